"""The near field in C++, rotary positions and scores of sinks included: outputs and gradients = the reference in float64, whatever
stands beside the window.

1e-5 relative to the largest entry: float32 rounds scores of about 5 to 6e-7, sums of up to 700 weights to about 2e-6.
"""

from typing import NamedTuple

import pytest
import torch

from kermit_hf import kernel_backend, window_cpu
from kermit_hf.backends import find_fused_window
from kermit_hf.cpu_kernels import cpu_misfit
from kermit_hf.window_attention import FarField, Sinks, window_reference
from kermit_hf.window_cpu import window_fused
from tests.kermit_hf.test_kernel_attention import assert_close
from tests.kermit_hf.tiny_models import place, tiny_model, tokens
from tests.threads import assert_equal_on_any_number_of_threads


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=str(MISFIT))
TOLERANCE = 1e-5


class Case(NamedTuple):
    """Sizes and which parts there are; `slots` are the keys, of which the last `length` belong to the queries, and of these
    all but `early` have a far field."""

    length: int
    slots: int
    head_dim: int
    window: int
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    sinks: int = 0
    far: bool = False
    early: int = 0
    rotary: bool = False
    padded: bool = False
    is_causal: bool = True


EVERYTHING = {
    "batch": 2,
    "heads": 4,
    "kv_heads": 2,
    "sinks": 3,
    "far": True,
    "early": 9,
    "rotary": True,
    "padded": True,
}
SCALING = 0.7
CASES = {
    "near field alone": Case(37, 37, 8, 8),
    "positions": Case(37, 37, 8, 8, rotary=True),
    "sinks without positions": Case(100, 120, 8, 8, sinks=2, padded=True),
    "no far field in the first blocks": Case(200, 200, 8, 130, heads=2, far=True, early=130),
    "everything": Case(70, 90, 16, 9, **EVERYTHING),
    "both ways": Case(70, 70, 16, 9, **EVERYTHING, is_causal=False),
    "whole blocks": Case(256, 256, 64, 128, heads=2, sinks=4, far=True, early=128, rotary=True),
    "wide window": Case(40, 140, 32, 100, far=True),
    "window of one": Case(5, 33, 24, 1, batch=2, sinks=1, far=True, padded=True),
    "one query": Case(1, 50, 16, 20, sinks=2, far=True),
    "one token": Case(1, 1, 4, 3, far=True),
    "large heads": Case(35, 35, 128, 20, sinks=4, far=True),
    "heads that are no whole vectors": Case(130, 150, 22, 40, **EVERYTHING),
    "odd heads": Case(130, 150, 19, 40, **{**EVERYTHING, "rotary": False}),
    "more sinks than a tile": Case(70, 70, 16, 9, heads=2, sinks=70, far=True),
    "several spans": Case(1100, 1300, 8, 128, **EVERYTHING),
    "several spans, both ways": Case(1100, 1100, 8, 128, **EVERYTHING, is_causal=False),
    "a past that ends in the first block of a span": Case(42, 600, 64, 41, far=True),
    "a window longer than a span": Case(1500, 1500, 8, 700, **EVERYTHING),
    "a window longer than a span, both ways": Case(1500, 1500, 8, 700, **EVERYTHING, is_causal=False),
}


