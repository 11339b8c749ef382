"""The kernels in C++ for single tokens: the float64 recurrence and softmax, from any layout, alone and in models that decode."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from kermit_hf import KermitForCausalLM, kernel_backend, step_cpu
from kermit_hf.backends import LAYER_MAPS
from kermit_hf.cpu_kernels import cpu_misfit
from kermit_hf.feature_maps import (
    FEATURE_MAPS,
    DpfpFeatureMap,
    EluFeatureMap,
    FavorFeatureMap,
    HedgehogFeatureMap,
    SiluL2FeatureMap,
    TaylorFeatureMap,
)
from kermit_hf.kermit_attention import rotate
from kermit_hf.kernel_attention import KernelMemory
from kermit_hf.step_cpu import (
    additive_elu_step_fused,
    additive_step_fused,
    delta_silu_step_fused,
    delta_step_fused,
    layer_step_fused,
    window_step_fused,
)
from kermit_hf.window_attention import FarField
from tests.kermit_hf import oracles
from tests.kermit_hf.test_delta_cpu import every_second, transposed
from tests.kermit_hf.test_kernel_attention import Inputs, assert_close, make_inputs, oracle
from tests.kermit_hf.tiny_models import SETTINGS, VOCABULARY, place, tiny_config, tiny_model, tokens
from tests.threads import assert_equal_on_any_number_of_threads


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=f"kernels for CPUs cannot run: {MISFIT}")

# Of the largest entry: a step sums as many terms as there are features, or tokens in a window.
TOLERANCE = 2e-6
SCALING = 0.3


# Near field.


def window_inputs(slots: int, head_dim: int, heads: int, kv_heads: int, num_sinks: int, batch: int = 3) -> dict:
    """In float32, with three texts: of the last one no token is real but the newest, and of the first one the first has left."""
    past = batch, kv_heads, slots, head_dim
    return {
        "query": torch.randn(batch, heads, 1, head_dim),
        "key": torch.randn(past),
        "value": torch.randn(past),
        "first_real": torch.tensor([-2, slots // 2, slots])[:batch],
        "sinks": tuple(torch.randn(batch, kv_heads, num_sinks, head_dim) for _ in range(2)) if num_sinks else None,
        "far": FarField(torch.randn(batch, heads, 1, head_dim), torch.randn(batch, heads, 1)),
    }


def tables(slots: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of more slots than there are."""
    angles = torch.arange(slots + 2)[:, None] * 3.0 ** -torch.arange(head_dim // 2).repeat(2)
    return angles.cos(), angles.sin()


def window_oracle(query, key, value, window_size, first_real, sinks, far, rotary, scaling) -> torch.Tensor:
    """The softmax of each query over the list of what it sees, in float64."""
    cos, sin = (table.double() for table in rotary)
    slots, groups = key.shape[2], query.shape[1] // key.shape[1]
    newest, output = slots - 1, torch.empty(query.shape[:3] + value.shape[3:], dtype=torch.float64)
    for row, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        own, first = (row, head // groups), int(first_real if isinstance(first_real, int) else first_real[row])
        turned = rotate(query[row, head].double(), cos[newest : newest + 1], sin[newest : newest + 1])[0]
        scores, values = [], []

        def see(key_row, value_row, place, turned=turned, scores=scores, values=values):
            key_row = rotate(key_row.double()[None], cos[place : place + 1], sin[place : place + 1])[0]
            scores.append(scaling * (turned @ key_row))
            values.append(value_row.double())

        for slot in range(max(slots - window_size, 0), slots):
            if slot >= first or slot == newest:
                see(key[own][slot], value[own][slot], slot)
        for index in range(0 if sinks is None else sinks[0].shape[2]):
            if first + index <= newest - window_size:
                see(sinks[0][own][index], sinks[1][own][index], newest - window_size + index)
        if far is not None:
            scores.append(far.logit[row, head, 0].double())
            values.append(far.value[row, head, 0].double())
        output[row, head, 0] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return output


def assert_near_field_follows(window_size: int, inputs: dict, tolerance: float = TOLERANCE) -> None:
    rotary = tables(*inputs["key"].shape[2:])
    expected = window_oracle(**inputs, window_size=window_size, rotary=rotary, scaling=SCALING)
    actual = window_step_fused(**inputs, window_size=window_size, rotary=rotary, scaling=SCALING)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("slots, window_size", [(1, 1), (1, 8), (5, 8), (8, 8), (9, 8), (12, 8), (40, 1), (133, 128)])
@pytest.mark.parametrize("num_sinks", [0, 1, 4])
def test_any_window(slots, window_size, num_sinks):
    seen = min(num_sinks, window_size) if slots > window_size else 0
    assert_near_field_follows(window_size, window_inputs(slots, 8, 4, 2, seen))


@pytest.mark.parametrize("head_dim", [2, 6, 16, 64, 100])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (4, 4)])
def test_any_head(head_dim, heads, kv_heads):
    assert_near_field_follows(12, window_inputs(20, head_dim, heads, kv_heads, 2))


