"""What to time and to measure about the Nyströmformer encoder: its rivals as functions of no argument, and its error.

Nothing runs on import; `tests.benchmarks` decides on lengths, repetitions and threads.
"""

from collections.abc import Callable, Iterable
from os import PathLike

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, NystromformerConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.nystromformer.modeling_nystromformer import NystromformerLayer, NystromformerSelfAttention

from nystromformer_hf import NystromformerHFConfig, NystromformerHFModel
from nystromformer_hf.modeling_nystromformer_hf import (
    POSITION_OFFSET,
    NystromformerHFLayer,
    NystromformerHFSelfAttention,
)


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
    hidden = torch.randn(batch, seq_len, HEADS * HEAD_DIM, requires_grad=backward)

    def softmax_attention(hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        heads = hidden_states.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
        return (F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2),)

    cores = {"ours": ours, "transformers": theirs, "softmax (SDPA)": softmax_attention}
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
        "ours": NystromformerHFLayer(ours_config),
        "transformers": NystromformerLayer(theirs_config),
        "BERT (SDPA)": BertLayer(bert),
    }
    layers["ours"].load_state_dict(layers["transformers"].state_dict())
    hidden = torch.randn(batch, seq_len, HEADS * HEAD_DIM, requires_grad=backward)
    return {name: _run(layer.eval(), hidden, backward) for name, layer in layers.items()}


class _Thrice(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.cat([hidden_states] * 3, dim=-1)


def _run(function: Callable, hidden: torch.Tensor, backward: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(backward):
            output = function(hidden)
            if backward:
                (output[0] if isinstance(output, tuple) else output).sum().backward()

    return run


def from_bert(bert: BertModel, **fields) -> NystromformerHFModel:
    """A Nyströmformer with the weights of a BERT, without convolution; `fields` go into its configuration."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    names += ("hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id")
    config = NystromformerHFConfig(
        **{name: getattr(bert.config, name) for name in names}, conv_kernel_size=None, **fields
    )
    weights = {name: tensor for name, tensor in bert.state_dict().items() if not name.startswith("pooler")}
    table = "embeddings.position_embeddings.weight"
    weights[table] = F.pad(weights[table], (0, 0, POSITION_OFFSET, 0))
    model = NystromformerHFModel(config)
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def token_cosine(
    folder: str | PathLike, tokens: torch.LongTensor, landmarks: Iterable[int], **fields
) -> dict[int, float]:
    """Mean cosine between the last states of a trained BERT and those of the same weights with Nyström attention.

    Args:
        folder: a checkpoint of `BertModel`.
        tokens: (texts, seq), texts of real tokens.
        landmarks: numbers of landmarks to try.
        fields: other fields of `NystromformerHFConfig`.

    Returns:
        The cosine for each number of landmarks; 1 at as many landmarks as tokens.
    """
    bert = BertModel.from_pretrained(folder).eval()
    exact = bert(tokens).last_hidden_state
    cosines = {}
    for number in landmarks:
        model = from_bert(bert, num_landmarks=number, **fields)
        cosines[number] = F.cosine_similarity(model(tokens).last_hidden_state, exact, dim=-1).mean().item()
    return cosines
