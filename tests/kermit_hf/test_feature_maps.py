"""Feature maps: each is what its paper says, and a map that is registered is a map that the config accepts.

Maps compute in the precision of their input, so definitions are compared in float64, where 1e-12 is rounding.
"""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModel

from kermit_hf import KermitConfig, KermitModel
from kermit_hf.feature_maps import FEATURE_MAPS, FeatureMap, register_feature_map
from tests.kermit_hf import oracles


NAMES = sorted(FEATURE_MAPS)
HEADS, KV_HEADS = 4, 2


def make(name: str, head_dim: int = 8, feature_dim: int | None = None, unit_norm: bool = False) -> FeatureMap:
    feature_map = FEATURE_MAPS[name](head_dim, feature_dim, HEADS, KV_HEADS)
    with torch.no_grad():
        feature_map.init_weights()
    feature_map.unit_norm = unit_norm
    return feature_map


def heads(count: int = HEADS, head_dim: int = 8, length: int = 11, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, count, length, head_dim, dtype=dtype)


def kernel(feature_map: FeatureMap, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """phi(q_i) . phi(k_j), the query's log scale multiplied in: (batch, heads, seq, seq)."""
    features, log_scale = feature_map.map_queries(query)
    products = features @ feature_map.map_keys(key).repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    return products if log_scale is None else products * log_scale.exp()[..., None]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


# Definitions.


@pytest.mark.parametrize(
    "name, formula",
    [
        ("elu", oracles.elu_features),
        ("relu", oracles.relu_features),
        ("silu_l2", oracles.silu_l2_features),
    ],
)
def test_elementwise_maps_are_their_formula(name, formula):
    x = heads()
    feature_map = make(name)
    feature_map.unit_norm = name == "silu_l2"  # as the delta rule, its only use, sets it
    features, log_scale = feature_map.map_queries(x)
    assert log_scale is None
    assert_close(features, formula(x))
    assert_close(feature_map.map_keys(x), formula(x))


@pytest.mark.parametrize("nu", [1, 2, 3, 5])
def test_dpfp_is_schlags_projection(nu):
    """Compared by its kernel: the order of features is nobody's business."""
    query, key = heads(2), heads(2)
    ours = kernel(make("dpfp", feature_dim=2 * 8 * nu), query, key)
    assert_close(ours, oracles.dpfp_features(query, nu) @ oracles.dpfp_features(key, nu).mT)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_taylor_without_projection_is_the_polynomial_exactly(head_dim):
    query, key = heads(2, head_dim), heads(2, head_dim)
    s = query @ key.mT / math.sqrt(head_dim)
    feature_map = make("taylor", head_dim, feature_dim=head_dim)
    assert_close(kernel(feature_map, query, key), 1 + s + s.square() / 2)
    assert feature_map.forward_keys(key).shape[-1] == 1 + head_dim + head_dim * (head_dim + 1) // 2
    assert not list(feature_map.parameters())


def test_taylor_with_projection_is_the_polynomial_of_the_projected_heads():
    query, key = heads(HEADS, 32), heads(KV_HEADS, 32)
    feature_map = make("taylor", 32)
    nn.init.normal_(feature_map.query_projection)
    projected_query = query @ feature_map.query_projection.double()
    projected_key = (key @ feature_map.key_projection.double()).repeat_interleave(2, 1)
    s = projected_query @ projected_key.mT / math.sqrt(16)
    assert_close(kernel(feature_map, query, key), 1 + s + s.square() / 2)


def test_taylor_starts_as_an_unbiased_estimate_of_the_scores():
    """Queries and keys of a group share one random projection: the mean over 2,000 of them is q . k to four standard errors."""
    query, key = torch.randn(2, 64, dtype=torch.float64)
    feature_map = FEATURE_MAPS["taylor"](64, None, 2000, 2000)
    with torch.no_grad():
        feature_map.init_weights()
        projected_query, projected_key = (
            tensor @ projection.double()
            for tensor, projection in ((query, feature_map.query_projection), (key, feature_map.key_projection))
        )
    estimates = (projected_query * projected_key).sum(-1)
    assert (estimates.mean() - query @ key).abs() < 4 * estimates.std() / math.sqrt(2000)
    grouped = make("taylor", 64)
    assert torch.equal(grouped.query_projection, grouped.key_projection.repeat_interleave(2, 0))


def test_hedgehog_is_softmax_of_plus_and_minus_wx_and_starts_with_the_identity():
    query, key = heads(HEADS), heads(KV_HEADS)
    feature_map = make("hedgehog")
    identity = torch.eye(8, dtype=torch.float64)
    assert_close(feature_map.forward_queries(query)[0], oracles.hedgehog_features(query, identity))
    assert_close(feature_map.forward_keys(key), oracles.hedgehog_features(key, identity))
    nn.init.normal_(feature_map.query_projection)
    nn.init.normal_(feature_map.key_projection)
    expected = oracles.hedgehog_features(query, feature_map.query_projection.double())
    assert_close(feature_map.forward_queries(query)[0], expected)
    assert_close(feature_map.forward_keys(key), oracles.hedgehog_features(key, feature_map.key_projection.double()))


@pytest.mark.parametrize("feature_dim", [3, 8, 20])
def test_hedgehog_takes_any_number_of_rows(feature_dim):
    features = make("hedgehog", feature_dim=feature_dim).forward_keys(heads(KV_HEADS))
    assert features.shape[-1] == 2 * feature_dim
    assert_close(features.sum(-1), torch.full(features.shape[:-1], 2.0, dtype=torch.float64))


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("size", [0.1, 1.0, 2.0])
def test_favor_is_choromanskis_map_in_float32_too(head_dim, size):
    """Whatever the head size: the factors of lemma 1 reach e^128 at 256 and have to cancel before they overflow. 1e-4 in
    float32: exponents of up to 50 carry a rounding of 50 * 6e-8 into the exponential."""
    query, key = heads(2, head_dim) * size, heads(2, head_dim) * size
    feature_map = make("favor", head_dim)
    directions = feature_map.directions.double()
    expected = oracles.favor_features(query, directions) @ oracles.favor_features(key, directions).mT
    assert_close(kernel(feature_map, query, key), expected)
    assert_close(kernel(feature_map, query.float(), key.float()), expected, 1e-4)
    # The small entries count as well: the far field divides by their sum, and takes its logarithm.
    error = (kernel(feature_map, query.float(), key.float()).double() / expected).log().abs().max()
    assert error < 1e-3


# FAVOR+ approximates the softmax.


def favor_estimates(feature_dim: int, seeds: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Estimates of exp(q . k / sqrt(head_dim)), one for each seed: (seeds, pairs)."""
    feature_map = make("favor", feature_dim=feature_dim)
    estimates = []
    for _ in range(seeds):
        feature_map.redraw()
        estimates.append(torch.diagonal(kernel(feature_map, query, key)[0, 0]))
    return torch.stack(estimates)


def test_favor_is_unbiased():
    """The mean over 1,000 draws lies within four standard errors of the softmax kernel, for each of ten pairs."""
    query, key = torch.randn(2, 1, 1, 10, 8, dtype=torch.float64) * 0.7
    exact = ((query * key).sum(-1) / math.sqrt(8)).exp()[0, 0]
    estimates = favor_estimates(16, 1000, query, key)
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - exact).abs() < 4 * standard_error).all()
    # A bias of a few percent would hide in a large standard error.
    assert (standard_error / exact).median() < 0.05


def test_favor_error_falls_as_features_grow():
    """The variance falls as 1 / m: four times the features, half of the error; 0.65 leaves room for 200 draws."""
    query, key = torch.randn(2, 1, 1, 20, 8, dtype=torch.float64) * 0.7
    exact = ((query * key).sum(-1) / math.sqrt(8)).exp()[0, 0]
    errors = [
        (favor_estimates(size, 200, query, key) / exact - 1).square().mean(0).sqrt().median() for size in (16, 64, 256)
    ]
    assert errors[1] < 0.65 * errors[0]
    assert errors[2] < 0.65 * errors[1]


def test_favor_attention_approaches_softmax_attention():
    query, key, value = torch.randn(3, 1, 1, 30, 8, dtype=torch.float64) * 0.7
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = []
    for size in (16, 256, 4096):
        feature_map, squares = make("favor", feature_dim=size), []
        for _ in range(10):
            feature_map.redraw()
            weights = kernel(feature_map, query, key)
            squares.append((weights / weights.sum(-1, keepdim=True) @ value - exact).square().mean())
        errors.append(torch.stack(squares).mean().sqrt().item())
    # Sixteen times the features, a quarter of the error once it is small.
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.03


def test_favor_directions_are_orthogonal_with_gaussian_lengths():
    directions = make("favor", 16, feature_dim=1600).directions.double()
    blocks = torch.nn.functional.normalize(directions, dim=-1).view(100, 16, 16)
    assert_close(blocks @ blocks.mT, torch.eye(16, dtype=torch.float64).expand(100, 16, 16), 1e-5)
    # |w|^2 of a Gaussian vector has mean 16 and variance 32: 1,600 of them have a standard error of 0.14.
    assert abs(directions.square().sum(-1).mean() - 16) < 0.6
    assert 0.8 < directions.square().sum(-1).var() / 32 < 1.2
    assert directions.mean(0).abs().max() < 0.15


def test_redraw_changes_the_features_of_every_favor_layer_and_nothing_else():
    model = KermitModel(_config(feature_map="favor", update_rule="additive"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.redraw_features()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"layers.{index}.self_attn.feature_map.directions" for index in range(2)}


@pytest.mark.parametrize("name", NAMES)
def test_models_can_be_made_in_half_precision(name):
    """FAVOR+'s directions come from a QR decomposition, which torch does not have in half precision."""
    rule = "additive" if FEATURE_MAPS[name].is_positive else "delta"
    config = _config(feature_map=name, update_rule=rule)
    half = AutoModel.from_config(config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    if name == "favor":
        full = AutoModel.from_config(config)
        directions = [model.layers[0].self_attn.feature_map.directions for model in (full, half)]
        assert torch.equal(directions[0].to(torch.bfloat16), directions[1])


# What the rules rely on.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0, 300.0])
def test_features_are_finite_and_positive_maps_never_sum_to_a_negative(name, size):
    feature_map = make(name)
    query, key = heads(HEADS, dtype=torch.float32) * size, heads(KV_HEADS, dtype=torch.float32) * size
    features, log_scale = feature_map.map_queries(query)
    products = features @ feature_map.map_keys(key).repeat_interleave(2, 1).mT
    assert products.isfinite().all()
    assert log_scale is None or log_scale.isfinite().all()
    if feature_map.is_positive:
        # Taylor's features may be negative, but not their products: 1 + s + s^2 / 2 >= 1 / 2.
        assert (products >= -1e-6 * products.abs().max()).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_unit_norm_makes_queries_and_keys_unit_vectors(name, size):
    """The delta rule overwrites exactly what a key recalled only if |phi(k)| = 1."""
    feature_map = make(name, unit_norm=True)
    features, log_scale = feature_map.map_queries(heads(HEADS, dtype=torch.float32) * size)
    keys = feature_map.map_keys(heads(KV_HEADS, dtype=torch.float32) * size)
    assert log_scale is None
    for tensor in (features, keys):
        assert_close(tensor.norm(dim=-1), torch.ones(tensor.shape[:-1]), 1e-5)


def _gradients(function, tensor: torch.Tensor, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = tensor.clone().requires_grad_()
    output = function(leaf)
    return output.detach(), torch.autograd.grad(output, leaf, direction)[0]


def test_elu_has_the_gradient_of_its_formula():
    tensor = torch.cat([heads(length=5), 0 * heads(length=1), 30 * heads(length=5)], 2)
    direction = torch.randn_like(tensor)
    ours = _gradients(make("elu").features, tensor, direction)
    theirs = _gradients(lambda leaf: torch.nn.functional.elu(leaf) + 1, tensor, direction)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [0.0, 1e-14, 1.0, 1e3])
def test_unit_norm_has_the_gradient_of_normalize(size):
    tensor, direction = size * heads(), torch.randn(2, HEADS, 11, 8, dtype=torch.float64)
    feature_map = make("silu_l2", unit_norm=True)
    ours = _gradients(feature_map.map_keys, tensor, direction)
    theirs = _gradients(
        lambda leaf: torch.nn.functional.normalize(torch.nn.functional.silu(leaf), dim=-1), tensor, direction
    )
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_query_equal_to_a_key_recalls_it(name):
    """The delta rule returns what was written under a key to the query that equals it: phi is one map, not two."""
    x = heads(2, dtype=torch.float32)
    feature_map = FEATURE_MAPS[name](8, None, 2, 2)
    with torch.no_grad():
        feature_map.init_weights()
    feature_map.unit_norm = True
    assert_close(feature_map.map_queries(x)[0], feature_map.map_keys(x), 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit_norm", [False, True])
def test_features_of_a_token_depend_on_that_token_alone(name, unit_norm):
    """A stabiliser taken over the sequence would leak the future."""
    feature_map = make(name, unit_norm=unit_norm)
    query, key = heads(HEADS), heads(KV_HEADS)
    whole_query, whole_scale = feature_map.map_queries(query)
    part_query, part_scale = feature_map.map_queries(query[:, :, 3:4])
    assert_close(part_query, whole_query[:, :, 3:4])
    if whole_scale is not None:
        assert_close(part_scale, whole_scale[:, :, 3:4])
    assert_close(feature_map.map_keys(key[:, :, 3:4]), feature_map.map_keys(key)[:, :, 3:4])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_inputs_give_float32_features(name):
    feature_map = make(name)
    query, key = heads(HEADS).bfloat16(), heads(KV_HEADS).bfloat16()
    features, log_scale = feature_map.map_queries(query)
    assert features.dtype == feature_map.map_keys(key).dtype == torch.float32
    assert torch.equal(features, feature_map.map_queries(query.float())[0])
    assert log_scale is None or log_scale.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_queries_keys_and_parameters(name):
    feature_map = make(name)
    query, key = heads(HEADS).requires_grad_(), heads(KV_HEADS).requires_grad_()
    kernel(feature_map, query, key).square().sum().backward()
    for tensor in (query, key, *feature_map.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.count_nonzero() > 0


# Registration, creation, errors.


def _config(**changes) -> KermitConfig:
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    return KermitConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, window_size=2, **changes)


@pytest.fixture
def registry():
    """Whatever a test registers is gone after it."""
    before = dict(FEATURE_MAPS)
    yield
    FEATURE_MAPS.clear()
    FEATURE_MAPS.update(before)


def test_a_map_is_registered_in_one_line_and_serves_a_model(registry):
    @register_feature_map("squared")
    class Squared(FeatureMap):
        def forward_queries(self, query):
            return query.float().square() + 1, None

        def forward_keys(self, key):
            return key.float().square() + 1

    for rule in ("additive", "delta"):
        model = KermitModel(_config(feature_map="squared", update_rule=rule))
        assert model(torch.randint(20, (2, 9))).last_hidden_state.isfinite().all()
        assert isinstance(model.layers[0].self_attn.feature_map, Squared)


def test_a_name_cannot_be_taken_twice(registry):
    with pytest.raises(ValueError, match=r"'elu' is taken by EluFeatureMap"):

        @register_feature_map("elu")
        class Other(FeatureMap):
            pass

    assert FEATURE_MAPS["elu"].__name__ == "EluFeatureMap"
    # Defining the same class again, as reloading a module does, replaces it.
    assert register_feature_map("elu")(FEATURE_MAPS["elu"]) is FEATURE_MAPS["elu"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feature_map": "cosine"}, r"feature_map='cosine' is unknown; allowed are .*dpfp.*elu.*favor.*hedgehog"),
        ({"feature_map": "elu", "feature_dim": 9}, r"feature_dim=9 .* head_dim=8"),
        ({"feature_map": "silu_l2", "feature_dim": 16}, r"feature_dim=16 .* head_dim=8"),
        ({"feature_map": "dpfp", "feature_dim": 8}, r"feature_dim=8 .* 2 \* head_dim=16"),
        ({"feature_map": "dpfp", "feature_dim": 24}, r"feature_dim=24 .* 2 \* head_dim=16"),
        ({"feature_map": "favor", "feature_dim": 0}, r"feature_dim=0 .* from 1"),
        ({"feature_map": "hedgehog", "feature_dim": -1}, r"feature_dim=-1 .* from 1"),
        ({"feature_map": "taylor", "feature_dim": 9}, r"feature_dim=9 .* 1 \.\.\. head_dim=8"),
        ({"feature_map": "taylor", "feature_dim": 0}, r"feature_dim=0 .* from 1"),
        (
            {"feature_map": "silu_l2", "update_rule": "additive"},
            r"'silu_l2' gives negative products.*allowed are .*elu",
        ),
    ],
)
def test_bad_settings_name_the_field_its_value_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        _config(**changes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", ["additive", "delta"])
def test_a_model_made_on_the_meta_device_comes_out_whole(name, rule):
    """As `from_pretrained` makes it, with a checkpoint that lacks everything of the far field."""
    if rule == "additive" and not FEATURE_MAPS[name].is_positive:
        pytest.skip("refused by the config: the additive rule divides by the sum of features")
    feature_dim = 4 if name == "taylor" else None  # so that taylor has its projection
    model = KermitModel(_config(feature_map=name, update_rule=rule, feature_dim=feature_dim))
    state = {
        key: value for key, value in model.state_dict().items() if "_proj" in key or "norm" in key or "embed" in key
    }
    state = {key: value for key, value in state.items() if "feature_map" not in key}
    loaded, report = KermitModel.from_pretrained(None, config=model.config, state_dict=state, output_loading_info=True)
    missing = any("feature_map" in key for key in report["missing_keys"])
    assert missing == (name in ("favor", "taylor", "hedgehog"))
    for key, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
        assert tensor.device.type == "cpu", key
        assert tensor.isfinite().all(), key
        if "directions" in key or "projection" in key or "conv_weight" in key:
            assert tensor.count_nonzero() > 0, key
        elif key in state:
            assert torch.equal(tensor, state[key]), key
    ids = torch.randint(20, (1, 9))
    if name not in ("favor", "taylor"):  # those two start from random numbers of their own
        assert_close(loaded(ids).last_hidden_state, model(ids).last_hidden_state, 1e-5)
