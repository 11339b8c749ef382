"""Published Nyströmformers come out with the same function, and go back."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, NystromformerConfig, NystromformerForMaskedLM

from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.convert_nystromformer import convert, main, make_parser
from tests.conversion_scripts.encoder_checkpoints import (
    HEADS,
    TINY,
    OriginalNystromformer,
    load,
    outputs,
    save_checkpoint,
)
from tests.conversion_scripts.helpers import edit_json, run_script
from tests.conversion_scripts.llama_checkpoints import VOCABULARY, make_tokenizer
from tests.hub_session import run_session


PARITY = 1e-5  # two float32 evaluations of the same function
BACK = "nystromformer"
LENGTH = 64  # the tiny models' `segment_means_seq_len`


def difference(model, other, length: int = LENGTH) -> float:
    """Of the outputs for one text, since transformers' class mixes the rows of a batch."""
    prompt = torch.randint(2, VOCABULARY, (1, length))
    return float((outputs(model, prompt) - outputs(other, prompt)).abs().max())


def assert_refused(match: str, source: Path, output: Path, to: str = "nystromformer_hf", **arguments) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(ConversionError, match=match):
        convert(str(source), output, to, **arguments)
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("landmarks", [16, 64], ids=["nystrom", "softmax"])
def test_outputs_and_weights_there_and_back(landmarks, head, source, output, tmp_path):
    model = save_checkpoint(source, "nystromformer", head, num_landmarks=landmarks)
    assert convert(str(source), output) < PARITY
    ours = load(output, head)
    assert ours.config.model_type == "nystromformer_hf"
    assert difference(model, ours) < PARITY
    back = tmp_path / "back"
    seq_len = LENGTH if landmarks < LENGTH else None
    assert convert(str(output), back, BACK, segment_means_seq_len=seq_len) < PARITY
    returned = load(back, head)
    assert type(returned) is type(model)
    assert difference(model, returned) < PARITY
    assert "auto_map" not in json.loads((back / "config.json").read_text())
    assert not list(back.glob("*.py"))
    state = returned.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    fields = {*NystromformerConfig.__annotations__, "architectures", "id2label"}
    for name in fields - {"num_landmarks", "segment_means_seq_len"}:
        assert getattr(returned.config, name) == getattr(model.config, name), name


def test_softmax_at_every_length(source, output):
    """As many landmarks as `segment_means_seq_len` are none."""
    model = save_checkpoint(source, "nystromformer", num_landmarks=64)
    convert(str(source), output)
    assert AutoConfig.from_pretrained(output).num_landmarks == 128
    assert difference(model, load(output), length=111) < PARITY


def test_landmarks_and_length_that_were_swapped(source, output):
    model = save_checkpoint(source, "nystromformer")
    edit_json(source / "config.json", num_landmarks=64, segment_means_seq_len=16)
    convert(str(source), output)
    assert difference(model, load(output)) < PARITY


def test_positions_are_repeated_to_a_greater_length(source, output, tmp_path):
    model = save_checkpoint(source, "nystromformer", "masked-lm")
    assert convert(str(source), output, max_position_embeddings=300) < PARITY
    table = load(output, "masked-lm").nystromformer.embeddings.position_embeddings.weight
    theirs = model.nystromformer.embeddings.position_embeddings.weight
    assert torch.equal(table, torch.cat([theirs, theirs[2:], theirs[2:46]]))
    assert difference(model, load(output, "masked-lm")) < PARITY
    assert convert(str(output), tmp_path / "back", BACK) < 1e-4  # over 288 tokens
    assert AutoConfig.from_pretrained(tmp_path / "back").segment_means_seq_len == 288


def test_attention_of_the_result(source, output):
    """What is compared is the source's attention, whatever the result's is."""
    save_checkpoint(source, "nystromformer")
    settings = {"num_landmarks": 8, "inverse_regularization": 0.01, "landmark_refinement_steps": 1}
    assert convert(str(source), output, settings=settings) < PARITY
    config = AutoConfig.from_pretrained(output)
    assert {name: getattr(config, name) for name in settings} == settings


def test_start_of_the_iteration_that_transformers_fails_with(source, output):
    save_checkpoint(source, "nystromformer")
    edit_json(source / "config.json", inv_coeff_init_option=True)
    assert convert(str(source), output) < PARITY
    assert AutoConfig.from_pretrained(output).inverse_init == "exact"


