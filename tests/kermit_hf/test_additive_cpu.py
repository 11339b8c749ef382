"""The additive rule's kernels in C++: the float64 reference's outputs and gradients, from any layout, alone and in models."""

import copy
from functools import partial

import pytest
import torch

from kermit_hf import FEATURE_MAPS, KermitForTokenClassification, additive_cpu, backends, kernel_backend
from kermit_hf.additive_cpu import additive_elu_fused, additive_fused
from kermit_hf.cpu_kernels import cpu_misfit
from kermit_hf.kernel_attention import KernelReadout, additive_reference
from tests.kermit_hf import oracles
from tests.kermit_hf.test_generation import generate
from tests.kermit_hf.test_kernel_attention import Inputs, assert_close, gradients, make_inputs
from tests.kermit_hf.tiny_models import place, tiny_model, tokens
from tests.threads import assert_equal_on_any_number_of_threads


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=f"kernels for CPUs cannot run: {MISFIT}")

# Of the largest entry: sums of up to 800 terms in float32.
TOLERANCE = 1e-5
GATES = pytest.mark.parametrize("gated", [False, True])
ADDITIVE_SETTINGS = ["additive", "additive_pure", "additive_favor", "additive_taylor", "hybrid_softmax_first"]


def elu_reference(query, key, value, log_forget=None, memory=None, key_mask=None) -> KernelReadout:
    query, key = oracles.elu_features(query), oracles.elu_features(key)
    return additive_reference(query, key if key_mask is None else key * key_mask[..., None], value, log_forget, memory)


def run(inputs: Inputs, form, divides: bool = False) -> tuple[torch.Tensor, ...]:
    read = form(**inputs.rule_arguments(), memory=inputs.memory())
    return read.numerator / read.denominator[..., None] if divides else read.numerator, read.denominator, *read.memory


def assert_follows_the_reference(
    inputs: Inputs, form=additive_fused, reference=additive_reference, single: Inputs | None = None
) -> None:
    """inputs in float64; single: the same in float32, by default as tensors of the same layout. With a numerator, and with
    one that is divided by the denominator."""
    single = inputs.to(torch.float32) if single is None else single
    for divides in (False, True):
        expected, actual = run(inputs, reference, divides), run(single, partial(form, divides=divides))
        for name, ours, theirs in zip(
            ("numerator", "denominator", "matrix", "normalizer"), actual, expected, strict=True
        ):
            assert ours.dtype == torch.float32
            assert_close(ours, theirs, TOLERANCE, name)
        ours, theirs = gradients(single, actual), gradients(inputs, expected)
        for name in theirs:
            assert_close(ours[name], theirs[name], TOLERANCE, f"gradient of {name}")


def before_the_map(inputs: Inputs) -> Inputs:
    """With queries and keys of both signs, for a form that maps them."""
    tensors = {name: t.log() if name in ("query", "key") else t for name, t in inputs.tensors.items()}
    return Inputs(tensors, "additive").to(torch.float64)


@GATES
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 47, 48, 49, 96, 130, 300, 384, 385, 800])
def test_any_length(gated, length):
    assert_follows_the_reference(make_inputs("additive", gated, length))


@GATES
@pytest.mark.parametrize("features, head_dim", [(1, 5), (3, 20), (16, 15), (64, 64), (153, 40)])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2)])
def test_any_size_and_any_groups(gated, features, head_dim, heads, kv_heads):
    sizes = {"features": features, "head_dim": head_dim, "heads": heads, "kv_heads": kv_heads}
    assert_follows_the_reference(make_inputs("additive", gated, 70, batch=1, **sizes))


@GATES
def test_without_a_memory_it_starts_empty(gated):
    assert_follows_the_reference(make_inputs("additive", gated, 70, memory=False))


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
    inputs = make_inputs("additive", True, 75)
    tensors = {name: layout(tensor.detach().float()).requires_grad_() for name, tensor in inputs.tensors.items()}
    assert_follows_the_reference(inputs, single=Inputs(tensors, "additive"))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, transposed])
