"""Far field rules: chunked = reference = step = a float64 recurrence, at any length, stable, linear in memory and work.

Errors are measured relative to the largest entry of what is expected. In float32 sums of up to 300 terms, in different
orders, part at about 1e-6 of that; 1e-4 leaves room for the triangular solve of the delta rule.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kermit_hf.kernel_attention import (
    KernelMemory,
    additive_chunked,
    additive_reference,
    additive_step,
    default_chunk_size,
    delta_chunked,
    delta_reference,
    delta_step,
    empty_memory,
    read_memory,
)
from tests.kermit_hf import oracles


FORMS = {
    "additive": {"reference": additive_reference, "chunked": additive_chunked, "step": additive_step},
    "delta": {"reference": delta_reference, "chunked": delta_chunked, "step": delta_step},
}
RULES_AND_GATES = pytest.mark.parametrize("rule, gated", list(itertools.product(FORMS, (False, True))))
TOLERANCE = 1e-4


class Inputs(NamedTuple):
    """Arguments of a rule by name, and the first memory as plain tensors, so that all of them can have gradients."""

    tensors: dict[str, torch.Tensor]
    rule: str

    def to(self, dtype: torch.dtype) -> "Inputs":
        tensors = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.tensors.items()}
        return Inputs(tensors, self.rule)

    def rule_arguments(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("matrix", "normalizer")}

    def memory(self) -> KernelMemory | None:
        if "matrix" not in self.tensors:
            return None
        return KernelMemory(self.tensors["matrix"], self.tensors.get("normalizer"))


def make_inputs(rule, gated, length, batch=2, heads=4, kv_heads=2, features=8, head_dim=6, memory=True) -> Inputs:
    """float64; positive features for the additive rule, unit features for the delta rule, as their callers promise."""
    query = torch.randn(batch, heads, length, features, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, length, features, dtype=torch.float64)
    tensors = {"value": torch.randn(batch, kv_heads, length, head_dim, dtype=torch.float64)}
    if rule == "additive":
        tensors |= {"query": query.exp(), "key": key.exp()}
    else:
        tensors |= {"query": F.normalize(query, dim=-1), "key": F.normalize(key, dim=-1)}
        tensors["write_strength"] = torch.randn(batch, kv_heads, length, dtype=torch.float64).sigmoid()
    if gated:
        tensors["log_forget"] = F.logsigmoid(2 + torch.randn(batch, kv_heads, length, dtype=torch.float64))
    if memory:
        tensors["matrix"] = torch.randn(batch, kv_heads, features, head_dim, dtype=torch.float64)
        if rule == "additive":
            tensors["normalizer"] = torch.rand(batch, kv_heads, features, dtype=torch.float64) + 1
    return Inputs(tensors, rule).to(torch.float64)


def oracle(inputs: Inputs, every_state: bool = False) -> tuple[torch.Tensor, ...]:
    """numerator, denominator or None, matrix, normalizer or None: by the recurrence, each query head on its own.

    The memory is that after the last token, or after every token, on axis 2.
    """
    tensors = inputs.tensors
    groups = tensors["query"].shape[1] // tensors["key"].shape[1]
    shared = {name: t if name == "query" else t.repeat_interleave(groups, 1) for name, t in tensors.items()}
    log_forget = shared.get("log_forget")
    read = oracles.recurrence(
        inputs.rule,
        shared["query"],
        shared["key"],
        shared["value"],
        None if log_forget is None else log_forget.exp(),
        shared.get("write_strength"),
        shared.get("matrix"),
        shared.get("normalizer"),
    )
    matrix, normalizer = read.matrix[:, ::groups], read.normalizer[:, ::groups]
    if not every_state:
        matrix, normalizer = matrix[:, :, -1], normalizer[:, :, -1]
    if inputs.rule == "delta":
        return read.numerator, None, matrix, None
    return read.numerator, read.denominator, matrix, normalizer


def run(inputs: Inputs, form: str, **options) -> tuple[torch.Tensor, ...]:
    """The same four tensors from one of our forms; `step` goes over the tokens."""
    function, arguments, memory = FORMS[inputs.rule][form], inputs.rule_arguments(), inputs.memory()
    if form != "step":
        read = function(**arguments, memory=memory, **options)
        return read.numerator, read.denominator, *read.memory
    numerators, denominators = [], []
    for t in range(arguments["query"].shape[2]):
        read = function(**{name: tensor[:, :, t : t + 1] for name, tensor in arguments.items()}, memory=memory)
        memory = read.memory
        numerators.append(read.numerator)
        denominators.append(read.denominator)
    denominator = None if inputs.rule == "delta" else torch.cat(denominators, 2)
    return torch.cat(numerators, 2), denominator, *memory


def gradients(inputs: Inputs, outputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Of one random projection of all outputs, the last memory included, with respect to every input."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
        for output in outputs
        if output is not None
    )
    return dict(zip(inputs.tensors, torch.autograd.grad(loss, list(inputs.tensors.values())), strict=True))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


def assert_same_outputs_and_gradients(inputs: Inputs, form: str, tolerance: float = TOLERANCE, **options) -> None:
    expected, single = oracle(inputs), inputs.to(torch.float32)
    actual = run(single, form, **options)
    for name, ours, theirs in zip(("numerator", "denominator", "matrix", "normalizer"), actual, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == torch.float32
            assert_close(ours, theirs, tolerance, name)
    ours, theirs = gradients(single, actual), gradients(inputs, expected)
    for name in theirs:
        assert_close(ours[name], theirs[name], tolerance, f"gradient of {name}")


# Equality of the forms.


@RULES_AND_GATES
@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_every_form_follows_the_recurrence(rule, gated, form, length):
    assert_same_outputs_and_gradients(make_inputs(rule, gated, length), form)


@RULES_AND_GATES
@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 191, 300])
def test_any_length_around_chunk_borders(rule, gated, length):
    inputs = make_inputs(rule, gated, length, batch=1, heads=2, kv_heads=1)
    assert_same_outputs_and_gradients(inputs, "chunked")


@RULES_AND_GATES
def test_every_odd_length_up_to_300(rule, gated):
    """Outputs only. The first tokens of a text give the first outputs, so one run of the oracle serves all lengths."""
    full = make_inputs(rule, gated, 300, batch=1, heads=2, kv_heads=1, features=4, head_dim=3)
    with torch.no_grad():
        numerator, denominator, matrices, normalizers = oracle(full, every_state=True)
        full = full.to(torch.float32)
        for length in range(1, 301, 2):
            tensors = {n: t if n in ("matrix", "normalizer") else t[:, :, :length] for n, t in full.tensors.items()}
            ours = run(Inputs(tensors, rule), "chunked")
            assert_close(ours[0], numerator[:, :, :length], name=f"numerator at length {length}")
            assert_close(ours[2], matrices[:, :, length - 1], name=f"memory after {length} tokens")
            if rule == "additive":
                assert_close(ours[1], denominator[:, :, :length], name=f"denominator at length {length}")
                assert_close(ours[3], normalizers[:, :, length - 1], name=f"normalizer after {length} tokens")


@RULES_AND_GATES
@pytest.mark.parametrize("chunk_size", [1, 2, 16, 100, 256])
def test_chunk_size_changes_nothing(rule, gated, chunk_size):
    assert_same_outputs_and_gradients(make_inputs(rule, gated, 77, batch=1), "chunked", chunk_size=chunk_size)


@RULES_AND_GATES
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_query_heads_share_the_memory_of_their_group(rule, gated, heads, kv_heads):
    inputs = make_inputs(rule, gated, 21, heads=heads, kv_heads=kv_heads)
    for form in FORMS[rule]:
        assert_same_outputs_and_gradients(inputs, form)


@RULES_AND_GATES
@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
def test_without_a_memory_it_starts_empty(rule, gated, form):
    inputs = make_inputs(rule, gated, 19, memory=False)
    assert_same_outputs_and_gradients(inputs, form)
    arguments = inputs.rule_arguments()
    empty = empty_memory(arguments["key"], arguments["value"], normalized=rule == "additive")
    assert all(tensor.count_nonzero() == 0 for tensor in empty if tensor is not None)


@RULES_AND_GATES
@pytest.mark.parametrize("split", [1, 5, 64, 90])
def test_a_text_read_in_two_parts_is_the_text(rule, gated, split):
    inputs = make_inputs(rule, gated, 91).to(torch.float32)
    with torch.no_grad():
        whole = run(inputs, "chunked")
        parts, memory = [], inputs.memory()
        for part in (slice(None, split), slice(split, None)):
            arguments = {name: tensor[:, :, part] for name, tensor in inputs.rule_arguments().items()}
            read = FORMS[rule]["chunked"](**arguments, memory=memory)
            memory = read.memory
            parts.append(read.numerator)
    assert_close(torch.cat(parts, 2), whole[0])
    assert_close(memory.matrix, whole[2])


@RULES_AND_GATES
def test_weights_of_the_reference_reproduce_the_numerator(rule, gated):
    inputs = make_inputs(rule, gated, 40, memory=False)
    arguments = inputs.rule_arguments()
    read = FORMS[rule]["reference"](**arguments)
    groups = arguments["query"].shape[1] // arguments["key"].shape[1]
    assert_close(read.weights @ arguments["value"].repeat_interleave(groups, 1), read.numerator, 1e-12)
    assert read.weights.triu(1).count_nonzero() == 0
    if rule == "additive":
        assert_close(read.weights.sum(-1), read.denominator, 1e-12)


@RULES_AND_GATES
def test_reading_does_not_write(rule, gated):
    inputs = make_inputs(rule, gated, 5)
    memory = inputs.memory()
    query = inputs.tensors["query"]
    read = read_memory(query, memory)
    groups = query.shape[1] // memory.matrix.shape[1]
    assert_close(read.numerator, query @ memory.matrix.repeat_interleave(groups, 1), 1e-12)
    if rule == "additive":
        expected = (query * memory.normalizer.repeat_interleave(groups, 1)[:, :, None]).sum(-1)
        assert_close(read.denominator, expected, 1e-12)
    assert read.memory is memory


@RULES_AND_GATES
@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
def test_a_token_of_padding_leaves_the_memory_exactly_as_it_was(rule, gated, form):
    """Exactly, so that a padded row equals the row alone whatever follows."""
    inputs = make_inputs(rule, gated, 9).to(torch.float32)
    with torch.no_grad():
        name = "key" if rule == "additive" else "write_strength"
        inputs.tensors[name].zero_()
        if gated:
            inputs.tensors["log_forget"].zero_()
        _, _, *after = run(inputs, form)
    for before, now in zip(inputs.memory(), after, strict=True):
        assert before is None or torch.equal(before, now)


# The published recurrences.


def test_additive_rule_is_linear_attention_of_katharopoulos():
    query, key, value = (torch.randn(2, 3, 30, 8, dtype=torch.float64) for _ in range(3))
    read = additive_chunked(oracles.elu_features(query), oracles.elu_features(key), value)
    assert_close(read.numerator / read.denominator[..., None], oracles.linear_attention(query, key, value), 1e-12)


def test_additive_rule_with_random_features_is_the_performer():
    query, key, value = (torch.randn(2, 3, 30, 8, dtype=torch.float64) for _ in range(3))
    directions = torch.randn(20, 8, dtype=torch.float64)
    read = additive_chunked(oracles.favor_features(query, directions), oracles.favor_features(key, directions), value)
    expected = oracles.performer(query, key, value, directions)
    assert_close(read.numerator / read.denominator[..., None], expected, 1e-12)


def test_additive_rule_with_taylor_features_is_based():
    query, key, value = (torch.randn(2, 3, 30, 8, dtype=torch.float64) for _ in range(3))
    read = additive_chunked(oracles.taylor_features(query), oracles.taylor_features(key), value)
    assert_close(read.numerator / read.denominator[..., None], oracles.based(query, key, value), 1e-12)


def test_delta_rule_is_delta_net():
    query, key, value = (torch.randn(2, 3, 70, 8, dtype=torch.float64) for _ in range(3))
    query, key = oracles.silu_l2_features(query), oracles.silu_l2_features(key)
    beta = torch.rand(2, 3, 70, dtype=torch.float64)
    assert_close(delta_chunked(query, key, value, beta).numerator, oracles.delta_net(query, key, value, beta), 1e-11)


def test_delta_rule_with_a_gate_is_gated_delta_net():
    query, key, value = (torch.randn(2, 3, 70, 8, dtype=torch.float64) for _ in range(3))
    query, key = oracles.silu_l2_features(query), oracles.silu_l2_features(key)
    beta, alpha = torch.rand(2, 2, 3, 70, dtype=torch.float64)
    read = delta_chunked(query, key, value, beta, alpha.log())
    assert_close(read.numerator, oracles.gated_delta_net(query, key, value, beta, alpha), 1e-11)


def test_delta_rule_recalls_what_was_written_last_under_a_key():
    """Strength one and a unit key: reading with that key gives exactly the last value, whatever was there before."""
    key = F.normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, 1, 100, 8)
    value = torch.randn(1, 1, 100, 5)
    read = delta_chunked(key, key, value, torch.ones(1, 1, 100))
    assert_close(read.numerator, value)


# Stability.


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("strength", [0.5, 0.999, 1.0])
@pytest.mark.parametrize("distinct", [1, 3])
def test_repeated_keys_lose_no_digits(gated, strength, distinct):
    """The unit triangular system is then full of entries near one; powers of it reach 2^chunk_size before they vanish."""
    inputs = make_inputs("delta", gated, 200, batch=1)
    tensors = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    index = torch.arange(200) % distinct
    tensors["key"] = tensors["key"][:, :, index]
    tensors["write_strength"].fill_(strength)
    assert_same_outputs_and_gradients(Inputs(tensors, "delta").to(torch.float64), "chunked")


@RULES_AND_GATES
def test_features_of_many_sizes_keep_their_precision(rule, gated):
    inputs = make_inputs(rule, gated, 150)
    tensors = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    tensors["value"] *= 10.0 ** torch.randint(-3, 4, tensors["value"].shape[:3])[..., None]
    if rule == "additive":
        tensors["key"] *= 10.0 ** torch.randint(-3, 4, tensors["key"].shape[:3])[..., None]
    assert_same_outputs_and_gradients(Inputs(tensors, rule).to(torch.float64), "chunked")


GATES = {
    "never forgets": lambda shape: torch.full(shape, -1e-8, dtype=torch.float64),
    "forgets all each token": lambda shape: torch.full(shape, -1e4, dtype=torch.float64),
    "decays by e^-1 a token": lambda shape: torch.full(shape, -1.0, dtype=torch.float64),
    "decays by e^-3 a token": lambda shape: torch.full(shape, -3.0, dtype=torch.float64),
    "decays by e^-39 a token": lambda shape: torch.full(shape, -39.0, dtype=torch.float64),
    "now and then forgets all": lambda shape: torch.where(torch.rand(shape) < 0.1, -1e4, -0.05).double(),
    "of every size": lambda shape: -(10.0 ** torch.empty(shape, dtype=torch.float64).uniform_(-6, 5)),
}


def extreme(rule: str, gate: str, length: int = 200) -> Inputs:
    inputs = make_inputs(rule, True, length, batch=1)
    tensors = dict(inputs.tensors)
    tensors["log_forget"] = GATES[gate](tensors["log_forget"].shape)
    return Inputs(tensors, rule).to(torch.float64)


@pytest.mark.parametrize("rule", FORMS)
@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
@pytest.mark.parametrize("gate", GATES)
def test_extreme_gates_keep_their_precision(rule, form, gate):
    inputs = extreme(rule, gate, length=100 if form == "step" else 200)
    expected, single = oracle(inputs), inputs.to(torch.float32)
    actual = run(single, form)
    for name, ours, theirs in zip(("numerator", "denominator", "matrix", "normalizer"), actual, expected, strict=True):
        if ours is not None:
            assert_close(ours, theirs, name=name)
    ours, theirs = gradients(single, actual), gradients(inputs, expected)
    for name in theirs:
        assert ours[name].isfinite().all(), name
        if name not in ("log_forget", "matrix", "normalizer"):
            assert_close(ours[name], theirs[name], name=f"gradient of {name}")


class Written(TorchDispatchMode):
    """Hands everything that an operation computes, forward or backward, to `look`; views and fresh memory compute nothing."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            allocates = "empty" in function.overloadpacket.__name__
            if isinstance(tensor, torch.Tensor) and not function.is_view and not allocates:
                self.look(function, tensor)
        return result