def test_buffers_of_older_checkpoints(source, output):
    model = save_checkpoint(source, "nystromformer", "masked-lm")
    weights = load_file(source / "model.safetensors")
    weights["nystromformer.embeddings.position_ids"] = torch.arange(128)[None] + 2
    weights["nystromformer.embeddings.token_type_ids"] = torch.zeros(1, 128, dtype=torch.long)
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    torch.save(weights, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    said = []
    convert(str(source), output, say=said.append)
    assert not [line for line in said if "left out" in line]
    assert difference(model, load(output, "masked-lm")) < PARITY


def test_no_length_at_which_transformers_could_be_asked(source, output):
    save_checkpoint(source, "nystromformer", num_landmarks=100, segment_means_seq_len=200)
    said = []
    assert convert(str(source), output, say=said.append) is None
    assert "not verified" in said[-1]


def test_comparison_in_half_precision(source, output, tmp_path):
    """Transformers' class can do it without landmarks only."""
    save_checkpoint(source, "nystromformer", dtype=torch.bfloat16)
    assert_refused("verify=bfloat16.*allowed are float32 and no", source, output, verify="bfloat16")
    save_checkpoint(tmp_path / "softmax", "nystromformer", num_landmarks=64, dtype=torch.bfloat16)
    assert convert(str(tmp_path / "softmax"), output, verify="bfloat16") < 0.2
    assert load(output).dtype == torch.bfloat16


class TestWayBack:
    @pytest.mark.parametrize("kernel_size", [None, 8, 9])
    def test_convolutions(self, kernel_size, source, output):
        model = save_checkpoint(source, "nystromformer_hf", "masked-lm", conv_kernel_size=kernel_size)
        assert convert(str(source), output, BACK, segment_means_seq_len=LENGTH) < PARITY
        returned = NystromformerForMaskedLM.from_pretrained(output)
        assert returned.config.conv_kernel_size == {None: 1, 8: 9, 9: 9}[kernel_size]
        assert difference(model, returned) < PARITY

    def test_longest_length_by_default(self, source, output):
        model = save_checkpoint(source, "nystromformer_hf", max_position_embeddings=120)
        convert(str(source), output, BACK)
        assert AutoConfig.from_pretrained(output).segment_means_seq_len == 112
        assert difference(model, load(output), length=112) < PARITY

    @pytest.mark.parametrize(
        "field, value",
        [
            ("inverse_iterations", 8),
            ("inverse_init", "exact"),
            ("inverse_regularization", 0.01),
            ("landmark_refinement_steps", 1),
        ],
    )
    def test_attention_without_counterpart(self, field, value, source, output):
        save_checkpoint(source, "nystromformer_hf", **{field: value})
        assert_refused(rf"{field}={value} has no counterpart.*allowed is", source, output, BACK)

    def test_attention_that_is_exact_anyway(self, source, output):
        model = save_checkpoint(source, "nystromformer_hf", num_landmarks=128, inverse_regularization=0.01)
        convert(str(source), output, BACK)
        assert difference(model, load(output), length=77) < PARITY

    @pytest.mark.parametrize("head", ["sequence-classification", "multiple-choice"])
    def test_activation_without_counterpart(self, head, source, output):
        save_checkpoint(source, "nystromformer_hf", head, classifier_activation="tanh")
        assert_refused("classifier_activation='tanh' has no counterpart.*--head none", source, output, BACK)
        convert(str(source), output, BACK, head="none")

    @pytest.mark.parametrize("seq_len", [16, 40, 144, -16])
    def test_lengths_at_which_it_would_not_work(self, seq_len, source, output):
        save_checkpoint(source, "nystromformer_hf")
        message = f"segment_means_seq_len={seq_len}.*multiples of num_landmarks=16, from two of them to 128"
        assert_refused(message, source, output, BACK, segment_means_seq_len=seq_len)

    def test_exact_attention_has_no_length(self, source, output):
        save_checkpoint(source, "nystromformer_hf", num_landmarks=128)
        assert_refused("segment_means_seq_len=64", source, output, BACK, segment_means_seq_len=64)
        assert_refused("max_position_embeddings=200 exceeds", source, output, BACK, max_position_embeddings=200)

    def test_sources_of_the_other_direction(self, source, output, tmp_path):
        save_checkpoint(source, "nystromformer")
        assert_refused("is no nystromformer_hf.*convert it to that first", source, output, BACK)
        save_checkpoint(tmp_path / "ours", "nystromformer_hf")
        assert_refused("is a nystromformer_hf already.*--to nystromformer", tmp_path / "ours", output)


ORIGINAL_HEADS = {"mlm": "masked-lm", "sen_classifer": "sequence-classification", "qahead": "question-answering"}


class TestFilesOfTheAuthors:
    def save(self, folder: Path, model: OriginalNystromformer, **changes) -> Path:
        """As their pretraining leaves a model; returns the path of the weights."""
        path = folder / "model" / "cp-0099.model"
        model.save(path)
        (folder / "config.json").write_text(json.dumps(model.config(**changes)))
        return path

    def difference(self, model: OriginalNystromformer, folder: Path, length: int = LENGTH) -> float:
        prompt = torch.randint(2, VOCABULARY, (1, length))
        ours = load(folder, ORIGINAL_HEADS[model.head])
        return float((model(prompt).flatten() - outputs(ours, prompt)).abs().max())

    @pytest.mark.parametrize("head", ORIGINAL_HEADS)
    @pytest.mark.parametrize("kernel_size", [9, None])
    def test_outputs_are_those_of_the_authors_model(self, kernel_size, head, source, output):
        model = OriginalNystromformer(16, LENGTH, kernel_size, head)
        path = self.save(source, model)
        assert convert(str(path), output) < PARITY
        assert self.difference(model, output) < PARITY
        config = AutoConfig.from_pretrained(output)
        assert (config.num_landmarks, config.conv_kernel_size) == (16, kernel_size)

    def test_there_and_back_to_transformers(self, source, output, tmp_path):
        model = OriginalNystromformer(16, LENGTH, 9)
        convert(str(self.save(source, model)), output)
        convert(str(output), tmp_path / "back", BACK, segment_means_seq_len=LENGTH)
        assert self.difference(model, tmp_path / "back") < PARITY

    @pytest.mark.parametrize("kernel_size", [9, None])
    def test_softmax(self, kernel_size, source, output):
        model = OriginalNystromformer(16, LENGTH, kernel_size, attn_type="softmax")
        convert(str(self.save(source, model)), output)
        assert self.difference(model, output, length=100) < PARITY

    def test_released_config_with_landmarks_and_length_swapped(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9)
        convert(str(self.save(source, model, num_landmarks=LENGTH, seq_len=16)), output)
        assert self.difference(model, output) < PARITY

    def test_as_many_landmarks_as_tokens(self, source, output):
        model = OriginalNystromformer(LENGTH, LENGTH, 9)
        convert(str(self.save(source, model)), output)
        assert self.difference(model, output, length=100) < PARITY

    def test_training_state_beside_the_weights(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9)
        optimizer = torch.optim.AdamW(model.parameters())
        path = self.save(source, model).with_suffix(".cp")
        model.save(path, optimizer_state_dict=optimizer.state_dict(), epoch=99, inst_pass=7)
        convert(str(path), output)
        assert self.difference(model, output) < PARITY

    def test_what_transformers_script_leaves_out_as_well(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9)
        path = self.save(source, model)
        more = {
            "model.pooler.weight": torch.ones(32, 32),
            "sen_class.bias": torch.ones(4),
            "model.transformer_0.mha.attn.conv.bias": torch.ones(4),
        }
        torch.save({"model_state_dict": {**model.state_dict(), **more}}, path)
        said = []
        convert(str(path), output, say=said.append)
        line = next(line for line in said if "left out" in line)
        assert all(name in line for name in more)

    def test_options_in_the_place_of_a_config(self, source, output):
        model = OriginalNystromformer(16, LENGTH, None)
        path = self.save(source, model)
        (source / "config.json").unlink()
        assert_refused("num_attention_heads: nothing says how many", path, output)
        assert_refused("nothing says with how many landmarks", path, output, num_attention_heads=4)
        convert(str(path), output, settings={"num_landmarks": 16}, num_attention_heads=4)
        assert self.difference(model, output) < PARITY

    def test_config_of_transformers_and_elsewhere(self, source, output, tmp_path):
        model = OriginalNystromformer(16, LENGTH, 9)
        path = self.save(source, model, num_landmarks=32)
        save_checkpoint(tmp_path / "in-tree", "nystromformer", type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=3)
        convert(str(path), output, config_file=tmp_path / "in-tree" / "config.json")
        assert self.difference(model, output) < PARITY
        assert AutoConfig.from_pretrained(output).pad_token_id == 3
        assert_refused(r"nowhere\.json does not exist", path, output.with_name("x"), config_file="nowhere.json")

    def test_longer_texts(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9)
        convert(str(self.save(source, model)), output, max_position_embeddings=1024)
        assert self.difference(model, output) < PARITY
        assert outputs(load(output, "masked-lm"), torch.randint(2, VOCABULARY, (1, 1000))).isfinite().all()

    def test_choice_of_head(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9, "sen_classifer")
        path = self.save(source, model)
        convert(str(path), output, head="masked-lm")
        model.head = "mlm"
        assert self.difference(model, output) < PARITY
        assert_refused("has no such head; allowed are none, masked-lm", path, output, head="multiple-choice")

    def test_head_for_wikihop(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9, "qahead")
        model.qahead = torch.nn.Linear(TINY["hidden_size"], 1)
        path = self.save(source, model)
        assert_refused("qahead.weight has one output.*--head", path, output)
        convert(str(path), output, head="masked-lm")

    @pytest.mark.parametrize(
        "changes, match",
        [
            ({"attn_type": "linformer"}, "attn_type='linformer' cannot be mapped; allowed are nystrom, softmax"),
            ({"max_seq_len": 512}, "max_seq_len=512 in the config, but 128 in cp-0099.model"),
            ({"transformer_hidden_dim": 3072}, "transformer_hidden_dim=3072 in the config, but 48"),
            ({"num_head": 8}, r"num_attention_heads: they contradict each other.*\[4, 8\]"),
        ],
    )
    def test_config_of_another_model(self, changes, match, source, output):
        path = self.save(source, OriginalNystromformer(16, LENGTH, 9), **changes)
        assert_refused(match, path, output)

    def test_projected_embeddings_have_no_place(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9)
        path = self.save(source, model)
        weights = {**model.state_dict(), "model.embeddings.dense.weight": torch.ones(32, 32)}
        torch.save({"model_state_dict": weights}, path)
        assert_refused(r"holds model\.embeddings\.dense\.weight, which cannot be mapped", path, output)

    def test_missing_weights(self, source, output):
        model = OriginalNystromformer(16, LENGTH, 9)
        path = self.save(source, model)
        weights = model.state_dict()
        del weights["model.transformer_1.ff1.weight"]
        torch.save({"model_state_dict": weights}, path)
        assert_refused(r"lacks nystromformer\.encoder\.layer\.1\.intermediate\.dense\.weight", path, output)
        torch.save({"model_state_dict": {"weight": torch.ones(3)}}, path)
        assert_refused("is no Nyströmformer of the authors' code", path, output)

    def test_damaged_and_dangerous_files(self, source, output, tmp_path):
        path = self.save(source, OriginalNystromformer(16, LENGTH, 9))
        path.write_bytes(path.read_bytes()[:5000])
        assert_refused(r"cp-0099\.model cannot be read as tensors alone", path, output)

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "evil"),)

        torch.save({"model_state_dict": Evil()}, path)
        assert_refused(r"cp-0099\.model cannot be read as tensors alone", path, output)
        assert not (tmp_path / "evil").exists()
        torch.save([torch.ones(3)], path)
        assert_refused("holds a list; allowed is a state dict", path, output)

    def test_vocabulary_of_the_tokenizer_beside_it(self, source, output):
        path = self.save(source, OriginalNystromformer(16, LENGTH, 9))
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(path.parent)
        convert(str(path), output, verify=None)
        assert (output / "tokenizer.json").is_file()
        tokenizer.add_tokens([f"<extra_{index}>" for index in range(VOCABULARY)])
        tokenizer.save_pretrained(path.parent)
        assert_refused("the tokenizer has .* tokens, but the config has vocab_size=300", path, output.with_name("x"))


