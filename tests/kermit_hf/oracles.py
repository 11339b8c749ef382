"""Slow, obvious references: float64, one token after the other, written from the papers' formulas.

Nothing here is taken from `kermit_hf`, except that `kermit_model` reads a model's config and its parameters by name. Tensors
are (..., seq, dim): whatever stands in front (batch, heads) is independent. All of it is differentiable.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


# Feature maps, as published. Each maps one tensor (..., seq, dim) to (..., seq, features).


def elu_features(x: Tensor) -> Tensor:
    """Katharopoulos et al. 2020 (arXiv 2006.16236), eq. 7: elu(x) + 1, which is e^x for x < 0."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def relu_features(x: Tensor) -> Tensor:
    """Choromanski et al. 2021 (arXiv 2009.14794), generalised attention with a kernel epsilon of 1e-3."""
    return x.clamp(min=0) + 1e-3


def silu_l2_features(x: Tensor) -> Tensor:
    """Yang et al. 2024 (arXiv 2406.06484), section 3.3: the direction of silu(x)."""
    x = x / (1 + (-x).exp())
    return x / x.square().sum(-1, keepdim=True).sqrt()


def dpfp_features(x: Tensor, nu: int = 3) -> Tensor:
    """Schlag et al. 2021 (arXiv 2102.11174), eq. 37: feature i of block s is r_i r_(i+s), r = [relu(x), relu(-x)]."""
    r = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1)
    size = r.shape[-1]
    return torch.stack([r[..., i] * r[..., (i + s) % size] for s in range(1, nu + 1) for i in range(size)], -1) + 1e-6


def favor_features(x: Tensor, directions: Tensor) -> Tensor:
    """Choromanski et al. 2021, lemma 1, of x / head_dim^(1/4): exp(w_f . x - |x|^2 / 2) / sqrt(m)."""
    x = x / x.shape[-1] ** 0.25
    return (x @ directions.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(directions))


def taylor_features(x: Tensor, projection: Tensor | None = None) -> Tensor:
    """Arora et al. 2024 (arXiv 2402.18668), section 4.1: [1, x, vec(x x^T) / sqrt(2)] of x / r^(1/4)."""
    x = x if projection is None else x @ projection
    x = x / x.shape[-1] ** 0.25
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)


def hedgehog_features(x: Tensor, projection: Tensor) -> Tensor:
    """Zhang et al. 2024 (arXiv 2402.04347), eq. 5 with softmax features: [softmax(W x), softmax(-W x)]."""
    x = x @ projection
    return torch.cat([_softmax(x), _softmax(-x)], -1)


# Pure kernel attention, as published. All causal, (..., seq, dim) -> (..., seq, head_dim).


def linear_attention(query: Tensor, key: Tensor, value: Tensor, features: Callable = elu_features) -> Tensor:
    """Katharopoulos et al. 2020, eq. 16-20: s_i = s_(i-1) + phi(k_i) v_i^T, z_i = z_(i-1) + phi(k_i), phi(q) s / phi(q) z."""
    s, z, outputs = 0.0, 0.0, []
    for i in range(query.shape[-2]):
        s = s + _outer(features(key[..., i, :]), value[..., i, :])
        z = z + features(key[..., i, :])
        phi = features(query[..., i, :])
        outputs.append((phi[..., None, :] @ s)[..., 0, :] / (phi * z).sum(-1, keepdim=True))
    return torch.stack(outputs, -2)


def performer(query: Tensor, key: Tensor, value: Tensor, directions: Tensor) -> Tensor:
    """Choromanski et al. 2021, eq. 2 (unidirectional) with Q' K'^T for A: D^-1 tril(Q' K'^T) V."""
    attention = (favor_features(query, directions) @ favor_features(key, directions).mT).tril()
    return (attention / attention.sum(-1, keepdim=True)) @ value


