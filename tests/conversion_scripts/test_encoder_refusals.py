"""What both encoder scripts refuse, each with a clear error and nothing left; and what becomes of the output folder."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from conversion_scripts import (
    checkpoint_files,
    companions,
    convert_bert_to_nystromformer,
    convert_nystromformer,
    encoder_weights,
)
from conversion_scripts.checkpoint_files import ConversionError
from tests.conversion_scripts.encoder_checkpoints import load, outputs, save_checkpoint
from tests.conversion_scripts.helpers import REPOSITORY, edit_json, edit_weights
from tests.conversion_scripts.llama_checkpoints import VOCABULARY


# Each direction: the kind of source, and the arguments of its conversion.
DIRECTIONS = {
    "bert": (convert_bert_to_nystromformer, {}),
    "roberta": (convert_bert_to_nystromformer, {}),
    "nystromformer": (convert_nystromformer, {}),
    "nystromformer_hf": (convert_nystromformer, {"to": "nystromformer"}),
}


class Conversion:
    """One direction, from a checkpoint with a language model head in `source`."""

    def __init__(self, family: str, folder: Path):
        self.family, (self.script, self.arguments) = family, DIRECTIONS[family]
        self.source, self.output = folder / "source", folder / "output"
        self.prefix = "roberta." if family == "roberta" else "bert." if family == "bert" else "nystromformer."

    def save(self, **options) -> None:
        self.model = save_checkpoint(self.source, self.family, "masked-lm", **options)

    def run(self, output: Path | None = None, **arguments) -> float | None:
        return self.script.convert(str(self.source), output or self.output, **self.arguments, **arguments)

    def assert_refused(self, match: str, output: Path | None = None, **arguments) -> None:
        before = sorted(self.output.parent.iterdir())
        with pytest.raises(ConversionError, match=match):
            self.run(output, **arguments)
        assert sorted(self.output.parent.iterdir()) == before

    def assert_output_is_whole(self) -> None:
        converted = load(self.output, "masked-lm")
        prompt = torch.randint(
            2, VOCABULARY, (1, 16)
        )  # as many tokens as landmarks, at most: exact everywhere but in-tree
        if "nystromformer" in self.family:
            prompt = torch.randint(2, VOCABULARY, (1, 64 if self.family == "nystromformer" else 128))
        torch.testing.assert_close(outputs(converted, prompt), outputs(self.model, prompt), atol=1e-4, rtol=0)


@pytest.fixture(params=DIRECTIONS)
def conversion(request, tmp_path) -> Conversion:
    result = Conversion(request.param, tmp_path)
    result.save()
    return result


class TestDamagedSources:
    @pytest.mark.parametrize("shard", ["1GB", "10KB"])
    @pytest.mark.parametrize("left", [0.6, 0.0005])
    def test_truncated_file(self, left, shard, conversion):
        shutil.rmtree(conversion.source)
        conversion.save(shard=shard)
        path = sorted(conversion.source.glob("*.safetensors"))[-1]
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
        conversion.assert_refused(f"{path.name} is damaged.*it lacks .*download it again")

    def test_missing_shard(self, conversion):
        shutil.rmtree(conversion.source)
        conversion.save(shard="10KB")
        path = sorted(conversion.source.glob("*.safetensors"))[1]
        path.unlink()
        conversion.assert_refused(f"lacks {path.name}")

    def test_pickle_that_is_truncated_or_runs_code(self, conversion, tmp_path):
        path = conversion.source / "pytorch_model.bin"
        torch.save(load_file(conversion.source / "model.safetensors"), path)
        (conversion.source / "model.safetensors").unlink()
        conversion.run()
        shutil.rmtree(conversion.output)
        path.write_bytes(path.read_bytes()[:5000])
        conversion.assert_refused("pytorch_model.bin cannot be read.*copy or download it again")

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "evil"),)

        torch.save({"embeddings.word_embeddings.weight": Evil()}, path)
        conversion.assert_refused("pytorch_model.bin cannot be read as tensors alone")
        assert not (tmp_path / "evil").exists()

    def test_no_weights_and_no_config(self, conversion):
        (conversion.source / "model.safetensors").unlink()
        conversion.assert_refused("holds no weights")
        (conversion.source / "config.json").write_text("{")
        conversion.assert_refused("config.json is no JSON")
        (conversion.source / "config.json").unlink()
        conversion.assert_refused("config.json does not exist")

    @pytest.mark.parametrize("ending", ["encoder.layer.1.attention.self.key.bias", "embeddings.word_embeddings.weight"])
    def test_missing_key(self, ending, conversion):
        name = conversion.prefix + ending
        edit_weights(conversion.source, lambda weights: weights.pop(name))
        conversion.assert_refused(f"lacks {name}")

    def test_key_that_has_no_place(self, conversion):
        name = conversion.prefix + "encoder.layer.0.attention.self.distance_embedding.weight"
        edit_weights(conversion.source, lambda weights: weights.update({name: torch.ones(4)}))
        conversion.assert_refused(f"holds {name}, which cannot be mapped")

    def test_shape_that_is_not_the_configs(self, conversion):
        edit_json(conversion.source / "config.json", intermediate_size=64)
        conversion.assert_refused(r"intermediate\.dense\.\w+ has shape .*, but the config makes it")

    def test_quantised_weights(self, conversion):
        name = conversion.prefix + "encoder.layer.0.output.dense.weight"
        change = {name: torch.ones(32, 48, dtype=torch.float8_e4m3fn)}
        edit_weights(conversion.source, lambda weights: weights.update(change))
        conversion.assert_refused(f"{name} has a dtype that cannot be mapped")
        edit_json(conversion.source / "config.json", quantization_config={"quant_method": "fp8"})
        conversion.assert_refused("quantization_config")

    @pytest.mark.parametrize("model_type", ["gpt2", "distilbert", "kermit", "of-nowhere", None])
    def test_other_architectures(self, model_type, conversion):
        edit_json(conversion.source / "config.json", model_type=model_type)
        conversion.assert_refused(f"model_type={model_type!r}.*allowed are")

    def test_config_that_cannot_be_read(self, conversion):
        edit_json(conversion.source / "config.json", hidden_size="wide")
        conversion.assert_refused("config.json cannot be read.*hidden_size")


class TestVocabulary:
    def test_of_config_and_weights(self, conversion):
        edit_json(conversion.source / "config.json", vocab_size=VOCABULARY + 1)
        conversion.assert_refused(r"has shape .*300.*vocab_size=301")

    def test_of_tokenizer(self, conversion):
        tokenizer = AutoTokenizer.from_pretrained(conversion.source)
        tokenizer.add_tokens([f"<extra_{index}>" for index in range(VOCABULARY)])
        tokenizer.save_pretrained(conversion.source)
        conversion.assert_refused(r"tokenizer has \d+ tokens, but the config has vocab_size=300")

    def test_special_token_outside_of_it(self, conversion):
        edit_json(conversion.source / "config.json", eos_token_id=VOCABULARY)
        conversion.assert_refused("eos_token_id=300 lies outside")

    def test_damaged_tokenizer(self, conversion):
        (conversion.source / "tokenizer.json").write_text("{}")
        conversion.assert_refused("the tokenizer of .* cannot be read")


class TestOutput:
    def test_too_little_space(self, conversion, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        conversion.assert_refused("no space left in .*free some")

    @pytest.mark.parametrize("function", ["save_file", "keep_files"])
    def test_space_that_runs_out(self, function, conversion, monkeypatch):
        def full(*arguments, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint_files if function == "save_file" else companions, function, full)
        conversion.assert_refused("no space left in .*free some")

    def test_existing_folder_is_kept_unless_it_may_be_overwritten(self, conversion):
        conversion.output.mkdir()
        conversion.run(verify=None)  # empty
        (conversion.output / "mine.txt").write_text("")
        conversion.assert_refused("exists.*--overwrite")
        edit_weights(conversion.source, lambda weights: weights.pop(next(iter(weights))))
        conversion.assert_refused("lacks", overwrite=True)
        conversion.assert_output_is_whole()
        assert (conversion.output / "mine.txt").exists()
        conversion.assert_refused("holds the source", output=conversion.source, overwrite=True)

    def test_overwriting(self, conversion):
        conversion.output.mkdir()
        (conversion.output / "config.json").write_text("{}")
        (conversion.output / "mine.txt").write_text("")
        conversion.run(overwrite=True)
        conversion.assert_output_is_whole()
        assert not (conversion.output / "mine.txt").exists()

    def test_a_result_that_differs_is_not_kept(self, conversion, monkeypatch):
        extend = encoder_weights.extend_positions
        monkeypatch.setattr(conversion.script, "extend_positions", lambda table, **a: extend(table, **a).flip(0))
        conversion.assert_refused("the result is not the original.*tolerance 1.0e-03")

    def test_memory_is_bounded_by_a_shard(self, conversion, monkeypatch):
        """What the writer holds never exceeds a shard, and nothing else holds tensors."""
        held, add = [], checkpoint_files.ShardWriter.add

        def watched(self, name, tensor):
            add(self, name, tensor)
            held.append(sum(tensor.nbytes for tensor in self.pending.values()))

        monkeypatch.setattr(encoder_weights.ShardWriter, "add", watched)
        conversion.run(max_shard_bytes=50_000, verify=None)
        assert max(held) <= 50_000
        assert len(list(conversion.output.glob("model-*.safetensors"))) > 1
        conversion.assert_output_is_whole()


def test_cut_off_it_leaves_nothing(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    save_checkpoint(source, "bert")
    code = (
        "import sys, time\nfrom conversion_scripts import convert_bert_to_nystromformer as script\n"
        "script.compare = lambda *arguments: (print('waiting', flush=True), time.sleep(60))\n"
        "script.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, str(source), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment) as process:
        assert any("waiting" in line for line in iter(process.stdout.readline, ""))
        assert [path for path in tmp_path.iterdir() if ".partial-" in path.name]
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == [source]