def test_every_head_loads_where_the_package_is_not_installed(source, output, tmp_path):
    model = save_checkpoint(source, "nystromformer", "sequence-classification")
    convert(str(source), output, verify=None)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    steps = [{"do": "load", "source": str(output), "auto_classes": list(HEADS.values())}]
    loaded = run_session(steps, environment, tmp_path / "session", without="nystromformer_hf")[0]
    assert loaded.keys() == set(HEADS.values())
    state = loaded["AutoModelForSequenceClassification"]["state"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class TestCommandLine:
    NAME = "convert_nystromformer"

    def test_one_command_each_way(self, source, output, tmp_path):
        """There as a module, back as a plain script."""
        model = save_checkpoint(source, "nystromformer", "masked-lm")
        result = run_script(self.NAME, str(source), str(output))
        assert result.returncode == 0, result.stderr
        assert re.search(r"verified: largest logit difference \d\.\de-\d\d over 128 tokens in float32", result.stdout)
        options = ["--to", BACK, "--segment-means-seq-len", str(LENGTH), "--head", "none"]
        result = run_script(self.NAME, str(output), str(tmp_path / "back"), *options, module=False, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "left out" in result.stdout
        assert difference(model.nystromformer, load(tmp_path / "back")) < PARITY

    def test_errors_are_one_line(self, source, output):
        with pytest.raises(SystemExit, match=r"^convert_nystromformer: .* does not exist"):
            main([str(source), str(output)])

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--to", BACK, "--num-landmarks", "8"], "--num-landmarks: not an option of --to nystromformer"),
            (["--segment-means-seq-len", "64"], "--segment-means-seq-len: an option of --to nystromformer only"),
        ],
    )
    def test_options_of_the_other_direction(self, options, message, capsys):
        with pytest.raises(SystemExit):
            main(["a", "b", *options])
        assert message in capsys.readouterr().err

    def test_help(self):
        text = re.sub(r"\s+", " ", make_parser().format_help())
        for name in ("to", "config", "num-attention-heads", "num-landmarks", "inverse-init", "head"):
            assert f"--{name} " in text
        assert "examples: " in text
        assert "--conv-kernel-size" not in text