def test_fresh_memory_is_not_looked_at():
    """What it holds is chance: denormal numbers there are nobody's."""
    found = []
    with Written(lambda function, tensor: found.append(str(function))):
        ones = torch.ones(2)
        torch.empty_like(ones)
        ones.new_empty_strided((2,), (1,))
    assert found == ["aten.ones.default"]


@pytest.mark.parametrize("rule", FORMS)
@pytest.mark.parametrize("form", ["chunked", "step"])
@pytest.mark.parametrize("gate", GATES)
def test_no_denormal_numbers_whatever_the_gate(rule, form, gate):
    """CPUs take about a hundred times longer over them. One in 100,000 may be: the product of two small decays and a
    feature that happens to be near zero costs nothing as long as it stays an accident."""
    denormal, written = {}, 0

    def look(function, tensor):
        nonlocal written
        if tensor.is_floating_point():
            written += tensor.numel()
            found = int(((tensor != 0) & (tensor.abs() < torch.finfo(tensor.dtype).tiny)).sum())
            if found:
                denormal[str(function)] = denormal.get(str(function), 0) + found

    inputs = extreme(rule, gate).to(torch.float32)
    with Written(look):
        outputs = run(inputs, form)
        gradients(inputs, outputs)
    assert sum(denormal.values()) <= 1e-5 * written, denormal


