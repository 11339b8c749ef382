"""The feature map "favor" in C++: features, log scales and gradients of PyTorch's in float64, from any layout."""

import pytest
import torch

from kermit_hf import FEATURE_MAPS, backends, favor_cpu, kermit_attention, kernel_backend
from kermit_hf.cpu_kernels import cpu_misfit
from tests.kermit_hf.test_kernel_attention import assert_close
from tests.kermit_hf.tiny_models import tiny_model, tokens
from tests.threads import assert_equal_on_any_number_of_threads


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=f"kernels for CPUs cannot run: {MISFIT}")

# Of the largest entry: exponents of about ten, whose rounding the exponential multiplies.
TOLERANCE = 1e-5


def favor(head_dim: int, features: int | None = None) -> torch.nn.Module:
    return FEATURE_MAPS["favor"](head_dim, features, 2, 2)


def features_and_gradient(states: torch.Tensor, feature_map, map_states) -> list[torch.Tensor]:
    """Features, log scales if any, and the gradient of a random projection of both."""
    states = states.detach().requires_grad_()
    outputs = map_states(states)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    random = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=random, dtype=torch.float64)).sum() for out in outputs)
    return [*outputs, *torch.autograd.grad(loss, [states])]


def assert_like_torch(states: torch.Tensor, feature_map) -> None:
    """states: float32, (batch, heads, seq, head_dim)."""
    ours = (
        lambda states: favor_cpu.favor_queries(states, feature_map.directions),
        lambda states: favor_cpu.favor_keys(states, feature_map.directions),
    )
    theirs = feature_map.forward_queries, feature_map.forward_keys
    for our_map, their_map in zip(ours, theirs, strict=True):
        expected = features_and_gradient(states.double(), feature_map, their_map)
        actual = features_and_gradient(states, feature_map, our_map)
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype == torch.float32
            assert_close(one, other, TOLERANCE)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 96, 97, 200])
def test_any_length(length):
    assert_like_torch(torch.randn(2, 3, length, 16), favor(16))


@pytest.mark.parametrize("head_dim, features", [(6, 12), (10, 21), (64, 128), (3, 5)])
def test_any_size(head_dim, features):
    assert_like_torch(torch.randn(1, 2, 30, head_dim), favor(head_dim, features))


def test_results_do_not_depend_on_the_number_of_threads():
    feature_map, states = favor(16), torch.randn(2, 3, 500, 16)

    def map_keys(states):
        return favor_cpu.favor_keys(states, feature_map.directions)

    assert_equal_on_any_number_of_threads(lambda: features_and_gradient(states, feature_map, map_keys))


def test_any_layout():
    feature_map = favor(16)
    assert_like_torch(torch.randn(2, 40, 3, 16).transpose(1, 2), feature_map)
    assert_like_torch(torch.randn(2, 3, 16, 40).mT, feature_map)


def test_features_that_are_clamped():
    """Far from all directions there is nothing left of a key, and along a direction its feature is e^60 at most."""
    feature_map = favor(4, 4)
    keys = torch.stack([20 * torch.ones(4), torch.zeros(4), feature_map.directions[0]]).expand(1, 1, 3, 4).clone()
    feature_map.directions[0] *= 100
    ours = features_and_gradient(keys, feature_map, lambda keys: favor_cpu.favor_keys(keys, feature_map.directions))
    theirs = features_and_gradient(keys.double(), feature_map, feature_map.forward_keys)
    assert theirs[0].min() == 0.0 and theirs[0].max() == torch.tensor(60.0).double().exp()
    for one, other in zip(ours, theirs, strict=True):
        for token in range(3):
            # Differences of numbers around 400, of which float32 has four decimals.
            assert_close(one[:, :, token], other[:, :, token], 1e-3)


def test_equal_exponents_share_the_gradient_of_their_scale():
    assert_like_torch(torch.zeros(1, 1, 2, 8), favor(8))


def test_no_tokens_whatever_their_strides():
    nothing = torch.empty(1, 2, 0, 1).expand(-1, -1, -1, 8)
    assert nothing.stride(-1) != 1
    assert favor_cpu.favor_keys(nothing, favor(8).directions).shape[:3] == (1, 2, 0)


def test_a_model_takes_it(monkeypatch):
    model, input_ids, called = tiny_model("additive_favor"), tokens(2, 70), []
    for name in ("favor_queries", "favor_keys"):
        form = getattr(favor_cpu, name)
        monkeypatch.setattr(
            favor_cpu, name, lambda *states, form=form, **more: called.append(1) or form(*states, **more)
        )
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids).logits
        assert not called
        with kernel_backend("cpp"):
            assert_close(model(input_ids).logits, expected)
    assert called


def test_a_text_in_segments_is_the_same_text(monkeypatch):
    """Each segment has its own slots, of which only the first one's hold the sinks: outputs and all gradients against PyTorch's of the
    whole text."""
    model, input_ids = tiny_model("additive_favor", window_size=8, num_sink_tokens=2), tokens(2, 70)
    random = torch.Generator().manual_seed(1)
    projection, found = torch.randn(2, 70, model.config.vocab_size, generator=random), {}
    for backend, segment in (("torch", 70), ("cpp", 16)):
        monkeypatch.setattr(kermit_attention, "_segment_size", lambda query, window_size, segment=segment: segment)
        model.zero_grad()
        with kernel_backend(backend):
            logits = model(input_ids, use_cache=False).logits
            (logits * projection).sum().backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        found[backend] = {"logits": logits.detach(), **grads}
    assert found["cpp"].keys() == found["torch"].keys()
    for name, ours in found["cpp"].items():
        assert_close(ours, found["torch"][name], 1e-4)


@pytest.mark.parametrize("update_rule, unit_norm", [("delta", True), ("additive", True)])
def test_directions_alone_stay_torch_s(update_rule, unit_norm):
    """Keys whose length does not count set their own scale."""
    feature_map = favor(8)
    feature_map.unit_norm = unit_norm
    states = torch.randn(1, 2, 5, 8)
    with kernel_backend("cpp"):
        maps = feature_map.map_queries, feature_map.map_keys
        kernel = backends.find_kernel(update_rule, *maps, states, states)
    assert kernel is None or (kernel.map_queries, kernel.map_keys) == maps