@pytest.mark.parametrize("first_real", [0, 3, -30])
def test_without_padding_one_number_serves_all_texts(first_real):
    assert_near_field_follows(12, window_inputs(20, 8, 4, 2, 2) | {"first_real": first_real})


def test_without_a_far_field_and_with_one_that_is_empty():
    inputs = window_inputs(20, 8, 4, 2, 2)
    assert_near_field_follows(12, inputs | {"far": None})
    closed = inputs["far"]._replace(logit=torch.full((3, 4, 1), float("-inf")))
    assert_near_field_follows(12, inputs | {"far": closed})


def test_scores_may_be_large():
    """A score of a hundred is exact to 1e-5 in float32, and so is its exponential."""
    inputs = window_inputs(20, 8, 4, 2, 2)
    assert_near_field_follows(12, inputs | {"query": 60 * inputs["query"]}, 1e-5)


@pytest.mark.parametrize("layout", [transposed, every_second])
def test_the_near_field_takes_any_layout(layout):
    inputs = window_inputs(20, 8, 4, 2, 2)
    laid = {name: layout(inputs[name]) for name in ("query", "key", "value")}
    parts = {"sinks": tuple(map(layout, inputs["sinks"])), "far": FarField(*map(layout, inputs["far"]))}
    assert_near_field_follows(12, inputs | laid | parts)


# Far field.


def run(form, inputs: Inputs, **options) -> tuple[torch.Tensor | None, ...]:
    with torch.no_grad():
        read = form(**inputs.rule_arguments(), memory=inputs.memory(), **options)
    return read.numerator, read.denominator, *read.memory


def assert_steps_follow(form, expected: Inputs, actual: Inputs | None = None, **options) -> None:
    """expected: in float64; actual: the same for the form, in float32 by default."""
    actual = expected.to(torch.float32) if actual is None else actual
    for ours, theirs in zip(run(form, actual, **options), oracle(expected), strict=False):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, TOLERANCE)


FORMS = {"delta": delta_step_fused, "additive": additive_step_fused}
RULES = pytest.mark.parametrize("rule", FORMS)


@RULES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("features, head_dim", [(1, 1), (3, 20), (64, 64), (145, 40)])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2)])
def test_any_size_and_any_groups(rule, gated, features, head_dim, heads, kv_heads):
    sizes = {"features": features, "head_dim": head_dim, "heads": heads, "kv_heads": kv_heads}
    assert_steps_follow(FORMS[rule], make_inputs(rule, gated, 1, **sizes))


@RULES
@pytest.mark.parametrize("layout", [transposed, every_second])
def test_the_rules_take_any_layout(rule, layout):
    inputs = make_inputs(rule, True, 1)
    single = {name: layout(tensor.detach().float()) for name, tensor in inputs.tensors.items()}
    assert_steps_follow(FORMS[rule], inputs, Inputs(single, rule))


@RULES
@pytest.mark.parametrize("log_forget", [0.0, -39.0, -1e4])
def test_the_memory_may_be_kept_or_dropped(rule, log_forget):
    inputs = make_inputs(rule, True, 1)
    with torch.no_grad():
        inputs.tensors["log_forget"].fill_(log_forget)
    assert_steps_follow(FORMS[rule], inputs)


