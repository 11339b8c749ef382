"""What we hand to flash-linear-attention's kernels, in which layout and with which constants: its own slow reference
functions, which run on a CPU, give our reference's results in their place."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kermit_hf import fla_kernels
from kermit_hf.kernel_attention import KernelMemory, additive_reference, delta_chunked, delta_reference
from tests.kermit_hf.test_kernel_attention import assert_close, make_inputs


FORMS = {
    "additive": (fla_kernels.fla_additive_chunked, additive_reference),
    "delta": (fla_kernels.fla_delta_chunked, delta_reference),
}
KERNELS = ("chunk_delta_rule", "chunk_gated_delta_rule", "chunk_simple_gla")


@pytest.fixture
def references(monkeypatch) -> list[str]:
    """Puts the package's references in the place of its kernels; the names of those that were called."""
    pytest.importorskip("fla.ops", reason="fla-core is not installed")
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla

    called = []

    def kernel(name):
        def reference(q, k, v, g=None, **arguments):
            # The kernels want this, of their inputs and their state.
            assert q.shape[2] == k.shape[2] == v.shape[2]
            assert q.shape[3] % 16 == v.shape[3] % 16 == 0
            assert q.dtype == k.dtype == v.dtype
            assert all(tensor.is_contiguous() for tensor in (q, k, v))
            called.append(name)
            naive = naive_recurrent_simple_gla if name == "chunk_simple_gla" else naive_recurrent_gated_delta_rule
            return naive(q=q, k=k, v=v, g=torch.zeros(q.shape[:3]) if g is None else g, **arguments)

        return reference

    monkeypatch.setattr(fla_kernels, "_kernel", kernel)
    return called


@pytest.mark.parametrize("rule, gated, memory", list(itertools.product(FORMS, (False, True), (False, True))))
def test_the_references_compute_our_rules(rule, gated, memory, references):
    """Outputs, last memory and all gradients; two query heads share a memory."""
    inputs = make_inputs(rule, gated, 21, memory=memory).to(torch.float32)
    fla_form, our_form = FORMS[rule]
    results = []
    for form in (fla_form, our_form):
        first = KernelMemory(inputs.tensors["matrix"], inputs.tensors.get("normalizer")) if memory else None
        read = form(**inputs.rule_arguments(), memory=first)
        parts = [part for part in (read.numerator, read.denominator, *read.memory) if part is not None]
        torch.manual_seed(1)
        loss = sum((part * torch.randn(part.shape)).sum() for part in parts)
        results.append(parts + list(torch.autograd.grad(loss, list(inputs.tensors.values()))))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, expected)
    delta = "chunk_gated_delta_rule" if gated else "chunk_delta_rule"
    assert references == ["chunk_simple_gla" if rule == "additive" else delta]


@pytest.mark.parametrize("rule", FORMS)
def test_half_precision_goes_in_and_single_precision_comes_out(rule, references):
    inputs = make_inputs(rule, True, 9, memory=False).to(torch.bfloat16)
    arguments = {name: tensor.detach() for name, tensor in inputs.rule_arguments().items()}
    gates = {name: arguments[name].float() for name in ("log_forget", "write_strength") if name in arguments}
    read = FORMS[rule][0](**{**arguments, **gates})
    expected = FORMS[rule][1](**{**arguments, **gates, "value": arguments["value"].float()})
    assert read.numerator.dtype == read.memory.matrix.dtype == torch.float32
    assert_close(read.numerator, expected.numerator, 2e-2)


def test_padding_leaves_the_memory_as_it_was(references):
    inputs = make_inputs("additive", True, 9).to(torch.float32)
    arguments = inputs.rule_arguments()
    arguments |= {name: torch.zeros_like(arguments[name]) for name in ("key", "log_forget")}
    memory = KernelMemory(inputs.tensors["matrix"], inputs.tensors["normalizer"])
    read = fla_kernels.fla_additive_chunked(**arguments, memory=memory)
    assert all(torch.equal(now, before) for now, before in zip(read.memory, memory, strict=True))


def test_more_features_than_the_kernels_take_are_ours():
    query = F.normalize(torch.randn(1, 1, 5, fla_kernels.MAX_DELTA_FEATURES + 1), dim=-1)
    value, strength = torch.randn(1, 1, 5, 4), torch.rand(1, 1, 5)
    read = fla_kernels.fla_delta_chunked(query, query, value, strength)
    assert torch.equal(read.numerator, delta_chunked(query, query, value, strength).numerator)


@pytest.mark.parametrize("name", KERNELS)
def test_the_package_has_the_kernels(name):
    pytest.importorskip("fla.ops", reason="fla-core is not installed")
    assert callable(fla_kernels._kernel(name))
