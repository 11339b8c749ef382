"""Reading checkpoints tensor by tensor, and writing one that is either whole or not there.

A source is a folder, a Hub id or a GGUF file. `Checkpoint` knows names, shapes and dtypes of its tensors before one of
them is read, so that a conversion fails before it writes; `atomic_folder` and `ShardWriter` take what it writes.
"""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from kermit_hf.checkpoints import incomplete_keys, listed


# Names of the weights without and with an index of shards, best first; everything else a checkpoint needs is small.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md")
# Files that go along unchanged.
KEPT_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# What makes a checkpoint a sentence encoder of the library sentence-transformers; `modules.json` names folders as well.
SENTENCE_MODULES = "modules.json"
SENTENCE_FILES = (SENTENCE_MODULES, "sentence_*_config.json", "config_sentence_transformers.json")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ConversionError(ValueError):
    """Why a conversion is refused or failed, and what to do about it."""


class Entry(NamedTuple):
    """A tensor that has not been read yet: its file, shape and dtype (None for one that no conversion takes)."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """The weights in a folder, as safetensors or `pytorch_model.bin`, in one file or many.

    `entries` maps names to `Entry`. Raises `ConversionError` where there are none, one of the files is missing or damaged.
    """

    gguf_file: str | None = None
    license: str | None = None  # what the weights' own file says

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def paths(self) -> list[Path]:
        for name in WEIGHT_FILES:
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                names = sorted(set(read_json(index).get("weight_map", {}).values()))
                if outside := [name for name in names if Path(name).name != name]:
                    raise ConversionError(
                        f"{index} names files outside its folder ({', '.join(outside)}); repair the index"
                    )
                if absent := [name for name in names if not (self.folder / name).is_file()]:
                    raise ConversionError(
                        f"{self.folder} lacks {', '.join(absent)}, which {index.name} names; copy or download it again"
                    )
                return [self.folder / name for name in names]
            if (path := self.folder / name).is_file():
                return [path]
        raise ConversionError(
            f"{self.folder} holds no weights; it needs model.safetensors or pytorch_model.bin, alone or in shards with "
            "their index, or name a GGUF file"
        )

    @cached_property
    def entries(self) -> dict[str, Entry]:
        return {name: entry for path in self.paths for name, entry in self._table(path).items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors, one file after the other; each is read when its turn comes."""
        for path in self.paths:
            with self._open(path) as file:
                for name in self._table(path):
                    yield name, file.get_tensor(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its name."""
        with self._open(self.entries[name].path) as file:
            return file.get_tensor(name)

    def _table(self, path: Path) -> dict[str, Entry]:
        with self._open(path) as file:
            if isinstance(file, _PickledFile):
                return {key: Entry(path, tuple(value.shape), value.dtype) for key, value in file.tensors.items()}
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            return {
                key: Entry(path, tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for key, part in slices.items()
            }

    @contextmanager
    def _open(self, path: Path):
        if path.suffix != ".safetensors":
            yield _PickledFile(path)
            return
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            lost = listed(incomplete_keys(path))
            raise ConversionError(f"{path} is damaged ({error}): it lacks {lost}; copy or download it again") from error
        with file:
            yield file


class TrainingCheckpoint(Checkpoint):
    """The weights in one file that a training script wrote with `torch.save`: a state dict, or one under
    `"model_state_dict"` beside the optimizer's and so on."""

    def __init__(self, path: Path):
        super().__init__(path.parent)
        self.paths = [path]


class _PickledFile:
    """A file of `torch.save` under the interface of `safe_open`: mapped into memory, and unpickled as tensors only."""

    def __init__(self, path: Path):
        try:
            # The format of before torch 1.6 cannot be mapped.
            mmap = zipfile.is_zipfile(path)
            self.tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except Exception as error:  # pickle, zip and torch each raise their own
            reason = str(error).splitlines()[0]
            raise ConversionError(
                f"{path} cannot be read as tensors alone ({reason}); it is damaged, or holds objects that are not loaded "
                "for safety: copy or download it again, or save it as safetensors"
            ) from error
        if not isinstance(self.tensors, dict):
            raise ConversionError(f"{path} holds a {type(self.tensors).__name__}; allowed is a state dict")
        if isinstance(state := self.tensors.get("model_state_dict"), dict):
            self.tensors = state
        others = [
            f"{key} ({type(value).__name__})" for key, value in self.tensors.items() if not torch.is_tensor(value)
        ]
        if others:
            raise ConversionError(f"{path} holds more than weights: {listed(others)}; save the state dict alone")

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].clone()  # safetensors takes no two names of one memory