@RULES
def test_what_was_read_stays_as_it_was(rule):
    """The memory of a cache that may be copied or rolled back."""
    inputs = make_inputs(rule, True, 1).to(torch.float32)
    before = {name: tensor.detach().clone() for name, tensor in inputs.tensors.items()}
    run(FORMS[rule], inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.tensors.items())


def mapped(inputs: Inputs, feature_map) -> Inputs:
    tensors = {name: t.detach() for name, t in inputs.tensors.items()}
    return inputs._replace(tensors=tensors | {name: feature_map(tensors[name]) for name in ("query", "key")})


@pytest.mark.parametrize(
    "rule, form, feature_map",
    [
        ("delta", delta_silu_step_fused, oracles.silu_l2_features),
        ("additive", additive_elu_step_fused, oracles.elu_features),
    ],
)
def test_elementwise_feature_maps_are_applied_here(rule, form, feature_map):
    inputs = make_inputs(rule, True, 1, features=16)
    with torch.no_grad():
        inputs.tensors["query"].copy_(3 * torch.randn(2, 4, 1, 16))
        inputs.tensors["key"].copy_(3 * torch.randn(2, 2, 1, 16))
    single = inputs.to(torch.float32)
    assert_steps_follow(form, mapped(inputs, feature_map), single)


def test_a_token_that_does_not_enter_leaves_the_additive_memory():
    inputs = make_inputs("additive", False, 1)
    mask = torch.tensor([[[0.0]], [[1.0]]])
    single = inputs.to(torch.float32)
    masked = mapped(inputs, oracles.elu_features)
    masked.tensors["key"] *= mask[..., None]
    assert_steps_follow(additive_elu_step_fused, masked, single, key_mask=mask)
    _, _, matrix, _ = run(additive_elu_step_fused, single, key_mask=mask)
    assert torch.equal(matrix[0], single.tensors["matrix"][0])


def test_numerators_may_come_divided():
    inputs = make_inputs("additive", True, 1).to(torch.float32)
    numerator, denominator, *memory = run(additive_step_fused, inputs)
    quotient, *others = run(additive_step_fused, inputs, divides=True)
    assert_close(quotient, numerator / denominator[..., None], TOLERANCE)
    assert all(torch.equal(*pair) for pair in zip(others, [denominator, *memory], strict=True))


def test_a_denominator_of_zero_divides_nothing_by_zero():
    inputs = make_inputs("additive", False, 1).to(torch.float32)
    empty = Inputs({name: torch.zeros_like(tensor) for name, tensor in inputs.tensors.items()}, "additive")
    quotient, *_ = run(additive_step_fused, empty, divides=True)
    assert torch.equal(quotient, torch.zeros_like(quotient))


def test_results_do_not_depend_on_the_number_of_threads():
    inputs, rotary = window_inputs(133, 64, 8, 4, 4), tables(133, 64)
    rules = [make_inputs(rule, True, 1, heads=8, kv_heads=4, features=64, head_dim=64) for rule in FORMS]

    def steps() -> list[torch.Tensor]:
        results = [window_step_fused(**inputs, window_size=128, rotary=rotary, scaling=SCALING)]
        for rule in rules:
            results += [tensor for tensor in run(FORMS[rule.rule], rule.to(torch.float32)) if tensor is not None]
        return results

    assert_equal_on_any_number_of_threads(steps)


def number_of(feature_map: type) -> int:
    return list(LAYER_MAPS).index(feature_map)


