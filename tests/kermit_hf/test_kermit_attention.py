"""KERMIT's attention as a whole: the model = a float64 loop over tokens, eager = fast, and softmax where it should be.

Tolerance 1e-4 relative to the largest entry, of outputs and of gradients: float32 through two layers, whose exponentials
carry the rounding of their exponents, parts from float64 at about 1e-5.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kermit_hf import FEATURE_MAPS, KermitConfig, KermitForCausalLM, KermitModel, kermit_attention
from kermit_hf.slots import slots_of_text
from tests.kermit_hf import oracles


TOLERANCE = 1e-4
LENGTH = 13
PADDINGS = {
    "none": [[1] * LENGTH] * 2,
    "left": [[0] * 4 + [1] * 9, [1] * 13],
    "right": [[1] * 9 + [0] * 4, [1] * 13],
    "both": [[0] * 3 + [1] * 8 + [0] * 2, [1] + [0] * 12],
}


class Setting(NamedTuple):
    feature_map: str
    update_rule: str
    forget_gate: bool
    window_size: int
    num_sink_tokens: int
    padding: str


MAPS_AND_RULES = [
    (name, rule)
    for name, cls in sorted(FEATURE_MAPS.items())
    for rule in ("additive", "delta")
    if rule == "delta" or cls.is_positive
]
WINDOWS_AND_SINKS = [(0, 0), (1, 0), (1, 1), (5, 0), (5, 3), (20, 2)]


def settings() -> list[Setting]:
    """Every feature map x rule x gate x padding, 104 of the 624 combinations with the six pairs of window and sinks.

    Those rotate so that each of them meets every feature map with its rule, either gate, and every padding (checked below).
    """
    product = itertools.product(enumerate(MAPS_AND_RULES), (False, True), enumerate(PADDINGS))
    return [
        Setting(*map_and_rule, gated, *WINDOWS_AND_SINKS[(index + 4 * gated + shift) % 6], padding)
        for (index, map_and_rule), gated, (shift, padding) in product
    ]


SETTINGS = settings()
NAMES = ["-".join(map(str, setting)) for setting in SETTINGS]
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
# An encoder shares the functions of both fields with a decoder; a third of the settings has every feature map and rule.
EVERY_SETTING_AND_ENCODERS = pytest.mark.parametrize(
    "setting, is_causal",
    [(setting, True) for setting in SETTINGS] + [(setting, False) for setting in SETTINGS[1::3]],
    ids=NAMES + [f"{name}-encoder" for name in NAMES[1::3]],
)


def test_the_settings_tested_cover_every_pair():
    for one, other in (("map", "window"), ("gate", "window"), ("padding", "window")):
        keys = {
            "map": lambda s: (s.feature_map, s.update_rule),
            "gate": lambda s: s.forget_gate,
            "padding": lambda s: s.padding,
            "window": lambda s: (s.window_size, s.num_sink_tokens),
        }
        seen = {(keys[one](setting), keys[other](setting)) for setting in SETTINGS}
        possible = {keys[one](setting) for setting in SETTINGS}
        assert seen == set(itertools.product(possible, WINDOWS_AND_SINKS)), f"{one} x {other}"


def make_model(cls=KermitModel, **changes):
    """A model whose every parameter is random and matters: attention is peaked, gates and biases differ."""
    sizes = {
        "vocab_size": 30,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "conv_kernel_size": 0,
        # The delta rule norms what it reads; the direction of something next to nothing would be all rounding. With 1e-3 a
        # last digit of the first layer's queries still was worth 2e-4 of a gradient, with this 3e-5.
        "rms_norm_eps": 1e-2,
    }
    if changes.get("feature_map") == "taylor":
        sizes["feature_dim"] = 4  # with its projection
    model = cls(KermitConfig(**(sizes | changes))).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
            elif "projection" in name:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            if "forget_proj.bias" in name:
                parameter += 2


def as_double(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, in float64, the parameters as leaves with gradients."""
    tensors = {name: tensor.detach().double().requires_grad_() for name, tensor in model.named_parameters()}
    return tensors | {name: tensor.double() for name, tensor in model.named_buffers() if "rotary" not in name}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12)).item()


