"""Kernels in C++ that take parts of tensors by themselves, give these back whole and add to their gradients in place."""

import pytest
import torch

from kermit_hf import FEATURE_MAPS, backends, kernel_backend
from kermit_hf.additive_cpu import additive_elu_of_parts
from kermit_hf.cpu_kernels import cpu_misfit
from kermit_hf.delta_cpu import delta_silu_of_parts
from kermit_hf.kermit_attention import kermit_attention
from kermit_hf.slots import Parts, slots_of_text
from tests.kermit_hf.test_additive_cpu import before_the_map, elu_reference
from tests.kermit_hf.test_delta_cpu import mapped_reference
from tests.kermit_hf.test_kernel_attention import Inputs, assert_close, make_inputs
from tests.kermit_hf.tiny_models import place, tiny_model, tokens


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=f"kernels for CPUs cannot run: {MISFIT}")

FORMS = {"additive": additive_elu_of_parts, "delta": delta_silu_of_parts}
REFERENCES = {"additive": elu_reference, "delta": mapped_reference}
STATES = ("query", "key", "value")
SETTINGS = ["delta", {"window_size": 8, "update_rule": "additive", "feature_map": "elu"}]
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


def projection_of(read: list[torch.Tensor], rest: list[torch.Tensor], uses: str) -> torch.Tensor:
    """A random one of what is read, of functions of the rest, or of both."""
    random, total = torch.Generator().manual_seed(1), 0
    for name, used in (("part", read), ("rest", [tensor.sin() for tensor in rest])):
        for tensor in used if uses in (name, "both") else ():
            total = total + (tensor * torch.randn(tensor.shape, generator=random, dtype=torch.float64)).sum()
    return total


def gradients(inputs: Inputs, form, parts: Parts, uses: str, times: int = 1) -> list[dict[str, torch.Tensor]]:
    """Of the inputs, zeros where they have no part in the projection."""
    total = projection_of(*form(inputs, parts), uses)
    names, leaves = zip(*inputs.tensors.items(), strict=True)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return [dict(zip(names, torch.autograd.grad(total, leaves, **options), strict=True)) for _ in range(times)]


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
def test_gradients_are_added_to_those_of_the_rest_in_place(rule):
    inputs, parts = inputs_and_parts(rule, True, 70, 8, 6)
    single = inputs.to(torch.float32)
    read, rest = by_kernel(single, parts)
    states = [single.tensors[name] for name in STATES]
    so_far = [torch.ones_like(state) for state in states]
    grads = torch.autograd.grad((read[0], *rest), states, (torch.ones_like(read[0]), *so_far))
    for grad, given in zip(grads, so_far, strict=True):
        assert grad.data_ptr() == given.data_ptr()
        assert not torch.equal(given, torch.ones_like(given))


@pytest.mark.parametrize("rule", FORMS)
def test_gradients_that_cannot_be_added_to_are_refused(rule):
    """Each entry of an expanded one is that of several heads."""
    inputs, parts = inputs_and_parts(rule, True, 70, 8, 6)
    single = inputs.to(torch.float32)
    read, rest = by_kernel(single, parts)
    so_far = [torch.ones_like(state[:, :1]).expand_as(state) for state in rest]
    with pytest.raises(RuntimeError, match="expanded"):
        torch.autograd.grad((read[0], *rest), single.tensors["key"], (torch.ones_like(read[0]), *so_far))


@pytest.mark.parametrize("rule", FORMS)
@pytest.mark.parametrize("tokens", [slice(2, 20), slice(0, 70)])
def test_as_many_tokens_as_readers_are_needed(rule, tokens):
    inputs, parts = inputs_and_parts(rule, True, 70, 8, 6)
    with pytest.raises(RuntimeError, match="as many keys and values"):
        by_kernel(inputs.to(torch.float32), parts._replace(tokens=tokens))


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
    projection_of(read, rest, "both").backward()
    for name, leaf in single.tensors.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, expected[name], TOLERANCE, f"gradient of {name}")


@pytest.mark.parametrize("setting", SETTINGS)
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


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("ends", [(20, 25, 60), (12, 15, 17, 40, 60)])
def test_a_text_in_pieces_whose_last_tokens_may_be_taken_back(setting, ends, monkeypatch):
    """Queries that read less than all tokens behind the window, and tokens that the memory holds only for a while, are not taken in
    parts. Gradients through a cache, against float64."""
    model, input_ids, called, found = tiny_model(setting), tokens(2, ends[-1]), [], []
    projection = torch.randn(2, ends[-1], model.config.vocab_size, dtype=torch.float64)
    find = backends._find_in_cpp
    monkeypatch.setattr(backends, "_find_in_cpp", lambda *arguments: recording(find(*arguments), called))
    for backend, dtype in (("cpp", torch.float32), ("torch", torch.float64)):
        model = model.to(dtype)
        model.zero_grad()
        logits, past = [], None
        with kernel_backend(backend):
            for start, end in zip((0, *ends), ends, strict=False):
                output = model(input_ids[:, start:end], use_cache=True, past_key_values=past)
                past = output.past_key_values
                if start == 0:
                    past.activate_past_recording()
                logits.append(output.logits)
            (torch.cat(logits, 1) * projection).sum().backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    assert 0 < len(called) < len(ends) * model.config.num_hidden_layers
    for name, theirs in found[1].items():
        assert_close(found[0][name], theirs, 1e-4, f"gradient of {name}")


@pytest.mark.parametrize("rule", FORMS)
def test_tokens_read_through_a_memory_that_is_thrown_away(rule):
    """Each query has its token, but the first tokens come from such a memory: gradients of the states, against float64."""
    feature_map = FEATURE_MAPS["elu" if rule == "additive" else "silu_l2"](4, None, 2, 2)
    feature_map.unit_norm = rule == "delta"
    query, *states = torch.randn(2, 2, 15, 4), *torch.randn(2, 2, 2, 40, 4)
    gates = {"log_forget": -torch.rand(2, 2, 40)} | (
        {"write_strength": torch.rand(2, 2, 40)} if rule == "delta" else {}
    )
    angles, projection = torch.arange(40)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1]), torch.randn(2, 2, 15, 4)
    found = []
    for backend, dtype in (("cpp", torch.float32), ("torch", torch.float64)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (query, *states)]
        slots = slots_of_text(*leaves[1:], {name: gate.to(dtype) for name, gate in gates.items()}, 0, 2)
        slots = slots._replace(num_absorbed=17)
        maps, rotary = (feature_map.map_queries, feature_map.map_keys), (angles.cos().to(dtype), angles.sin().to(dtype))
        far_logit = torch.zeros(2, 2, 15, dtype=dtype)
        with kernel_backend(backend):
            output = kermit_attention(leaves[0], slots, rotary, 8, rule, *maps, far_logit, torch.nn.Identity()).output
        found.append((output, *torch.autograd.grad((output * projection).sum(), leaves)))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-4)


def recording(kernel: backends.Kernel, called: list) -> backends.Kernel:
    return kernel._replace(of_parts=lambda *states, **more: called.append(1) or kernel.of_parts(*states, **more))