def layer_inputs(is_additive: bool, heads: int, kv_heads: int, window: int, head_dim: int, batch: int = 2) -> dict:
    """Of `layer_step_fused`: the additive rule with "elu" or the delta rule with "silu_l2", with gate and convolution."""
    tokens, channels = (batch, kv_heads, window), (heads + 2 * kv_heads) * head_dim
    states = {"keys": torch.randn(*tokens, head_dim), "values": torch.randn(*tokens, head_dim)}
    states |= {name: torch.randn(batch, kv_heads, 4, head_dim) for name in ("sink_keys", "sink_values")}
    states |= {"matrix": torch.rand(batch, kv_heads, head_dim, head_dim), "log_forget": -torch.rand(tokens)}
    states |= {"conv_tail": torch.randn(batch, channels, 3)}
    states["normalizer"] = torch.rand(batch, kv_heads, head_dim) if is_additive else None
    states["write_strength"] = None if is_additive else torch.rand(tokens)
    weights = {"conv_weight": torch.randn(channels, 1, 4), "far_query": torch.randn(heads, head_dim)}
    weights |= dict.fromkeys(("query_norm", "key_norm", "query_weight", "key_weight"))
    weights |= {"far_bias": torch.randn(heads), "far_norm": None if is_additive else torch.rand(head_dim)}
    widths = {"query": heads * head_dim, "key": kv_heads * head_dim, "value": kv_heads * head_dim}
    projected = {name: torch.randn(batch, 1, width) for name, width in widths.items()}
    gate = torch.randn(batch, 1, kv_heads)
    return {
        **projected,
        "write_logit": None if is_additive else gate,
        "forget_logit": gate,
        "state": states,
        "weights": weights,
        "rotary": tables(window + 1, head_dim),
        "norm_eps": 1e-6,
        "scaling": head_dim**-0.5,
        "feature_map": number_of(EluFeatureMap if is_additive else SiluL2FeatureMap),
    }


@pytest.mark.parametrize("is_additive", [True, False])
def test_a_layer_does_not_depend_on_the_number_of_threads(is_additive):
    inputs = layer_inputs(is_additive, heads=8, kv_heads=4, window=128, head_dim=64)

    def step() -> list[torch.Tensor]:
        output, state = layer_step_fused(**inputs)
        return [output, *(tensor for tensor in state.values() if tensor is not None)]

    assert_equal_on_any_number_of_threads(step)


def test_a_layer_divides_nothing_by_zero():
    """What is far is read as by the kernel of the rule alone, also where its denominator counts as 1e-30."""
    inputs = layer_inputs(True, heads=2, kv_heads=1, window=8, head_dim=16)
    state, weights = inputs["state"], inputs["weights"]
    state["keys"].sub_(100.0)
    for name in ("matrix", "normalizer"):
        state[name].zero_()
    inputs["query"] = torch.full((2, 1, 32), -100.0)
    weights["conv_weight"].zero_()[:, :, -1] = 1.0
    weights["far_query"].zero_()
    weights["far_bias"].fill_(1e6)  # nothing else is seen
    output, renewed = layer_step_fused(**inputs)
    oldest = (state[name][:, :, :1] for name in ("keys", "values"))
    queries = inputs["query"].view(2, 1, 2, 16).transpose(1, 2)
    memory = KernelMemory(state["matrix"], state["normalizer"])
    read = additive_elu_step_fused(queries, *oldest, state["log_forget"][:, :, :1], memory, divides=True)
    assert (read.denominator < 1e-30).all() and read.numerator.abs().amax() > 1e-6
    assert_close(output, read.numerator.transpose(1, 2).flatten(2).double(), 1e-6)
    assert_close(renewed["matrix"], read.memory.matrix.double(), 1e-6)


@pytest.mark.parametrize(
    "left_out, message",
    [
        (("normalizer",), "the delta rule needs"),
        (("log_forget",), "gates need a new one"),
        (("conv_tail",), "a convolution needs a past"),
        (("far_bias",), "a window needs a far logit and positions"),
    ],
)
def test_what_belongs_together_comes_together(left_out, message):
    inputs = layer_inputs(True, heads=2, kv_heads=1, window=8, head_dim=16)
    for part in ("state", "weights"):
        inputs[part] |= dict.fromkeys(inputs[part].keys() & set(left_out))
    with pytest.raises(RuntimeError, match=message):
        layer_step_fused(**inputs)


