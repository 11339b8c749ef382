"""Llama-shaped checkpoints come out with the same function, whole or not at all."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from conversion_scripts import cards, checkpoint_files, companions, convert_llama
from conversion_scripts.card_facts import read_facts
from conversion_scripts.cards import CardOptions, check_card
from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.convert_llama import TARGETS, attention_settings, convert, main, make_parser
from tests.conversion_scripts.helpers import REPOSITORY, edit_json, edit_weights, run_script
from tests.conversion_scripts.llama_checkpoints import CHAT_TEMPLATE, VOCABULARY, save_checkpoint
from tests.hub_server import HubServer
from tests.hub_session import INPUT_IDS, run_session


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Two float32 evaluations of the same function; the logits are of size 10.
PARITY = 1e-4
# A prompt of 24 tokens is inside both: exact attention.
WINDOW = {"kermit": {"window_size": 24}, "nystromformer_hf_decoder": {"segment_size": 8}}


@torch.no_grad()
def difference(model, folder: Path, length: int = 24, **kwargs) -> float:
    prompt = torch.randint(VOCABULARY, (2, length))
    converted = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    return float((model(prompt).logits - converted(prompt).logits).abs().max())


def assert_refused(match: str, source: Path, output: Path, to: str = "kermit", **arguments) -> None:
    """The message matches, and the folder of the output holds nothing that was not there before."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(ConversionError, match=match):
        convert(str(source), output, to, **arguments)
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_original(family, tied, to, source, output):
    model = save_checkpoint(source, family, tie_word_embeddings=tied)
    assert convert(str(source), output, to, WINDOW[to]) < PARITY
    assert difference(model, output) < PARITY


@pytest.mark.parametrize("to", TARGETS)
def test_further_biases_and_their_absence(to, source, output):
    model = save_checkpoint(source, attention_bias=True, mlp_bias=True, num_key_value_heads=4)
    convert(str(source), output, to, WINDOW[to], verify=None)
    assert difference(model, output) < PARITY
    assert AutoConfig.from_pretrained(output).attention_output_bias


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 5e5,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_rope_scaling_goes_along(rope_parameters, to, source, output):
    model = save_checkpoint(source, rope_parameters=rope_parameters)
    convert(str(source), output, to, WINDOW[to], verify=None)
    assert difference(model, output) < PARITY
    assert AutoConfig.from_pretrained(output).rope_parameters == rope_parameters


def test_rope_scaling_of_older_configs(source, output):
    model = save_checkpoint(source, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4})
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (source / "config.json").write_text(json.dumps(config))
    convert(str(source), output, "kermit")
    assert difference(model, output) < PARITY


@pytest.mark.parametrize("to", TARGETS)
def test_shards_dtype_and_every_bit_are_kept(to, source, output):
    model = save_checkpoint(source, "qwen2", dtype=torch.bfloat16, shard="10KB", tie_word_embeddings=True)
    assert len(list(source.glob("model-*.safetensors"))) > 3
    # Whatever the dtype of the weights, compared in float32.
    assert convert(str(source), output, to, WINDOW[to], max_shard_bytes=20_000) < PARITY
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(output.glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in shards]
    assert all(re.fullmatch(rf"model-\d{{5}}-of-{len(shards):05d}\.safetensors", path.name) for path in shards)
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in shards for tensor in load_file(path).values()
    )
    # The embedding alone is as large as a shard may be.
    assert all(path.stat().st_size < 25_000 for path in shards)
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    converted = AutoModelForCausalLM.from_pretrained(output)
    assert converted.dtype == torch.bfloat16
    state = converted.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("verify", ["bfloat16", "float16"])
def test_verification_in_half_precision(verify, source, output):
    save_checkpoint(source, dtype=torch.bfloat16)
    assert 0 < convert(str(source), output, "kermit", verify=verify) < 1.0


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickled_weights(zipped, source, output):
    model = save_checkpoint(source)
    weights = load_file(source / "model.safetensors")
    # One memory under two names, which safetensors does not take.
    model.lm_head.weight = model.model.embed_tokens.weight
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (source / "model.safetensors").unlink()
    convert(str(source), output, "kermit", verify=None)
    assert difference(model, output) < PARITY


