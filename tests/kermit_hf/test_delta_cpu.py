"""The delta rule's kernels in C++: the float64 reference's outputs and gradients, from any layout, alone and in models."""

import copy
import itertools

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kermit_hf import FEATURE_MAPS, KermitForTokenClassification, backends, delta_cpu, kernel_backend
from kermit_hf.cpu_kernels import cpu_misfit
from kermit_hf.kernel_attention import delta_reference
from tests.kermit_hf import oracles
from tests.kermit_hf.test_generation import generate
from tests.kermit_hf.test_kernel_attention import Inputs, assert_close, gradients, make_inputs
from tests.kermit_hf.tiny_models import place, tiny_model, tokens
from tests.threads import assert_equal_on_any_number_of_threads


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=f"kernels for CPUs cannot run: {MISFIT}")

# Of the largest entry: sums of up to 600 terms in float32, and a triangular system.
TOLERANCE = 1e-5
GATES = pytest.mark.parametrize("gated", [False, True])
DELTA_SETTINGS = ["delta", "delta_pure", "delta_bare", "delta_one_token_window", "hybrid"]


def run(inputs: Inputs, form=delta_cpu.delta_fused) -> tuple[torch.Tensor, torch.Tensor]:
    read = form(**inputs.rule_arguments(), memory=inputs.memory())
    return read.numerator, read.memory.matrix


def mapped_reference(query, key, *others, **options):
    return delta_reference(oracles.silu_l2_features(query), oracles.silu_l2_features(key), *others, **options)


def assert_follows_the_reference(
    inputs: Inputs, single: Inputs | None = None, form=delta_cpu.delta_fused, reference=delta_reference
) -> None:
    """inputs in float64; single: the same in float32, by default as tensors of the same layout."""
    single = inputs.to(torch.float32) if single is None else single
    expected, actual = run(inputs, reference), run(single, form)
    for name, ours, theirs in zip(("numerator", "memory"), actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, TOLERANCE, name)
    ours, theirs = gradients(single, actual), gradients(inputs, expected)
    for name in theirs:
        assert_close(ours[name], theirs[name], TOLERANCE, f"gradient of {name}")


@GATES
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 130, 256, 257, 600])
def test_any_length(gated, length):
    assert_follows_the_reference(make_inputs("delta", gated, length))


@GATES
@pytest.mark.parametrize("features, head_dim", [(1, 1), (3, 20), (16, 16), (64, 64), (100, 40)])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2)])
def test_any_size_and_any_groups(gated, features, head_dim, heads, kv_heads):
    sizes = {"features": features, "head_dim": head_dim, "heads": heads, "kv_heads": kv_heads}
    assert_follows_the_reference(make_inputs("delta", gated, 70, batch=1, **sizes))


@GATES
def test_without_a_memory_it_starts_empty(gated):
    assert_follows_the_reference(make_inputs("delta", gated, 70, memory=False))


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """In the layout of a model's states, (batch, seq, heads, ...)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor twice as large along every axis, so that the last one is not contiguous either."""
    large = tensor
    for axis in range(tensor.dim()):
        large = large.repeat_interleave(2, axis)
    return large[(slice(None, None, 2),) * tensor.dim()]


@pytest.mark.parametrize("layout", [transposed, every_second])
def test_any_layout(layout):
    inputs = make_inputs("delta", True, 75)
    tensors = {name: layout(tensor.detach().float()).requires_grad_() for name, tensor in inputs.tensors.items()}
    assert_follows_the_reference(inputs, Inputs(tensors, "delta"))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed])
def test_gradients_lie_in_memory_as_the_states(layout):
    inputs = make_inputs("delta", True, 75)
    states = {name: layout(tensor.detach().float()).requires_grad_() for name, tensor in inputs.tensors.items()}
    outputs = run(Inputs(states, "delta"))
    grads = torch.autograd.grad(sum(out.square().sum() for out in outputs), states.values())
    for name, grad in zip(states, grads, strict=True):
        assert name not in ("query", "key", "value") or grad.stride() == states[name].stride(), name


def test_the_gradient_of_a_sum():
    """Which comes expanded from one number."""
    inputs = make_inputs("delta", True, 75).to(torch.float32)
    numerator = run(inputs)[0]
    ones = torch.ones(()).expand(numerator.shape), torch.ones_like(numerator)
    results = [torch.autograd.grad(numerator, inputs.tensors.values(), one, retain_graph=True) for one in ones]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@GATES
def test_the_feature_map_is_applied_on_the_way(gated):
    inputs = make_inputs("delta", gated, 75)
    tensors = {name: 3 * t.detach() if name in ("query", "key") else t for name, t in inputs.tensors.items()}
    inputs = Inputs(tensors, "delta").to(torch.float64)
    assert_follows_the_reference(inputs, form=delta_cpu.delta_silu_fused, reference=mapped_reference)