@pytest.mark.parametrize(
    "feature_map, weight_shape",
    [
        (EluFeatureMap, None),
        (DpfpFeatureMap, None),
        (TaylorFeatureMap, (2, 16, 3)),
        (HedgehogFeatureMap, (2, 16, 5)),
        (FavorFeatureMap, (9, 16)),
    ],
)
def test_features_of_another_size_are_refused(feature_map, weight_shape):
    inputs = layer_inputs(True, heads=2, kv_heads=1, window=8, head_dim=16)
    inputs["feature_map"] = number_of(feature_map)
    inputs["state"]["matrix"] = inputs["state"]["matrix"][:, :, :8]
    weight = None if weight_shape is None else torch.rand(weight_shape)
    inputs["weights"] |= {"query_weight": weight, "key_weight": weight}
    with pytest.raises(RuntimeError, match="8 features do not fit the feature map"):
        layer_step_fused(**inputs)


@pytest.mark.parametrize("feature_map", [HedgehogFeatureMap, FavorFeatureMap])
def test_a_feature_map_without_its_weights_is_refused(feature_map):
    inputs = layer_inputs(True, heads=2, kv_heads=1, window=8, head_dim=16) | {"feature_map": number_of(feature_map)}
    with pytest.raises(RuntimeError, match="the feature map needs weights"):
        layer_step_fused(**inputs)


# In models.


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The kernels that ran."""
    kernels, made = step_cpu.load_cpu_kernels("kermit_hf"), []

    class Recorded:
        def __getattr__(self, name):
            made.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(step_cpu, "load_cpu_kernels", lambda namespace: Recorded())
    return made


def decode(model, input_ids: torch.Tensor, mask: torch.Tensor, prompt: int, **options) -> torch.Tensor:
    """Logits of all tokens from the last one of the prompt on, one after the other."""
    output = model(input_ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **options)
    logits = [output.logits[:, -1:]]
    for end in range(prompt + 1, input_ids.shape[1] + 1):
        newest = input_ids[:, end - 1 : end]
        output = model(newest, attention_mask=mask[:, :end], past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("side", ["left", None])
def test_a_model_decodes_as_it_reads(setting, side, calls):
    """Against PyTorch's forms for whole texts."""
    model = tiny_model(setting)
    input_ids, mask = place([tokens(40), tokens(40 if side is None else 27)], "left")
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids, attention_mask=mask).logits[:, 2:]
        with kernel_backend("cpp"):
            actual = decode(model, input_ids, mask, 3)
    layers, rule = model.config.layer_types.count("kernel_attention"), f"{model.config.update_rule}_step"
    of_tokens = "window_step" if model.config.window_size else rule
    assert calls.count(of_tokens) + calls.count("layer_step") == 37 * layers
    assert bool({rule, "layer_step"} & set(calls)) == (model.config.window_size < 40)
    seen = mask[:, 2:] == 1
    # Rounding passes through two or three layers whose weights are large.
    assert_close(actual[seen], expected[seen], 1e-4)


def test_generation_writes_the_same(calls):
    model, prompt = tiny_model("delta"), tokens(2, 12)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "num_beams": 2}
    with kernel_backend("torch"):
        expected = model.generate(prompt, **options)
    assert not calls
    with kernel_backend("cpp"):
        assert torch.equal(model.generate(prompt, **options), expected)
    assert "layer_step" in calls