def based(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Arora et al. 2024, section 4.1: weights 1 + s + s^2 / 2 with s = q . k / sqrt(head_dim), causal, divided by their sum."""
    s = query @ key.mT / math.sqrt(query.shape[-1])
    attention = (1 + s + s.square() / 2).tril()
    return (attention / attention.sum(-1, keepdim=True)) @ value


def delta_net(query: Tensor, key: Tensor, value: Tensor, beta: Tensor) -> Tensor:
    """Yang et al. 2024 (arXiv 2406.06484), section 2.2: v_old = S k, S <- S - v_old k^T + (b v + (1 - b) v_old) k^T, S q."""
    s, outputs = torch.zeros(*key.shape[:-2], value.shape[-1], key.shape[-1], dtype=value.dtype), []
    for t in range(query.shape[-2]):
        k, v, b = key[..., t, :], value[..., t, :], beta[..., t, None]
        v_old = (s @ k[..., None])[..., 0]
        s = s - _outer(v_old, k) + _outer(b * v + (1 - b) * v_old, k)
        outputs.append((s @ query[..., t, :, None])[..., 0])
    return torch.stack(outputs, -2)


def gated_delta_net(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
    """Yang et al. 2024 (arXiv 2412.06464), eq. 10: S_t = S_(t-1) (a_t (I - b_t k_t k_t^T)) + b_t v_t k_t^T, S_t q_t."""
    s, outputs = torch.zeros(*key.shape[:-2], value.shape[-1], key.shape[-1], dtype=value.dtype), []
    identity = torch.eye(key.shape[-1], dtype=key.dtype)
    for t in range(query.shape[-2]):
        k, v = key[..., t, :], value[..., t, :]
        a, b = alpha[..., t, None, None], beta[..., t, None, None]
        s = s @ (a * (identity - b * _outer(k, k))) + b * _outer(v, k)
        outputs.append((s @ query[..., t, :, None])[..., 0])
    return torch.stack(outputs, -2)


# One memory for both rules, with a forget gate and a first state.


class Read(NamedTuple):
    """numerators (..., seq, head_dim) and denominators (..., seq) that queries read; matrix S (..., seq, features, head_dim)
    and normalizer z (..., seq, features) after each token."""

    numerator: Tensor
    denominator: Tensor
    matrix: Tensor
    normalizer: Tensor


def recurrence(
    rule: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forget: Tensor | None = None,
    strength: Tensor | None = None,
    matrix: Tensor | None = None,
    normalizer: Tensor | None = None,
) -> Read:
    """S and z of design section 3 over features `query` and `key`, from a first state on. The delta rule has no z."""
    states = _states(rule, key, value, forget, strength, matrix, normalizer)
    matrices, normalizers = (
        torch.stack(parts[1:], -3 + index) for index, parts in enumerate(zip(*states, strict=True))
    )
    return Read(
        torch.einsum("...tf,...tfd->...td", query, matrices),
        torch.einsum("...tf,...tf->...t", query, normalizers),
        matrices,
        normalizers,
    )


def _states(rule, key, value, forget=None, strength=None, matrix=None, normalizer=None) -> list[tuple[Tensor, Tensor]]:
    """(S, z) before the first token and after each one."""
    if matrix is None:
        matrix = key.new_zeros(*key.shape[:-2], key.shape[-1], value.shape[-1])
    if normalizer is None:
        normalizer = torch.zeros_like(matrix[..., 0])
    states = [(matrix, normalizer)]
    for t in range(key.shape[-2]):
        k, v = key[..., t, :], value[..., t, :]
        g = torch.ones_like(k[..., 0]) if forget is None else forget[..., t]
        if rule == "additive":
            matrix = g[..., None, None] * matrix + _outer(k, v)
            normalizer = g[..., None] * normalizer + k
        else:
            b = strength[..., t, None, None]
            recalled = (k[..., None, :] @ matrix)[..., 0, :]
            matrix = g[..., None, None] * (matrix - b * _outer(k, recalled)) + b * _outer(k, v)
        states.append((matrix, normalizer))
    return states


# Near field, and near field with far field.


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    is_causal: bool = True,
    extra_logits: Tensor | None = None,
    extra_values: Tensor | None = None,
) -> Tensor:
    """Softmax over the window of each query, query by query; scores are plain dot products, (..., seq, dim).

    extra_logits (..., seq, extras) and extra_values (..., seq, extras, dim) enter the same softmax; -inf hides one.
    """
    length, outputs = query.shape[-2], []
    for i in range(length):
        seen = [j for j in range(length) if abs(i - j) < window and (j <= i or not is_causal)]
        logits = (key[..., seen, :] @ query[..., i, :, None])[..., 0]
        values = value[..., seen, :]
        if extra_logits is not None:
            logits = torch.cat([logits, extra_logits[..., i, :]], -1)
            values = torch.cat([values, extra_values[..., i, :, :]], -2)
        outputs.append((_softmax(logits)[..., None, :] @ values)[..., 0, :])
    return torch.stack(outputs, -2)


class Rotary(NamedTuple):
    """frequencies (head_dim / 2,); scale, by which a rope type multiplies both queries and keys."""

    frequencies: Tensor
    scale: float

    def score(self, query: Tensor, key: Tensor, distance: int) -> Tensor:
        """(..., dim) x (..., dim) -> (...): halves of a head as complex numbers, the query turned by `distance`."""
        q, k = (torch.complex(*x.chunk(2, -1)) for x in (query, key))
        turn = torch.polar(torch.ones_like(self.frequencies), distance * self.frequencies)
        return self.scale**2 * (q * turn * k.conj()).real.sum(-1) / math.sqrt(query.shape[-1])


def kermit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    rule: str,
    window: int,
    num_sinks: int,
    rotary: Rotary,
    far_logit: Tensor,
    far_norm: Callable[[Tensor], Tensor],
    forget: Tensor | None = None,
    strength: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Design section 3, for one text without padding, token by token: the exact tokens and the far field as one more.

    far_logit (..., seq) is its learned part; far_norm the norm of the delta rule's far value.
    """
    length = query.shape[-2]
    skip = min(num_sinks, length)
    read = {}
    for way in (1, -1):
        # Sinks never enter a memory; read[-1] is the memory of an encoder that reads the text backwards.
        tokens = list(range(skip, length))[::way]
        gates = (None if gate is None else gate[..., tokens] for gate in (forget, strength))
        read[way] = _states(rule, key_features[..., tokens, :], value[..., tokens, :], *gates)

    outputs = []
    for i in range(length):
        near = [j for j in range(length) if abs(i - j) < window and (j <= i or not is_causal)]
        sinks = [j for j in range(skip) if j <= i - window]
        logits = [rotary.score(query[..., i, :], key[..., j, :], i - j) for j in near]
        logits += [rotary.score(query[..., i, :], key[..., j, :], window - j) for j in sinks]
        values = [value[..., j, :] for j in near + sinks]

        older = max(i - window + 1 - skip, 0)
        newer = 0 if is_causal else max(length - max(i + max(window, 1), skip), 0)
        if older or newer:
            (matrix, normalizer), (matrix_behind, normalizer_behind) = read[1][older], read[-1][newer]
            phi = query_features[..., i, :]
            numerator = (phi[..., None, :] @ (matrix + matrix_behind))[..., 0, :]
            if rule == "additive":
                denominator = (phi * (normalizer + normalizer_behind)).sum(-1)
                values.append(numerator / denominator[..., None])
                logits.append(far_logit[..., i] + denominator.log())
            else:
                values.append(far_norm(numerator))
                logits.append(far_logit[..., i])
        weights = _softmax(torch.stack(logits, -1))
        outputs.append((weights[..., None, :] @ torch.stack(values, -2))[..., 0, :])
    return torch.stack(outputs, -2)


# The whole model.


def kermit_model(model, parameters: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """Last hidden states, (seq, hidden_size), of one text (seq,) without padding.

    `model` is a KermitModel, read for its config and rotary frequencies; `parameters` holds its parameters and buffers by
    name, in float64.
    """
    config = model.config
    rotary = Rotary(model.rotary_emb.inv_freq.double(), model.rotary_emb.attention_scaling)
    hidden = parameters["embed_tokens.weight"][input_ids]
    for index in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"layers.{index}."): parameter
            for name, parameter in parameters.items()
            if name.startswith(f"layers.{index}.")
        }
        normed = rms_norm(hidden, layer["input_layernorm.weight"], config.rms_norm_eps)
        hidden = hidden + kermit_layer(config, _under("self_attn.", layer), normed, rotary)
        normed = rms_norm(hidden, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = _linear(_under("mlp.gate_proj.", layer), normed)
        gate = gate / (1 + (-gate).exp())
        hidden = hidden + _linear(
            _under("mlp.down_proj.", layer), gate * _linear(_under("mlp.up_proj.", layer), normed)
        )
    return rms_norm(hidden, parameters["norm.weight"], config.rms_norm_eps)


def kermit_layer(config, parameters: dict[str, Tensor], hidden: Tensor, rotary: Rotary) -> Tensor:
    """The attention of one layer, (seq, hidden_size) -> (seq, hidden_size)."""
    length, dim = hidden.shape[0], config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    groups = heads // kv_heads

    states = torch.cat([_linear(_under(f"{name}_proj.", parameters), hidden) for name in "qkv"], -1)
    if config.conv_kernel_size:
        taps, kernel = config.conv_kernel_size, parameters["conv_weight"]
        newest = 0 if config.is_causal else taps - 1 - taps // 2
        mixed = []
        for t in range(length):
            sources = [(tap, t + newest - (taps - 1 - tap)) for tap in range(taps)]
            mixed.append(sum(kernel[:, 0, tap] * states[source] for tap, source in sources if 0 <= source < length))
        states = torch.stack(mixed)
    states = states.unflatten(-1, (-1, dim)).transpose(0, 1)
    query, key, value = states.split([heads, kv_heads, kv_heads])
    if config.use_qk_norm:
        query = rms_norm(query, parameters["q_norm.weight"], config.rms_norm_eps)
        key = rms_norm(key, parameters["k_norm.weight"], config.rms_norm_eps)

    maps = _under("feature_map.", parameters)
    query_features = _features(config, query, maps.get("directions"), maps.get("query_projection"))
    key_features = _features(config, key, maps.get("directions"), maps.get("key_projection"))
    forget = strength = None
    if config.forget_gate:
        forget = 1 / (1 + (-_linear(_under("forget_proj.", parameters), hidden).T).exp())
    if config.update_rule == "delta":
        strength = 1 / (1 + (-_linear(_under("write_proj.", parameters), hidden).T).exp())
        query_features, key_features = (
            features / features.square().sum(-1, keepdim=True).sqrt() for features in (query_features, key_features)
        )

    far_logit = query.new_zeros(heads, length)
    if config.window_size:  # without a near field nothing competes with the far field
        far_logit = (query * parameters["far_query"][:, None]).sum(-1) + parameters["far_bias"][:, None]
    # Consecutive query heads share a key/value head and its memory.
    shared = [head // groups for head in range(heads)]
    output = kermit_attention(
        query,
        key[shared],
        value[shared],
        query_features,
        key_features[shared],
        config.update_rule,
        config.window_size,
        config.num_sink_tokens,
        rotary,
        far_logit,
        lambda x: rms_norm(x, parameters["far_norm.weight"], config.rms_norm_eps),
        None if forget is None else forget[shared],
        None if strength is None else strength[shared],
        config.is_causal,
    )
    return _linear(_under("o_proj.", parameters), output.transpose(0, 1).flatten(1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _features(config, x: Tensor, directions: Tensor | None, projection: Tensor | None) -> Tensor:
    """x: (heads, seq, head_dim)."""
    name = config.feature_map
    if name == "favor":
        return favor_features(x, directions)
    if name == "taylor":
        return taylor_features(x, projection)
    if name == "hedgehog":
        return hedgehog_features(x, projection)
    return {"elu": elu_features, "relu": relu_features, "silu_l2": silu_l2_features, "dpfp": dpfp_features}[name](x)


def _under(prefix: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _linear(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ parameters["weight"].T + parameters.get("bias", 0.0)


def _softmax(logits: Tensor) -> Tensor:
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    return weights / weights.sum(-1, keepdim=True)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left[..., :, None] * right[..., None, :]
