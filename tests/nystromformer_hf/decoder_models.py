"""Tiny Nyströmformer decoders in many settings, and batches for them: what the tests of the decoder share."""

import torch

from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM


VOCABULARY = 40
PAD = 0

BODY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Every option away from its default at least once, in combinations that differ from each other in more than one.
SETTINGS = {
    "pooled": {"segment_size": 4, "near_segments": 2, "num_sink_tokens": 2},
    "pooled_bare": {"segment_size": 5, "near_segments": 1, "num_sink_tokens": 0, "num_key_value_heads": 4},
    "pooled_conv": {"segment_size": 3, "near_segments": 1, "num_sink_tokens": 5, "conv_kernel_size": 6},
    "softmax": {"segment_size": 1, "near_segments": 1, "num_sink_tokens": 4, "inverse_regularization": 2},
    "regularized": {"segment_size": 4, "near_segments": 1, "num_sink_tokens": 1, "inverse_regularization": 1.5},
    "regularized_conv": {
        "segment_size": 2,
        "near_segments": 3,
        "num_sink_tokens": 3,
        "inverse_regularization": 1.01,
        "conv_kernel_size": 3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    "longer_than_text": {"segment_size": 512, "near_segments": 1},
}


def tiny_config(setting: str | dict = "pooled", **overrides) -> NystromformerHFDecoderConfig:
    """The configuration of that name in `SETTINGS`, or of these arguments, with `overrides`."""
    chosen = SETTINGS[setting] if isinstance(setting, str) else setting
    return NystromformerHFDecoderConfig(**{**BODY, **chosen, **overrides})


def tiny_model(
    setting: str | dict = "pooled",
    head: type = NystromformerHFDecoderForCausalLM,
    implementation: str | None = None,
    **overrides,
) -> torch.nn.Module:
    """A model in evaluation mode whose weights are large enough that every part of it matters."""
    config = tiny_config(setting, **overrides)
    if implementation is not None:
        config._attn_implementation = implementation
    torch.manual_seed(0)
    model = head(config).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """Moves every weight away from its start, which leaves the convolution without effect."""
    for name, parameter in model.named_parameters():
        scale = 1.0 if "embed" in name else 0.3 if parameter.dim() > 1 else 0.1
        parameter.add_(scale * torch.randn_like(parameter))


def tokens(*shape: int) -> torch.Tensor:
    """Random real tokens, none of them the pad token."""
    return torch.randint(1, VOCABULARY, shape)


def place(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts rows of different lengths into one batch: input_ids and attention_mask, (batch, seq).

    `side`: where the padding goes, "left", "right" or "middle" (at random places). Padding holds arbitrary tokens.
    """
    longest = max(map(len, rows)) + (3 if side == "middle" else 0)
    input_ids, mask = tokens(len(rows), longest), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        if side == "middle":
            mask[index, torch.randperm(longest)[: len(row)]] = 1
        else:
            mask[index, slice(longest - len(row), None) if side == "left" else slice(len(row))] = 1
        input_ids[index, mask[index] == 1] = row
    return input_ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """The position of each real token among the real tokens of its row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