class GGUFCheckpoint(Checkpoint):
    """The weights in a GGUF file, dequantised to float32 one at a time, under the names that transformers gives them.

    `model` is a model of the source's class, on the meta device, whose parameter names are wanted.
    """

    def __init__(self, path: Path, model: torch.nn.Module):
        super().__init__(path.parent)
        self.gguf_file, self.model = path.name, model

    @cached_property
    def reader(self):
        from gguf import GGUFReader

        path = self.folder / self.gguf_file
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise ConversionError(f"{path} is damaged ({error}); copy or download it again") from error
        # Both change the model's function, and transformers does not read them.
        scaling = [name for name in reader.fields if ".rope.scaling." in name]
        scaling += [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
        if scaling:
            raise ConversionError(
                f"{path} scales its rotary positions ({', '.join(scaling)}), which cannot be mapped from GGUF; convert the "
                "original safetensors checkpoint instead"
            )
        return reader

    @property
    def num_tokens(self) -> int:
        """Of the tokenizer in the file; transformers' own tokenizer may get some more, which no text contains."""
        tokens = self.reader.fields.get("tokenizer.ggml.tokens")
        return 0 if tokens is None else len(tokens.data)

    @property
    def license(self) -> str | None:
        field = self.reader.fields.get("general.license")
        return None if field is None else field.contents()

    @cached_property
    def _names(self) -> tuple[object, dict[str, str]]:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        # The file's own name for its architecture: Mistral's files call themselves llama, and are laid out like it.
        architecture = self.reader.fields["general.architecture"].contents()
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self.model.config.to_dict())
        return processor, get_gguf_hf_weights_map(self.model, processor, architecture)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        path, names = self.folder / self.gguf_file, self._names[1]
        return {
            names.get(tensor.name, tensor.name): Entry(path, tuple(map(int, reversed(tensor.shape))), torch.float32)
            for tensor in self.reader.tensors
        }

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in self.reader.tensors:
            yield self._names[1].get(tensor.name, tensor.name), self._dequantize(tensor)

    def read(self, name: str) -> torch.Tensor:
        return next(
            self._dequantize(tensor)
            for tensor in self.reader.tensors
            if self._names[1].get(tensor.name, tensor.name) == name
        )

    def _dequantize(self, tensor) -> torch.Tensor:
        from gguf import dequantize

        processor, names = self._names
        result = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters={"config": self.model.config.to_dict(), "tensors": {}},
        )
        return torch.from_numpy(result.weights.copy()).float()


def find_source(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder that a path or Hub id stands for, and the name of the GGUF file in it, if that is what was given.

    `source` may be a folder, a `.gguf` file, a Hub id, or a Hub id followed by the name of a `.gguf` file in it. Raises
    `ConversionError`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        others = sorted(path.glob("*.gguf"))
        if others and not (path / "config.json").is_file():
            raise ConversionError(f"{path} holds GGUF files; give the path of one, such as {others[0]}")
        return path.resolve(), None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConversionError(f"{path} is no folder; allowed are a folder, a Hub id, or a .gguf file")
        return path.resolve().parent, path.name
    repo_id, gguf_file = "/".join(source.split("/")[:2]), "/".join(source.split("/")[2:]) or None
    if source.startswith((".", "/", "~")) or (gguf_file and not gguf_file.endswith(".gguf")):
        raise ConversionError(f"{source} does not exist; give a folder, a .gguf file, or a Hub id such as user/name")
    try:
        if gguf_file:
            wanted = [gguf_file, "LICENSE*", "README.md"]
            folder = snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
            path = Path(folder, gguf_file)
            if not path.is_file():
                raise ConversionError(f"{repo_id} holds no file {gguf_file}; look it up on the Hub")
            return path.parent, path.name
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(SMALL_FILES))
        for name in WEIGHT_FILES:
            # Not all that ends like a weight file: a repository may hold the same weights twice.
            index = Path(folder, f"{name}.index.json")
            names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else [name]
            folder = snapshot_download(repo_id, revision=revision, allow_patterns=names)
            if Path(folder, names[0]).is_file():
                break
        if modules := sentence_modules(Path(folder)):
            patterns = [f"{name}/*" for name in modules]
            folder = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = str(error).strip().splitlines()[-1]
        raise ConversionError(
            f"{source} is no folder here, and the Hub did not give it ({reason}); check the name and the connection, and "
            "`hf auth login` for a private or gated repository"
        ) from error
    return Path(folder), None


def find_folder(source: str, revision: str | None = None, allowed: str = "a folder and a Hub id") -> Path:
    """`find_source` where a GGUF file is refused."""
    folder, gguf_file = find_source(source, revision)
    if gguf_file:
        raise ConversionError(f"{source} is a GGUF file; allowed are {allowed}")
    return folder


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist; is this folder a whole checkpoint?") from error
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object; copy or download it again")
    return content


def check_names(folder: Path, lost: list[str], unknown: list[str], cure: str) -> None:
    """`ConversionError` if the checkpoint in `folder` lacks weights (`lost`) or has some that are `unknown`; `cure` says what
    else to try than another copy."""
    lack = f"it lacks {listed(lost)}" if lost else ""
    excess = f"it holds {listed(unknown)}, which cannot be mapped" if unknown else ""
    if lack or excess:
        raise ConversionError(
            f"{folder} does not fit its config: {'; '.join(filter(None, (lack, excess)))}. Is it of another architecture, an "
            f"adapter, or not whole? Copy or download it again, or {cure}"
        )


