"""Near field: blocked = reference = a float64 softmax, query by query, whatever stands beside the window.

1e-4 relative to the largest entry: float32 rounds scores of about 5 to 6e-7, sums of up to 300 weights to about 1e-6.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kermit_hf.window_attention import FarField, Sinks, block_size, window_blocked, window_reference
from tests.kermit_hf import oracles


FORMS = {"reference": window_reference, "blocked": window_blocked}
TOLERANCE = 1e-4


class Case:
    """Random inputs with what the settings ask for, as leaves with gradients, and their oracle.

    Each row has its own number of padding slots in front, the first none. Extra tokens stand behind `-inf` as the layer
    puts them: a sink while it is inside the window, the far field while nothing has left the window.
    """

    def __init__(
        self, length, window, heads=2, kv_heads=1, batch=2, dim=4, padded=False, num_sinks=0, far=False, past=0
    ):
        slots = length + past
        self.window, self.past, self.groups = window, past, heads // kv_heads
        self.first_real = torch.randint(0, slots, (batch,)) if padded else 0
        if padded:
            self.first_real[0] = 0
        self.leaves = {
            "query": torch.randn(batch, heads, length, dim, dtype=torch.float64),
            "key": torch.randn(batch, kv_heads, slots, dim, dtype=torch.float64),
            "value": torch.randn(batch, kv_heads, slots, dim, dtype=torch.float64),
        }
        column = self.first_real.view(-1, 1, 1) if padded else 0
        older = torch.arange(past, slots) - window + 1 - column
        if num_sinks:
            self.leaves["sink_logits"] = torch.randn(batch, heads, length, num_sinks, dtype=torch.float64)
            self.leaves["sink_values"] = torch.randn(batch, kv_heads, num_sinks, dim, dtype=torch.float64)
        if far:
            self.leaves["far_logit"] = torch.randn(batch, heads, length, dtype=torch.float64)
            self.leaves["far_value"] = torch.randn(batch, heads, length, dim, dtype=torch.float64)
        self.no_sink = older[..., None] <= torch.arange(num_sinks)
        self.no_far = older <= num_sinks
        for name in self.leaves:
            self.leaves[name].requires_grad_()

    def single(self) -> "Case":
        """The same inputs in float32, as leaves of their own."""
        single = object.__new__(Case)
        single.__dict__ = dict(self.__dict__)
        single.leaves = {name: leaf.detach().float().requires_grad_() for name, leaf in self.leaves.items()}
        return single

    def extras(self) -> tuple[Sinks | None, FarField | None]:
        sinks = far = None
        if "sink_logits" in self.leaves:
            hidden = self.no_sink
            sinks = Sinks(self.leaves["sink_logits"].masked_fill(hidden, -math.inf), self.leaves["sink_values"])
        if "far_logit" in self.leaves:
            far = FarField(self.leaves["far_value"], self.leaves["far_logit"].masked_fill(self.no_far, -math.inf))
        return sinks, far

    def run(self, form: str, **options) -> torch.Tensor:
        query, key, value = (self.leaves[name] for name in ("query", "key", "value"))
        return FORMS[form](query, key, value, self.window, self.first_real, *self.extras(), **options)

    def oracle(self, is_causal: bool = True) -> torch.Tensor:
        """Row by row without its padding; the queries of the past, which nobody asks for, are zeros."""
        sinks, far = self.extras()
        rows = []
        for row in range(self.leaves["query"].shape[0]):
            first = int(self.first_real[row]) if isinstance(self.first_real, torch.Tensor) else self.first_real
            query = F.pad(self.leaves["query"][row], (0, 0, self.past, 0))[:, first:]
            key, value = (
                self.leaves[name][row].repeat_interleave(self.groups, 0)[:, first:] for name in ("key", "value")
            )
            logits, values = [], []
            if sinks is not None:
                logits.append(sinks.logits[row])
                shared = sinks.value[row].repeat_interleave(self.groups, 0)
                values.append(shared[:, None].expand(-1, logits[-1].shape[1], -1, -1))
            if far is not None:
                logits.append(far.logit[row][..., None])
                values.append(far.value[row][..., None, :])
            if logits:
                logits = F.pad(torch.cat(logits, -1), (0, 0, self.past, 0))[:, first:]
                values = F.pad(torch.cat(values, -2), (0, 0, 0, 0, self.past, 0))[:, first:]
            else:
                logits = values = None
            output = oracles.window_attention(query, key, value, self.window, is_causal, logits, values)
            rows.append(output[:, max(self.past - first, 0) :])
        return rows

    def real(self, output: torch.Tensor) -> list[torch.Tensor]:
        """Each row's real queries."""
        firsts = (
            self.first_real.tolist() if isinstance(self.first_real, torch.Tensor) else [self.first_real] * len(output)
        )
        return [row[:, max(first - self.past, 0) :] for row, first in zip(output, firsts, strict=True)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str = "", tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


def gradients(case: Case, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    loss = sum((row * torch.randn(row.shape, generator=generator, dtype=torch.float64)).sum() for row in rows)
    found = torch.autograd.grad(loss, list(case.leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(case.leaves.items(), found, strict=True)
    }


def assert_same_outputs_and_gradients(case: Case, form: str, is_causal: bool = True) -> None:
    single = case.single()
    expected, actual = case.oracle(is_causal), single.real(single.run(form, is_causal=is_causal).output)
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours, theirs, f"row {index}")
    ours, theirs = gradients(single, actual), gradients(case, expected)
    for name, gradient in theirs.items():
        # A gradient that is zero, of the scores of a query that sees one token, has no size to compare with.
        scale = max(gradient.abs().max().item(), 0.1)
        assert (ours[name].double() - gradient).abs().max() < TOLERANCE * scale, f"gradient of {name}"


EXTRAS = [(0, False), (3, False), (0, True), (3, True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_sinks, far", EXTRAS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window, length", [(1, 1), (1, 9), (3, 2), (4, 33), (40, 39), (40, 41), (40, 97)])
def test_every_form_is_the_softmax_of_what_a_query_sees(form, window, length, padded, num_sinks, far):
    """Lengths on both sides of the window, and of the blocks (of 32 queries here) that the fast form cuts."""
    num_sinks = min(num_sinks, window)
    assert_same_outputs_and_gradients(Case(length, window, padded=padded, num_sinks=num_sinks, far=far), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("num_sinks, far", EXTRAS)
def test_query_heads_share_the_keys_of_their_group(form, heads, kv_heads, num_sinks, far):
    assert_same_outputs_and_gradients(
        Case(45, 5, heads=heads, kv_heads=kv_heads, padded=True, num_sinks=num_sinks, far=far), form
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length, past", [(1, 7), (1, 40), (5, 3), (33, 39), (64, 64), (70, 1)])
def test_queries_are_the_last_of_the_slots(form, length, past, padded):
    """As with a cache: its tokens are keys, and no queries of this call."""
    case = Case(length, 40, past=past, padded=padded, num_sinks=2, far=True)
    assert_same_outputs_and_gradients(case, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window, length", [(1, 5), (3, 20), (40, 20), (40, 97)])
@pytest.mark.parametrize("padded, num_sinks, far", [(False, 0, False), (True, 0, False), (True, 3, True)])
def test_an_encoder_looks_both_ways(form, window, length, padded, num_sinks, far):
    case = Case(length, window, padded=padded, num_sinks=min(num_sinks, window), far=far)
    assert_same_outputs_and_gradients(case, form, is_causal=False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_length_and_window_agree_in_both_forms(padded, is_causal):
    """Outputs in float64, so that a wrong mask cannot pass for rounding: 1e-10."""
    for length, window in itertools.product(range(1, 100, 9), (1, 2, 32, 33, 64, 65, 98)):
        case = Case(length, window, padded=padded, num_sinks=1, far=True)
        with torch.no_grad():
            ours = case.real(case.run("blocked", is_causal=is_causal).output)
            theirs = case.real(case.run("reference", is_causal=is_causal).output)
        for row, expected in zip(ours, theirs, strict=True):
            assert_close(row, expected, f"length {length}, window {window}", 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [50, 51, 1000])
def test_a_window_over_everything_is_ordinary_attention(form, is_causal, window):
    case = Case(50, window, heads=4, kv_heads=2).single()
    output = case.run(form, is_causal=is_causal).output
    leaves = case.leaves
    expected = F.scaled_dot_product_attention(
        leaves["query"], leaves["key"], leaves["value"], is_causal=is_causal, scale=1.0, enable_gqa=True
    )
    assert_close(output, expected, tolerance=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [4, 30])
def test_one_number_of_padding_slots_serves_all_rows(form, window):
    case = Case(20, window)
    case.first_real = 6
    assert_same_outputs_and_gradients(case, form)


def test_weights_of_the_reference_sum_to_one_and_reproduce_the_output():
    case = Case(30, 5, num_sinks=2, far=True)
    result = case.run("reference")
    weights = torch.cat([result.near, result.sinks, result.far], -1)
    assert_close(weights.sum(-1), torch.ones(2, 2, 30, dtype=torch.float64), tolerance=1e-12)
    value, sink_values = (case.leaves[name].repeat_interleave(2, 1) for name in ("value", "sink_values"))
    output = result.near @ value + result.sinks @ sink_values + result.far * case.leaves["far_value"]
    assert_close(result.output, output, tolerance=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_large_scores_neither_overflow_nor_lose_the_gradient(form, size):
    """Scores of several thousand: a softmax that is one token and zeros. Its output is exact to float32 wherever the two
    largest scores differ by more than their rounding, which is why only finiteness is asked of the rest."""
    case = Case(70, 8, num_sinks=2, far=True, padded=True)
    with torch.no_grad():
        for name in ("query", "key", "sink_logits", "far_logit"):
            case.leaves[name] *= size
    single = case.single()
    rows = single.real(single.run(form).output)
    for ours, theirs in zip(rows, case.oracle(), strict=True):
        close = (ours.double() - theirs).abs().amax(-1) < 1e-2
        assert ours.isfinite().all()
        assert close.double().mean() > 0.95
    assert all(gradient.isfinite().all() for gradient in gradients(single, rows).values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extra", ["near", "far only", "sinks only"])
def test_one_token_can_take_all_the_weight(form, extra):
    case = Case(40, 4, num_sinks=2, far=True)
    with torch.no_grad():
        case.leaves["far_logit"].fill_(200.0 if extra == "far only" else -200.0)
        case.leaves["sink_logits"].fill_(200.0 if extra == "sinks only" else -200.0)
    output = case.single().run(form).output[:, :, -1]
    if extra == "far only":
        assert_close(output, case.leaves["far_value"][:, :, -1])
    elif extra == "sinks only":
        assert_close(output, case.leaves["sink_values"].mean(2).repeat_interleave(2, 1))
    else:
        alone = Case(40, 4)
        alone.leaves |= {name: case.leaves[name] for name in ("query", "key", "value")}
        assert_close(output, alone.run("reference").output[:, :, -1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_no_gradient_reaches_what_a_query_does_not_see(form, is_causal):
    """Exactly zero, neither NaN nor rounding."""
    case = Case(80, 7, num_sinks=2, far=True)
    case.run(form, is_causal=is_causal).output[:, :, 50].sum().backward()
    seen = torch.zeros(80, dtype=torch.bool)
    seen[44 : 51 if is_causal else 57] = True
    for name in ("key", "value"):
        touched = case.leaves[name].grad.abs().sum((0, 1, 3)) > 0
        assert torch.equal(touched, seen), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window, num_sinks, far", [(100, 0, False), (8, 0, False), (8, 2, True)])
def test_dropout_drops_weights_and_keeps_their_mean(form, window, num_sinks, far):
    """The mean over 400 draws, rows of one batch, lies within five standard errors of the output without dropout."""
    case = Case(40, window, num_sinks=num_sinks, far=far, batch=1)
    with torch.no_grad():
        exact = case.run(form).output
        case.leaves = {name: leaf.expand(400, *leaf.shape[1:]) for name, leaf in case.leaves.items()}
        draws = case.run(form, dropout=0.3).output
    error = (draws.mean(0) - exact[0]).abs() / (draws.std(0) / math.sqrt(400)).clamp(min=1e-6)
    assert (error < 5).double().mean() > 0.995
    # The first query sees itself alone, with weight one: it becomes 0 in 30 % of the draws, and 1 / 0.7 of it in the others.
    first, value = draws[:, 0, 0], case.leaves["value"].detach()[0, 0, 0]
    dropped = (first == 0).all(-1)
    assert 0.2 < dropped.double().mean() < 0.4
    assert_close(first[~dropped], (value / 0.7).expand(int((~dropped).sum()), -1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_sinks, far", EXTRAS[1:])
def test_half_precision_inputs_are_summed_in_float32(form, num_sinks, far):
    """Rounding the inputs is all that bfloat16 does: 1e-4 to float32 on the rounded ones, not bfloat16's 4e-3."""
    case = Case(70, 8, num_sinks=num_sinks, far=far).single()
    rounded = {name: leaf.detach().bfloat16() for name, leaf in case.leaves.items()}
    case.leaves = {name: leaf.float() for name, leaf in rounded.items()}
    expected = case.run("reference").output
    case.leaves = {name: leaf if name.startswith("far") else rounded[name] for name, leaf in case.leaves.items()}
    assert_close(case.run(form).output.float(), expected)


@pytest.mark.parametrize("window", [1, 64, 128, 129, 4096])
def test_blocks_waste_little(window):
    """A block of queries scores its own keys and a window's worth behind them, within sensible sizes of a block."""
    assert 32 <= block_size(window) <= 512
    assert block_size(window) <= max(window // 2, 32)


def test_the_layout_of_tensors_in_memory_does_not_matter():
    """The kernel reads the last axis as contiguous: values after a convolution and gradients of a sum are not."""
    shape, window = (1, 2, 32, 8), 1  # whole blocks: nothing is padded, hence copied, on the way

    def run(transposed: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        if transposed:
            query, key, value = (states.mT.contiguous().mT for states in (query, key, value))
        query, key, value = (states.requires_grad_() for states in (query, key, value))
        output = window_blocked(query, key, value, window).output
        grads = torch.autograd.grad(output.sum() if transposed else (output * 1.0).sum(), (query, key, value))
        return [output.detach(), *grads]

    reference = window_reference(
        *(torch.randn(shape, generator=g) for g in [torch.Generator().manual_seed(0)] * 3), window
    )
    for ours, theirs in zip(run(transposed=True), run(transposed=False), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # float32 sums in another order
    torch.testing.assert_close(run(transposed=True)[0], reference.output, atol=1e-5, rtol=1e-5)
