"""The near field in Triton, run by Triton's interpreter on a CPU as `interpreted_taylor` is, with the same bounds.

python -m pytest tests/kermit_hf/interpreted_window.py      # on a CUDA device, compiled
"""

from typing import NamedTuple

import pytest
import torch

from kermit_hf.window_attention import FarField, Sinks, window_reference
from kermit_hf.window_triton import window_merged
from tests.kermit_hf.test_kernel_attention import assert_close


pytestmark = pytest.mark.usefixtures("on_kernel_device")

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-3}


class Case(NamedTuple):
    """Sizes and which parts there are; `slots` are the keys, of which the last `length` belong to the queries."""

    length: int
    slots: int
    head_dim: int
    window: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    sinks: int = 0
    far: bool = False
    padded: bool = False
    is_causal: bool = True


CASES = {
    "near field alone": Case(37, 37, 8, 8),
    "everything": Case(70, 90, 16, 9, batch=2, heads=4, kv_heads=2, sinks=3, far=True, padded=True),
    "both ways": Case(70, 70, 16, 9, batch=2, heads=2, kv_heads=1, sinks=2, far=True, padded=True, is_causal=False),
    "wide window": Case(40, 140, 32, 100, far=True),
    "window of one": Case(5, 33, 24, 1, batch=2, sinks=1, far=True, padded=True),
    "one query": Case(1, 50, 16, 20, sinks=2, far=True),
    "large heads": Case(35, 35, 128, 20, sinks=4, far=True),
    "bfloat16": Case(100, 100, 64, 40, torch.bfloat16, heads=2, kv_heads=1, sinks=4, far=True),
    "bfloat16, large heads": Case(35, 40, 128, 20, torch.bfloat16, sinks=4, far=True),
    "float16": Case(35, 35, 32, 20, torch.float16, far=True),
}


def make_inputs(case: Case) -> tuple[dict[str, torch.Tensor], int | torch.Tensor]:
    """Tensors by name, and the first real slot. Some queries see no far field, or not all sinks."""
    queries, keys = (case.batch, case.heads, case.length), (case.batch, case.kv_heads, case.slots)
    tensors = {
        "query": 1.5 * case.head_dim**-0.5 * torch.randn(*queries, case.head_dim),
        "key": torch.randn(*keys, case.head_dim),
        "value": torch.randn(*keys, case.head_dim),
    }
    tensors = {name: tensor.to(case.dtype) for name, tensor in tensors.items()}
    if case.sinks:
        logits = torch.randn(*queries, case.sinks)
        tensors["sink_logits"] = logits.masked_fill(torch.rand(logits.shape) < 0.3, float("-inf"))
        tensors["sink_values"] = torch.randn(case.batch, case.kv_heads, case.sinks, case.head_dim)
    if case.far:
        logits = torch.randn(queries)
        tensors["far_value"] = torch.randn(*queries, case.head_dim)
        tensors["far_logit"] = logits.masked_fill(torch.rand(logits.shape) < 0.3, float("-inf"))
    return tensors, torch.randint(1, case.slots // 2, (case.batch,)) if case.padded else 0


def attend(window, tensors: dict[str, torch.Tensor], case: Case, first_real: int | torch.Tensor) -> torch.Tensor:
    sinks = Sinks(tensors["sink_logits"], tensors["sink_values"]) if case.sinks else None
    far = FarField(tensors["far_value"], tensors["far_logit"]) if case.far else None
    states = tensors["query"], tensors["key"], tensors["value"]
    return window(*states, case.window, first_real, sinks, far, case.is_causal).output


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(name):
    """In float64."""
    case = CASES[name]
    tensors, first_real = make_inputs(case)
    ours = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    output, target = attend(window_merged, ours, case, first_real), attend(window_reference, exact, case, first_real)
    assert output.dtype == torch.float32
    assert_close(output, target, TOLERANCE[case.dtype])
    weights = torch.randn(target.shape, dtype=torch.float64)
    grads = torch.autograd.grad((output * weights).sum(), list(ours.values()))
    targets = torch.autograd.grad((target * weights).sum(), list(exact.values()))
    for name, grad, wanted in zip(tensors, grads, targets, strict=True):
        assert grad.dtype == tensors[name].dtype
        assert_close(grad, wanted, TOLERANCE[case.dtype], f"gradient of {name}")


def test_first_real_slots_may_lie_apart_in_memory():
    """As a column of a matrix, already in the kernels' dtype."""
    case = CASES["everything"]
    tensors, first_real = make_inputs(case)
    first_real = first_real.int()
    apart = torch.stack([first_real, first_real + 30], 1)[:, 0]
    expected, output = (attend(window_merged, tensors, case, slots) for slots in (first_real, apart))
    assert torch.equal(output, expected)


def test_no_query_sees_beyond_its_window():
    """Bit for bit, and without a gradient."""
    case = Case(90, 90, 8, 10)
    tensors, _ = make_inputs(case)
    before = attend(window_merged, tensors, case, 0)
    for name in ("key", "value"):
        changed = tensors[name].clone()
        changed[:, :, 51:] += 1
        changed[:, :, :41] += 1
        leaf = changed.requires_grad_()
        after = attend(window_merged, {**tensors, name: leaf}, case, 0)
        assert torch.equal(after[:, :, 50], before[:, :, 50])
        (grad,) = torch.autograd.grad(after[:, :, 50].sum(), leaf)
        assert grad[:, :, :41].count_nonzero() == grad[:, :, 51:].count_nonzero() == 0
        assert grad[:, :, 41:51].count_nonzero() > 0


def test_large_logits_do_not_overflow():
    case = Case(40, 40, 8, 10, sinks=2, far=True)
    tensors, _ = make_inputs(case)
    tensors = {name: 300 * tensor if "value" not in name else tensor for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    # Scores of up to 1e6 are known to about 0.1 in float32, which decides between close ones.
    output, target = (attend(window, t, case, 0) for window, t in ((window_merged, tensors), (window_reference, exact)))
    assert output.isfinite().all()
    assert ((output - target).abs().amax(-1) < 1e-2).float().mean() > 0.9