def compare_with_oracle(model: KermitModel, mask: torch.Tensor) -> None:
    """Last hidden states at real tokens, and the gradients of all parameters of a random projection of them."""
    input_ids = torch.randint(30, mask.shape)
    parameters = as_double(model)
    expected = torch.cat(
        [oracles.kermit_model(model, parameters, row[real]) for row, real in zip(input_ids, mask.bool(), strict=True)]
    )
    actual = model(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert relative_error(actual, expected) < TOLERANCE

    direction = torch.randn(expected.shape, dtype=torch.float64)
    leaves = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
    theirs = torch.autograd.grad((expected * direction).sum(), list(leaves.values()), allow_unused=True)
    ours = torch.autograd.grad(
        (actual * direction).sum(), [model.get_parameter(name) for name in leaves], allow_unused=True
    )
    largest = max(gradient.abs().max().item() for gradient in theirs if gradient is not None)
    for name, mine, reference in zip(leaves, ours, theirs, strict=True):
        mine = torch.zeros_like(leaves[name]) if mine is None else mine.double()
        reference = torch.zeros_like(leaves[name]) if reference is None else reference
        # A parameter that hardly matters has a gradient of rounding errors of the others'.
        scale = max(reference.abs().max().item(), 1e-2 * largest)
        assert (mine - reference).abs().max() < TOLERANCE * scale, f"gradient of {name}"


# Against the oracle.


@EVERY_SETTING
def test_the_model_is_its_definition_token_by_token(setting):
    options = setting._asdict()
    mask = torch.tensor(PADDINGS[options.pop("padding")])
    # One layer at most settings, for time; a second one shows what the first left at padding.
    compare_with_oracle(make_model(**options, num_hidden_layers=2 if setting.padding == "both" else 1), mask)


@pytest.mark.parametrize("feature_map, update_rule", [("elu", "additive"), ("favor", "additive"), ("silu_l2", "delta")])
@pytest.mark.parametrize("is_causal, kernel_size", [(True, 2), (True, 4), (False, 4), (False, 3)])
def test_a_short_convolution_sees_neighbours_and_no_padding(feature_map, update_rule, is_causal, kernel_size):
    """With padding on both sides, for odd and even numbers of taps."""
    model = make_model(
        feature_map=feature_map,
        update_rule=update_rule,
        conv_kernel_size=kernel_size,
        is_causal=is_causal,
        window_size=3,
        num_sink_tokens=1,
        num_hidden_layers=1,
    )
    compare_with_oracle(model, torch.tensor(PADDINGS["both"]))


@pytest.mark.parametrize("feature_map, update_rule", MAPS_AND_RULES)
@pytest.mark.parametrize("index", range(4))
def test_an_encoder_is_its_bidirectional_definition(feature_map, update_rule, index):
    """Windows, sinks and gates rotate against the paddings from one feature map to the next."""
    offset = MAPS_AND_RULES.index((feature_map, update_rule))
    window_size, num_sink_tokens = WINDOWS_AND_SINKS[(2 * index + offset) % 6]
    model = make_model(
        feature_map=feature_map,
        update_rule=update_rule,
        forget_gate=bool((index + offset // 2) % 2),
        window_size=window_size,
        num_sink_tokens=num_sink_tokens,
        is_causal=False,
        num_hidden_layers=1,
    )
    compare_with_oracle(model, torch.tensor(list(PADDINGS.values())[index]))


def test_an_encoder_without_gate_or_window_weighs_the_whole_text_by_its_kernel():
    """No order and no position is left: a permutation of the text permutes the output."""
    model = make_model(update_rule="additive", feature_map="elu", window_size=0, forget_gate=False, is_causal=False)
    input_ids, order = torch.randint(30, (1, 17)), torch.randperm(17)
    with torch.no_grad():
        straight, permuted = (model(ids).last_hidden_state for ids in (input_ids, input_ids[:, order]))
    assert relative_error(permuted, straight[:, order]) < TOLERANCE


@pytest.mark.parametrize("update_rule", ["additive", "delta"])
@pytest.mark.parametrize("changes", [{"use_qk_norm": True}, {"attention_bias": True}, {"num_key_value_heads": 1}])
def test_variants_of_the_body_follow_their_definition(update_rule, changes):
    model = make_model(update_rule=update_rule, window_size=3, num_sink_tokens=1, **changes)
    compare_with_oracle(model, torch.tensor(PADDINGS["both"]))


@pytest.mark.parametrize("update_rule", ["additive", "delta"])
@pytest.mark.parametrize("segment", [4, 7])
def test_cutting_a_text_into_segments_changes_nothing(update_rule, segment, monkeypatch):
    """On CPUs a long text is treated in segments that fit their caches; here of a few tokens."""
    monkeypatch.setattr(kermit_attention, "_segment_size", lambda query, window_size: segment)
    for padding in PADDINGS.values():
        for window_size, num_sink_tokens in ((0, 0), (3, 2)):
            model = make_model(update_rule=update_rule, window_size=window_size, num_sink_tokens=num_sink_tokens)
            compare_with_oracle(model, torch.tensor(padding))


@pytest.mark.parametrize("update_rule", ["additive", "delta"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_long_texts_follow_the_definition_over_chunk_borders(update_rule, length):
    model = make_model(update_rule=update_rule, window_size=5, num_sink_tokens=2, num_hidden_layers=1)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    compare_with_oracle(model, mask)


# eager = fast.


def both_forms(model, **inputs):
    """Outputs and gradients of one model as it is and with explicit weights, and those weights."""
    found = []
    for implementation in (model.config._attn_implementation, "eager"):
        model.set_attn_implementation(implementation)
        output = model(**inputs, output_attentions=implementation == "eager")
        hidden = output.last_hidden_state
        if inputs.get("attention_mask") is not None:
            hidden = hidden[inputs["attention_mask"].bool()]
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad((hidden * direction).sum(), list(model.parameters()), allow_unused=True)
        found.append((hidden, dict(zip(dict(model.named_parameters()), gradients, strict=True)), output.attentions))
    return found


@EVERY_SETTING_AND_ENCODERS
def test_explicit_weights_give_the_same_outputs_and_gradients(setting, is_causal):
    options = setting._asdict()
    mask = torch.tensor(PADDINGS[options.pop("padding")])
    model = make_model(**options, is_causal=is_causal)
    (fast, fast_gradients, _), (eager, eager_gradients, _) = both_forms(
        model, input_ids=torch.randint(30, mask.shape), attention_mask=mask
    )
    assert model.config._attn_implementation == "eager"
    assert relative_error(fast, eager) < TOLERANCE
    largest = max(gradient.abs().max() for gradient in eager_gradients.values() if gradient is not None)
    for name, expected in eager_gradients.items():
        if expected is None:
            assert fast_gradients[name] is None or fast_gradients[name].count_nonzero() == 0, name
        else:
            scale = torch.maximum(expected.abs().max(), 1e-2 * largest)
            assert (fast_gradients[name] - expected).abs().max() < TOLERANCE * scale, name


# output_attentions.


@EVERY_SETTING_AND_ENCODERS
def test_attentions_reproduce_the_attentions_output(setting, is_causal):
    """Weights of all n x n pairs, times the values, are what enters the output projection. Additive: they sum to one. Delta:
    they stand before the output norm, which is the identity here."""
    options = setting._asdict()
    mask = torch.tensor(PADDINGS[options.pop("padding")])
    model = make_model(**options, is_causal=is_causal, num_hidden_layers=1)
    model.set_attn_implementation("eager")
    normed, outputs = [], []
    for layer in model.layers:
        layer.self_attn.far_norm = nn.Identity()
        layer.input_layernorm.register_forward_hook(lambda module, inputs, output: normed.append(output))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    real = mask.bool()
    with torch.no_grad():
        attentions = model(torch.randint(30, mask.shape), attention_mask=mask, output_attentions=True).attentions
        values = [layer.self_attn.v_proj(states) for layer, states in zip(model.layers, normed, strict=True)]
    assert len(attentions) == 1
    for weights, value, output in zip(attentions, values, outputs, strict=True):
        assert weights.shape == (2, 4, LENGTH, LENGTH)
        value = value.unflatten(-1, (2, 6)).transpose(1, 2).repeat_interleave(2, 1)
        output = output.unflatten(-1, (4, 6)).transpose(1, 2)
        for row in range(2):
            places = real[row].nonzero()[:, 0]
            here = weights[row][:, places]
            assert relative_error(here @ value[row], output[row][:, places]) < TOLERANCE
            assert here[:, :, ~real[row]].count_nonzero() == 0
            if options["update_rule"] == "additive":
                assert (here.sum(-1) - 1).abs().max() < TOLERANCE
                assert (here >= 0).all() or options["feature_map"] == "taylor"
            if is_causal:
                assert here[:, :, places].triu(1).count_nonzero() == 0


# Softmax attention where the window reaches over the whole text.


SIZES = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
ROPE_TYPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 4.0, 6.0, 8.0],
        # Up to here the short factors hold; a kernel layer chooses them by its window, Llama by the text.
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    # A part of each head is not rotated at all.
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}
# Neither convolution nor forgetting: those are KERMIT's own.
PLAIN = {"conv_kernel_size": 0, "forget_gate": False}


def rope(name: str) -> dict:
    return {"rope_theta": 10000.0} | ROPE_TYPES[name]


def with_weights_of(other: nn.Module, **changes) -> KermitForCausalLM:
    """A KERMIT that takes over every weight by name; nothing is left over, and what it lacks belongs to the far field."""
    randomize(other.eval())
    model = KermitForCausalLM(KermitConfig(**(SIZES | PLAIN | changes))).eval()
    report = model.load_state_dict(other.state_dict(), strict=False)
    assert report.unexpected_keys == []
    own = ("far_", "feature_map", "write_proj")
    assert all(any(part in key for part in own) for key in report.missing_keys), report.missing_keys
    return model


def assert_same_logits(model: nn.Module, other: nn.Module, length: int = 40, **inputs) -> None:
    input_ids = torch.randint(30, (2, length))
    with torch.no_grad():
        ours, theirs = model(input_ids, **inputs).logits, other(input_ids, **inputs).logits
    if "attention_mask" in inputs:
        real = inputs["attention_mask"].bool()
        ours, theirs = ours[real], theirs[real]
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("window_size", [40, 64])
def test_a_window_over_everything_is_llama(rope_type, window_size, implementation):
    parameters = rope(rope_type)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=parameters))
    model = with_weights_of(llama, rope_parameters=parameters, window_size=window_size)
    model.set_attn_implementation(implementation)
    assert_same_logits(model, llama)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_types_that_depend_on_the_length_take_the_window_for_it(rope_type):
    """A window longer than the trained length, and a text that fills it."""
    parameters = rope(rope_type)
    if rope_type == "longrope":
        parameters["original_max_position_embeddings"] = 16
    llama = LlamaForCausalLM(LlamaConfig(**(SIZES | {"max_position_embeddings": 32}), rope_parameters=parameters))
    model = with_weights_of(llama, rope_parameters=parameters, window_size=40, max_position_embeddings=32)
    assert_same_logits(model, llama)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_until_the_window_is_full_it_is_llama(rope_type):
    """And from then on it is not, or the far field would not be there."""
    parameters = rope(rope_type)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=parameters))
    model = with_weights_of(llama, rope_parameters=parameters, window_size=10)
    input_ids = torch.randint(30, (2, 40))
    with torch.no_grad():
        ours, theirs = model(input_ids).logits, llama(input_ids).logits
    assert relative_error(ours[:, :10], theirs[:, :10]) < TOLERANCE
    assert relative_error(ours[:, 10:], theirs[:, 10:]) > TOLERANCE


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_full_attention_layers_are_llama_at_any_length(rope_type):
    parameters = rope(rope_type)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=parameters))
    model = with_weights_of(llama, rope_parameters=parameters, layer_types=["full_attention"] * 2)
    assert_same_logits(model, llama)
    assert_same_logits(model, llama, length=90)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_batch_is_llamas(padding):
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, slice(0, 15) if padding == "left" else slice(25, 40)] = 0
    assert_same_logits(with_weights_of(llama, window_size=40), llama, attention_mask=mask)


