"""The convolution of queries, keys and values = `conv1d`, whatever lies outside of the text, with all gradients."""

import pytest
import torch
import torch.nn.functional as F

from kermit_hf import depthwise_conv as module
from kermit_hf.depthwise_conv import depthwise_conv
from tests.kermit_hf.test_kernel_attention import assert_close
from tests.kermit_hf.tiny_models import tiny_model, tokens


BORDERS = [(3, 0), (2, 1), (0, 0), (0, 3), (3, 3)]


def inputs(batch: int, length: int, channels: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """States and the weights of four taps."""
    shapes = (batch, length, channels), (channels, 1, 4)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def reference(states: torch.Tensor, weight: torch.Tensor, behind: int, ahead: int) -> torch.Tensor:
    return F.conv1d(F.pad(states.mT, (behind, ahead)), weight, groups=len(weight)).mT


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("length", [4, 5, 30, 600])
def test_outputs_and_gradients_are_those_of_conv1d(borders, length):
    leaves = inputs(2, length, 6)
    ours, target = depthwise_conv(*leaves, *borders), reference(*leaves, *borders)
    assert ours.shape == target.shape
    assert_close(ours, target, 1e-12)
    weights = torch.randn_like(target)
    grads = [torch.autograd.grad((output * weights).sum(), leaves) for output in (ours, target)]
    for result, expected in zip(*grads, strict=True):
        assert_close(result, expected, 1e-12)


@pytest.mark.parametrize("borders", BORDERS)
def test_the_second_derivative(borders):
    assert torch.autograd.gradgradcheck(lambda *leaves: depthwise_conv(*leaves, *borders), inputs(1, 5, 2))


def test_a_text_shorter_than_the_taps():
    states, weight = inputs(1, 1, 3)
    output = depthwise_conv(states, weight, 3, 0)
    assert torch.equal(output, states * weight[:, 0, -1])
    assert_close(torch.autograd.grad(output.sum(), weight)[0][:, 0, -1], states[0, 0], 1e-12)


def test_only_the_gradients_that_are_asked_for(monkeypatch):
    states, weight = inputs(2, 20, 6)
    monkeypatch.setattr(module, "_correlate", lambda *_: pytest.fail("nobody wants the gradient of these weights"))
    expected = torch.autograd.grad(reference(states, weight.detach(), 3, 0).square().sum(), states)
    assert_close(
        torch.autograd.grad(depthwise_conv(states, weight.detach(), 3, 0).square().sum(), states)[0], *expected, 1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_stay_next_to_each_other(dtype):
    """Heads are then read as they lie, without a copy."""
    states, weight = inputs(2, 70, 32, dtype)
    output = depthwise_conv(states, weight, 3, 0)
    assert output.stride(-1) == 1
    grads = torch.autograd.grad(output.sum(), (states, weight))
    assert grads[0].stride(-1) == 1
    exact = [leaf.detach().double().requires_grad_() for leaf in (states, weight)]
    targets = torch.autograd.grad(reference(*exact, 3, 0).sum(), exact)
    # Rounding of one number: of a sum of 280 in float32, of the result in bfloat16.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    for result, target in zip((output, *grads), (reference(*exact, 3, 0), *targets), strict=True):
        assert result.dtype == dtype
        assert_close(result, target, tolerance)


def test_autocast_trains_weights_in_float32():
    states, weight = inputs(2, 30, 16, torch.float32)
    grads = []
    for convolve in (depthwise_conv, reference):
        with torch.autocast("cpu", torch.bfloat16):
            output = convolve(states, weight, 3, 0)
        assert output.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(output.float().square().sum(), (states, weight)))
    for result, target in zip(*grads, strict=True):
        assert result.dtype == torch.float32
        assert_close(result, target, 2**-6)


def test_torch_compile_gets_an_operator_of_torch(monkeypatch):
    monkeypatch.setattr(module._DepthwiseConv, "apply", lambda *_: pytest.fail("the compiler knows conv1d"))
    states, weight = (leaf.detach().float() for leaf in inputs(1, 20, 4))
    compiled = torch.compile(depthwise_conv, fullgraph=True, backend="eager")
    assert_close(compiled(states, weight, 3, 0), reference(states, weight, 3, 0), 1e-6)


@torch.no_grad()
def test_a_model_hands_heads_on_as_they_lie(monkeypatch):
    """Queries, keys and values reach the attention with the coordinates of a head next to each other."""
    strides = []

    def attend(query, slots, *_, **options):
        strides.extend(states.stride(-1) for states in (query, slots.keys, slots.values))
        return kermit_attention(query, slots, *_, **options)

    from kermit_hf import attention_layers

    kermit_attention = attention_layers.kermit_attention
    monkeypatch.setattr(attention_layers, "kermit_attention", attend)
    model = tiny_model("delta")
    assert model.config.conv_kernel_size
    model(tokens(1, 40), use_cache=False)
    assert set(strides) == {1}


@torch.no_grad()
def test_a_cache_changes_no_bit():
    model, input_ids = tiny_model("delta"), tokens(1, 70)
    assert torch.equal(model(input_ids, use_cache=True).logits, model(input_ids, use_cache=False).logits)
