"""Feature maps: phi with phi(q) . phi(k) standing in for the softmax kernel exp(q . k / sqrt(head_dim)).

A feature map is a module with one method for queries and one for keys. Both take (batch, heads, seq, head_dim) without
positions and return features (batch, heads, seq, output_dim) in float32; queries come with a log scale (batch, heads,
seq), or None for zero: phi(q) = features * exp(log_scale), which keeps large exponents out of the features. Maps whose
products phi(q) . phi(k) may be negative (`is_positive = False`) serve the delta rule only: the additive rule divides by
their sum.
`feature_dim` sets the size; each map states what it counts, None takes the map's default.

    @register_feature_map("mine")
    class MyFeatureMap(FeatureMap): ...

makes `KermitConfig(feature_map="mine")` work.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .functions import apply_function


FEATURE_MAPS: dict[str, type["FeatureMap"]] = {}


def register_feature_map(name: str):
    """Class decorator that makes a `FeatureMap` available as `KermitConfig(feature_map=name)`.

    Raises `ValueError` if the name is taken by another class.
    """

    def register(cls: type["FeatureMap"]) -> type["FeatureMap"]:
        taken = FEATURE_MAPS.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"feature_map name {name!r} is taken by {taken.__qualname__}; choose another name")
        FEATURE_MAPS[name] = cls
        return cls

    return register


class FeatureMap(nn.Module):
    """Base of all feature maps. The delta rule sets `unit_norm`: with |phi(k)| = 1 a write of strength one replaces exactly
    what the key recalled.

    Args:
        head_dim: size of one head of q and k.
        feature_dim: size parameter of the map, checked by `validate`.
        num_heads, num_key_value_heads: for maps with parameters of their own.
    """

    is_positive = True
    unit_norm = False

    def __init__(self, head_dim: int, feature_dim: int | None, num_heads: int, num_key_value_heads: int):
        super().__init__()
        self.head_dim = head_dim
        self.feature_dim = self.validate(head_dim, feature_dim)

    @classmethod
    def validate(cls, head_dim: int, feature_dim: int | None) -> int:
        """Returns the size to use, or raises `ValueError` naming the allowed ones."""
        if feature_dim not in (None, head_dim):
            raise ValueError(
                f"feature_dim={feature_dim} does not fit {cls.__name__}: it keeps the size of a head, "
                f"so allowed are None and head_dim={head_dim}"
            )
        return head_dim

    def init_weights(self) -> None:
        """Fills the parameters and buffers of this module, through `transformers.initialization`."""

    def forward_queries(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError

    def forward_keys(self, key: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def map_queries(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward_queries`, or its direction alone where `unit_norm` is set."""
        features, log_scale = self.forward_queries(query)
        return (apply_function(_Normalize, features), None) if self.unit_norm else (features, log_scale)

    def map_keys(self, key: torch.Tensor) -> torch.Tensor:
        """`forward_keys`, or its direction alone where `unit_norm` is set."""
        features = self.forward_keys(key)
        return apply_function(_Normalize, features) if self.unit_norm else features