def test_biases_head_size_and_tied_embeddings_are_llamas():
    changes = {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True}
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **changes))
    assert_same_logits(with_weights_of(llama, window_size=40, **changes), llama)


@pytest.mark.parametrize("sliding_window", [None, 12])
def test_mistral_loads_one_to_one(sliding_window):
    """Its sliding window is a window without sinks whose far field is shut, or a layer type of its own."""
    mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=sliding_window))
    if sliding_window is None:
        assert_same_logits(with_weights_of(mistral, window_size=40), mistral)
        return
    layer_types = ["sliding_attention"] * 2
    assert_same_logits(with_weights_of(mistral, layer_types=layer_types, sliding_window=sliding_window), mistral)
    model = with_weights_of(mistral, window_size=sliding_window, num_sink_tokens=0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.far_bias.fill_(-1e4)
    assert_same_logits(model, mistral)


def test_qwen2_loads_one_to_one():
    """Biases on queries, keys and values, none on the output."""
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    model = with_weights_of(qwen, window_size=40, attention_bias=True, attention_output_bias=False)
    assert_same_logits(model, qwen)


def test_qwen3_loads_one_to_one():
    """RMS norm on each head of queries and keys."""
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))
    assert_same_logits(with_weights_of(qwen, window_size=40, head_dim=16, use_qk_norm=True), qwen)


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_follows_the_definition_beyond_the_window(rope_type):
    """Sinks included, whose distance is clipped: rope types that scale queries and keys scale them here too."""
    model = make_model(
        head_dim=8, rope_parameters=rope(rope_type), max_position_embeddings=64, window_size=4, num_sink_tokens=2
    )
    compare_with_oracle(model, torch.tensor(PADDINGS["left"]))


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_decodes_as_it_reads(rope_type):
    """Token by token, where sinks are turned like slots: the same scores, scaled as often."""
    model = make_model(
        head_dim=8, rope_parameters=rope(rope_type), max_position_embeddings=64, window_size=4, num_sink_tokens=2
    )
    input_ids, cache = torch.randint(30, (2, 20)), DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids, use_cache=False).last_hidden_state
        steps = [model(token, past_key_values=cache).last_hidden_state for token in input_ids.split(1, 1)]
    assert relative_error(torch.cat(steps, 1), whole) < TOLERANCE