def test_gradients_lie_in_memory_as_the_states(layout):
    inputs = make_inputs("additive", True, 75)
    states = {name: layout(tensor.detach().float()).requires_grad_() for name, tensor in inputs.tensors.items()}
    outputs = run(Inputs(states, "additive"), additive_fused)
    grads = torch.autograd.grad(sum(out.square().sum() for out in outputs), states.values())
    for name, grad in zip(states, grads, strict=True):
        assert name not in ("query", "key", "value") or grad.stride() == states[name].stride(), name


def test_the_gradient_of_a_sum():
    """Which comes expanded from one number."""
    inputs = make_inputs("additive", True, 75).to(torch.float32)
    numerator = run(inputs, additive_fused)[0]
    ones = torch.ones(()).expand(numerator.shape), torch.ones_like(numerator)
    results = [torch.autograd.grad(numerator, inputs.tensors.values(), one, retain_graph=True) for one in ones]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@GATES
@pytest.mark.parametrize("features", [6, 16])
def test_the_feature_map_is_applied_on_the_way(gated, features):
    inputs = before_the_map(make_inputs("additive", gated, 75, features=features))
    assert_follows_the_reference(inputs, additive_elu_fused, elu_reference)


@GATES
def test_masked_tokens_leave_the_memory_as_it_is(gated):
    inputs = before_the_map(make_inputs("additive", gated, 75))
    mask = torch.rand(2, 1, 75) < 0.5
    if gated:
        log_forget = inputs.tensors["log_forget"].detach() * mask
        inputs = Inputs({**inputs.tensors, "log_forget": log_forget}, "additive").to(torch.float64)
    forms = (partial(form, key_mask=mask) for form in (additive_elu_fused, elu_reference))
    assert_follows_the_reference(inputs, *forms)


def test_the_feature_map_of_extreme_states():
    """As the map's own: constant below -40, and not-a-numbers are not hidden."""
    states, value = torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    states[0, 0, 1], states[0, 0, 2], states[0, 0, 3] = -1e4, 1e4, -60.0
    mapped = FEATURE_MAPS["elu"](8, None, 1, 1).map_keys(states)
    ours, theirs = additive_elu_fused(states, states, value), additive_fused(mapped, mapped, value)
    for name in ("numerator", "denominator"):
        # Row by row, because they are of very different sizes.
        for row in range(6):
            assert_close(getattr(ours, name)[:, :, row], getattr(theirs, name)[:, :, row], TOLERANCE)
    states[0, 0, 4, 3] = float("nan")
    read = additive_elu_fused(states, states, value)
    assert read.numerator[0, 0, 4:].isnan().all() and not read.numerator[0, 0, :4].isnan().any()


def test_gates_of_every_size():
    """From one that forgets nothing to one that forgets everything, beside each other."""
    inputs = make_inputs("additive", True, 150)
    tensors = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    tensors["log_forget"] = -(10.0 ** (6 * torch.rand(tensors["log_forget"].shape, dtype=torch.float64) - 4.2))
    assert_follows_the_reference(Inputs(tensors, "additive").to(torch.float64))


def test_long_sums_lose_no_digits():
    """Thousands of numbers of one sign, which a memory adds up chunk by chunk."""
    inputs = make_inputs("additive", False, 5000, batch=1, heads=1, kv_heads=1)
    tensors = {name: tensor.detach().abs() for name, tensor in inputs.tensors.items()}
    inputs = Inputs(tensors, "additive").to(torch.float64)
    for ours, theirs in zip(
        run(inputs.to(torch.float32), additive_fused), run(inputs, additive_reference), strict=True
    ):
        assert_close(ours, theirs, 2e-6)


def test_nothing_to_divide_by():
    """Padding before the first token reads an empty memory: zero, without a gradient."""
    inputs = before_the_map(make_inputs("additive", False, 20, memory=False)).to(torch.float32)
    mask = (torch.arange(20) >= 5).view(1, 1, -1)
    read = additive_elu_fused(**inputs.rule_arguments(), key_mask=mask, divides=True)
    assert not read.numerator[:, :, :5].any() and not read.denominator[:, :, :5].any()
    (grad,) = torch.autograd.grad(read.numerator.square().sum(), inputs.tensors["query"])
    assert not grad[:, :, :5].any() and grad[:, :, 5:].isfinite().all()