def test_the_feature_map_of_extreme_states():
    """Zeros have no direction, numbers as large as these are their own silu or nothing."""
    query, value = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    query[0, 0, 1], query[0, 0, 2], query[0, 0, 3] = 0.0, 1e4 * query[0, 0, 0], -200.0
    model_map = backends.SiluL2FeatureMap(8, None, 1, 1)
    model_map.unit_norm = True
    results = []
    for states, form in ((query, delta_cpu.delta_silu_fused), (model_map.map_keys(query), delta_cpu.delta_fused)):
        results.append(form(states, states, value, torch.full((1, 1, 5), 0.5)).numerator)
    assert_close(results[0], results[1], TOLERANCE)


@GATES
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("distinct", [1, 3])
def test_repeated_keys_lose_no_digits(gated, strength, distinct):
    """The triangular system is then full of entries near one; rounding adds up over the tokens that share a key."""
    inputs = make_inputs("delta", gated, 200, batch=1)
    tensors = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    tensors["key"] = tensors["key"][:, :, torch.arange(200) % distinct]
    tensors["write_strength"].fill_(strength)
    assert_follows_the_reference(Inputs(tensors, "delta").to(torch.float64))


def test_gates_of_every_size():
    """From one that forgets nothing to one that forgets everything, beside each other."""
    inputs = make_inputs("delta", True, 150)
    tensors = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    tensors["log_forget"] = -(10.0 ** (6 * torch.rand(tensors["log_forget"].shape, dtype=torch.float64) - 4.2))
    assert_follows_the_reference(Inputs(tensors, "delta").to(torch.float64))


@pytest.mark.parametrize("name", ["query", "key", "value", "write_strength", "log_forget"])
def test_what_is_no_number_shows(name):
    inputs = make_inputs("delta", True, 40, batch=1, heads=1, kv_heads=1).to(torch.float32)
    inputs.tensors[name].data[:, :, 20] = float("nan")
    with torch.no_grad():
        numerator = run(inputs)[0]
    assert numerator[:, :, 20].isnan().all()


def test_a_token_of_padding_leaves_the_memory_exactly_as_it_was():
    inputs = make_inputs("delta", True, 70).to(torch.float32)
    with torch.no_grad():
        inputs.tensors["write_strength"].zero_()
        inputs.tensors["log_forget"].zero_()
        assert torch.equal(run(inputs)[1], inputs.tensors["matrix"])


def test_threads_change_nothing():
    inputs = make_inputs("delta", True, 130, batch=3).to(torch.float32)

    def outputs_and_gradients():
        outputs = run(inputs)
        return [*outputs, *gradients(inputs, outputs).values()]

    assert_equal_on_any_number_of_threads(outputs_and_gradients)