def make_inputs(case: Case) -> tuple[dict[str, torch.Tensor], int | torch.Tensor]:
    """Tensors by name, and the first real slot. Some queries see no far field, or not all sinks; in a padded batch, the first row's
    first token has left."""
    queries, keys = (case.batch, case.heads, case.length), (case.batch, case.kv_heads, case.slots)
    tensors = {
        "query": 1.5 * case.head_dim**-0.5 * torch.randn(*queries, case.head_dim),
        "key": torch.randn(*keys, case.head_dim),
        "value": torch.randn(*keys, case.head_dim),
    }
    if case.sinks:
        tensors["sink_keys"] = torch.randn(case.batch, case.kv_heads, case.sinks, case.head_dim)
        tensors["sink_values"] = torch.randn(case.batch, case.kv_heads, case.sinks, case.head_dim)
    if case.far:
        logits = torch.randn(case.batch, case.heads, case.length - case.early)
        tensors["far_value"] = torch.randn(*logits.shape, case.head_dim)
        tensors["far_logit"] = logits.masked_fill(torch.rand(logits.shape) < 0.3, float("-inf"))
    if not case.padded:
        return tensors, 0
    first_real = torch.randint(1, max(case.slots // 2, 2), (case.batch,))
    first_real[0] = -5
    return tensors, first_real


def rotary_angles(case: Case) -> torch.Tensor:
    """One more slot than there are."""
    return torch.arange(case.slots + 1)[:, None] * 3.0 ** -torch.arange(case.head_dim // 2)


def attend_fused(tensors: dict[str, torch.Tensor], case: Case, first_real: int | torch.Tensor = 0) -> torch.Tensor:
    sinks = (tensors["sink_keys"], tensors["sink_values"]) if case.sinks else None
    far = FarField(tensors["far_value"], tensors["far_logit"]) if case.far else None
    states = tensors["query"], tensors["key"], tensors["value"]
    # Tables may be wider than half a head.
    tables = rotary_angles(case).repeat(1, 2)
    rotary = (tables.cos(), tables.sin()) if case.rotary else None
    return window_fused(*states, case.window, first_real, sinks, far, case.is_causal, rotary, SCALING)


def attend_reference(tensors: dict[str, torch.Tensor], case: Case, first_real: int | torch.Tensor = 0) -> torch.Tensor:
    query, key, past = tensors["query"], tensors["key"], case.slots - case.length
    sinks = far = None
    if case.sinks:
        logits = query @ tensors["sink_keys"].repeat_interleave(case.heads // case.kv_heads, 1).mT
        first = torch.as_tensor(first_real).view(-1, 1, 1, 1)
        behind = torch.arange(past, case.slots)[:, None] - case.window >= first + torch.arange(case.sinks)
        sinks = Sinks(logits.masked_fill(~behind, float("-inf")), tensors["sink_values"])
    if case.far:
        value, logit = tensors["far_value"], tensors["far_logit"]
        nothing = logit.new_full((*logit.shape[:2], case.early), float("-inf"))
        value = torch.cat([value.new_zeros(*nothing.shape, case.head_dim), value], 2)
        far = FarField(value, torch.cat([nothing, logit], 2))
    if case.rotary:
        query, key = turned(query, case, past), turned(key, case, 0)
    states = SCALING * query, key, tensors["value"]
    return window_reference(*states, case.window, first_real, sinks, far, case.is_causal).output


def turned(states: torch.Tensor, case: Case, first_slot: int) -> torch.Tensor:
    """Halves of a head as real and imaginary parts, times e^(i angle)."""
    angles = rotary_angles(case)[first_slot : first_slot + states.shape[2]].to(states.dtype)
    turned = torch.complex(*states.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def run(attend, tensors: dict[str, torch.Tensor], case: Case, first_real: int | torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of its sum with fixed random weights."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = attend(leaves, case, first_real)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output * weights).sum(), list(leaves.values()))]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_reference(name):
    case = CASES[name]
    tensors, first_real = make_inputs(case)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    results, targets = run(attend_fused, tensors, case, first_real), run(attend_reference, exact, case, first_real)
    for part, result, target in zip(("output", *tensors), results, targets, strict=True):
        assert result.dtype == torch.float32
        assert_close(result, target, TOLERANCE, part)


def test_every_length_window_and_past_agree_with_the_reference():
    """All ways in which blocks of 64 queries meet the window's borders."""
    for length in (1, 7, 63, 64, 65, 128, 200):
        for window in (1, 2, 63, 64, 65, 129):
            for past in (0, 1, 70):
                for is_causal in (True, False):
                    case = Case(length, length + past, 4, window, far=True, is_causal=is_causal)
                    tensors, _ = make_inputs(case)
                    exact = {name: tensor.double() for name, tensor in tensors.items()}
                    results, targets = run(attend_fused, tensors, case, 0), run(attend_reference, exact, case, 0)
                    for part, result, target in zip(("output", *tensors), results, targets, strict=True):
                        # Rounding is all that is left of a gradient that is zero, where a query sees one token.
                        close = (result - target).abs().max() < TOLERANCE * target.abs().max().clamp(min=1.0)
                        assert close, f"{part} of {case}"


@pytest.mark.parametrize("name", ["everything", "several spans, both ways"])
def test_inputs_may_lie_in_any_way_in_memory(name):
    """As projections leave them, (batch, seq, heads, dim), as a slice of a larger tensor, and with a strided last axis."""
    case = CASES[name]
    tensors, first_real = make_inputs(case)
    expected = run(attend_fused, tensors, case, first_real)
    layouts = (
        lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
        lambda tensor: torch.cat([tensor, tensor], 2)[:, :, : tensor.shape[2]],
        lambda tensor: tensor.mT.contiguous().mT if tensor.dim() == 4 else tensor,
    )
    for layout in layouts:
        strided = {name: layout(tensor) for name, tensor in tensors.items()}
        for result, target in zip(run(attend_fused, strided, case, first_real), expected, strict=True):
            assert torch.equal(result, target)


def test_heads_may_lie_one_number_apart():
    """As the coordinates of a token do: gradients of such a layout could be ordered either way."""
    case = Case(70, 70, 16, 9, heads=3, kv_heads=3)
    tensors, _ = make_inputs(case)
    overlapping = {
        name: torch.randn(70 * 16 + 2).as_strided(tensor.shape, (0, 1, 16, 1)) for name, tensor in tensors.items()
    }
    dense = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in overlapping.items()}
    results = run(attend_fused, overlapping, case, 0)
    for result, target in zip(results, run(attend_fused, dense, case, 0), strict=True):
        assert torch.equal(result, target)


def test_the_gradient_of_a_plain_sum_is_taken_too():
    """It comes as one number, expanded."""
    case = CASES["everything"]
    tensors, first_real = make_inputs(case)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    grads = [
        torch.autograd.grad(attend(leaves, case, first_real).sum(), list(leaves.values()))
        for attend in (attend_fused, attend_reference)
    ]
    for result, target in zip(*grads, strict=True):
        assert_close(result, target, 1e-4)


def test_the_number_of_threads_changes_nothing():
    case = CASES["several spans, both ways"]
    tensors, first_real = make_inputs(case)
    assert_equal_on_any_number_of_threads(lambda: run(attend_fused, tensors, case, first_real))


def test_no_query_sees_beyond_its_window():
    """Bit for bit, and without a gradient."""
    case = Case(190, 190, 8, 70)
    tensors, _ = make_inputs(case)
    before = attend_fused(tensors, case)
    for name in ("key", "value"):
        changed = tensors[name].clone()
        changed[:, :, 151:] += 1
        changed[:, :, :81] += 1
        leaf = changed.requires_grad_()
        after = attend_fused({**tensors, name: leaf}, case)
        assert torch.equal(after[:, :, 150], before[:, :, 150])
        (grad,) = torch.autograd.grad(after[:, :, 150].sum(), leaf)
        assert grad[:, :, :81].count_nonzero() == grad[:, :, 151:].count_nonzero() == 0
        assert (grad[:, :, 81:151] != 0).any(-1).all()


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_logits_neither_overflow_nor_lose_the_gradient(size):
    case = Case(100, 100, 8, 10, sinks=2, far=True)
    tensors, _ = make_inputs(case)
    tensors = {name: size * tensor if "value" not in name else tensor for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    # Scores of up to 1e6 are known to about 0.1 in float32, which decides between close ones.
    output, *grads = run(attend_fused, tensors, case, 0)
    close = (output - attend_reference(exact, case)).abs().amax(-1) < 1e-2
    assert close.float().mean() > 0.9
    assert all(result.isfinite().all() for result in (output, *grads))


@pytest.mark.parametrize("name", ["query", "key"])
def test_not_a_number_is_not_hidden(name):
    """Of the queries that see it, no other."""
    case = Case(100, 100, 8, 10, rotary=True)
    tensors, _ = make_inputs(case)
    tensors[name][0, 0, 50, 3] = float("nan")
    (broken,) = attend_fused(tensors, case)[0, 0].isnan().any(-1).nonzero(as_tuple=True)
    assert broken.tolist() == ([50] if name == "query" else list(range(50, 60)))


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("sink_values", (2, 2, 4, 16), "sinks have to be"),
        ("far_value", (2, 4, 71, 16), "with at most 70 rows"),
        ("far_logit", (2, 4, 60), "its logit"),
        ("value", (2, 2, 80, 16), "does not fit key and value"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, message):
    case = CASES["everything"]
    tensors, first_real = make_inputs(case)
    tensors[name] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=message):
        attend_fused(tensors, case, first_real)


def test_sinks_and_far_field_that_nobody_sees_leave_the_near_field_as_it_is():
    case = Case(100, 100, 8, 10, sinks=2, far=True)
    tensors, _ = make_inputs(case)
    tensors["far_logit"].fill_(float("-inf"))
    # The first token comes so late that no sink is behind a window.
    output, *grads = run(attend_fused, tensors, case, torch.tensor([90]))
    assert torch.equal(output, attend_fused(tensors, case._replace(sinks=0, far=False), torch.tensor([90])))
    for name, grad in zip(tensors, grads, strict=True):
        assert grad.isfinite().all()
        assert ("sink" in name or "far" in name) == (grad.count_nonzero() == 0), name


# Through the whole model.


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernel's calls, forward and backward."""
    kernels, made = window_cpu.load_cpu_kernels("kermit_hf"), []

    class Recorded:
        def __getattr__(self, name):
            def call(*arguments):
                made.append(name)
                return getattr(kernels, name)(*arguments)

            return call

    monkeypatch.setattr(window_cpu, "load_cpu_kernels", lambda namespace: Recorded())
    return made


def logits_and_gradients(model, input_ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids, attention_mask=mask).logits[mask == 1]
    logits.square().mean().backward()
    return [
        logits.detach(),
        *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("setting", ["delta", "additive", "additive_favor", "hybrid"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_gives_the_same_logits_and_gradients(setting, side, calls):
    model = tiny_model(setting)
    input_ids, mask = place([tokens(50), tokens(33)], side)
    with kernel_backend("torch"):
        expected = logits_and_gradients(model, input_ids, mask)
    assert calls == []
    with kernel_backend("cpp"):
        results = logits_and_gradients(model, input_ids, mask)
    assert {"window_forward", "window_backward"} <= set(calls)
    for result, target in zip(results, expected, strict=True):
        # Rounding passes through two layers whose weights are large.
        assert_close(result, target, 1e-4)


def test_a_model_generates_the_same_text(calls):
    model = tiny_model("additive")
    input_ids, mask = place([tokens(30), tokens(21)], "left")
    texts = []
    for backend in ("torch", "cpp"):
        with kernel_backend(backend):
            texts.append(model.generate(input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert "window_forward" in calls
    assert torch.equal(*texts)


def test_a_cached_text_goes_on_as_if_it_had_been_read_at_once(calls):
    model, input_ids = tiny_model("additive"), tokens(2, 60)
    with torch.no_grad(), kernel_backend("cpp"):
        whole = model(input_ids).logits
        first = model(input_ids[:, :25], use_cache=True)
        rest = model(input_ids[:, 25:], past_key_values=first.past_key_values).logits
    assert "window_forward" in calls
    assert_close(torch.cat([first.logits, rest], 1), whole, 1e-4)


# What is left to PyTorch.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype, calls):
    with kernel_backend("cpp"):
        assert find_fused_window(torch.zeros(1, 1, 20, 4)) is window_fused
        assert find_fused_window(torch.zeros(1, 1, 20, 4, dtype=dtype)) is None
        tiny_model("additive").to(dtype)(tokens(1, 20))
    assert calls == []


def test_torch_compile_and_torch_func_are_left_to_torch(monkeypatch):
    forms, query = [], torch.zeros(1, 1, 20, 4)

    def choose(states):
        forms.append(find_fused_window(states))
        return states.sum()

    with kernel_backend("cpp"):
        torch.func.grad(choose)(query)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        choose(query)
    assert forms == [None, None]


def test_dropout_is_left_to_torch(calls):
    model = tiny_model("additive", attention_dropout=0.5).train()
    with kernel_backend("cpp"):
        model(tokens(1, 50))
        assert calls == []
        model.eval()(tokens(1, 50))
    assert calls


def test_a_second_derivative_is_refused():
    case = Case(40, 40, 8, 10)
    tensors, _ = make_inputs(case)
    query = tensors["query"].requires_grad_()
    output = attend_fused(tensors, case)
    with pytest.raises(RuntimeError, match=r"second derivatives.*attn_implementation='eager'"):
        torch.autograd.grad(output.square().sum(), query, create_graph=True)
