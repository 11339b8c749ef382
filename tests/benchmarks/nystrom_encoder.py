"""What is timed for the Nyströmformer encoder: its attention and a whole layer, against transformers' own, other
packages, and softmax attention."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, NystromformerConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.nystromformer.modeling_nystromformer import NystromformerLayer, NystromformerSelfAttention

from nystromformer_hf import NystromformerHFConfig, kernel_backend
from nystromformer_hf.modeling_nystromformer_hf import NystromformerHFLayer, NystromformerHFSelfAttention

from . import peers, work
from .compiled import compiled, with_compiled
from .measure import Contender, Section, by_length
from .models import HEAD_DIM, HEADS, LENGTHS
from .targets import Faster, growing


LANDMARKS, FEATURES = 64, 128
COMPILED = compiled("ours")


def _configs(seq_len: int) -> tuple[NystromformerConfig, NystromformerHFConfig]:
    theirs = NystromformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=4 * HEADS * HEAD_DIM,
        num_landmarks=LANDMARKS,
        segment_means_seq_len=seq_len,
    )
    return theirs, NystromformerHFConfig.from_nystromformer(theirs, attn_implementation="sdpa")


def attention_cores(seq_len: int, batch: int = 1, backward: bool = False) -> dict[str, Contender]:
    """Attention without projections, of hidden states (batch, seq_len, 512); with a convolution where Nyström has one."""
    theirs_config, ours_config = _configs(seq_len)
    theirs, ours = NystromformerSelfAttention(theirs_config).eval(), NystromformerHFSelfAttention(ours_config).eval()
    ours.load_state_dict(theirs.state_dict())  # also because fresh memory may hold denormal numbers, which are slow
    for attention in (theirs, ours):
        attention.query = attention.key = attention.value = nn.Identity()
    hidden = torch.randn(batch, seq_len, HEADS * HEAD_DIM)
    once = partial(_contender, hidden=hidden, backward=backward)
    cores = {
        "softmax (SDPA)": once(_on_heads(F.scaled_dot_product_attention), HEADS * _softmax(seq_len)),
        "ours": once(ours, HEADS * _nystrom(seq_len, theirs_config)),
        "transformers": once(theirs, HEADS * _nystrom(seq_len, theirs_config)),
    }
    cores = with_compiled(cores, ["ours"], kernel_backend)
    others = {name: once(_on_heads(peer)) for name, peer in peers.bidirectional_peers(HEAD_DIM, FEATURES).items()}
    if peers.has("nystrom-attention"):
        others = {"nystrom-attention": once(_nystrom_attention())} | others
    return cores | peers.as_peers(others)


def encoder_layers(seq_len: int, batch: int = 1, backward: bool = False) -> dict[str, Contender]:
    """One whole encoder layer, of hidden states (batch, seq_len, 512)."""
    theirs_config, ours_config = _configs(seq_len)
    bert = BertConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, intermediate_size=4 * HEADS * HEAD_DIM)
    bert._attn_implementation = "sdpa"
    layers = {
        "BERT (SDPA)": BertLayer(bert).eval(),
        "ours": NystromformerHFLayer(ours_config).eval(),
        "transformers": NystromformerLayer(theirs_config).eval(),
    }
    layers["ours"].load_state_dict(layers["transformers"].state_dict())
    hidden = torch.randn(batch, seq_len, HEADS * HEAD_DIM)
    contenders = {}
    for name, layer in layers.items():
        attention = _softmax(seq_len) if name == "BERT (SDPA)" else _nystrom(seq_len, theirs_config)
        needed = HEADS * attention + work.linear_layers(layer, seq_len)
        contenders[name] = _contender(layer, needed, hidden=hidden, backward=backward)
    return with_compiled(contenders, ["ours"], kernel_backend)


def _softmax(seq_len: int) -> int:
    return work.softmax_bidirectional(seq_len, HEAD_DIM)


def _nystrom(seq_len: int, config: NystromformerConfig) -> int:
    return work.nystrom(seq_len, HEAD_DIM, LANDMARKS, taps=config.conv_kernel_size)


def _on_heads(attention: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Attention of (batch, heads, seq, head_dim), the same as query, key and value, of hidden states."""

    def attend(hidden_states: torch.Tensor) -> torch.Tensor:
        heads = hidden_states.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
        return attention(heads, heads, heads).transpose(1, 2).flatten(2)

    return attend


def _nystrom_attention() -> nn.Module:
    """The package projects queries, keys and values in one layer, which the identity replaces here."""
    from nystrom_attention import NystromAttention

    peer = NystromAttention(HEADS * HEAD_DIM, dim_head=HEAD_DIM, heads=HEADS, num_landmarks=LANDMARKS).eval()
    peer.to_qkv, peer.to_out = _Thrice(), nn.Identity()
    return peer


class _Thrice(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden_states] * 3, dim=-1)


def _contender(
    function: Callable, multiplications: int | None = None, *, hidden: torch.Tensor, backward: bool
) -> Contender:
    """multiplications: of one row of the batch, forward."""

    def run() -> None:
        with torch.set_grad_enabled(backward):
            output = function(hidden.detach().requires_grad_(backward))
            if backward:
                (output[0] if isinstance(output, tuple) else output).sum().backward()

    needed = None if multiplications is None else (work.TRAINING if backward else 1) * len(hidden) * multiplications
    return Contender(run, needed, (3 if backward else 1) * 2 * hidden.nbytes)


CORE_TARGETS = tuple(
    Faster(name, rival, length, ratio)
    for name in ("ours", COMPILED)
    for rival, ratio in (("transformers", 3.0), ("nystrom-attention", 2.5))
    for length in (4096, 8192)
)
SECTIONS = {
    "nystrom-core": Section(
        "Nyström encoder attention without projections, forward: 8 heads x 64, 64 landmarks",
        by_length(attention_cores),
        LENGTHS,
        (*CORE_TARGETS, *growing(1.1, "ours", COMPILED)),
    ),
    "nystrom-core-training": Section(
        "Nyström encoder attention without projections, forward + backward: 8 heads x 64, 64 landmarks",
        by_length(partial(attention_cores, backward=True)),
        LENGTHS,
        (*CORE_TARGETS, *growing(1.1, "ours", COMPILED)),
    ),
    "nystrom-layer": Section(
        "One encoder layer, forward: width 512, 8 heads, 64 landmarks",
        by_length(encoder_layers),
        LENGTHS,
        (
            *(Faster(name, "transformers", 8192, 1.5) for name in ("ours", COMPILED)),
            *(Faster(name, "BERT (SDPA)", 8192, 3.0) for name in ("ours", COMPILED)),
            *growing(1.1, "ours", COMPILED),
        ),
    ),
}
