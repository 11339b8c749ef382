"""Perplexity by position is what the loss of the model says, and the baselines are what their masks say."""

import argparse
import dataclasses
import json
import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from conversion_scripts import perplexity
from conversion_scripts.card_facts import Perplexity
from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.convert_llama import convert
from conversion_scripts.perplexity import (
    NearField,
    losses_without_far_field,
    measure,
    near_field,
    summarize,
    table,
    token_losses,
)

from .llama_checkpoints import VOCABULARY, save_checkpoint


LENGTH = 40
KERMIT = {"window_size": 8, "num_sink_tokens": 2, "update_rule": "additive", "conv_kernel_size": 0}
NYSTROM = {"segment_size": 4, "near_segments": 2, "num_sink_tokens": 2}


@pytest.fixture
def original(tmp_path):
    return save_checkpoint(tmp_path / "llama").eval()


@pytest.fixture
def ids():
    return torch.randint(2, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def converted(tmp_path, to, **settings):
    convert(str(tmp_path / "llama"), tmp_path / to, to, settings, far_bias=0.0)
    return perplexity.load_model(str(tmp_path / to))[0]


def test_losses_are_those_of_the_model(original, ids):
    with torch.no_grad():
        logits = original(ids).logits[0, :-1].double()
    expected = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(token_losses(original, ids).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("to", "settings"), [("kermit", KERMIT), ("nystromformer_hf_decoder", NYSTROM)])
def test_chunks_give_the_same_losses(to, settings, original, ids, tmp_path, monkeypatch):
    model = converted(tmp_path, to, **settings)
    whole = token_losses(model, ids)
    monkeypatch.setattr(perplexity, "CHUNK", 7)
    monkeypatch.setattr(perplexity, "LOGITS", 5)
    torch.testing.assert_close(token_losses(model, ids), whole, rtol=0, atol=1e-5)


def test_masks_are_the_definition_of_the_near_field(original, tmp_path):
    kermit = near_field(converted(tmp_path, "kermit", **KERMIT).config)
    nystrom = near_field(converted(tmp_path, "nystromformer_hf_decoder", **NYSTROM).config)

    def near_of_kermit(query, key):
        return query - key < 8

    def near_of_nystrom(query, key):
        # Segments of 4 behind 2 sinks: a query's own and the two before it.
        return (query - 2) // 4 - (key - 2) // 4 <= 2

    for near, is_near in ((kermit, near_of_kermit), (nystrom, near_of_nystrom)):
        both, alone = near.mask(LENGTH)[0, 0], near.mask(LENGTH, with_sinks=False)[0, 0]
        for query in range(LENGTH):
            for key in range(LENGTH):
                causal = key <= query
                assert both[query, key] == (causal and (key < 2 or is_near(query, key)))
                if key >= 2:
                    assert alone[query, key] == both[query, key]
        assert not alone[-1, :2].any()
        assert alone.diagonal().all()


def test_kermit_without_memory_is_the_original_under_the_mask(original, ids, tmp_path):
    # Without sinks: KERMIT bounds their distance, which the mask on the original does not.
    model = converted(tmp_path, "kermit", **{**KERMIT, "num_sink_tokens": 0})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (losses,) = losses_without_far_field(model, original, [ids])
    expected = token_losses(original, ids, near_field(model.config).mask(LENGTH))
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    assert (token_losses(model, ids) - losses).abs().max() > 1e-2  # open, the memory does something
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nystromformer_without_landmarks_is_the_masked_original(original, ids, tmp_path):
    model = converted(tmp_path, "nystromformer_hf_decoder", **NYSTROM)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.1)  # trained: no longer the original's
    (losses,) = losses_without_far_field(model, original, [ids])
    exact = 2 + 3 * 4  # no landmark is visible up to here
    open_losses = token_losses(model, ids)
    torch.testing.assert_close(losses[: exact - 1], open_losses[: exact - 1], rtol=0, atol=1e-4)
    assert (losses[exact:] - open_losses[exact:]).abs().max() > 1e-3
    assert (token_losses(original, ids)[: exact - 1] - losses[: exact - 1]).abs().max() > 1e-3


def test_summary_is_the_exponential_of_mean_losses():
    texts = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 1.0, 0.0])]
    summary = summarize({"a": texts}, [0, 2, 5], first=3)
    assert summary["tokens"] == 5
    assert summary["buckets"] == [[0, 2], [2, 5]]
    # Position p is predicted at index p - 1.
    assert summary["perplexity"]["a"] == pytest.approx([math.exp(1.5), math.exp(12 / 6)])
    assert summary["summary"]["perplexity"]["a"] == pytest.approx(math.exp(8 / 4))


def test_measure_names_every_baseline(original, ids, tmp_path):
    model = converted(tmp_path, "kermit", **KERMIT)
    measured = Perplexity(data="random tokens", **measure({"this model": model}, original, [ids]))
    names = ["this model", "this model, far field off", "full softmax", "window + sinks", "window"]
    assert list(measured.perplexity) == names
    assert measured.summary["from_position"] == LENGTH // 2
    # Nothing is old in the first bucket: there all of them are the same function.
    assert [values[0] for values in measured.perplexity.values()] == pytest.approx(
        [measured.perplexity["full softmax"][0]] * 5, rel=1e-4
    )
    lines = table(measured).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == names
    assert f"{measured.perplexity['window'][3]:.2f}" in lines[-1].split()


def test_models_without_a_near_field_are_refused(original):
    with pytest.raises(ConversionError, match="model_type='llama' has no near field; allowed are kermit"):
        near_field(original.config)


def test_mask_of_a_window_beyond_the_text_is_causal():
    near = NearField(0, lambda query: query - 100)
    assert torch.equal(near.mask(6)[0, 0], torch.ones(6, 6, dtype=torch.bool).tril())


def test_command_line(original, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "text.txt").write_text("the state of the union is strong " * 20, encoding="utf-8")
    converted(tmp_path, "kermit", **KERMIT)
    arguments = [str(tmp_path / "kermit"), "--original", str(tmp_path / "llama"), "--texts", str(tmp_path / "text.txt")]
    arguments += ["--min-characters", "0", "--documents", "1", "--tokens", "48", "--output", str(tmp_path / "p.json")]
    perplexity.main(arguments)
    measured = Perplexity(**json.loads((tmp_path / "p.json").read_text()))
    assert table(measured) in capsys.readouterr().out
    assert measured.data == "text.txt, first documents of at least 0 characters"
    assert (tmp_path / "p.png").stat().st_size > 0
    assert dataclasses.asdict(measured)["summary"]["from_position"] == 24


def test_errors_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^perplexity: .* does not exist"):
        perplexity.main([str(tmp_path / "absent")])


def test_a_model_of_another_build(original, tmp_path):
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(SystemExit, match=r"^perplexity: .*bert: model_type='bert' .* allowed are .* Llama is$"):
        perplexity.main([str(tmp_path / "llama"), "--original", str(tmp_path / "bert")])


def test_a_model_without_tokenizer(original, tmp_path):
    for path in (tmp_path / "llama").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SystemExit, match=r"^perplexity: .*llama has no tokenizer; put its files there"):
        perplexity.main([str(tmp_path / "llama")])


def test_description_of_the_texts_names_no_folder(tmp_path):
    args = argparse.Namespace(texts=str(tmp_path), min_characters=40_000)
    assert perplexity.describe(args) == f"{tmp_path.name}, first documents of at least 40,000 characters"