PURE = {"window_size": 0, "num_sink_tokens": 0}
LAYERS = {
    "default": {},
    "without_gate": {"forget_gate": False},
    "without_convolution": {"conv_kernel_size": 0},
    "two_taps": {"conv_kernel_size": 2},
    "with_norms": {"use_qk_norm": True, "conv_kernel_size": 0},
    "with_biases": {"attention_bias": True},
    "without_sinks": {"num_sink_tokens": 0},
    "all_sinks": {"num_sink_tokens": 8},
    "one_token_window": {"window_size": 1, "num_sink_tokens": 1},
    "narrow_heads": {"head_dim": 2},
    "wide_heads": {"head_dim": 36, "num_key_value_heads": 4},
    "one_key_value_head": {"num_key_value_heads": 1},
    "elu": {"feature_map": "elu"},
    "hedgehog": {"feature_map": "hedgehog", "feature_dim": 5, "num_key_value_heads": 1},
    "additive": {"update_rule": "additive"},
    "additive_elu": {"update_rule": "additive", "feature_map": "elu", "use_qk_norm": True},
    "additive_hedgehog": {"update_rule": "additive", "feature_map": "hedgehog", "feature_dim": 9},
    "additive_without_gate": {"update_rule": "additive", "forget_gate": False, "conv_kernel_size": 0},
    "additive_one_token_window": {"update_rule": "additive", "window_size": 1, "num_sink_tokens": 0},
    "relu": {"feature_map": "relu"},
    "dpfp": {"feature_map": "dpfp"},
    "taylor": {"feature_map": "taylor", "feature_dim": 4},
    "favor": {"feature_map": "favor", "num_key_value_heads": 1},
    "additive_relu": {"update_rule": "additive", "feature_map": "relu"},
    "additive_dpfp": {"update_rule": "additive", "feature_map": "dpfp", "feature_dim": 32},
    "additive_taylor": {"update_rule": "additive", "feature_map": "taylor", "feature_dim": 3},
    "additive_taylor_of_whole_heads": {"update_rule": "additive", "feature_map": "taylor", "feature_dim": 8},
    "additive_favor": {"update_rule": "additive", "feature_map": "favor", "feature_dim": 19},
    "pure": PURE,
    "pure_without_gate": PURE | {"forget_gate": False, "conv_kernel_size": 0, "use_qk_norm": True},
    "pure_additive": PURE | {"update_rule": "additive", "feature_map": "elu"},
    "pure_additive_favor": PURE | {"update_rule": "additive", "feature_map": "favor", "num_key_value_heads": 1},
}


def assert_layers_follow(model, calls: list[str]) -> None:
    """From a text that filled the window on, against PyTorch's forms in float64."""
    input_ids, exact = tokens(2, 50), copy.deepcopy(model).double()
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = exact(input_ids).logits[:, 19:]
        with kernel_backend("cpp"):
            actual = decode(model, input_ids, torch.ones_like(input_ids), 20)
    assert calls[-60:] == ["layer_step"] * 60
    # Rounding passes through two layers whose weights are large, and the norms round to float32 in both.
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_one_call(name, calls):
    assert_layers_follow(tiny_model("delta", **LAYERS[name]), calls)


@pytest.mark.parametrize("setting", ["delta", "additive"])
def test_a_layer_that_forgets_at_once(setting, calls):
    """Gates below e^-40 are zero."""
    model = tiny_model(setting)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.forget_proj.bias.fill_(-60.0)
    assert_layers_follow(model, calls)


@pytest.mark.parametrize("rule", ["delta", "additive"])
def test_random_features_of_keys_at_the_limits_of_their_exponents(rule, calls):
    """Where the delta rule scales them by their largest one and the additive rule by the key's length."""
    model = tiny_model("delta", update_rule=rule, feature_map="favor", conv_kernel_size=0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight *= 10.0
    exponents = []
    mapped = FavorFeatureMap._exp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FavorFeatureMap, "_exp", staticmethod(lambda e: exponents.append(e) or mapped(e)))
        assert_layers_follow(model, calls)
    assert max(-exponent.min() for exponent in exponents) > 100


def test_norms_of_different_epsilon_are_left_to_other_forms(calls):
    model, input_ids = tiny_model("delta", use_qk_norm=True), tokens(1, 24)
    for layer in model.model.layers:
        layer.self_attn.far_norm.variance_epsilon = 0.5
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids).logits[:, 19:]
        with kernel_backend("cpp"):
            actual = decode(model, input_ids, torch.ones_like(input_ids), 20)
    assert "layer_step" not in calls
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize("setting, sinks", [("delta", 2), ("additive", 3)])
def test_rows_of_different_lengths_in_one_call(setting, sinks, calls):
    """Once all of them have filled the window and left the sinks behind."""
    model = tiny_model(setting)
    input_ids, mask = place([tokens(60), tokens(35), tokens(31)], "left")
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids, attention_mask=mask).logits[:, 29:]
        with kernel_backend("cpp"):
            actual = decode(model, input_ids, mask, 30)
    # The shortest one begins with one token, and is steady once it has those of the window and the sinks.
    assert calls.count("layer_step") == 2 * (60 - 29 - 8 - sinks)
    assert_close(actual[mask[:, 29:] == 1], expected[mask[:, 29:] == 1], 1e-4)


