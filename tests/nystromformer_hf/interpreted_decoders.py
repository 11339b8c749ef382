"""Whole models on the Triton backend, run by Triton's interpreter on a CPU as `interpreted_landmarks` is.

python -m pytest tests/nystromformer_hf/interpreted_decoders.py      # on a CUDA device, compiled
"""

import pytest
import torch
from transformers import StaticCache

from nystromformer_hf import kernel_backend
from tests.nystromformer_hf.decoder_models import place, tiny_model, tokens
from tests.nystromformer_hf.interpreted_landmarks import HISTORY, TEXT, assert_close, called


pytestmark = pytest.mark.usefixtures("on_kernel_device")
assert called  # a fixture, of every test


@pytest.mark.parametrize("side", ["left", "middle", "right"])
@pytest.mark.parametrize("setting", ["pooled", "pooled_bare", "regularized_conv", "longer_than_text"])
def test_a_model_is_the_same_on_either_backend(setting, side, called):
    """Logits and all gradients, for a padded batch."""
    model = tiny_model(setting, num_hidden_layers=1).train()
    input_ids, attention_mask = place([tokens(21), tokens(13)], side)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    results = []
    for backend in ("torch", "triton"):
        model.zero_grad()
        with kernel_backend(backend):
            output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            output.loss.backward()
        results.append((output.logits[attention_mask == 1], {n: p.grad for n, p in model.named_parameters()}))
    assert set(called) == ({TEXT, HISTORY} if setting == "regularized_conv" else {TEXT})
    (logits, grads), (triton_logits, triton_grads) = results
    assert_close(triton_logits, logits)
    for parameter in grads:
        assert_close(triton_grads[parameter], grads[parameter], name=parameter)


@pytest.mark.parametrize("setting", ["pooled_conv", "regularized"])
def test_generation_goes_on_from_what_the_kernels_left(setting, called):
    """The prompts are the kernels', the single tokens after them are torch's; a chunk later on is the kernels' again."""
    model = tiny_model(setting)
    (prompts, mask), more = place([tokens(15), tokens(9)], "left"), tokens(2, 9)
    logits, texts = [], []
    for backend in ("torch", "triton"):
        called.clear()
        with kernel_backend(backend), torch.no_grad():
            first = model.generate(
                prompts, attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
            )
            texts.append(first.sequences)
            continued = torch.cat([first.sequences[:, -1:], more], 1)
            longer = torch.cat([mask, mask.new_ones(2, 3 + more.shape[1])], 1)
            logits.append(model(continued, attention_mask=longer, past_key_values=first.past_key_values).logits)
    assert called.count(TEXT) == 2 * model.config.num_hidden_layers
    assert torch.equal(*texts)
    assert_close(*logits)


def test_a_static_cache_is_filled_alike(called):
    model, prompt = tiny_model("pooled_conv"), tokens(1, 25)
    logits = []
    for backend in ("torch", "triton"):
        cache = StaticCache(config=model.config, max_cache_len=40)
        with kernel_backend(backend), torch.no_grad():
            first = model(prompt[:, :20], past_key_values=cache).logits
            logits.append(torch.cat([first, model(prompt[:, 20:], past_key_values=cache).logits], 1))
    assert called.count(TEXT) == 2 * model.config.num_hidden_layers
    assert_close(*logits)


def test_explicit_weights_are_torch_s(called):
    model = tiny_model("pooled", implementation="eager")
    with kernel_backend("triton"), torch.no_grad():
        assert model(tokens(1, 20), output_attentions=True).attentions[0] is not None
    assert called == []


def test_torch_compile_gets_the_torch_forms(called):
    """It cannot look into the interpreter."""
    model, input_ids = tiny_model("regularized_conv", num_hidden_layers=1), tokens(1, 20)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("triton"):
            assert_close(torch.compile(model, backend="aot_eager")(input_ids).logits, expected)
    assert called == []
