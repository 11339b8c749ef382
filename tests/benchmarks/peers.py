"""Other people's attention on query, key, value (batch, heads, seq, head_dim). All of it is optional: what is not
installed is named in the output and left out."""

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F

from .measure import Contender, on_gpu


PACKAGES = {
    "nystrom-attention": "nystrom_attention",
    "performer-pytorch": "performer_pytorch",
    "linear-attention-transformer": "linear_attention_transformer",
}
GPU_PACKAGES = {"flash-linear-attention": "fla.ops"}

Attention = Callable[..., torch.Tensor]


@cache
def missing_peers() -> dict[str, str]:
    """Packages that cannot be imported, with the reason. Those that need a GPU are missed only where there is one."""
    missing = {}
    for package, module in (PACKAGES | (GPU_PACKAGES if on_gpu() else {})).items():
        try:
            import_module(module)
        except ImportError as error:
            missing[package] = str(error)
    return missing


def has(package: str) -> bool:
    return package not in missing_peers() and (package in PACKAGES or on_gpu())


def as_peers(contenders: dict[str, Contender]) -> dict[str, Contender]:
    """The same, marked as other people's."""
    return {name: contender._replace(is_peer=True) for name, contender in contenders.items()}


def causal_peers(head_dim: int, feature_dim: int) -> dict[str, Attention]:
    """Causal kernel attention of the installed peers."""
    peers: dict[str, Attention] = {}
    if has("performer-pytorch"):
        peers[f"performer-pytorch, {feature_dim} features"] = performer(head_dim, feature_dim, causal=True)
    if has("linear-attention-transformer"):
        peers["linear-attention-transformer"] = blind_linear_attention
    if has("flash-linear-attention"):
        peers["flash-linear-attention"] = flash_linear_attention
    return peers


def bidirectional_peers(head_dim: int, feature_dim: int) -> dict[str, Attention]:
    """Kernel attention of the installed peers that looks both ways."""
    peers: dict[str, Attention] = {}
    if has("performer-pytorch"):
        peers[f"performer-pytorch, {feature_dim} features"] = performer(head_dim, feature_dim, causal=False)
    if has("linear-attention-transformer"):
        from linear_attention_transformer.linear_attention_transformer import linear_attn

        peers["linear-attention-transformer"] = linear_attn
    return peers


def performer(head_dim: int, feature_dim: int, causal: bool) -> Attention:
    """FAVOR+ in pure torch. Causal, the package would take a CUDA kernel of `fast_transformers`, which knows no CPU."""
    from performer_pytorch.performer_pytorch import FastAttention, causal_linear_attention_noncuda

    # Its random features come from a QR decomposition, which torch does not have in half precision.
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            attention = FastAttention(head_dim, nb_features=feature_dim)
    finally:
        torch.set_default_dtype(dtype)
    attention.causal = causal
    attention.causal_linear_fn = causal_linear_attention_noncuda
    return attention.to(torch.get_default_device(), dtype)


def blind_linear_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The package's causal form in its fast setting, in which a token does not see the 64 tokens of its own bucket: less
    work than attention to all of them. Without that blind spot it keeps a matrix for each token."""
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn

    return causal_linear_attn(query, key, value, bucket_size=math.gcd(query.shape[2], 64))


def flash_linear_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The additive rule, elu feature map included; the package wants (batch, seq, heads, head_dim)."""
    from fla.ops.linear_attn import chunk_linear_attn

    states = (F.elu(query) + 1, F.elu(key) + 1, value)
    return chunk_linear_attn(*(tensor.transpose(1, 2) for tensor in states), scale=1.0)[0]


def flash_based(coordinates: int) -> Attention:
    """The Taylor map of the package's Based layer, on the first `coordinates` of each head in place of a projection."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        from fla.ops.based import fused_chunk_based

        states = (query[..., :coordinates], key[..., :coordinates], value)
        return fused_chunk_based(*(tensor.transpose(1, 2).contiguous() for tensor in states))

    return attend


def flash_gated_delta(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    write_strength: torch.Tensor,
    log_forget: torch.Tensor,
) -> torch.Tensor:
    """The gated delta rule of flash-linear-attention on silu features of unit length; gates (batch, heads, seq)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    states = (tensor.transpose(1, 2) for tensor in (F.silu(query), F.silu(key), value))
    gates = {"g": log_forget.transpose(1, 2), "beta": write_strength.transpose(1, 2)}
    return chunk_gated_delta_rule(*states, **gates, scale=1.0, use_qk_l2norm_in_kernel=True)[0]