def test_without_numbers_to_look_at_it_is_left_to_torch(calls):
    """On the meta device, and in a compiled step, with a cache of padded rows."""
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad(), kernel_backend("compiled"):
        with torch.device("meta"):
            model = KermitForCausalLM(tiny_config("delta"))
            cache = model(tokens(2, 30), attention_mask=mask.to("meta")).past_key_values
            assert model(tokens(2, 1), past_key_values=cache).logits.shape == (2, 1, VOCABULARY)
        model, input_ids = tiny_model("delta"), tokens(2, 31)
        caches = [model(input_ids[:, :-1], attention_mask=mask).past_key_values for _ in range(2)]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        calls.clear()
        logits = compiled(input_ids[:, -1:], past_key_values=caches[0]).logits
        assert not calls
        assert_close(logits, model(input_ids[:, -1:], past_key_values=caches[1]).logits.double(), 1e-4)


@pytest.mark.parametrize("setting", ["delta", "additive"])
def test_a_copied_cache_goes_its_own_way(setting):
    """A step leaves what it read as it was."""
    model, input_ids = tiny_model(setting), tokens(1, 30)
    with torch.no_grad(), kernel_backend("cpp"):
        cache = model(input_ids, use_cache=True).past_key_values
        before = [[tensor.clone() for tensor in layer.tensors()] for layer in cache.layers]
        kept = [layer.tensors() for layer in cache.layers]
        model(tokens(1, 1), past_key_values=cache)
    for tensors, copies in zip(kept, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(tensors, copies, strict=True))
    assert all(
        tensor.data_ptr() not in {other.data_ptr() for other in tensors if other.numel()}
        for layer, tensors in zip(cache.layers, kept, strict=True)
        for tensor in (layer.keys, layer.values, *layer.memory, layer.conv_tail, *layer.gates.values())
        if tensor is not None
    )


@pytest.mark.parametrize(
    "other", [{"num_attention_heads": 8, "head_dim": 8}, {"num_key_value_heads": 4}, {"head_dim": 16}]
)
def test_the_cache_of_another_model_is_refused(other):
    model, another = tiny_model("delta"), tiny_model("delta", **other)
    with torch.no_grad(), kernel_backend("cpp"):
        cache = another(tokens(1, 30), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values"):
            model(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize("changes", [{}, PURE, PURE | {"update_rule": "additive", "feature_map": "favor"}])
def test_a_cache_begun_under_autocast_is_gone_on_with(changes):
    """Norms leave keys in float32 there, while values and the convolution's past are in half precision."""
    model, input_ids = tiny_model("delta", use_qk_norm=True, **changes), tokens(1, 31)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), kernel_backend("torch"):
            cache = model(input_ids[:, :-1], use_cache=True).past_key_values
        assert {tensor.dtype for tensor in cache.layers[0].tensors()} == {torch.float32, torch.bfloat16}
        logits = []
        for backend in ("torch", "cpp"):
            with kernel_backend(backend):
                logits.append(model(input_ids[:, -1:], past_key_values=copy.deepcopy(cache)).logits)
    assert_close(logits[1], logits[0].double(), 1e-4)


def hook_the_norm(model) -> None:
    model.model.layers[0].self_attn.far_norm.register_forward_hook(lambda module, args, output: 2 * output)
    model.model.layers[1].self_attn.far_norm.register_forward_hook(lambda module, args, output: 2 * output)


class SharperEluFeatureMap(EluFeatureMap):
    """One of a user."""

    def features(self, tensor):
        return super().features(2 * tensor)


@pytest.mark.parametrize("case", ["hooks", "users_map", "recording", "static", "short", "offloaded"])
def test_other_layers_are_left_to_other_forms(case, calls, monkeypatch):
    monkeypatch.setitem(FEATURE_MAPS, "sharper", SharperEluFeatureMap)
    changes = {"feature_map": "sharper"} if case == "users_map" else {}
    model, length = tiny_model("delta", **changes), 9 if case == "short" else 30
    if case == "hooks":
        hook_the_norm(model)
    input_ids, cache = tokens(1, length + 1), DynamicCache(config=model.config)
    if case == "static":
        cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids).logits[:, -1:]
        with kernel_backend("cpp"):
            model(input_ids[:, :-1], past_key_values=cache)
            for layer in cache.layers:
                if case == "recording":
                    layer.activate_past_recording()
                elif case == "offloaded":
                    layer.offload()
            actual = model(input_ids[:, -1:], past_key_values=cache).logits
    assert "layer_step" not in calls
    assert_close(actual, expected, 1e-4)