def test_a_sink_is_seen_from_the_distance_of_the_window_however_far_it_is():
    """With nothing else in the far field, a token that repeats gets the same output at every place behind the window."""
    model = make_model(num_hidden_layers=1, window_size=6, num_sink_tokens=3)
    with torch.no_grad():
        model.layers[0].self_attn.far_bias.fill_(-1e4)
        input_ids = torch.cat([torch.randint(30, (1, 3)), torch.full((1, 300), 7)], 1)
        hidden = model(input_ids).last_hidden_state
    assert relative_error(hidden[:, 12:], hidden[:, 12:13].expand(-1, 291, -1)) < TOLERANCE


@pytest.mark.parametrize("rule", ["delta", "additive"])
@pytest.mark.parametrize("window", [0, 5])
def test_segments_change_nothing(rule, window, monkeypatch):
    """A long text is read segment by segment on a CPU: same outputs and gradients as in one piece."""

    model = make_model(update_rule=rule, feature_map="elu", window_size=window, num_sink_tokens=min(window, 2))
    model = model.double().train()
    inputs = torch.randint(3, model.config.vocab_size, (2, 700), generator=torch.Generator().manual_seed(0))

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(inputs, use_cache=False).last_hidden_state
        output.sin().sum().backward()
        with torch.no_grad():
            untracked = model(inputs, use_cache=False).last_hidden_state
        return [output.detach(), untracked, *(p.grad for p in model.parameters() if p.grad is not None)]

    monkeypatch.setattr("kermit_hf.kermit_attention.SEGMENT_ELEMENTS", 1)
    in_segments = run()
    monkeypatch.setattr("kermit_hf.kermit_attention.SEGMENT_ELEMENTS", 10**9)
    # Rotary angles are float32 and, in a segment, of smaller numbers; without a window there are none.
    tolerance = 1e-4 if window else 1e-9
    for ours, whole in zip(in_segments, run(), strict=True):
        assert (ours - whole).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("rule", ["delta", "additive"])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("length", [40, 15])
