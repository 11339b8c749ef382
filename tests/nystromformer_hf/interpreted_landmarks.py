"""Causal Nyström attention in Triton, run by Triton's interpreter on a CPU. Not collected by itself: the interpreter has to be
chosen before triton is imported, so `test_triton_kernels` runs this file in a process of its own.

    python -m pytest tests/nystromformer_hf/interpreted_landmarks.py      # on a CUDA device, compiled

Errors are relative to the largest entry of what is expected. bfloat16 keeps 8 bits and the interpreter cuts off the rest
instead of rounding, so a product of two is off by up to 1 in 64 and sums of them by less; the bound is 2e-2.
"""

from typing import NamedTuple

import pytest
import torch

from nystromformer_hf import causal_nystrom_attention, kernel_backend, landmark_triton
from nystromformer_hf.cache_nystromformer_hf_decoder import NystromformerHFDecoderCacheLayer
from nystromformer_hf.causal_nystrom_attention import (
    causal_nystrom_blocked,
    causal_nystrom_reference,
    context_of_whole_text,
    extend_landmarks,
)


pytestmark = pytest.mark.usefixtures("on_kernel_device")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-3}
TEXT, HISTORY = "landmark_attention", "history_attention"


class Case(NamedTuple):
    """Sizes. lengths: new tokens of each row; past: tokens of each row before them, in a cache."""

    lengths: tuple[int, ...]
    segment_size: int
    near_segments: int = 1
    sinks: int = 0
    past: tuple[int, ...] = ()
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    regularized: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def gamma(self) -> torch.Tensor | None:
        return torch.linspace(1.5, 3.0, self.heads) if self.regularized else None

    @property
    def real(self) -> torch.Tensor:
        """(batch, 1, seq, 1): which queries are no padding."""
        return (torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None])[:, None, :, None]


CASES = {
    "whole text": Case((70, 70), 4, sinks=2, heads=4, kv_heads=2),
    "no sinks": Case((53,), 5, 2, kv_heads=2, head_dim=24),
    "segments of one token": Case((45,), 1, sinks=3),
    "no landmarks": Case((40,), 30, 2, sinks=1),
    "shorter than a segment": Case((30,), 100, sinks=4),
    "not even all sinks": Case((3,), 4, sinks=5),
    "gradients in parts": Case((300,), 2, sinks=4),
    "large segments": Case((130,), 48, sinks=1),
    "regularized": Case((70, 70), 4, sinks=2, heads=4, kv_heads=2, regularized=True),
    "behind a past": Case((33,), 4, 2, sinks=2, past=(38,), heads=4, kv_heads=2, regularized=True),
    "one token behind a past": Case((1,), 4, sinks=2, past=(39,), regularized=True),
    "rows": Case((30, 11), 3, 2, sinks=2, past=(17, 40), heads=4, kv_heads=2),
    "rows, regularized": Case((30, 11), 3, sinks=2, past=(1, 40), heads=4, kv_heads=2, regularized=True),
    "large heads": Case((50,), 4, 2, sinks=2, head_dim=128),
    "bfloat16": Case((150,), 8, 2, sinks=4, head_dim=64, dtype=torch.bfloat16),
    "bfloat16, regularized": Case((100,), 4, sinks=4, head_dim=32, regularized=True, dtype=torch.bfloat16),
    "bfloat16, large heads": Case((50,), 4, 2, sinks=1, head_dim=128, dtype=torch.bfloat16),
    "float16": Case((50,), 4, 2, sinks=2, head_dim=16, dtype=torch.float16),
}


@pytest.fixture(autouse=True)
def called(monkeypatch) -> list[str]:
    """Names of the kernels that ran. The history is theirs however few landmarks read it."""
    names = []

    def count(name):
        attend = getattr(landmark_triton, name)

        def counted(*arguments):
            names.append(name)
            return attend(*arguments)

        monkeypatch.setattr(landmark_triton, name, counted)

    count(TEXT)
    count(HISTORY)
    monkeypatch.setattr(causal_nystrom_attention, "HISTORY_TILE", 0)
    return names


def make_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Queries, keys and values by name, those of the past first."""

    def draw(heads, length):
        return torch.randn(len(case.lengths), heads, length, case.head_dim).to(case.dtype)

    def states(prefix, length):
        heads = {"query": case.heads, "key": case.kv_heads, "value": case.kv_heads}
        return {prefix + name: draw(count, length) for name, count in heads.items()}

    return (states("past_", max(case.past)) if case.past else {}) | states("", max(case.lengths))


def leaves(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype or tensor.dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}


def attend(form, tensors: dict[str, torch.Tensor], case: Case, **options) -> torch.Tensor:
    """On the Triton backend; of the past, only the landmarks are."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    with kernel_backend("triton"):
        if case.past:
            context = fill_cache(tensors, case).context
        else:
            context = context_of_whole_text(query, key, value, case.sinks, case.regularized)
        gamma, scaling = case.gamma, case.head_dim**-0.5
        result = form(query, context, case.segment_size, case.near_segments, gamma, scaling, **options)
    return result.output