def test_threads_change_nothing():
    inputs = make_inputs("additive", True, 130, batch=3).to(torch.float32)

    def outputs_and_gradients():
        outputs = run(inputs, additive_fused)
        return [*outputs, *gradients(inputs, outputs).values()]

    assert_equal_on_any_number_of_threads(outputs_and_gradients)


# In models.


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The forms that ran in C++."""
    called, run_fused = [], additive_cpu._run

    def record(*arguments):
        called.append("additive")
        return run_fused(*arguments)

    monkeypatch.setattr(additive_cpu, "_run", record)
    return called


def train(model: torch.nn.Module, backend: str, **inputs) -> list[torch.Tensor]:
    """Logits and all gradients."""
    model = copy.deepcopy(model)
    with kernel_backend(backend):
        output = model(**inputs)
    output.loss.backward()
    return [output.logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("setting", ADDITIVE_SETTINGS)
def test_a_model_computes_the_same(setting, side, calls):
    model, (input_ids, mask) = tiny_model(setting), place([tokens(90), tokens(71)], side)
    labels = input_ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    expected = train(model, "torch", **inputs)
    assert not calls
    largest = max(theirs.abs().max() for theirs in expected[1:])
    actual = train(model, "cpp", **inputs)
    assert calls
    assert_close(actual[0][mask == 1], expected[0][mask == 1])
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        # Gradients that nearly cancel are as exact as what cancels in them.
        assert (ours - theirs).abs().max() < 1e-4 * (theirs.abs().max() + 0.01 * largest)


@pytest.mark.parametrize("setting", ["additive_pure", "additive"])
def test_a_long_text_is_read_in_pieces_or_at_once(setting):
    """Longer than what PyTorch's form treats at a time."""
    model, input_ids = tiny_model(setting, num_attention_heads=8, head_dim=32), tokens(9, 600)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("cpp"):
            assert_close(model(input_ids).logits, expected)


@pytest.mark.parametrize("setting", ["additive_pure", "additive"])
def test_an_encoder_computes_the_same(setting, calls):
    model = tiny_model(setting, KermitForTokenClassification, is_causal=False)
    input_ids, mask = place([tokens(40), tokens(23)], "right")
    with torch.no_grad():
        expected = model(input_ids, attention_mask=mask).logits
        with kernel_backend("cpp"):
            actual = model(input_ids, attention_mask=mask).logits
    assert calls
    assert_close(actual[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("setting", ADDITIVE_SETTINGS)
def test_generation_writes_the_same(setting, calls):
    model, prompt = tiny_model(setting), tokens(2, 70)
    expected = generate(model, prompt)
    with kernel_backend("cpp"):
        assert torch.equal(generate(model, prompt), expected)
    assert calls


# What stays PyTorch's.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype, calls):
    model, input_ids = tiny_model("additive_pure").to(dtype), tokens(2, 70)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("cpp"):
            assert torch.equal(model(input_ids).logits, expected)
    assert not calls


def test_the_delta_rule_and_single_tokens_are_left_to_torch(calls):
    with torch.no_grad(), kernel_backend("cpp"):
        tiny_model("delta_pure")(tokens(2, 70))
        tiny_model("additive_pure")(tokens(2, 1))
    assert not calls


def test_torch_compile_is_left_to_torch(calls):
    model, input_ids = tiny_model("additive"), tokens(2, 70)
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids).logits
        with kernel_backend("cpp"):
            assert_close(torch.compile(model, backend="eager", fullgraph=True)(input_ids).logits, expected)
    assert not calls


@pytest.mark.parametrize(
    "backend, feature_map, expected",
    [
        ("cpp", "elu", "additive_elu_fused"),
        ("auto", "elu", "additive_elu_fused"),
        ("cpp", "favor", "additive_fused"),
        ("cpp", "hedgehog", "additive_fused"),
        ("torch", "elu", None),
    ],
)
def test_the_choice(backend, feature_map, expected):
    maps = FEATURE_MAPS[feature_map](8, None, 2, 2)
    states = torch.randn(1, 2, 5, 8)
    with kernel_backend(backend):
        kernel = backends.find_kernel("additive", maps.map_queries, maps.map_keys, states, states)
    assert (kernel and kernel.chunked.__name__) == expected