# The norm.


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 2, 5000, 16), (2, 1, 33, 100)])
def test_the_norm_is_that_of_llama(shape):
    """Outputs and gradients in float64, of states of many sizes."""
    states = (torch.randn(shape) * 10 ** torch.randn(*shape[:-1], 1)).double().requires_grad_()
    norm = LlamaRMSNorm(shape[-1], eps=1e-3)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    single = [tensor.detach().float().requires_grad_() for tensor in (states, weight)]
    expected = weight * states / (states.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    actual = delta_cpu.rms_norm_fused(*single, norm.variance_epsilon)
    assert_close(actual, expected, TOLERANCE)
    with torch.no_grad():
        assert torch.equal(delta_cpu.rms_norm_fused(single[0].clone(), single[1], norm.variance_epsilon), actual)
    for grad in (transposed(torch.randn(shape)), torch.randn(shape[-1]).expand(shape)):
        theirs = torch.autograd.grad(expected, [states, weight], grad.double(), retain_graph=True)
        ours = torch.autograd.grad(actual, single, grad, retain_graph=True)
        for name, one, correct in zip(("states", "weight"), ours, theirs, strict=True):
            assert_close(one, correct, TOLERANCE, name)


def test_threads_change_nothing_about_the_norm():
    states, weight = torch.randn(1, 2, 5000, 16, requires_grad=True), torch.randn(16, requires_grad=True)

    def output_and_gradients():
        output = delta_cpu.rms_norm_fused(states, weight, 1e-6)
        return [output, *torch.autograd.grad(output.square().sum(), [states, weight])]

    assert_equal_on_any_number_of_threads(output_and_gradients)


def test_only_a_plain_norm_is_replaced():
    states, norm = torch.randn(1, 2, 5, 8), LlamaRMSNorm(8)
    with kernel_backend("cpp"):
        assert backends.find_norm(norm, states) is not norm
        other = torch.nn.RMSNorm(8)
        assert backends.find_norm(other, states) is other
        assert backends.find_norm(norm, states.double()) is norm
        norm.register_forward_hook(lambda *_: None)
        assert backends.find_norm(norm, states) is norm


# In models.


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The forms that ran in C++."""
    called, run_fused = [], delta_cpu._run

    def record(*arguments):
        called.append("delta")
        return run_fused(*arguments)

    monkeypatch.setattr(delta_cpu, "_run", record)
    return called


def train(model: torch.nn.Module, backend: str, **inputs) -> list[torch.Tensor]:
    """Logits and all gradients."""
    model = copy.deepcopy(model)
    with kernel_backend(backend):
        output = model(**inputs)
    output.loss.backward()
    return [output.logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("setting", DELTA_SETTINGS)
def test_a_model_computes_the_same(setting, calls):
    model, (input_ids, mask) = tiny_model(setting), place([tokens(90), tokens(71)], "left")
    labels = input_ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    expected = train(model, "torch", **inputs)
    assert not calls
    largest = max(theirs.abs().max() for theirs in expected[1:])
    for ours, theirs in zip(train(model, "cpp", **inputs), expected, strict=True):
        # Gradients that nearly cancel are as exact as what cancels in them.
        assert (ours - theirs).abs().max() < 1e-4 * (theirs.abs().max() + 0.01 * largest)
    assert calls


def test_a_long_text_is_read_in_pieces_or_at_once():
    """Longer than what PyTorch's form treats at a time."""
    model, input_ids = tiny_model("delta", num_attention_heads=8, head_dim=32), tokens(9, 600)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("cpp"):
            assert_close(model(input_ids).logits, expected)


def test_an_encoder_computes_the_same(calls):
    model = tiny_model("delta", KermitForTokenClassification, is_causal=False)
    input_ids, mask = place([tokens(40), tokens(23)], "right")
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask).logits
        with kernel_backend("cpp"):
            actual = model(input_ids, attention_mask=mask).logits
    assert calls
    assert_close(actual[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("setting", DELTA_SETTINGS)
def test_generation_writes_the_same(setting, calls):
    model, prompt = tiny_model(setting), tokens(2, 70)
    expected = generate(model, prompt)
    with kernel_backend("cpp"):
        assert torch.equal(generate(model, prompt), expected)
    assert calls


# What stays PyTorch's.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype, calls):
    model, input_ids = tiny_model("delta_pure").to(dtype), tokens(2, 70)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("cpp"):
            assert torch.equal(model(input_ids).logits, expected)
    assert not calls


def test_the_additive_rule_and_single_tokens_are_left_to_torch(calls):
    with torch.no_grad(), kernel_backend("cpp"):
        tiny_model("additive_pure")(tokens(2, 70))
        tiny_model("delta_pure")(tokens(2, 1))
    assert not calls


def test_torch_compile_is_left_to_torch(calls):
    model, input_ids = tiny_model("delta_pure"), tokens(2, 70)
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids).logits
        with kernel_backend("cpp"):
            assert_close(torch.compile(model, backend="eager", fullgraph=True)(input_ids).logits, expected)
    assert not calls


@pytest.mark.parametrize(
    "backend, feature_map, expected",
    [
        *itertools.product(["cpp", "auto"], ["silu_l2"], ["delta_silu_fused"]),
        ("cpp", "elu", "delta_fused"),
        ("torch", "silu_l2", None),
    ],
)
def test_the_choice(backend, feature_map, expected):
    maps = FEATURE_MAPS[feature_map](8, None, 2, 2)
    maps.unit_norm = True
    states = torch.randn(1, 2, 5, 8)
    with kernel_backend(backend):
        kernel = backends.find_kernel("delta", maps.map_queries, maps.map_keys, states, states)
    assert (kernel and kernel.chunked.__name__) == expected


def test_heads_may_lie_one_number_apart():
    """As the coordinates of a token do: gradients of such a layout could be ordered either way."""
    gates = torch.rand(1, 3, 70), -torch.rand(1, 3, 70)
    overlapping = [torch.randn(70 * 16 + 2).as_strided((1, 3, 70, 16), (0, 1, 16, 1)) for _ in range(3)]
    dense = [states.clone(memory_format=torch.contiguous_format) for states in overlapping]
    weights, grads = torch.randn(1, 3, 70, 16), []
    for states in (overlapping, dense):
        leaves = [tensor.requires_grad_() for tensor in states]
        grads.append(
            torch.autograd.grad((delta_cpu.delta_silu_fused(*leaves, *gates).numerator * weights).sum(), leaves)
        )
    for result, target in zip(*grads, strict=True):
        assert torch.equal(result, target)