def fill_cache(tensors: dict[str, torch.Tensor], case: Case) -> NystromformerHFDecoderCacheLayer:
    """The layer of a cache, in which the new tokens stand behind the past, to be attended."""
    layer = NystromformerHFDecoderCacheLayer()
    layer.bind(
        segment_size=case.segment_size,
        near_segments=case.near_segments,
        num_sink_tokens=case.sinks,
        conv_kernel_size=None,
        regularized=case.regularized,
    )
    differ = len(case.past) > 1
    real = torch.arange(max(case.past)) < torch.tensor(case.past)[:, None]
    states = tensors["past_key"], tensors["past_value"], tensors["past_query"]
    layer.update(*states, real if differ else None)
    layer.store(extend_landmarks(layer.context, case.segment_size, case.gamma, case.head_dim**-0.5))
    states = tensors["key"], tensors["value"], tensors["query"]
    layer.update(*states, case.real[:, 0, :, 0] if differ else None)
    return layer


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(name, called):
    """In float64, for which there are no kernels."""
    case = CASES[name]
    tensors = make_inputs(case)
    ours, exact = leaves(tensors), leaves(tensors, torch.float64)
    columns = max(case.lengths) + (max(case.past) if case.past else 0)
    target = attend(causal_nystrom_reference, exact, case, num_tokens=columns).where(case.real, 0)
    assert called == []
    output = attend(causal_nystrom_blocked, ours, case)
    assert set(called) == ({TEXT, HISTORY} if case.regularized else {TEXT})
    assert output.dtype == torch.float32
    assert_close(output.where(case.real, 0), target, TOLERANCE[case.dtype])
    weights = torch.randn(target.shape, dtype=torch.float64) * case.real
    grads = torch.autograd.grad((output * weights).sum(), list(ours.values()), materialize_grads=True)
    targets = torch.autograd.grad((target * weights).sum(), list(exact.values()), materialize_grads=True)
    for name, grad, wanted in zip(ours, grads, targets, strict=True):
        assert grad.dtype == case.dtype
        assert_close(grad, wanted, TOLERANCE[case.dtype], f"gradient of {name}")


@pytest.mark.parametrize("regularized", [False, True])
def test_no_query_sees_a_later_token(regularized):
    """Bit for bit, and without a gradient."""
    case = Case((75,), 4, sinks=2, regularized=regularized)
    tensors = make_inputs(case)
    before = attend(causal_nystrom_blocked, tensors, case)
    for tensor in tensors.values():
        tensor[:, :, 51:] += 1
    changed = leaves(tensors)
    after = attend(causal_nystrom_blocked, changed, case)
    assert torch.equal(after[:, :, :51], before[:, :, :51])
    for index in (0, 1, 2, 17, 50):
        target = (after[:, :, index] * torch.randn_like(after[:, :, index])).sum()
        grads = torch.autograd.grad(target, list(changed.values()), retain_graph=True)
        assert all(grad[:, :, index + 1 :].count_nonzero() == 0 for grad in grads)
        # Each earlier value by itself, as a sink's, or through the landmark of its segment.
        assert (grads[-1][:, :, : index + 1].abs().amax((0, 1, 3)) > 0).all()


def test_large_logits_do_not_overflow():
    case = Case((60,), 4, sinks=2)
    tensors = make_inputs(case)
    tensors |= {name: 300 * tensors[name] for name in ("query", "key")}
    ours, exact = leaves(tensors), leaves(tensors, torch.float64)
    output, target = attend(causal_nystrom_blocked, ours, case), attend(causal_nystrom_reference, exact, case)
    # Scores of up to 1e6 are known to about 0.1 in float32, which decides between close ones.
    assert ((output - target).abs().amax(-1) < 1e-2).float().mean() > 0.9
    output.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in ours.values())


def test_dropout_is_torch_s(called):
    """The kernel has none."""
    case = Case((40,), 4, sinks=2)
    query, key, value = make_inputs(case).values()
    outputs = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        context = context_of_whole_text(query, key, value, case.sinks, case.regularized)
        with kernel_backend(backend):
            outputs.append(causal_nystrom_blocked(query, context, 4, 1, dropout=0.5).output)
    assert called == []
    assert torch.equal(*outputs)