def test_adapters_on_projections_are_called():
    """As PEFT puts them in their place."""
    model, input_ids = tiny_model("delta"), tokens(1, 40)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "write_proj", "forget_proj", "o_proj"):
            getattr(layer.self_attn, name).register_forward_hook(lambda module, args, output: output.tanh())
    with torch.no_grad():
        with kernel_backend("torch"):
            expected = model(input_ids).logits[:, 19:]
        with kernel_backend("cpp"):
            actual = decode(model, input_ids, torch.ones_like(input_ids), 20)
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize("setting", ["additive", "delta"])
def test_tokens_that_may_be_rolled_back_are_read_alike(setting, calls):
    """As assisted generation reads them: the memory of what may go is thrown away."""
    model, input_ids = tiny_model(setting), tokens(1, 40)
    with torch.no_grad(), kernel_backend("torch"):
        expected = model(input_ids).logits[:, -1:]
    with torch.no_grad(), kernel_backend("cpp"):
        cache = model(input_ids[:, :20], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.activate_past_recording()
        for _ in range(16):
            model(tokens(1, 1), past_key_values=cache)
        cache.crop(-16)
        for index in range(20, 40):
            actual = model(input_ids[:, index : index + 1], past_key_values=cache).logits
    assert "window_step" in calls
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize(
    "setting, trained",
    [
        *itertools.product(["delta", "delta_pure", "additive", "additive_favor", "additive_pure"], ["", "v_proj"]),
        *itertools.product(["delta", "delta_pure"], ["forget_proj", "write_proj"]),
        *itertools.product(["delta", "additive", "additive_favor"], ["far_bias"]),
        *itertools.product(["additive"], ["forget_proj", "feature_map"]),
    ],
)
def test_a_step_with_gradients_is_left_to_forms_that_have_them(setting, trained, calls):
    """Also if all but a few parameters are frozen, which leaves most states without a gradient."""
    model, input_ids, gradients = tiny_model(setting), tokens(2, 30), []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    for backend in ("torch", "cpp"):
        model.zero_grad()
        with kernel_backend(backend):
            logits = decode(model, input_ids, torch.ones_like(input_ids), 20)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 20:].flatten()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert trained or not calls
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, expected in gradients[0].items():
        # Gradients that nearly cancel are as exact as what cancels in them.
        assert (gradients[1][name] - expected).abs().max() < 1e-4 * (expected.abs().max() + 0.01 * largest), name


@pytest.mark.parametrize("setting", ["delta", "additive"])
@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"implementation": "eager"}])
def test_other_dtypes_and_explicit_weights_are_left_to_torch(setting, options, calls):
    model = tiny_model(setting, implementation=options.get("implementation")).to(options.get("dtype", torch.float32))
    input_ids = tokens(1, 24)
    with torch.no_grad(), kernel_backend("cpp"):
        decode(model, input_ids, torch.ones_like(input_ids), 20)
    assert not calls


@pytest.mark.parametrize("setting", ["delta", "additive"])
def test_dropout_is_left_to_torch(setting, calls):
    model, input_ids = tiny_model(setting, attention_dropout=0.5).train(), tokens(1, 24)
    with torch.no_grad(), kernel_backend("cpp"):
        decode(model, input_ids, torch.ones_like(input_ids), 20)
    assert not {"window_step", "layer_step"} & set(calls)
