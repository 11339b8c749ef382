"""What people do with models on the Hub, as steps of sessions that each run in a fresh interpreter.

Imported by a test, `run_session` starts an interpreter on this very file and brings back what its steps returned. The
interpreter reads the Hub's address from its environment, and can be told that a package does not exist, however that
package is installed: this is how the code pushed along with a model is proved to be complete.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast


# Two rows of byte-level token ids, the second one left-padded.
PAD = 0
INPUT_IDS = torch.tensor([[34, 45, 56, 67, 78, 89, 90, 12, 23, 31], [PAD, PAD, PAD, 77, 66, 55, 44, 33, 22, 11]])
VOCABULARY = 300  # enough for the padding token, the 256 bytes and a few merges


def run_session(steps: list[dict], environment: dict[str, str], folder: Path, *, without: str | None = None) -> list:
    """Run `steps` one after the other in a fresh interpreter and return what each of them returned.

    A step is `{"do": name of a function below, **its arguments}`. `folder` holds the result and is where the session
    runs; `without` names a package the session cannot import.
    """
    folder.mkdir(parents=True, exist_ok=True)
    repository = Path(__file__).resolve().parents[1]
    request = {"steps": steps, "path": None if without else str(repository), "without": without}
    if without:
        # Kernels in C++ come with the package alone, and who names them where they are not gets an error.
        named = {name for name, value in environment.items() if name.endswith("_BACKEND") and value == "cpp"}
        environment = {name: value for name, value in environment.items() if name not in named}
    # -I: neither the current folder nor this file's nor PYTHONPATH can make a package importable.
    session = subprocess.run(
        [sys.executable, "-I", __file__, json.dumps(request)],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert session.returncode == 0, f"session failed:\n{session.stdout}\n{session.stderr}"
    return torch.load(folder / "results.pt")


def push(package: str, model_type: str, config: dict, auto_class: str, repo_id: str, message: str, seed: int) -> dict:
    """Build a random model of an installed package and push it with a tokenizer; returns `describe` of it."""
    __import__(package)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **config)
    model = getattr(transformers, auto_class).from_config(config).eval()
    model.push_to_hub(repo_id, commit_message=message)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level_bpe(), pad_token="<pad>", padding_side="left")
    tokenizer.push_to_hub(repo_id)
    return describe(model)


def load(source: str, auto_classes: list[str]) -> dict[str, dict]:
    """Load `source`, a repository or a folder, through each of the Auto classes; returns `describe` of each by name.

    All models are loaded before the first one runs: code from several sources has to live side by side.
    """
    models = {name: _load(source, name).eval() for name in auto_classes}
    return {name: describe(model) for name, model in models.items()}


def load_revisions(source: str, auto_class: str, revisions: list[str]) -> dict[str, dict]:
    """Load several states of one repository into one process before the first one runs; `describe` by revision."""
    models = {revision: _load(source, auto_class, revision).eval() for revision in revisions}
    return {revision: describe(model) for revision, model in models.items()}


def load_config(source: str) -> dict:
    """The configuration alone, as a dict, with the module and name of its class."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    return {"class": type(config).__name__, "module": type(config).__module__, "config": config.to_dict()}


def load_and_push(
    source: str, auto_class: str, repo_id: str, message: str, part: str | None = None, scale: float = 1.0
) -> dict:
    """Load a model, multiply its weights by `scale` and push it, or the submodel `part` of it; returns `describe`.

    Goes through `save_pretrained(push_to_hub=True)`, which uploads what it sees appear in a folder.
    """
    model = _load(source, auto_class).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    model = model.get_submodule(part) if part else model
    model.save_pretrained(f"saved-{repo_id.split('/')[-1]}", push_to_hub=True, repo_id=repo_id, commit_message=message)
    return describe(model)


def generate_text(source: str, prompts: list[str]) -> list[str]:
    """Greedy continuations by the text-generation pipeline, from the name of the repository alone."""
    generator = transformers.pipeline("text-generation", model=source, trust_remote_code=True)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = [rows[0]["generated_text"] for rows in generator(prompts, batch_size=len(prompts), **options)]
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert together == alone
    return together


def _byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the state of the union"], trainer)
    return tokenizer


def _load(source: str, auto_class: str, revision: str | None = None) -> PreTrainedModel:
    return getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True, revision=revision)


@torch.no_grad()
def describe(model: PreTrainedModel) -> dict:
    """Class, module, state dict, outputs on `INPUT_IDS` and, of a model that can, generated ids."""
    inputs = {"input_ids": INPUT_IDS, "attention_mask": (INPUT_IDS != PAD).long()}
    generated = None
    if model.can_generate():
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    if "MultipleChoice" in type(model).__name__:
        inputs = {name: torch.stack([value, value.flip(1)], dim=1) for name, value in inputs.items()}
    outputs = model(**inputs)
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "base_model_prefix": model.base_model_prefix,
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "outputs": {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)},
        "generated": generated,
    }


class _Absent(MetaPathFinder):
    """Makes `import package` fail as it does where the package is not installed."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name: str, path: Iterable[str] | None = None, target: object = None) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    """Run the steps given as JSON and leave what they return in `results.pt`."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    if request["path"]:
        sys.path.insert(0, request["path"])
    if request["without"]:
        sys.meta_path.insert(0, _Absent(request["without"]))
    torch.save([globals()[step.pop("do")](**step) for step in request["steps"]], "results.pt")


if __name__ == "__main__":
    main()