def check_entry(
    name: str,
    entry: Entry,
    shape: torch.Size,
    config: PreTrainedConfig,
    change: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous,
) -> None:
    """`ConversionError` unless the tensor `name` has a dtype that can be mapped and, after `change`, the `shape` that the
    `config` makes it."""
    if entry.dtype is None or not entry.dtype.is_floating_point:
        raise ConversionError(
            f"{name} has a dtype that cannot be mapped; allowed are float32, float16, bfloat16: dequantise the source"
        )
    if change(torch.empty(entry.shape, device="meta")).shape != shape:
        raise ConversionError(
            f"{name} has shape {entry.shape}, but the config makes it {tuple(shape)}, with vocab_size={config.vocab_size} and "
            f"hidden_size={config.hidden_size}; repair config.json, or copy the checkpoint again"
        )


def sentence_modules(folder: Path) -> list[str]:
    """Folders of a sentence encoder's further modules (pooling, for one), below `folder`."""
    try:
        modules = json.loads((folder / SENTENCE_MODULES).read_text(encoding="utf-8"))
        names = [module["path"] for module in modules if module["path"]]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise ConversionError(
            f"{folder / SENTENCE_MODULES} is no list of modules; copy or download it again"
        ) from error
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise ConversionError(
            f"{folder / SENTENCE_MODULES} names folders that are not beside it ({', '.join(outside)}); repair it"
        )
    return names


def keep_files(source: Path, folder: Path) -> None:
    """Copies tokenizer, chat templates, generation config, licence and what belongs to a sentence encoder as they are."""
    modules = sentence_modules(source)
    for pattern in (*KEPT_FILES, *(SENTENCE_FILES if modules else ()), *modules):
        for path in sorted(source.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)


class ShardWriter:
    """Writes tensors in the order they come, `max_bytes` to a file, and at the end the index.

    Holds one file's tensors in memory.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total_bytes = self.total_parameters = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
            self._write()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes
        self.total_parameters += tensor.numel()

    def _write(self) -> None:
        path = self._path(len(self.shards))
        try:
            save_file(self.pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            # It turns an operating system's error into a sentence.
            if "os error 28" in str(error).lower() or "no space" in str(error).lower():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        self.shards.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def _path(self, index: int, total: str = "of-unknown") -> Path:
        return self.folder / f"model-{index + 1:05d}-{total}.safetensors"

    def finish(self) -> None:
        """Writes what is left, gives the files their names and, to more than one, the index."""
        if self.pending:
            self._write()
        if len(self.shards) == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self.shards):
            path = self._path(index, f"of-{len(self.shards):05d}")
            self._path(index).rename(path)
            weight_map |= dict.fromkeys(names, path.name)
        index = {
            "metadata": {"total_parameters": self.total_parameters, "total_size": self.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def check_output(output: Path, overwrite: bool, source: Path | None = None) -> None:
    """`ConversionError` unless `output` may be written: it is new, an empty folder, or a checkpoint to overwrite."""
    if source is not None and (output == source or output in source.parents):
        raise ConversionError(f"{output} holds the source, which is not overwritten; choose another output folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise ConversionError(f"{output} is a file; choose a folder")
    if not overwrite:
        raise ConversionError(f"{output} exists; choose another folder, or replace it with --overwrite")
    if not (output / "config.json").is_file():
        raise ConversionError(
            f"{output} is no checkpoint (it has no config.json), so it is not overwritten; choose another"
        )


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place when the block ends, and is gone if the block raises.

    Call `check_output` first: what is at `output` is replaced. SIGTERM ends the program as an exception would.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.parent / f".{output.name}.partial-{os.getpid()}"
        partial.mkdir()
    except OSError as error:
        raise ConversionError(f"{output} cannot be written ({error.strerror}); choose another output folder") from error
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if in_main_thread else None
    try:
        yield partial
        replaced = output.parent / f".{output.name}.replaced-{os.getpid()}"
        if output.exists():
            output.rename(replaced)
        try:
            partial.rename(output)
        except OSError:
            if replaced.exists():
                replaced.rename(output)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ConversionError(f"no space left in {output.parent}; free some, or choose a folder elsewhere") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def check_space(folder: Path, num_bytes: int) -> None:
    """`ConversionError` if `folder`'s disk has no room for `num_bytes`."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ConversionError(
            f"no space left in {folder}: the weights take {num_bytes / 2**20:,.0f} MiB, free are {free / 2**20:,.0f} MiB; "
            "free some, or choose a folder elsewhere"
        )


def check_login(repo_id: str) -> None:
    """`ConversionError` unless someone is logged in to the Hub: better known before a conversion than after."""
    try:
        HfApi().whoami()
    except (HfHubHTTPError, OSError) as error:
        raise ConversionError(f"cannot push to {repo_id} ({error}); log in with `hf auth login`") from error


def push_folder(folder: Path, repo_id: str, private: bool, message: str) -> str:
    """Uploads `folder`; the address of the repository. `ConversionError` if the Hub does not take it."""
    try:
        url = HfApi().create_repo(repo_id, exist_ok=True, private=private or None)
        HfApi().upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConversionError(
            f"{folder} is complete but was not pushed to {repo_id} ({error}); repeat with `hf upload {repo_id} {folder}`"
        ) from error
    return str(url)