class ElementwiseFeatureMap(FeatureMap):
    """The same elementwise function for queries and keys."""

    def features(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward_queries(self, query: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.features(_upcast(query)), None

    def forward_keys(self, key: torch.Tensor) -> torch.Tensor:
        return self.features(_upcast(key))


@register_feature_map("elu")
class EluFeatureMap(ElementwiseFeatureMap):
    """elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""

    def features(self, tensor):
        return apply_function(_EluPlusOne, tensor)


@register_feature_map("relu")
class ReluFeatureMap(ElementwiseFeatureMap):
    """relu(x) + 1e-3 (Choromanski et al. 2021, generalised attention); the constant keeps the normaliser positive."""

    def features(self, tensor):
        return F.relu(tensor) + 1e-3


@register_feature_map("silu_l2")
class SiluL2FeatureMap(ElementwiseFeatureMap):
    """silu(x), of unit length by the delta rule's `unit_norm`: the map of DeltaNet (Yang et al. 2024, arXiv 2406.06484).
    Signed, so for the delta rule only."""

    is_positive = False

    def features(self, tensor):
        return F.silu(tensor)


@register_feature_map("dpfp")
class DpfpFeatureMap(ElementwiseFeatureMap):
    """Deterministic parameter-free projection (Schlag et al. 2021, arXiv 2102.11174): with r = relu([x, -x]), the
    products r_i r_{i-s} for s = 1 ... nu, plus 1e-6. `feature_dim` = 2 head_dim nu; default nu = 3."""

    @classmethod
    def validate(cls, head_dim, feature_dim):
        feature_dim = 6 * head_dim if feature_dim is None else feature_dim
        if feature_dim < 2 * head_dim or feature_dim % (2 * head_dim):
            raise ValueError(
                f"feature_dim={feature_dim} does not fit dpfp: allowed are multiples of 2 * head_dim={2 * head_dim}"
            )
        return feature_dim

    def features(self, tensor):
        signs = F.relu(torch.cat([tensor, -tensor], -1))
        shifts = self.feature_dim // (2 * self.head_dim)
        return torch.cat([signs * signs.roll(shift, -1) for shift in range(1, shifts + 1)], -1) + 1e-6


@register_feature_map("favor")
class FavorFeatureMap(FeatureMap):
    """Positive orthogonal random features (FAVOR+, Choromanski et al. 2021, arXiv 2009.14794, lemma 1):
    phi_f(x) = exp(w_f . x - |x|^2 / 2) / sqrt(m), an unbiased estimate of exp(q . k / sqrt(head_dim)).

    `feature_dim` = m random features, default 2 head_dim. No stabiliser is taken over the keys, which would leak the
    future: their features lie far inside the range of float32 unless a key is aligned with w_f. A new model has the same
    features every time; `redraw` draws others.
    """

    def __init__(self, head_dim, feature_dim, num_heads, num_key_value_heads):
        super().__init__(head_dim, feature_dim, num_heads, num_key_value_heads)
        self.register_buffer("directions", torch.empty(self.feature_dim, head_dim))
        if not self.directions.is_meta:
            self.directions.copy_(self.draw(torch.Generator().manual_seed(0)))

    @classmethod
    def validate(cls, head_dim, feature_dim):
        return _at_least_one("favor", 2 * head_dim if feature_dim is None else feature_dim)

    def init_weights(self):
        init.copy_(self.directions, self.draw(torch.Generator().manual_seed(0)))

    @torch.no_grad()
    def redraw(self) -> None:
        """Replaces the random features; every cache and every memory made with the old ones is void."""
        self.directions.copy_(self.draw())

    def draw(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Blocks of orthogonal directions with the lengths of Gaussian vectors, (feature_dim, head_dim)."""
        normal = partial(
            torch.randn, generator=generator, device="cpu", dtype=torch.float32
        )  # half precision has no QR
        blocks = []
        for _ in range(-(-self.feature_dim // self.head_dim)):
            orthogonal, upper = torch.linalg.qr(normal(self.head_dim, self.head_dim))
            blocks.append((orthogonal * upper.diagonal().sign()).T)
        lengths = normal(self.feature_dim, self.head_dim).norm(dim=-1, keepdim=True)
        return torch.cat(blocks)[: self.feature_dim] * lengths

    def forward_queries(self, query):
        query = _upcast(query) * self.head_dim**-0.25
        exponents = query @ self.directions.to(query.dtype).T
        scale = exponents.amax(-1, keepdim=True)
        log_scale = scale.squeeze(-1) - query.square().sum(-1) / 2 - math.log(self.feature_dim)
        return self._exp(exponents - scale), log_scale

    def forward_keys(self, key):
        key = _upcast(key) * self.head_dim**-0.25
        exponents = key @ self.directions.to(key.dtype).T
        # Where only the direction counts, a key of any size may set its own scale; keys that are summed share one.
        scale = exponents.amax(-1, keepdim=True) if self.unit_norm else key.square().sum(-1, keepdim=True) / 2
        return self._exp(exponents - scale)

    @staticmethod
    def _exp(exponents: torch.Tensor) -> torch.Tensor:
        """Features below e^-60 count for nothing and would make denormal numbers, slow on CPUs; above e^60 sums overflow."""
        return torch.where(exponents < -60.0, 0.0, exponents.clamp(-60.0, 60.0).exp())


@register_feature_map("taylor")
class TaylorFeatureMap(FeatureMap):
    """Second-order expansion of the exponential, phi(q) . phi(k) = 1 + s + s^2 / 2 (Arora et al. 2024, arXiv 2402.18668,
    section 4.1, and Zhang et al. 2024), with s = q . k / sqrt(r).

    `feature_dim` = r, the coordinates a learned projection keeps of each head (Arora et al. use 16, the default); at
    r = head_dim there is no projection. The output has 1 + r + r (r + 1) / 2 features: the symmetric products once.
    """

    def __init__(self, head_dim, feature_dim, num_heads, num_key_value_heads):
        super().__init__(head_dim, feature_dim, num_heads, num_key_value_heads)
        if self.feature_dim < head_dim:
            self.query_projection = nn.Parameter(torch.empty(num_heads, head_dim, self.feature_dim))
            self.key_projection = nn.Parameter(torch.empty(num_key_value_heads, head_dim, self.feature_dim))

    @classmethod
    def validate(cls, head_dim, feature_dim):
        feature_dim = _at_least_one("taylor", min(16, head_dim) if feature_dim is None else feature_dim)
        if feature_dim > head_dim:
            raise ValueError(f"feature_dim={feature_dim} does not fit taylor: allowed are 1 ... head_dim={head_dim}")
        return feature_dim

    def init_weights(self):
        if self.feature_dim < self.head_dim:
            # The same start for queries and keys of a head: their product then estimates q . k.
            projection = torch.randn(self.key_projection.shape) * self.feature_dim**-0.5
            groups = self.query_projection.shape[0] // self.key_projection.shape[0]
            init.copy_(self.key_projection, projection)
            init.copy_(self.query_projection, projection.repeat_interleave(groups, 0))

    def project_queries(self, query: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The r coordinates whose products the features are, (batch, heads, seq, r), and no log scale."""
        return self._project(query, getattr(self, "query_projection", None)), None

    def project_keys(self, key: torch.Tensor) -> torch.Tensor:
        return self._project(key, getattr(self, "key_projection", None))

    def forward_queries(self, query):
        return self._expand(self.project_queries(query)[0]), None

    def forward_keys(self, key):
        return self._expand(self.project_keys(key))

    @staticmethod
    def _project(tensor: torch.Tensor, projection: torch.Tensor | None) -> torch.Tensor:
        tensor = _upcast(tensor)
        return tensor if projection is None else tensor @ projection.to(tensor.dtype)

    def _expand(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor * self.feature_dim**-0.25
        rows, columns = torch.triu_indices(self.feature_dim, self.feature_dim, device=tensor.device)
        # Off the diagonal a product stands for two of the full square: 2 / 2 = 1; on it, 1 / 2.
        factor = torch.where(rows == columns, 0.5, 1.0).to(tensor.dtype).sqrt()
        products = tensor[..., rows] * tensor[..., columns] * factor
        return torch.cat([torch.ones_like(tensor[..., :1]), tensor, products], -1)


@register_feature_map("hedgehog")
class HedgehogFeatureMap(FeatureMap):
    """Learned softmax features (Hedgehog, Zhang et al. 2024, arXiv 2402.04347): phi(x) = [softmax(W x),
    softmax(-W x)], one W per head of q and of k, starting as the identity. `feature_dim` = rows of W, default head_dim."""

    def __init__(self, head_dim, feature_dim, num_heads, num_key_value_heads):
        super().__init__(head_dim, feature_dim, num_heads, num_key_value_heads)
        self.query_projection = nn.Parameter(torch.empty(num_heads, head_dim, self.feature_dim))
        self.key_projection = nn.Parameter(torch.empty(num_key_value_heads, head_dim, self.feature_dim))

    @classmethod
    def validate(cls, head_dim, feature_dim):
        return _at_least_one("hedgehog", head_dim if feature_dim is None else feature_dim)

    def init_weights(self):
        identity = torch.eye(self.head_dim, self.feature_dim)
        init.copy_(self.query_projection, identity.expand_as(self.query_projection))
        init.copy_(self.key_projection, identity.expand_as(self.key_projection))

    def forward_queries(self, query):
        return self._features(query, self.query_projection), None

    def forward_keys(self, key):
        return self._features(key, self.key_projection)

    @staticmethod
    def _features(tensor: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
        tensor = _upcast(tensor)
        projected = tensor @ projection.to(tensor.dtype)
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)


class _EluPlusOne(torch.autograd.Function):
    """exp(min(x, 0)) + max(x, 0): half the time of `elu`, and its derivative is min(result, 1). Below -40 it is constant, for
    products of smaller features would be denormal numbers."""

    @staticmethod
    def forward(tensor):
        return tensor.clamp(-40.0, 0.0).exp_().add_(tensor.clamp(min=0.0))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].clamp(max=1.0)


class _Normalize(torch.autograd.Function):
    """x / max(|x|, 1e-12) over the last axis. Its gradient, taken from the result, passes over memory half as often as
    autograd's."""

    @staticmethod
    def forward(tensor):
        return tensor / torch.linalg.vector_norm(tensor, dim=-1, keepdim=True).clamp(min=1e-12)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad):
        tensor, unit = ctx.saved_tensors
        norm = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
        along = (grad * unit).sum(-1, keepdim=True) * (norm > 1e-12)
        return (grad - along * unit) / norm.clamp(min=1e-12)


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _at_least_one(name: str, feature_dim: int) -> int:
    if feature_dim < 1:
        raise ValueError(f"feature_dim={feature_dim} does not fit {name}: allowed are integers from 1")
    return feature_dim
