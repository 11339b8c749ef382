"""What must hold for every architecture of this repository that goes to the Hub and comes back.

A test module names its architecture in a subclass of `HubRoundTrip`; the tests are inherited.
"""

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from transformers import AutoConfig

from tests.hub_server import HubServer
from tests.hub_session import run_session


class HubRoundTrip:
    """The contract: whichever head is saved or pushed, all heads load from it where the package is not installed.

    `heads` maps the Auto classes to class names, the first of them to the base model; `code` names the files that the
    modeling file, the first of them, and the configuration file, the second of them, need, themselves included.
    """

    package: ClassVar[str]
    model_type: ClassVar[str]
    config: ClassVar[dict]  # of a small model, with the vocabulary and padding token of tests.hub_session
    config_class: ClassVar[str]
    heads: ClassVar[dict[str, str]]
    code: ClassVar[list[str]]
    pushed_heads: ClassVar[list[str]]  # the Auto classes of the pushed heads whose round trip is made

    @pytest.fixture(scope="class")
    @classmethod
    def hub(cls) -> Iterator[HubServer]:
        """The Hub that the tests of one class share."""
        with HubServer() as hub:
            yield hub

    @pytest.fixture(scope="class")
    @classmethod
    def pushed(cls, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
        """Pushes one model of every head to a repository of its own; what was pushed, by Auto class."""
        steps = [
            {
                "do": "push",
                "package": cls.package,
                "model_type": cls.model_type,
                "config": cls.config,
                "auto_class": auto_class,
                "repo_id": cls.repo_id(auto_class),
                "message": "First",
                "seed": seed,
            }
            for seed, auto_class in enumerate(cls.heads)
        ]
        folder = tmp_path_factory.mktemp("push")
        return dict(zip(cls.heads, run_session(steps, hub.environment(folder / "home"), folder), strict=True))

    @classmethod
    def repo_id(cls, auto_class: str) -> str:
        """The repository in which the head of an Auto class is pushed."""
        return f"team/{cls.model_type}-{auto_class}"

    def auto_map(self) -> dict[str, str]:
        """The `auto_map` that every saved config has."""
        modeling, configuration = (Path(name).stem for name in self.code[:2])
        heads = {auto_class: f"{modeling}.{name}" for auto_class, name in self.heads.items()}
        return heads | {"AutoConfig": f"{configuration}.{self.config_class}"}

    def assert_complete(self, files: dict[str, bytes]) -> None:
        """A saved or pushed model holds its weights, its code as it stands in the package and the whole auto map."""
        assert "model.safetensors" in files
        assert sorted(name for name in files if name.endswith(".py")) == sorted(self.code)
        package = Path(inspect.getfile(importlib.import_module(self.package))).parent
        for name in self.code:
            assert files[name] == (package / name).read_bytes(), name
        assert json.loads(files["config.json"])["auto_map"] == self.auto_map()

    def test_saved_folders_hold_the_code_and_name_all_heads(self, tmp_path: Path) -> None:
        """Whichever head is saved."""
        importlib.import_module(self.package)
        for auto_class, name in self.heads.items():
            config = AutoConfig.for_model(self.model_type, **self.config)
            model = getattr(transformers, auto_class).from_config(config)
            model.save_pretrained(tmp_path / name)
            self.assert_complete(read_folder(tmp_path / name))

    def test_a_config_saved_alone_names_no_missing_file(self, tmp_path: Path) -> None:
        """A folder without weights has the code of the config, and an auto map that names nothing else."""
        importlib.import_module(self.package)
        AutoConfig.for_model(self.model_type, **self.config).save_pretrained(tmp_path)
        files = read_folder(tmp_path)
        auto_map = json.loads(files["config.json"])["auto_map"]
        assert auto_map == {"AutoConfig": self.auto_map()["AutoConfig"]}
        assert self.code[1] in files and self.code[0] not in files

    def test_pushed_repositories_are_complete(self, hub: HubServer, pushed: dict[str, dict]) -> None:
        """As saved folders are, with a model card and the message of the commit."""
        for auto_class in self.heads:
            files = hub.files(self.repo_id(auto_class))
            self.assert_complete(files)
            assert {"README.md", "tokenizer.json"} <= files.keys()
            assert hub.messages(self.repo_id(auto_class)) == ["initial commit", "First", "Upload tokenizer"]

    def test_any_head_loads_without_the_package(self, hub: HubServer, pushed: dict[str, dict], tmp_path: Path) -> None:
        """The pushed head is the same model, the others have its backbone, and the pushed code builds all of them."""
        sources = [self.repo_id(auto_class) for auto_class in self.pushed_heads]
        steps = [{"do": "load_config", "source": source} for source in sources]
        steps += [{"do": "load", "source": source, "auto_classes": list(self.heads)} for source in sources]
        loaded = run_session(steps, hub.environment(tmp_path / "home"), tmp_path, without=self.package)
        configs, models_of_heads = loaded[: len(sources)], loaded[len(sources) :]
        for auto_class, config, models in zip(self.pushed_heads, configs, models_of_heads, strict=True):
            assert config["class"] == self.config_class
            assert config["module"].startswith("transformers_modules.")
            assert auto_class in config["module"]
            assert_same_model(models[auto_class], pushed[auto_class])
            for name, model in models.items():
                assert model["class"] == self.heads[name]
                assert model["module"].startswith("transformers_modules.")
                assert_same_backbone(model, pushed[auto_class])

    def test_models_from_the_hub_are_saved_and_pushed_again(
        self, hub: HubServer, pushed: dict[str, dict], tmp_path: Path
    ) -> None:
        """Remote code saves itself: an update of the same repository, the backbone alone in another one.

        Old and new state then load side by side in one process, and from a folder as from the Hub.
        """
        auto_class, base = self.pushed_heads[0], next(iter(self.heads))
        source, backbone = f"team/{self.model_type}-updated", f"team/{self.model_type}-backbone"
        first = hub.duplicate(self.repo_id(auto_class), source)
        again = {"do": "load_and_push", "source": source, "auto_class": auto_class}
        steps = [
            again | {"repo_id": backbone, "message": "Backbone", "part": pushed[auto_class]["base_model_prefix"]},
            again | {"repo_id": source, "message": "Second", "scale": 0.5},
            {"do": "load_revisions", "source": source, "auto_class": auto_class, "revisions": [first, "main"]},
            {"do": "load", "source": backbone, "auto_classes": [base]},
            # The folder that the second step saved: local folders have their own way to load code.
            {"do": "load", "source": f"saved-{source.split('/')[1]}", "auto_classes": [base, auto_class]},
        ]
        folder = tmp_path / "session"
        part, second, revisions, from_backbone, from_folder = run_session(
            steps, hub.environment(tmp_path / "home"), folder, without=self.package
        )
        assert hub.messages(source) == ["initial commit", "First", "Upload tokenizer", "Second"]
        for repo_id in (source, backbone):
            self.assert_complete(hub.files(repo_id))
        assert_same_model(revisions[first], pushed[auto_class])
        assert_same_model(revisions["main"], second)
        assert_same_model(from_backbone[base], part)
        assert_same_model(from_folder[auto_class], second)
        assert_same_backbone(from_folder[base], second)


class GenerativeHubRoundTrip(HubRoundTrip):
    """For architectures that generate: the text-generation pipeline needs nothing but the name of a repository."""

    def test_the_pipeline_generates(self, hub: HubServer, pushed: dict[str, dict], tmp_path: Path) -> None:
        """Tokenizer, config, weights and code all come from the Hub; a padded batch gives each prompt's own text."""
        prompts = ["the state of the union", "of"]
        step = {"do": "generate_text", "source": self.repo_id("AutoModelForCausalLM"), "prompts": prompts}
        (texts,) = run_session([step], hub.environment(tmp_path / "home"), tmp_path, without=self.package)
        assert all(
            text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True)
        )


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_same_model(loaded: dict, pushed: dict) -> None:
    """Two descriptions agree in class, weights, outputs and generated ids.

    The weights to the bit; the outputs to the rounding that another alignment of the same data in memory brings.
    """
    assert loaded["class"] == pushed["class"]
    assert loaded["state"].keys() == pushed["state"].keys()
    for name, tensor in pushed["state"].items():
        assert torch.equal(loaded["state"][name], tensor), name
    torch.testing.assert_close(loaded["outputs"], pushed["outputs"], rtol=1e-5, atol=1e-6)
    if pushed["generated"] is not None:
        assert loaded["generated"].tolist() == pushed["generated"].tolist()


def assert_same_backbone(loaded: dict, pushed: dict) -> None:
    """Two heads of one checkpoint hold the same backbone."""
    loaded, pushed = backbone(loaded), backbone(pushed)
    assert loaded.keys() == pushed.keys()
    for name, tensor in pushed.items():
        assert torch.equal(loaded[name], tensor), name


def backbone(model: dict) -> dict[str, torch.Tensor]:
    """The weights of a described model that belong to its base model, under the names they have there."""
    prefix = f"{model['base_model_prefix']}."
    inner = {name.removeprefix(prefix): tensor for name, tensor in model["state"].items() if name.startswith(prefix)}
    return inner or model["state"]  # a base model is its own backbone