# Precision of the inputs.


@RULES_AND_GATES
@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(rule, gated, form, dtype):
    """Bit for bit what the rounded inputs give in float32."""
    half = make_inputs(rule, gated, 70, memory=False).to(dtype)
    with torch.no_grad():
        actual = run(half, form)
        expected = run(half.to(torch.float32), form)
    for ours, theirs in zip(actual, expected, strict=True):
        if theirs is not None:
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)


@RULES_AND_GATES
@pytest.mark.parametrize("form", ["reference", "chunked", "step"])
def test_float64_stays_float64(rule, gated, form):
    """1e-10: nothing on the way is rounded to float32 (6e-8)."""
    inputs = make_inputs(rule, gated, 70)
    for ours, theirs in zip(run(inputs, form), oracle(inputs), strict=True):
        if theirs is not None:
            assert ours.dtype == torch.float64
            assert_close(ours, theirs, 1e-10)


# Cost.


def cost(rule: str, gated: bool, length: int) -> tuple[int, int]:
    """Elements saved for the backward pass, and elements that all operations of both passes write."""
    inputs = make_inputs(rule, gated, length, batch=1, heads=2, kv_heads=1, features=16, head_dim=16).to(torch.float32)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    written = 0

    def look(function, tensor):
        nonlocal written
        written += tensor.numel()

    with Written(look):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run(inputs, "chunked")
        gradients(inputs, outputs)
    return sum(saved.values()), written