@pytest.mark.parametrize("first_real", [0, torch.tensor([0, 6])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_without_gradients_are_those_with(rule, window, length, first_real, dtype, monkeypatch):
    """Written into one tensor instead of put together from pieces: whole texts and the last tokens of them, of one dtype even
    where the first segment has nothing behind its window."""
    monkeypatch.setattr(kermit_attention, "_segment_size", lambda query, window_size: 4)
    feature_map = FEATURE_MAPS["elu"](4, None, 4, 2)
    feature_map.unit_norm = rule == "delta"
    query, keys, values = torch.randn(2, 4, length, 4, dtype=dtype), *torch.randn(2, 2, 2, 40, 4, dtype=dtype)
    gates = {"log_forget": -torch.rand(2, 2, 40), "write_strength": torch.rand(2, 2, 40)}
    if rule == "additive":
        del gates["write_strength"]
    angles = torch.arange(40)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    slots = slots_of_text(keys, values, gates, first_real, 2 if window else 0)
    maps, rotary = (feature_map.map_queries, feature_map.map_keys), (angles.cos(), angles.sin())
    found = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            inputs = query, slots, rotary, window, rule, *maps, torch.zeros(2, 4, length), nn.Identity()
            found.append(kermit_attention.kermit_attention(*inputs))
    torch.testing.assert_close(found[1].output, found[0].output)
    torch.testing.assert_close(found[1].memory.matrix, found[0].memory.matrix)


@pytest.mark.parametrize("rule", ["delta", "additive"])
@pytest.mark.parametrize("first_real", [0, 3, torch.tensor([0, 6])])
@pytest.mark.parametrize("num_absorbed", [None, 0, 1, 5, 17])
def test_tokens_that_may_be_taken_back_are_read_and_not_kept(rule, first_real, num_absorbed):
    """The memory keeps the first slots only; outputs are as if it kept all, in the linear form and the explicit one."""
    feature_map = FEATURE_MAPS["elu"](4, None, 2, 2)
    feature_map.unit_norm = rule == "delta"
    query, keys, values = torch.randn(2, 2, 15, 4).double(), *torch.randn(2, 2, 2, 40, 4).double()
    gates = {"log_forget": -torch.rand(2, 2, 40).double()}
    if rule == "delta":
        gates["write_strength"] = torch.rand(2, 2, 40).double()
    text = slots_of_text(keys, values, gates, first_real, 2)
    angles = torch.arange(40)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1]).double()

    def attend(num_absorbed: int | None, explicit: bool = False, num_slots: int = 40):
        cut = {name: gate[:, :, :num_slots] for name, gate in gates.items()}
        tokens = {"keys": keys[:, :, :num_slots], "values": values[:, :, :num_slots], "gates": cut}
        slots = text._replace(**tokens, num_absorbed=num_absorbed)
        maps, rotary = (feature_map.map_queries, feature_map.map_keys), (angles.cos(), angles.sin())
        options = {"far_norm": nn.Identity(), "explicit": explicit}
        queries = query[:, :, -num_slots:]
        far_logit = torch.zeros(queries.shape[:3])
        return kermit_attention.kermit_attention(queries, slots, rotary, 8, rule, *maps, far_logit, **options)

    linear, explicit = attend(num_absorbed), attend(num_absorbed, explicit=True)
    for output in (linear.output, explicit.output):
        assert relative_error(output, attend(None).output) < 1e-9
    assert explicit.weights.shape == (2, 2, 15, 40)
    expected = attend(None, num_slots=40 if num_absorbed is None else num_absorbed + 8).memory
    for memory in (linear.memory, explicit.memory):
        assert (memory is None) == (expected is None)
        assert memory is None or (memory.matrix - expected.matrix).abs().max() < 1e-9


@pytest.mark.parametrize("rule", ["delta", "additive"])
def test_a_batch_without_texts(rule):
    model = make_model(update_rule=rule, feature_map="elu", window_size=5)
    assert model(torch.zeros(0, LENGTH, dtype=torch.long)).last_hidden_state.shape == (
        0,
        LENGTH,
        model.config.hidden_size,
    )


@pytest.mark.parametrize("padding", ["none", "left"])
def test_no_step_backwards_gives_nan(padding):
    """Queries without a far field have nothing to divide by; what is masked must not be NaN on the way either."""
    model = make_model(KermitModel, update_rule="additive", feature_map="elu", window_size=4, num_sink_tokens=2)
    mask = torch.tensor(PADDINGS[padding])
    states = torch.randn(2, LENGTH, model.config.hidden_size, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        output = model(inputs_embeds=states, attention_mask=mask).last_hidden_state
        output[mask.bool()].sum().backward()
    assert torch.isfinite(states.grad).all()
