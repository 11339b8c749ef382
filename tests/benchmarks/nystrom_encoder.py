"""What is timed for the Nyströmformer encoder: its attention and a whole layer, against transformers' own, the package
`nystrom-attention`, and softmax attention."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, NystromformerConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.nystromformer.modeling_nystromformer import NystromformerLayer, NystromformerSelfAttention

from nystromformer_hf import NystromformerHFConfig
from nystromformer_hf.modeling_nystromformer_hf import NystromformerHFLayer, NystromformerHFSelfAttention

from .measure import Faster, Growth, Section, by_length


HEADS, HEAD_DIM, LANDMARKS = 8, 64, 64


def _configs(seq_len: int) -> tuple[NystromformerConfig, NystromformerHFConfig]:
    theirs = NystromformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=4 * HEADS * HEAD_DIM,
        num_landmarks=LANDMARKS,
        segment_means_seq_len=seq_len,
    )
    return theirs, NystromformerHFConfig.from_nystromformer(theirs, attn_implementation="sdpa")


def attention_cores(seq_len: int, batch: int = 1, backward: bool = False) -> dict[str, Callable[[], None]]:
    """Attention with its convolution but without projections, of hidden states (batch, seq_len, 512).

    `nystrom-attention` is there where it is installed; its module projects queries, keys and values in one layer, which
    the identity replaces here.
    """
    theirs_config, ours_config = _configs(seq_len)
    theirs, ours = NystromformerSelfAttention(theirs_config).eval(), NystromformerHFSelfAttention(ours_config).eval()
    ours.load_state_dict(theirs.state_dict())  # also because fresh memory may hold denormal numbers, which are slow
    for attention in (theirs, ours):
        attention.query = attention.key = attention.value = nn.Identity()
    hidden = torch.randn(batch, seq_len, HEADS * HEAD_DIM)

    def softmax_attention(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        heads = hidden_states.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
        return (F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2),)

    cores = {"softmax (SDPA)": softmax_attention, "ours": ours, "transformers": theirs}
    try:
        from nystrom_attention import NystromAttention
    except ImportError:
        pass
    else:
        peer = NystromAttention(HEADS * HEAD_DIM, dim_head=HEAD_DIM, heads=HEADS, num_landmarks=LANDMARKS).eval()
        peer.to_qkv, peer.to_out = _Thrice(), nn.Identity()
        cores["nystrom-attention"] = lambda hidden_states: (peer(hidden_states),)
    return {name: _run(core, hidden, backward) for name, core in cores.items()}


def encoder_layers(seq_len: int, batch: int = 1, backward: bool = False) -> dict[str, Callable[[], None]]:
    """One whole encoder layer, of hidden states (batch, seq_len, 512)."""
    theirs_config, ours_config = _configs(seq_len)
    bert = BertConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, intermediate_size=4 * HEADS * HEAD_DIM)
    bert._attn_implementation = "sdpa"
    layers = {
        "BERT (SDPA)": BertLayer(bert),
        "ours": NystromformerHFLayer(ours_config),
        "transformers": NystromformerLayer(theirs_config),
    }
    layers["ours"].load_state_dict(layers["transformers"].state_dict())
    hidden = torch.randn(batch, seq_len, HEADS * HEAD_DIM)
    return {name: _run(layer.eval(), hidden, backward) for name, layer in layers.items()}


class _Thrice(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden_states] * 3, dim=-1)


def _run(function: Callable, hidden: torch.Tensor, backward: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(backward):
            output = function(hidden.detach().requires_grad_(backward))
            if backward:
                (output[0] if isinstance(output, tuple) else output).sum().backward()

    return run


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CORE_TARGETS = tuple(
    Faster("ours", rival, length, 2.5) for rival in ("transformers", "nystrom-attention") for length in (4096, 8192)
)
SECTIONS = {
    "nystrom-core": Section(
        "Nyström encoder attention without projections, forward: 8 heads x 64, 64 landmarks, float32",
        by_length(attention_cores),
        LENGTHS,
        (*CORE_TARGETS, Growth("ours", "peak_bytes", 1.1)),
    ),
    "nystrom-core-training": Section(
        "Nyström encoder attention without projections, forward + backward: 8 heads x 64, 64 landmarks, float32",
        by_length(partial(attention_cores, backward=True)),
        LENGTHS,
        (*CORE_TARGETS, Growth("ours", "peak_bytes", 1.1)),
    ),
    "nystrom-layer": Section(
        "One encoder layer, forward: width 512, 8 heads, 64 landmarks, float32",
        by_length(encoder_layers),
        LENGTHS,
        (Faster("ours", "transformers", 8192, 1.5), Faster("ours", "BERT (SDPA)", 8192, 3.0)),
    ),
}
