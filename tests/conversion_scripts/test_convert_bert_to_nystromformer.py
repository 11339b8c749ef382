"""BERT-shaped checkpoints come out with the same function at texts of at most as many tokens as landmarks."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertForNextSentencePrediction, BertForPreTraining, BertLMHeadModel

from conversion_scripts import convert_bert_to_nystromformer
from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.convert_bert_to_nystromformer import DEFAULTS, FAMILIES, convert, main, make_parser
from tests.conversion_scripts.encoder_checkpoints import (
    HEADS,
    load,
    make_config,
    outputs,
    randomize,
    save_checkpoint,
)
from tests.conversion_scripts.helpers import edit_json, edit_weights, run_script
from tests.conversion_scripts.llama_checkpoints import VOCABULARY, make_tokenizer
from tests.hub_server import HubServer
from tests.hub_session import INPUT_IDS, run_session


# Two float32 evaluations of the same function.
PARITY = 1e-5
PADDING_TOKENS = 6  # the families' padding tokens are all below


def tokens(*shape: int) -> torch.LongTensor:
    return torch.randint(PADDING_TOKENS, VOCABULARY, shape)


def difference(model, folder: Path, head: str = "none", length: int = 60, **kwargs) -> float:
    prompt = tokens(2, length)
    return float((outputs(model, prompt) - outputs(load(folder, head, **kwargs), prompt)).abs().max())


def assert_refused(match: str, source: Path, output: Path, **arguments) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(ConversionError, match=match):
        convert(str(source), output, **arguments)
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_original(family, head, source, output):
    model = save_checkpoint(source, family, head)
    assert convert(str(source), output) < PARITY
    assert difference(model, output, head) < PARITY
    assert AutoConfig.from_pretrained(output).num_labels == model.config.num_labels
    assert load(output, head).config.architectures == [type(load(output, head)).__name__]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(family, source, output):
    """Real tokens see what they saw before."""
    model = save_checkpoint(source, family)
    convert(str(source), output, verify=None)
    prompt, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    prompt[1, 25:], mask[1, 25:] = model.config.pad_token_id, 0
    types = torch.randint(model.config.type_vocab_size, (2, 40))
    inputs = {"attention_mask": mask, "token_type_ids": types}
    theirs, ours = (outputs(x, prompt, **inputs).view(2, 40, -1)[mask == 1] for x in (model, load(output)))
    torch.testing.assert_close(ours, theirs, atol=PARITY, rtol=0)


@pytest.mark.parametrize("family", ["bert", "roberta", "camembert"])
def test_positions_are_repeated_to_a_greater_length(family, source, output):
    model = save_checkpoint(source, family)
    settings = {"num_landmarks": 150}
    assert convert(str(source), output, settings, max_position_embeddings=150) < PARITY
    # The same repetition in the original's own table.
    first = 0 if family == "bert" else model.config.pad_token_id + 1
    table = model.embeddings.position_embeddings.weight.data
    table = torch.cat([table[:first], table[first:].repeat(3, 1)])
    model.embeddings.position_embeddings = nn.Embedding.from_pretrained(table)
    model.embeddings.position_ids = torch.arange(len(table))[None]
    model.embeddings.token_type_ids = torch.zeros(1, len(table), dtype=torch.long)
    assert load(output).embeddings.position_embeddings.weight.shape == (152, 32)
    assert difference(model, output, length=150) < PARITY
    assert json.loads((output / "tokenizer_config.json").read_text())["model_max_length"] == 150


def test_convolution_starts_as_nothing(source, output):
    model = save_checkpoint(source, "bert", "masked-lm")
    said = []
    convert(str(source), output, {"conv_kernel_size": 9}, say=said.append)
    assert any("2 new ones of zeros" in line for line in said)
    weights = load_file(output / "model.safetensors")
    kernels = [tensor for name, tensor in weights.items() if name.endswith("conv.weight")]
    assert [tuple(tensor.shape) for tensor in kernels] == [(4, 1, 9, 1)] * 2
    assert not torch.cat(kernels).any()
    assert difference(model, output, "masked-lm") < PARITY


def test_attention_of_the_result(source, output):
    save_checkpoint(source, "bert")
    convert(str(source), output, {"num_landmarks": 8, "inverse_regularization": 0.01, "inverse_iterations": 12})
    config = AutoConfig.from_pretrained(output)
    assert (config.num_landmarks, config.inverse_regularization, config.inverse_iterations) == (8, 0.01, 12)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


def test_shards_dtype_and_every_bit_are_kept(source, output):
    model = save_checkpoint(source, "roberta", "masked-lm", dtype=torch.bfloat16, shard="10KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    assert convert(str(source), output, max_shard_bytes=30_000) < 1e-4
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(output.glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in shards]
    assert all(path.stat().st_size < 35_000 for path in shards)
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = model.state_dict()
    ours = load(output, "masked-lm").state_dict()
    for layer in range(2):
        for name in ("attention.self.query.weight", "attention.output.LayerNorm.bias", "output.dense.weight"):
            mapped = ours[f"nystromformer.encoder.layer.{layer}.{name}"]
            assert torch.equal(mapped, theirs[f"roberta.encoder.layer.{layer}.{name}"])
    for old, new in {"lm_head.layer_norm.weight": "transform.LayerNorm.weight", "lm_head.bias": "bias"}.items():
        assert torch.equal(ours[f"cls.predictions.{new}"], theirs[old])


def test_names_and_buffers_of_older_checkpoints(source, output):
    model = save_checkpoint(source, "bert", "masked-lm")

    def change(weights):
        for name in [name for name in weights if "LayerNorm" in name]:
            older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            weights[older] = weights.pop(name)
        weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
        # Tied, but stored as well.
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()

    edit_weights(source, change)
    said = []
    convert(str(source), output, say=said.append)
    assert not [line for line in said if "left out" in line]
    assert difference(model, output, "masked-lm") < PARITY
    assert "cls.predictions.decoder.weight" not in load_file(output / "model.safetensors")


def test_tied_weights_that_differ(source, output):
    save_checkpoint(source, "bert", "masked-lm")
    edit_weights(source, lambda weights: weights.update({"cls.predictions.decoder.weight": torch.ones(VOCABULARY, 32)}))
    assert_refused(r"cls\.predictions\.decoder\.weight.*tie_word_embeddings=true", source, output)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_untied_head(family, source, output):
    model = save_checkpoint(source, family, "masked-lm", tie_word_embeddings=False)
    convert(str(source), output)
    assert difference(model, output, "masked-lm") < PARITY


def test_pretraining_checkpoint_loses_the_next_sentence_head_alone(source, output):
    model = BertForPreTraining(make_config("bert")).eval()
    randomize(model)
    model.save_pretrained(source)
    said = []
    convert(str(source), output, say=said.append)
    line = next(line for line in said if "left out" in line)
    for name in ("bert.pooler.dense.weight", "cls.seq_relationship.bias"):
        assert name in line
    prompt = tokens(1, 60)
    with torch.no_grad():
        expected = model(prompt).prediction_logits
        logits = load(output, "masked-lm")(prompt).logits
    torch.testing.assert_close(logits, expected, atol=PARITY, rtol=0)


class TestChoiceOfHead:
    def test_body_of_a_classifier(self, source, output):
        model = save_checkpoint(source, "roberta", "sequence-classification")
        convert(str(source), output, head="none")
        assert difference(model.roberta, output) < PARITY
        assert not [name for name in load_file(output / "model.safetensors") if "classifier" in name]

    def test_language_model_whose_config_names_the_body(self, source, output):
        model = save_checkpoint(source, "bert", "masked-lm")
        edit_json(source / "config.json", architectures=["BertModel"])
        assert_refused("cls.predictions.bias.*cannot be mapped.*--head", source, output)
        convert(str(source), output, head="masked-lm")
        assert difference(model, output, "masked-lm") < PARITY

    def test_head_that_is_not_there(self, source, output):
        save_checkpoint(source, "bert")
        assert_refused(r"lacks cls\.predictions\.bias", source, output, head="masked-lm")

    def test_classifier_without_its_pooler(self, source, output):
        save_checkpoint(source, "bert", "sequence-classification")
        edit_weights(source, lambda weights: weights.pop("bert.pooler.dense.weight"))
        assert_refused(r"lacks bert\.pooler\.dense\.weight", source, output)

    @pytest.mark.parametrize("model_class", [BertForNextSentencePrediction, BertLMHeadModel])
    def test_heads_that_ours_has_not(self, model_class, source, output):
        model_class(make_config("bert")).save_pretrained(source)
        name = model_class.__name__
        assert_refused(rf"architectures=\['{name}'\].*--head: none, masked-lm", source, output)
        convert(str(source), output, head="none")

    def test_activation_of_robertas_language_model_head(self, source, output):
        save_checkpoint(source, "roberta", "masked-lm", hidden_act="relu")
        assert_refused("hidden_act='relu'.*--head none", source, output)
        convert(str(source), output, head="none")


class TestSentenceEncoders:
    FILES = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 48, "do_lower_case": False},
        "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "unrelated.json": {},
    }

    def save(self, source: Path):
        model = save_checkpoint(source, "bert")
        for name, content in self.FILES.items():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_text(json.dumps(content))
        return model

    def test_what_belongs_to_it_goes_along(self, source, output):
        self.save(source)
        convert(str(source), output)
        for name in self.FILES.keys() - {"unrelated.json"}:
            assert (output / name).read_bytes() == (source / name).read_bytes(), name
        assert not (output / "unrelated.json").exists()

    def test_limit_of_length_grows_with_the_positions(self, source, output):
        self.save(source)
        convert(str(source), output, max_position_embeddings=256)
        config = json.loads((output / "sentence_bert_config.json").read_text())
        assert config == {"max_seq_length": 256, "do_lower_case": False}
        assert AutoTokenizer.from_pretrained(output).model_max_length == 256

    def test_module_outside_of_the_folder(self, source, output):
        self.save(source)
        for path in ("../elsewhere", ".."):
            (source / "modules.json").write_text(json.dumps([{"path": path}]))
            assert_refused(r"modules\.json names folders that are not beside it", source, output)
        (source / "modules.json").write_text("{")
        assert_refused(r"modules\.json is no list of modules", source, output)


def test_every_head_loads_where_the_package_is_not_installed(source, output, tmp_path):
    model = save_checkpoint(source, "bert", "masked-lm")
    convert(str(source), output, verify=None)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    steps = [{"do": "load", "source": str(output), "auto_classes": list(HEADS.values())}]
    loaded = run_session(steps, environment, tmp_path / "session", without="nystromformer_hf")[0]
    assert loaded.keys() == set(HEADS.values())
    with torch.no_grad():
        expected = model(INPUT_IDS[:1]).logits
    logits = loaded["AutoModelForMaskedLM"]["outputs"]["logits"][:1]
    torch.testing.assert_close(logits, expected, atol=PARITY, rtol=0)


class TestRefusals:
    """Those of this source alone; the others are in `test_encoder_refusals`."""

    @pytest.mark.parametrize("field", ["is_decoder", "add_cross_attention"])
    def test_decoders(self, field, source, output):
        save_checkpoint(source, "bert")
        edit_json(source / "config.json", **{field: True})
        assert_refused(f"{field}=True.*allowed is False", source, output)

    def test_relative_positions(self, source, output):
        save_checkpoint(source, "bert")
        edit_json(source / "config.json", position_embedding_type="relative_key")
        assert_refused("position_embedding_type=relative_key.*allowed is absolute", source, output)

    def test_positions_that_start_behind_a_token_that_is_not_there(self, source, output):
        save_checkpoint(source, "roberta")
        edit_json(source / "config.json", pad_token_id=None)
        assert_refused("pad_token_id=None", source, output)

    def test_position_table_of_another_length(self, source, output):
        save_checkpoint(source, "bert")
        edit_json(source / "config.json", max_position_embeddings=32)
        assert_refused("position_embeddings.weight has 64 rows, but the config makes it 32", source, output)

    def test_fewer_positions(self, source, output):
        save_checkpoint(source, "roberta")
        assert_refused(
            "max_position_embeddings=32 is less.*allowed are 64 and more", source, output, max_position_embeddings=32
        )

    def test_settings_the_config_refuses(self, source, output):
        save_checkpoint(source, "bert")
        assert_refused("num_landmarks=0", source, output, settings={"num_landmarks": 0})
        assert_refused("hidden_size: the source decides", source, output, settings={"hidden_size": 8})

    def test_a_result_that_is_not_the_original(self, source, output, monkeypatch):
        """A mapping that forgets something is caught by the comparison."""
        save_checkpoint(source, "bert", layer_norm_eps=0.1)
        shared = tuple(name for name in convert_bert_to_nystromformer.SHARED_FIELDS if name != "layer_norm_eps")
        monkeypatch.setattr(convert_bert_to_nystromformer, "SHARED_FIELDS", shared)
        assert_refused("not the original: largest hidden state difference.*tolerance 1.0e-03", source, output)

    def test_gguf(self, tmp_path, output):
        (tmp_path / "model.gguf").write_bytes(b"")
        assert_refused("is a GGUF file; allowed are a folder and a Hub id", tmp_path / "model.gguf", output)


class TestCommandLine:
    NAME = "convert_bert_to_nystromformer"

    @pytest.mark.parametrize("module", [True, False], ids=["module", "script"])
    def test_one_command(self, module, source, output, tmp_path):
        model = save_checkpoint(source, "bert", "sequence-classification")
        options = ["--num-landmarks", "24", "--inverse-regularization", "0.01", "--max-position-embeddings", "100"]
        kwargs = {} if module else {"cwd": tmp_path}
        result = run_script(self.NAME, str(source), str(output), *options, module=module, **kwargs)
        assert result.returncode == 0, result.stderr
        assert re.search(r"verified: largest logit difference \d\.\de[+-]\d\d over 24 tokens in float32", result.stdout)
        assert difference(model, output, "sequence-classification", length=24) < PARITY
        config = AutoConfig.from_pretrained(output)
        assert (config.num_landmarks, config.inverse_regularization) == (24, 0.01)

    def test_hub_to_hub(self, source, output, tmp_path):
        model = TestSentenceEncoders().save(source)
        with HubServer() as hub:
            files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
            hub.create(json.dumps({"name": "original"}).encode())
            hub.repositories["tester/original"].commit("upload", files)
            options = ["--push-to-hub", "tester/converted", "--private"]
            environment = hub.environment(tmp_path / "home")
            result = run_script(self.NAME, "tester/original", str(output), *options, env=environment)
            assert result.returncode == 0, result.stderr
            assert "tester/converted" in result.stdout
            pushed = hub.files("tester/converted")
            other = run_script(self.NAME, "tester/none", str(tmp_path / "other"), env=environment)
        assert {"1_Pooling/config.json", "modules.json", "model.safetensors", "tokenizer.json"} <= pushed.keys()
        assert difference(model, output) < PARITY
        assert other.returncode == 1
        assert "the Hub did not give it" in other.stderr
        assert "Traceback" not in other.stderr

    def test_errors_are_one_line(self, source, output):
        with pytest.raises(SystemExit, match=r"^convert_bert_to_nystromformer: .* does not exist"):
            main([str(source), str(output)])

    def test_help(self):
        text = re.sub(r"\s+", " ", make_parser().format_help())
        for name in ("num-landmarks", "conv-kernel-size", "inverse-iterations", "landmark-refinement-steps", "head"):
            assert f"--{name} " in text
        assert "examples: " in text
        assert "--hidden-size" not in text


def test_tokenizer_of_older_checkpoints(source, output):
    """Its class, and with it the special tokens and the types of a pair's tokens, once followed from the model type alone."""
    save_checkpoint(source, "bert")
    for path in source.glob("*token*"):
        path.unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "state", "of", "union"]
    (source / "vocab.txt").write_text("\n".join(words) + "\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 64}))
    convert(str(source), output, verify=None)
    original, kept = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(output)
    assert kept.mask_token == "[MASK]"
    assert kept.model_max_length == 64
    pair = original("The union", "of the state")
    assert dict(kept("The union", "of the state")) == dict(pair)
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_tokenizer_and_licence_are_kept(source, output):
    save_checkpoint(source, "roberta")
    (source / "LICENSE").write_text("Ours.")
    convert(str(source), output, verify=None)
    text = "the state of the union 1,234"
    assert AutoTokenizer.from_pretrained(output)(text).input_ids == make_tokenizer()(text).input_ids
    assert (output / "LICENSE").read_text() == "Ours."