def test_weights_of_the_body_alone(source, output):
    model = save_checkpoint(source, tie_word_embeddings=True)
    model.model.save_pretrained(source)
    assert "embed_tokens.weight" in load_file(source / "model.safetensors")
    convert(str(source), output, "kermit")
    assert difference(model, output) < PARITY


def test_superfluous_tensors_of_older_checkpoints(source, output):
    model = save_checkpoint(source, tie_word_embeddings=True)

    def change(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_weights(source, change)
    convert(str(source), output, "kermit")
    assert difference(model, output) < PARITY
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


def test_tokenizer_chat_template_generation_config_and_licence_are_kept(source, output):
    save_checkpoint(source)
    (source / "LICENSE").write_text("Ours.")
    convert(str(source), output, "kermit", verify=None)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = "the state of the union 1,234"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(source)(text).input_ids
    generation = GenerationConfig.from_pretrained(output)
    assert (generation.do_sample, generation.temperature, generation.top_k) == (True, 0.3, 7)


class TestCard:
    @pytest.mark.parametrize("to", TARGETS)
    def test_it_says_what_was_done(self, to, source, output):
        save_checkpoint(source)
        (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# The original")
        difference = convert(str(source), output, to, WINDOW[to], card=CardOptions(command="python -m this --way"))
        facts = read_facts(output)
        assert facts.license == "mit"
        assert facts.settings.keys() == attention_settings(TARGETS[to].config_class).keys()
        config = AutoConfig.from_pretrained(output)
        assert all(getattr(config, name) == value for name, value in facts.settings.items())
        parity = facts.stages[0].parity
        assert (parity.difference, parity.tokens, parity.dtype) == (difference, 28 if "nys" in to else 24, "float32")
        card = check_card(output)
        assert card.data.license == "mit"
        assert card.data.base_model is None  # a folder has no name on the Hub
        assert card.data.eval_results is None
        assert f"| {difference:.1e} | 1.0e-03 |" in card.text
        assert "python -m this --way" in card.text
        assert str(source.parent) not in card.text
        assert "The original" not in card.text

    @pytest.mark.parametrize("to", TARGETS)
    def test_its_code_runs(self, to, source, output, monkeypatch):
        save_checkpoint(source)
        convert(str(source), output, to, verify=None)
        monkeypatch.chdir(output.parent)
        blocks = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            variables = {}
            exec(block, variables)
            assert type(variables["model"]).__name__ == TARGETS[to].model_class.__name__

    def test_what_was_not_compared_has_no_parity(self, source, output):
        save_checkpoint(source)
        convert(str(source), output, "kermit", verify=None)
        assert "## Parity" not in (output / "README.md").read_text()
        assert read_facts(output).stages[0].parity is None

    def test_start_of_the_far_field(self, source, output):
        save_checkpoint(source)
        convert(str(source), output, "kermit", far_bias=-7.5, seed=3, verify=None)
        text = (output / "README.md").read_text()
        assert "a bias of -7.5" in text
        assert re.search(r"\b12 tensors that the source lacks start as in a new model, seed 3", text)
        full = {"layer_types": ["full_attention"] * 2}
        convert(str(source), output, "kermit", full, verify=None, overwrite=True)
        assert not re.search("a bias of|the source lacks", (output / "README.md").read_text())

    def test_what_the_user_says_of_it(self, source, output):
        save_checkpoint(source)
        said = []
        card = CardOptions(license="gemma", base_model="someone/original", model_id="me/ours")
        convert(str(source), output, "kermit", verify=None, say=said.append, card=card)
        card = check_card(output)
        assert (card.data.license, card.data.base_model) == ("gemma", "someone/original")
        assert card.text.startswith("\n# me/ours\n")
        assert not [line for line in said if line.startswith("license")]

    def test_license_that_nobody_knows(self, source, output):
        save_checkpoint(source)
        said = []
        convert(str(source), output, "kermit", verify=None, say=said.append)
        assert [line for line in said if "name it with --license" in line]
        assert check_card(output).data.license is None

    def test_refusals(self, source, output, monkeypatch):
        save_checkpoint(source)
        assert_refused("--license mine is no licence", source, output, card=CardOptions(license="mine"))
        assert_refused("--base-model a/b/c is no Hub id", source, output, card=CardOptions(base_model="a/b/c"))
        monkeypatch.setattr(cards, "TEMPLATES", output / "nowhere")
        assert_refused("copy the folder model_cards", source, output)


def test_tokenizer_that_does_not_name_its_class(source, output):
    save_checkpoint(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    convert(str(source), output, "kermit", verify=None)
    text = "the state of the union 1,234"
    expected = AutoTokenizer.from_pretrained(source)(text).input_ids
    assert AutoTokenizer.from_pretrained(output)(text).input_ids == expected


def test_no_tokenizer_and_no_generation_config(source, output):
    save_checkpoint(source)
    for path in [*source.glob("tokenizer*"), *source.glob("chat*"), source / "generation_config.json"]:
        path.unlink()
    convert(str(source), output, "kermit", verify=None)
    assert GenerationConfig.from_pretrained(output).eos_token_id == 1


@pytest.mark.parametrize("to", TARGETS)
def test_loads_where_the_packages_are_not_installed(to, source, output, tmp_path):
    model = save_checkpoint(source)
    convert(str(source), output, to, WINDOW[to], verify=None)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    steps = [{"do": "load", "source": str(output), "auto_classes": ["AutoModelForCausalLM"]}]
    package = TARGETS[to].modeling.__name__.split(".")[0]
    loaded = run_session(steps, environment, tmp_path / "session", without=package)[0]["AutoModelForCausalLM"]
    with torch.no_grad():
        expected = model(INPUT_IDS[:1]).logits
    torch.testing.assert_close(loaded["outputs"]["logits"][:1], expected, atol=PARITY, rtol=0)


def test_new_weights_are_the_same_every_time_and_follow_the_seed(source, tmp_path):
    save_checkpoint(source)
    settings = {"update_rule": "additive", "feature_map": "taylor", "feature_dim": 4, "forget_gate": True}
    weights = {}
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        torch.manual_seed(len(name))
        convert(str(source), tmp_path / name, "kermit", settings, seed=seed, verify=None)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert all(torch.equal(tensor, weights["second"][name]) for name, tensor in weights["first"].items())
    changed = {name for name, tensor in weights["first"].items() if not torch.equal(tensor, weights["other"][name])}
    kinds = {name.split("self_attn.")[-1] for name in changed}
    assert kinds == {"feature_map.query_projection", "feature_map.key_projection", "forget_proj.weight"}


@pytest.mark.parametrize("feature_map", ["elu", "favor", "taylor", "hedgehog"])
def test_far_field_starts_closed(feature_map, source, output):
    """Beyond the window the model is its own near field: another memory makes no difference."""
    save_checkpoint(source)
    settings = {"update_rule": "additive", "feature_map": feature_map, "window_size": 8}
    convert(str(source), output, "kermit", settings, verify=None)
    model = AutoModelForCausalLM.from_pretrained(output)
    prompt = torch.randint(VOCABULARY, (1, 64))
    with torch.no_grad():
        logits = model(prompt).logits
        for name, parameter in model.named_parameters():
            if name.endswith("far_bias"):
                assert bool((parameter == convert_llama.FAR_BIAS).all())
                parameter.fill_(-1e4)
        closed = model(prompt).logits
        for name, parameter in model.named_parameters():
            if name.endswith("far_bias"):
                parameter.fill_(0.0)
        opened = model(prompt).logits
    # e^-10 of the near field's weight, times the kernel's own estimate of a few tens of tokens.
    assert (logits - closed).abs().max() < 0.05 * (opened - closed).abs().max()


def test_layers_that_stay_softmax(source, output):
    model = save_checkpoint(source)
    settings = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 24}
    assert convert(str(source), output, "kermit", settings) < PARITY
    assert difference(model, output) < PARITY
    assert not [name for name in load_file(output / "model.safetensors") if "far_bias" in name]


def test_settings_without_exact_attention_are_not_verified(source, output):
    save_checkpoint(source)
    said = []
    assert convert(str(source), output, "kermit", {"window_size": 0}, say=said.append) is None
    assert "not verified" in said[-1]
    assert AutoConfig.from_pretrained(output).window_size == 0


class TestSlidingWindows:
    def test_mistral_within_its_window(self, source, output):
        model = save_checkpoint(source, "mistral", sliding_window=24)
        assert convert(str(source), output, "kermit", {"window_size": 24}) < PARITY
        assert difference(model, output) < PARITY

    def test_mistral_with_its_window_is_itself_at_any_length(self, source, output):
        model = save_checkpoint(source, "mistral", sliding_window=8)
        convert(str(source), output, "kermit", {"window_size": 8, "layer_types": ["sliding_attention"] * 2})
        assert difference(model, output, length=50) < PARITY

    def test_mistral_seen_further_than_trained(self, source, output):
        save_checkpoint(source, "mistral", sliding_window=24)
        assert_refused("window_size=128 for layer 0.*sliding_window=24", source, output)
        settings = {"layer_types": ["full_attention", "kernel_attention"], "window_size": 16}
        assert_refused("'full_attention' for layer 0.*sliding_window=24", source, output, settings=settings)
        settings = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 32}
        assert_refused("sliding_window=32 for layer 0", source, output, settings=settings)

    def test_landmarks_see_everything(self, source, output):
        save_checkpoint(source, "mistral", sliding_window=24)
        assert_refused("sliding_window=24 cannot be mapped", source, output, "nystromformer_hf_decoder")

    def test_window_longer_than_any_text(self, source, output):
        model = save_checkpoint(source, "mistral", sliding_window=512)
        convert(str(source), output, "nystromformer_hf_decoder")
        assert difference(model, output) < PARITY

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_qwen_by_layer(self, family, source, output):
        window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
        model = save_checkpoint(source, family, **window)
        assert model.config.layer_types == ["full_attention", "sliding_attention"]
        settings = {"layer_types": ["kernel_attention", "sliding_attention"], "window_size": 128}
        convert(str(source), output, "kermit", settings)
        assert difference(model, output, length=50) < PARITY
        settings["layer_types"].reverse()
        assert_refused("for layer 1.*sliding_window=16", source, output.with_name("other"), settings=settings)

    def test_qwen_with_its_window_switched_off(self, source, output):
        model = save_checkpoint(source, "qwen2", use_sliding_window=False, sliding_window=16)
        convert(str(source), output, "kermit")
        assert difference(model, output, length=50) < PARITY

    def test_other_layer_types(self, source, output):
        save_checkpoint(source, "qwen3")
        edit_json(source / "config.json", layer_types=["full_attention", "chunked_attention"])
        assert_refused("layer_types.*chunked_attention.*allowed are", source, output)


class TestRefusals:
    """A clear error, and nothing left."""

    @pytest.mark.parametrize("shard", ["1GB", "10KB"])
    @pytest.mark.parametrize("left", [0.6, 0.0005])
    def test_truncated_file(self, left, shard, source, output):
        save_checkpoint(source, shard=shard)
        path = sorted(source.glob("*.safetensors"))[-1]
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
        assert_refused(f"{path.name} is damaged.*it lacks .*download it again", source, output)

    def test_truncated_pickle(self, source, output):
        save_checkpoint(source)
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
        path = source / "pytorch_model.bin"
        path.write_bytes(path.read_bytes()[:5000])
        assert_refused("pytorch_model.bin cannot be read.*copy or download it again", source, output)

    def test_pickle_that_runs_code(self, source, output, tmp_path):
        save_checkpoint(source)
        (source / "model.safetensors").unlink()

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "evil"),)

        torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
        assert_refused("pytorch_model.bin cannot be read as tensors alone", source, output)
        assert not (tmp_path / "evil").exists()

    def test_missing_shard(self, source, output):
        save_checkpoint(source, shard="10KB")
        path = sorted(source.glob("*.safetensors"))[1]
        path.unlink()
        assert_refused(f"lacks {path.name}", source, output)

    def test_index_that_leaves_the_folder(self, source, output):
        save_checkpoint(source, shard="10KB")
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
        path.write_text(json.dumps(index))
        assert_refused("outside its folder", source, output)

    def test_no_weights(self, source, output):
        save_checkpoint(source)
        (source / "model.safetensors").unlink()
        assert_refused("holds no weights", source, output)

    def test_missing_key(self, source, output):
        save_checkpoint(source)
        edit_weights(source, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        assert_refused(r"lacks model\.layers\.1\.mlp\.up_proj\.weight", source, output)

    def test_missing_head(self, source, output):
        save_checkpoint(source)
        edit_weights(source, lambda weights: weights.pop("lm_head.weight"))
        assert_refused(r"lacks lm_head\.weight", source, output)

    def test_missing_embedding(self, source, output):
        save_checkpoint(source)
        edit_json(source / "config.json", tie_word_embeddings=True)
        edit_weights(source, lambda weights: weights.pop("model.embed_tokens.weight"))
        assert_refused(r"lacks model\.embed_tokens\.weight", source, output)

    def test_key_that_has_no_place(self, source, output):
        save_checkpoint(source)
        edit_weights(source, lambda weights: weights.update({"model.layers.0.self_attn.sinks": torch.ones(4)}))
        assert_refused(r"holds model\.layers\.0\.self_attn\.sinks, which cannot be mapped", source, output)

    def test_two_different_heads_of_which_one_is_tied(self, source, output):
        save_checkpoint(source)
        edit_json(source / "config.json", tie_word_embeddings=True)
        assert_refused(r"lm_head\.weight differs", source, output)

    def test_shape_that_is_not_the_configs(self, source, output):
        save_checkpoint(source)
        edit_json(source / "config.json", intermediate_size=64)
        assert_refused(r"model\.layers\.0\.mlp\.\w+\.weight has shape", source, output)

    def test_dtype_of_quantised_weights(self, source, output):
        save_checkpoint(source)
        name = "model.layers.0.mlp.up_proj.weight"
        edit_weights(source, lambda weights: weights.update({name: weights[name].to(torch.float8_e4m3fn)}))
        assert_refused(f"{name} has a dtype that cannot be mapped", source, output)

    def test_quantised_config(self, source, output):
        save_checkpoint(source)
        edit_json(source / "config.json", quantization_config={"quant_method": "fp8"})
        assert_refused("quantization_config", source, output)

    @pytest.mark.parametrize("model_type", ["gpt2", "kermit", "of-nowhere", None])
    def test_other_architectures(self, model_type, source, output):
        save_checkpoint(source)
        edit_json(source / "config.json", model_type=model_type)
        assert_refused(f"model_type={model_type!r}.*allowed are llama, mistral, qwen2, qwen3", source, output)

    def test_configs_that_are_none(self, source, output):
        save_checkpoint(source)
        (source / "config.json").write_text("{")
        assert_refused("config.json is no JSON", source, output)
        (source / "config.json").unlink()
        assert_refused("config.json does not exist", source, output)

    def test_vocabulary_of_config_and_weights(self, source, output):
        save_checkpoint(source)
        edit_json(source / "config.json", vocab_size=VOCABULARY + 1)
        assert_refused(r"(embed_tokens|lm_head)\.weight has shape \(300, 32\).*vocab_size=301", source, output)

    def test_vocabulary_of_tokenizer(self, source, output):
        save_checkpoint(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens([f"<extra_{index}>" for index in range(VOCABULARY)])
        tokenizer.save_pretrained(source)
        assert_refused(r"tokenizer has \d+ tokens, but the config has vocab_size=300", source, output)

    def test_special_token_outside_of_the_vocabulary(self, source, output):
        save_checkpoint(source)
        edit_json(source / "config.json", eos_token_id=[1, VOCABULARY])
        assert_refused("eos_token_id=300 lies outside", source, output)

    def test_damaged_tokenizer(self, source, output):
        save_checkpoint(source)
        (source / "tokenizer.json").write_text("{}")
        assert_refused("the tokenizer of .* cannot be read", source, output)

    def test_too_little_space(self, source, output, monkeypatch):
        save_checkpoint(source)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        assert_refused("no space left in .*free some", source, output)

    @pytest.mark.parametrize("function", ["save_file", "keep_files"])
    def test_space_that_runs_out(self, function, source, output, monkeypatch):
        save_checkpoint(source)

        def full(*arguments, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        module = checkpoint_files if function == "save_file" else companions
        monkeypatch.setattr(module, function, full)
        assert_refused("no space left in .*free some", source, output)

    def test_settings_the_config_refuses(self, source, output):
        save_checkpoint(source)
        assert_refused("num_sink_tokens=9 exceeds", source, output, settings={"window_size": 8, "num_sink_tokens": 9})
        assert_refused("feature_map='none_such' is unknown", source, output, settings={"feature_map": "none_such"})
        assert_refused("layer_types names 1 layers", source, output, settings={"layer_types": ["kernel_attention"]})
        assert_refused("hidden_size: the source decides", source, output, settings={"hidden_size": 64})

    def test_result_that_differs(self, source, output, monkeypatch):
        """Whatever a later transformers adds to a source's function is noticed."""
        save_checkpoint(source, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
        shared = tuple(name for name in convert_llama.SHARED_FIELDS if name != "rope_parameters")
        monkeypatch.setattr(convert_llama, "SHARED_FIELDS", shared)
        assert_refused("not the original: largest logit difference.*tolerance 1.0e-03", source, output)

    def test_source_that_is_not_there(self, tmp_path, output):
        assert_refused("does not exist", tmp_path / "nowhere", output)
        (tmp_path / "file.txt").write_text("")
        assert_refused("is no folder", tmp_path / "file.txt", output)


class TestOutput:
    def test_existing_folder_is_kept_unless_it_may_be_overwritten(self, source, output):
        model = save_checkpoint(source)
        output.mkdir()
        convert(str(source), output, "kermit", verify=None)  # empty
        (output / "mine.txt").write_text("")
        assert_refused("exists.*--overwrite", source, output)
        convert(str(source), output, "nystromformer_hf_decoder", overwrite=True, verify=None)
        assert difference(model, output) < PARITY
        assert not (output / "mine.txt").exists()
        assert sorted(path.name for path in output.parent.iterdir()) == ["output", "source"]

    def test_failure_leaves_the_old_checkpoint(self, source, output):
        model = save_checkpoint(source)
        convert(str(source), output, "kermit", verify=None)
        edit_weights(source, lambda weights: weights.pop("model.norm.weight"))
        assert_refused("lacks", source, output, overwrite=True)
        assert difference(model, output) < PARITY

    def test_what_is_no_checkpoint_is_never_overwritten(self, source, output):
        save_checkpoint(source)
        output.mkdir()
        (output / "thesis.tex").write_text("")
        assert_refused("no checkpoint", source, output, overwrite=True)
        assert_refused("is a file", source, output / "thesis.tex", overwrite=True)
        assert_refused("holds the source", source, source, overwrite=True)
        assert_refused("holds the source", source, source.parent, overwrite=True)

    def test_permissions_are_those_of_any_folder(self, source, output):
        save_checkpoint(source)
        convert(str(source), output, "kermit", verify=None)
        assert output.stat().st_mode == source.stat().st_mode


class TestCommandLine:
    @pytest.mark.parametrize("module", [True, False], ids=["module", "script"])
    def test_one_command(self, module, source, output, tmp_path):
        model = save_checkpoint(source)
        options = ["--to", "kermit", "--window-size", "24", "--feature-map", "favor", "--no-forget-gate"]
        result = run_script(
            "convert_llama", str(source), str(output), *options, module=module, **({} if module else {"cwd": tmp_path})
        )
        assert result.returncode == 0, result.stderr
        assert re.search(r"verified: largest logit difference \d\.\de-\d\d over 24 tokens in float32", result.stdout)
        assert difference(model, output) < PARITY
        config = AutoConfig.from_pretrained(output)
        assert (config.window_size, config.feature_map, config.forget_gate) == (24, "favor", False)

    def test_hub_to_hub(self, source, output, tmp_path):
        model = save_checkpoint(source, shard="50KB")
        with HubServer() as hub:
            files = {path.name: path.read_bytes() for path in source.iterdir()}
            files["consolidated.safetensors"] = b"the same weights once more"
            files["README.md"] = b"---\nlicense: apache-2.0\n---\n# The original"
            hub.create(json.dumps({"name": "original"}).encode())
            revision = hub.repositories["tester/original"].commit("upload", files).oid
            options = ["--to", "nystromformer_hf_decoder", "--push-to-hub", "tester/converted"]
            environment = hub.environment(tmp_path / "home")
            result = run_script("convert_llama", "tester/original", str(output), *options, env=environment)
            assert result.returncode == 0, result.stderr
            assert "tester/converted" in result.stdout
            pushed = hub.files("tester/converted")
            assert not list((tmp_path / "home").rglob("consolidated*"))
            other = run_script(
                "convert_llama", "tester/none", str(tmp_path / "other"), "--to", "kermit", env=environment
            )
        assert {path.name for path in output.iterdir()} <= pushed.keys()
        card = ModelCard(pushed["README.md"].decode())
        assert (card.data.base_model, card.data.license) == ("tester/original", "apache-2.0")
        assert 'from_pretrained("tester/converted", trust_remote_code=True)' in card.text
        assert f"of `tester/original` at revision `{revision}`" in card.text
        assert "convert_llama tester/original output --to nystromformer_hf_decoder --push-to-hub" in card.text
        assert difference(model, output) < PARITY
        assert other.returncode == 1
        assert "the Hub did not give it" in other.stderr
        assert "Traceback" not in other.stderr

    def test_cut_off_it_leaves_nothing(self, source, output):
        save_checkpoint(source)
        code = (
            "import sys, time\nfrom conversion_scripts import convert_llama\n"
            "convert_llama.compare = lambda *arguments: (print('waiting', flush=True), time.sleep(60))\n"
            "convert_llama.main(sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, str(source), str(output), "--to", "kermit"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment) as process:
            lines = iter(process.stdout.readline, "")
            assert any("waiting" in line for line in lines)
            assert [path for path in output.parent.iterdir() if ".partial-" in path.name]
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        assert process.returncode == 143
        assert list(output.parent.iterdir()) == [source]

    def test_errors_are_one_line(self, source, output):
        with pytest.raises(SystemExit, match=r"^convert_llama: .* does not exist"):
            main([str(source), str(output), "--to", "kermit"])

    def test_every_attention_setting_is_an_option(self):
        text = re.sub(r"\s+", " ", make_parser().format_help())
        for target in TARGETS.values():
            for name in attention_settings(target.config_class):
                assert f"--{name.replace('_', '-')} " in text
        names = set(attention_settings(TARGETS["kermit"].config_class))
        assert {"window_size", "update_rule", "feature_map", "feature_dim", "layer_types", "sliding_window"} <= names
        assert "examples: " in text

    def test_values_of_options(self):
        options = ["a", "b", "--to", "nystromformer_hf_decoder", "--inverse-regularization", "1.5"]
        parsed = make_parser().parse_args([*options, "--conv-kernel-size", "none", "--max-shard-size", "2MB"])
        assert (parsed.inverse_regularization, parsed.conv_kernel_size) == (1.5, None)
        assert parsed.max_shard_size == 2_000_000
        parsed = make_parser().parse_args(["a", "b", "--to", "kermit", "--layer-types", "full_attention*2", "x"])
        assert [name for part in parsed.layer_types for name in part] == ["full_attention", "full_attention", "x"]

    def test_option_of_the_other_architecture(self, capsys):
        with pytest.raises(SystemExit):
            main(["a", "b", "--to", "kermit", "--segment-size", "8"])
        assert "--segment-size: not an option of --to kermit" in capsys.readouterr().err


def test_memory_is_bounded_by_a_shard(source, output, monkeypatch):
    """What the writer holds never exceeds a shard, and nothing else holds tensors."""
    save_checkpoint(source, num_hidden_layers=8, vocab_size=VOCABULARY)
    held = []
    add = checkpoint_files.ShardWriter.add

    def watched(self, name, tensor):
        add(self, name, tensor)
        held.append(sum(tensor.nbytes for tensor in self.pending.values()))

    monkeypatch.setattr(checkpoint_files.ShardWriter, "add", watched)
    convert(str(source), output, "kermit", max_shard_bytes=50_000, verify=None)
    assert max(held) <= 50_000
    with safe_open(next(output.glob("model-00001-of-*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
