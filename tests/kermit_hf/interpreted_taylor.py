"""The far field with Taylor features in Triton, run by Triton's interpreter on a CPU. Not collected by itself: the
interpreter has to be chosen before triton is imported, so `test_triton_kernels` runs this file in a process of its own.

    python -m pytest tests/kermit_hf/interpreted_taylor.py      # on a CUDA device, compiled

Errors are relative to the largest entry of what is expected. bfloat16 keeps 8 bits and the interpreter cuts off the rest
instead of rounding, so a product of two is off by up to 1 in 64 and sums of them by less; the bound is 2e-2.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from kermit_hf import taylor_triton
from kermit_hf.feature_maps import TaylorFeatureMap
from kermit_hf.kernel_attention import KernelMemory
from kermit_hf.taylor_triton import taylor_chunked
from tests.kermit_hf import oracles
from tests.kermit_hf.test_kernel_attention import Written, assert_close


pytestmark = pytest.mark.usefixtures("on_kernel_device")

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-3}


class Case(NamedTuple):
    """Sizes and which arguments there are."""

    length: int
    coordinates: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    gated: bool = False
    memory: bool = False
    padded: bool = False
    chunk_size: int | None = None

    @property
    def num_features(self) -> int:
        return 1 + self.coordinates + self.coordinates * (self.coordinates + 1) // 2


def make_inputs(case: Case) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Arguments by name, the first memory as matrix and normalizer, and the mask."""
    batch, kv_heads, length = case.batch, case.kv_heads, case.length
    tensors = {
        "query": torch.randn(batch, case.heads, length, case.coordinates).to(case.dtype),
        "key": torch.randn(batch, kv_heads, length, case.coordinates).to(case.dtype),
        "value": torch.randn(batch, kv_heads, length, case.head_dim).to(case.dtype),
    }
    key_mask = (torch.arange(length) >= torch.randint(1, length // 2, (batch, 1, 1))) if case.padded else None
    if case.gated:
        log_forget = F.logsigmoid(2 + torch.randn(batch, kv_heads, length))
        tensors["log_forget"] = log_forget if key_mask is None else log_forget * key_mask
    if case.memory:
        tensors["matrix"] = torch.randn(batch, kv_heads, case.num_features, case.head_dim)
        tensors["normalizer"] = torch.rand(batch, kv_heads, case.num_features) + 1
    return tensors, key_mask


def run(tensors: dict[str, torch.Tensor], key_mask: torch.Tensor | None, chunk_size: int | None = None):
    """numerator, denominator, matrix, normalizer, by the kernels."""
    arguments = dict(tensors)
    memory = KernelMemory(arguments.pop("matrix"), arguments.pop("normalizer")) if "matrix" in tensors else None
    read = taylor_chunked(**arguments, memory=memory, key_mask=key_mask, chunk_size=chunk_size)
    return read.numerator, read.denominator, *read.memory


def expected(tensors: dict[str, torch.Tensor], key_mask: torch.Tensor | None):
    """The same by the recurrence in float64, each query head on its own."""
    groups = tensors["query"].shape[1] // tensors["key"].shape[1]
    coordinates = tensors["key"].shape[-1]
    feature_map = TaylorFeatureMap(coordinates, coordinates, 1, 1)
    query, key = feature_map.forward_queries(tensors["query"])[0], feature_map.forward_keys(tensors["key"])
    if key_mask is not None:
        key = key * key_mask[..., None]
    shared = {name: tensor.repeat_interleave(groups, 1) for name, tensor in {**tensors, "key": key}.items()}
    forget = shared["log_forget"].exp() if "log_forget" in shared else None
    memory = shared.get("matrix"), shared.get("normalizer")
    read = oracles.recurrence("additive", query, shared["key"], shared["value"], forget, None, *memory)
    matrix, normalizer = read.matrix[:, ::groups, -1], read.normalizer[:, ::groups, -1]
    return read.numerator, read.denominator, matrix, normalizer


CASES = {
    "one chunk": Case(37, 4, 8),
    "several chunks": Case(129, 16, 32, chunk_size=64, memory=True),
    "everything": Case(85, 16, 32, batch=2, heads=2, kv_heads=1, gated=True, memory=True, padded=True, chunk_size=64),
    "odd sizes, no memory": Case(71, 5, 24, heads=3, kv_heads=1, gated=True, chunk_size=64),
    "padding alone": Case(67, 6, 16, batch=2, padded=True, chunk_size=64),
    "large heads": Case(33, 16, 128, gated=True, memory=True),
    "one token": Case(1, 16, 64, gated=True, memory=True),
    "bfloat16": Case(101, 16, 64, torch.bfloat16, heads=2, kv_heads=1, chunk_size=64, memory=True),
    "bfloat16, gated": Case(77, 16, 64, torch.bfloat16, gated=True, memory=True, padded=True, chunk_size=64),
    "bfloat16, large heads": Case(35, 16, 128, torch.bfloat16, gated=True),
    "float16": Case(35, 8, 32, torch.float16, gated=True),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_follow_the_recurrence(name):
    case = CASES[name]
    tensors, key_mask = make_inputs(case)
    ours = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    outputs, targets = run(ours, key_mask, case.chunk_size), expected(exact, key_mask)
    tolerance = TOLERANCE[case.dtype]
    for part, output, target in zip(
        ("numerator", "denominator", "matrix", "normalizer"), outputs, targets, strict=True
    ):
        assert output.dtype == torch.float32
        assert_close(output, target, tolerance, part)
    weights = [torch.randn(target.shape, dtype=torch.float64) for target in targets]
    grads = [
        torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), inputs)
        for parts, inputs in ((outputs, list(ours.values())), (targets, list(exact.values())))
    ]
    for name, grad, target in zip(tensors, *grads, strict=True):
        assert grad.dtype == tensors[name].dtype
        assert_close(grad, target, tolerance, f"gradient of {name}")


def test_the_default_dtype_changes_nothing():
    """What a script sets for its models says nothing about the kernels' constants."""
    taylor_triton._expansion.cache_clear()
    tensors, _ = make_inputs(Case(20, 3, 8))
    torch.set_default_dtype(torch.bfloat16)
    try:
        outputs = run(tensors, None)
    finally:
        torch.set_default_dtype(torch.float32)
    for output, target in zip(outputs, expected({k: t.double() for k, t in tensors.items()}, None), strict=True):
        assert_close(output, target)


def test_chunks_that_do_not_fit_tiles_are_refused():
    tensors, _ = make_inputs(Case(9, 4, 8))
    with pytest.raises(ValueError, match="chunk_size=48 does not fit tiles of tokens; allowed are multiples of 64"):
        run(tensors, None, 48)


@pytest.mark.parametrize("gated", [False, True])
def test_later_tokens_change_nothing_before_them(gated):
    """Bit for bit, inside a chunk and across chunks, and their gradient is exactly zero."""
    tensors, _ = make_inputs(Case(90, 4, 8, gated=gated, chunk_size=64))
    for seen in (20, 70):
        changed = {
            name: torch.cat([t[:, :, :seen], torch.randn_like(t[:, :, seen:]) - 5], 2) for name, t in tensors.items()
        }
        leaves = {name: tensor.requires_grad_() for name, tensor in changed.items()}
        before, after = run(tensors, None, 64), run(leaves, None, 64)
        assert torch.equal(before[0][:, :, :seen], after[0][:, :, :seen])
        assert torch.equal(before[1][:, :, :seen], after[1][:, :, :seen])
        early = after[0][:, :, :seen].sum() + after[1][:, :, :seen].sum()
        for name, grad in zip(leaves, torch.autograd.grad(early, list(leaves.values())), strict=True):
            assert grad[:, :, seen:].count_nonzero() == 0, name
            assert grad[:, :, :seen].count_nonzero() > 0, name


def test_a_text_read_in_two_parts_is_the_text():
    tensors, _ = make_inputs(Case(90, 4, 8, gated=True))
    whole = run(tensors, None, 64)
    first = run({name: tensor[:, :, :41] for name, tensor in tensors.items()}, None)
    rest = {name: tensor[:, :, 41:] for name, tensor in tensors.items()}
    second = run({**rest, "matrix": first[2], "normalizer": first[3]}, None)
    assert_close(torch.cat([first[0], second[0]], 2), whole[0])
    assert_close(second[2], whole[2])
    assert_close(second[3], whole[3])


def test_padding_leaves_the_memory_exactly_as_it_was():
    tensors, _ = make_inputs(Case(40, 4, 8, gated=True, memory=True))
    tensors["log_forget"].zero_()
    *_, matrix, normalizer = run(tensors, torch.zeros(1, 1, 40))
    assert torch.equal(matrix, tensors["matrix"]) and torch.equal(normalizer, tensors["normalizer"])


def test_gates_of_very_different_size_are_all_counted():
    """A nearly closed gate, next to which a nearly open one is lost in the digits of one cumulative sum."""
    tensors, _ = make_inputs(Case(100, 4, 8, gated=True, memory=True))
    tensors["log_forget"] = torch.where(torch.arange(100) % 10 == 0, -35.0, -1e-3).expand(1, 1, 100).clone()
    for output, target in zip(
        run(tensors, None), expected({k: t.double() for k, t in tensors.items()}, None), strict=True
    ):
        assert_close(output, target)


@pytest.mark.parametrize("gated", [False, True])
def test_no_tensor_holds_the_features(gated):
    case = Case(192, 16, 16, gated=gated)
    tensors, _ = make_inputs(case)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    sizes = []
    with Recorded(sizes):
        numerator, denominator, *_ = run(leaves, None, 64)
        (numerator.sum() + denominator.sum()).backward()
    assert max(sizes) < 4 * case.length * case.num_features / 2


class Recorded(Written):
    """Notes the bytes of all tensors, memory that is only allocated included."""

    def __init__(self, sizes: list[int]):
        super().__init__(None)
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        parts = result if isinstance(result, (tuple, list)) else (result,)
        self.sizes.extend(part.nbytes for part in parts if isinstance(part, torch.Tensor))
        return result
