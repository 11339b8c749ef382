"""Kernels in C++ that take parts of tensors by themselves, give these back whole and add to their gradients in place."""

import pytest
import torch

from kermit_hf import backends, kernel_backend
from kermit_hf.additive_cpu import additive_elu_of_parts
from kermit_hf.cpu_kernels import cpu_misfit
from kermit_hf.delta_cpu import delta_silu_of_parts
from kermit_hf.slots import Parts
from tests.kermit_hf.test_additive_cpu import before_the_map, elu_reference
from tests.kermit_hf.test_delta_cpu import mapped_reference
from tests.kermit_hf.test_kernel_attention import Inputs, assert_close, make_inputs
from tests.kermit_hf.tiny_models import place, tiny_model, tokens


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=f"kernels for CPUs cannot run: {MISFIT}")

FORMS = {"additive": additive_elu_of_parts, "delta": delta_silu_of_parts}
REFERENCES = {"additive": elu_reference, "delta": mapped_reference}
STATES = ("query", "key", "value")
TOLERANCE = 1e-5


def inputs_and_parts(rule: str, gated: bool, length: int, features: int, head_dim: int) -> tuple[Inputs, Parts]:
    """As many readers as tokens, in other slots; gates and memory of the tokens alone."""
    inputs = make_inputs(rule, gated, length, heads=4, kv_heads=2, features=features, head_dim=head_dim)
    inputs = before_the_map(inputs) if rule == "additive" else inputs
    parts = Parts(slice(5, length), slice(2, length - 3))
    tensors = {
        name: tensor[:, :, parts.tokens] if name in ("log_forget", "write_strength") else tensor
        for name, tensor in inputs.tensors.items()
    }
    return Inputs(tensors, rule).to(torch.float64), parts


def by_kernel(inputs: Inputs, parts: Parts) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What is read with the last memory, and the states to be used from then on."""
    read, rest = FORMS[inputs.rule](**inputs.rule_arguments(), parts=parts, memory=inputs.memory())
    return _outputs(read), list(rest)


def by_slices(inputs: Inputs, parts: Parts) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    arguments = inputs.rule_arguments()
    states = [arguments.pop(name) for name in STATES]
    read = REFERENCES[inputs.rule](*parts.of(*states), **arguments, memory=inputs.memory())
    return _outputs(read), states


def _outputs(read) -> list[torch.Tensor]:
    return [tensor for tensor in (read.numerator, read.denominator, *read.memory) if tensor is not None]


def gradients(inputs: Inputs, form, parts: Parts, uses: str, times: int = 1) -> list[dict[str, torch.Tensor]]:
    """Of a random projection of what is read, of functions of the rest, or of both."""
    read, rest = form(inputs, parts)
    random = torch.Generator().manual_seed(1)
    total = 0
    for name, used in (("part", read), ("rest", [tensor.sin() for tensor in rest])):
        for tensor in used:
            weights = torch.randn(tensor.shape, generator=random, dtype=torch.float64)
            total = total + (tensor * weights).sum() * (uses in (name, "both"))
    names, leaves = zip(*inputs.tensors.items(), strict=True)
    found = []
    for _ in range(times):
        found.append(dict(zip(names, torch.autograd.grad(total, leaves, retain_graph=True), strict=True)))
    return found


@pytest.mark.parametrize("rule", FORMS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length, features, head_dim", [(9, 8, 6), (70, 15, 20), (130, 16, 16), (420, 3, 1)])
def test_outputs_and_gradients_are_those_of_slices(rule, gated, length, features, head_dim):
    inputs, parts = inputs_and_parts(rule, gated, length, features, head_dim)
    single = inputs.to(torch.float32)
    (actual, rest), (expected, _) = by_kernel(single, parts), by_slices(inputs, parts)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, TOLERANCE)
    for name, ours in zip(STATES, rest, strict=True):
        assert torch.equal(ours, single.tensors[name])
    for uses in ("both", "part", "rest"):
        (actual,) = gradients(single, by_kernel, parts, uses)
        (expected,) = gradients(inputs, by_slices, parts, uses)
        for name, theirs in expected.items():
            assert_close(actual[name], theirs, TOLERANCE, f"gradient of {name}, {uses} used")


@pytest.mark.parametrize("rule", FORMS)
def test_what_is_not_used_gets_no_gradient_of_its_own(rule):
    """The rest alone, and the part alone, where autograd has no gradient of the other."""
    inputs, parts = inputs_and_parts(rule, True, 70, 8, 6)
    single = inputs.to(torch.float32)
    for chosen in (0, 1):
        found = []
        for each, form in ((single, by_kernel), (inputs, by_slices)):
            total = sum(tensor.sin().sum() for tensor in form(each, parts)[chosen])
            found.append(torch.autograd.grad(total, [each.tensors[name] for name in STATES]))
        for ours, theirs in zip(*found, strict=True):
            assert_close(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("rule", FORMS)
def test_a_graph_that_is_kept_gives_the_same_gradients_again(rule):
    inputs, parts = inputs_and_parts(rule, True, 70, 8, 6)
    first, second = gradients(inputs.to(torch.float32), by_kernel, parts, "both", times=2)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])


@pytest.mark.parametrize("rule", FORMS)
@pytest.mark.parametrize("frozen", [("query",), ("key", "value"), STATES])
def test_states_without_gradients_leave_those_of_others_as_they_are(rule, frozen):
    inputs, parts = inputs_and_parts(rule, True, 70, 8, 6)
    (expected,) = gradients(inputs, by_slices, parts, "both")
    single = inputs.to(torch.float32)
    for name in frozen:
        single.tensors[name].requires_grad_(False)
    read, rest = by_kernel(single, parts)
    random = torch.Generator().manual_seed(1)
    total = 0
    for tensor in (*read, *(tensor.sin() for tensor in rest)):
        total = total + (tensor * torch.randn(tensor.shape, generator=random, dtype=torch.float64)).sum()
    total.backward()
    for name, leaf in single.tensors.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, expected[name], TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("setting", ["delta", {"window_size": 8, "update_rule": "additive", "feature_map": "elu"}])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_model_in_training_takes_them_behind_its_window(setting, side, monkeypatch):
    model, called = tiny_model(setting), []
    rows = [tokens(70), tokens(70 if side is None else 41)]
    input_ids, mask = place(rows, side or "left")
    projection = torch.randn(2, 70, model.config.vocab_size) * mask[..., None]

    find = backends._find_in_cpp
    monkeypatch.setattr(backends, "_find_in_cpp", lambda *arguments: recording(find(*arguments), called))
    found = []
    for backend in ("torch", "cpp"):
        model.zero_grad()
        with kernel_backend(backend):
            logits = model(input_ids, attention_mask=mask, use_cache=False).logits
            (logits * projection).sum().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert len(called) == model.config.num_hidden_layers
    for name, theirs in found[0].items():
        assert_close(found[1][name], theirs, 1e-4, f"gradient of {name}")
    with torch.no_grad(), kernel_backend("cpp"):
        model(input_ids, attention_mask=mask, use_cache=False)
    assert len(called) == model.config.num_hidden_layers


def recording(kernel: backends.Kernel, called: list) -> backends.Kernel:
    return kernel._replace(of_parts=lambda *states, **more: called.append(1) or kernel.of_parts(*states, **more))