@RULES_AND_GATES
def test_training_memory_and_work_grow_linearly_with_the_length(rule, gated):
    """Four times the length costs four times as much; a slice of a preallocated tensor per chunk would cost sixteen."""
    (short_memory, short_work), (long_memory, long_work) = (cost(rule, gated, length) for length in (512, 2048))
    assert long_memory < 4.2 * short_memory
    assert long_work < 4.2 * short_work


@pytest.mark.parametrize("length, expected", [(1, 1), (5, 8), (64, 64), (1000, 64)])
def test_a_short_text_is_one_chunk(length, expected):
    assert default_chunk_size(feature_dim=64, length=length) == expected


@RULES_AND_GATES
def test_several_chunks_compile_without_a_graph_break(rule, gated):
    """Forward and backward, of more than one head: the sums over chunks are views there."""
    states = [torch.rand(1, 2, 70, 8).requires_grad_() for _ in range(3)]
    gates = {"log_forget": -torch.rand(1, 2, 70)} if gated else {}
    if rule == "delta":
        states[1] = F.normalize(states[1].detach(), dim=-1).requires_grad_()
        gates["write_strength"] = torch.rand(1, 2, 70)
    torch.compiler.reset()
    results = []
    for form in (torch.compile(FORMS[rule]["chunked"], fullgraph=True, backend="aot_eager"), FORMS[rule]["chunked"]):
        read = form(*states, **gates, chunk_size=16)
        loss = read.numerator.square().sum() + read.memory.matrix.square().sum()
        results.append([read.numerator, read.memory.matrix, *torch.autograd.grad(loss, states)])
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
