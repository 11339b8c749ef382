"""Whole models on the Triton backend, run by Triton's interpreter on a CPU as `interpreted_taylor` is.

python -m pytest tests/kermit_hf/interpreted_models.py      # on a CUDA device, compiled
"""

import pytest
import torch

from kermit_hf import KermitForSequenceClassification, kernel_backend, taylor_triton, window_triton
from tests.kermit_hf.test_kernel_attention import assert_close
from tests.kermit_hf.tiny_models import place, tiny_model, tokens


pytestmark = pytest.mark.usefixtures("on_kernel_device")

TAYLOR = {"update_rule": "additive", "feature_map": "taylor", "feature_dim": 4}
MODELS = {
    "Taylor and window": {**TAYLOR, "window_size": 6, "num_sink_tokens": 2, "conv_kernel_size": 0},
    "Taylor": {**TAYLOR, "window_size": 0, "forget_gate": False, "feature_dim": 8},
    "window": {"window_size": 6, "num_sink_tokens": 1},
}
FAR, NEAR = "taylor_chunked", "window_merged"
CALLED = {"Taylor and window": {FAR, NEAR}, "Taylor": {FAR}, "window": {NEAR}}


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Names of the kernels that ran, for more than one token."""
    names = []

    def count(module, name):
        kernel = getattr(module, name)

        def counted(query, *arguments, **options):
            assert query.shape[2] > 1
            names.append(name)
            return kernel(query, *arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(taylor_triton, FAR)
    count(window_triton, NEAR)
    return names


@pytest.mark.parametrize("name, side", [("Taylor and window", "left"), ("Taylor", "middle"), ("window", "middle")])
def test_a_model_is_the_same_on_either_backend(name, side, called):
    """Logits and all gradients, for a padded batch."""
    model = tiny_model(MODELS[name], num_hidden_layers=1)
    input_ids, attention_mask = place([tokens(21), tokens(13)], side)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    results = []
    for backend in ("torch", "triton"):
        model.zero_grad()
        with kernel_backend(backend):
            output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            output.loss.backward()
        results.append((output.logits[attention_mask == 1], {n: p.grad for n, p in model.named_parameters()}))
    assert set(called) == CALLED[name]
    (logits, grads), (triton_logits, triton_grads) = results
    assert_close(triton_logits, logits)
    for parameter in grads:
        assert_close(triton_grads[parameter], grads[parameter], name=parameter)


def test_an_encoder_is_the_same_on_either_backend(called):
    model = tiny_model(
        MODELS["Taylor and window"], KermitForSequenceClassification, is_causal=False, num_hidden_layers=1, num_labels=3
    )
    input_ids, attention_mask = place([tokens(21), tokens(13)], "left")
    logits = []
    for backend in ("torch", "triton"):
        with kernel_backend(backend), torch.no_grad():
            logits.append(model(input_ids=input_ids, attention_mask=attention_mask).logits)
    assert sorted(called) == [FAR, FAR, NEAR]  # the memory goes forwards and backwards over the text
    assert_close(*logits)


def test_generation_goes_on_from_what_the_kernels_left(called):
    """The prompt is the kernels', the single tokens after it are torch's; a chunk later on is the kernels' again."""
    model = tiny_model(MODELS["Taylor and window"], num_hidden_layers=1)
    prompt, more = tokens(1, 15), tokens(1, 9)
    logits, texts = [], []
    for backend in ("torch", "triton"):
        with kernel_backend(backend), torch.no_grad():
            first = model.generate(prompt, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            texts.append(first.sequences)
            continued = torch.cat([first.sequences[:, -1:], more], 1)
            logits.append(model(continued, past_key_values=first.past_key_values).logits)
    assert set(called) == {FAR, NEAR} and len(called) >= 4
    assert torch.equal(*texts)
    assert_close(*logits)


def test_dropout_is_torch_s(called):
    """The kernel has none; with it the near field is torch's, of which dropout takes out weights."""
    model = tiny_model(MODELS["window"], num_hidden_layers=1, attention_dropout=0.5).train()
    input_ids = tokens(1, 20)
    logits = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        with kernel_backend(backend), torch.no_grad():
            logits.append(model(input_ids).logits)
    assert_close(*logits)


def test_torch_compile_gets_the_torch_forms(called):
    """It cannot look into the interpreter."""
    model = tiny_model(MODELS["Taylor and window"], num_hidden_layers=1)
    input_ids = tokens(1, 20)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("triton"):
            assert_close(torch.compile(model, backend="aot_eager")(input_ids).logits, expected)
    assert not called
