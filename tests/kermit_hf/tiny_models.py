"""Tiny KERMIT models in many settings: what the tests of this folder share."""

import torch

from kermit_hf import KermitConfig, KermitForCausalLM


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
    "forget_gate": True,
}

KERNEL, FULL, SLIDING = "kernel_attention", "full_attention", "sliding_attention"

# Every option away from its default at least once, in combinations that differ from each other in more than one.
SETTINGS = {
    "delta": {"window_size": 8, "num_sink_tokens": 2},
    "delta_pure": {"window_size": 0},
    "delta_bare": {
        "window_size": 5,
        "num_sink_tokens": 0,
        "feature_map": "elu",
        "forget_gate": False,
        "conv_kernel_size": 0,
    },
    "delta_one_token_window": {"window_size": 1, "num_sink_tokens": 1, "feature_map": "dpfp", "num_key_value_heads": 1},
    "delta_all_sinks": {"window_size": 6, "num_sink_tokens": 6, "conv_kernel_size": 2, "num_key_value_heads": 4},
    "delta_longer_than_text": {"window_size": 512},
    "additive": {"window_size": 8, "num_sink_tokens": 3, "update_rule": "additive"},
    "additive_pure": {
        "window_size": 0,
        "update_rule": "additive",
        "feature_map": "elu",
        "forget_gate": False,
        "conv_kernel_size": 0,
    },
    "additive_favor": {
        "window_size": 6,
        "num_sink_tokens": 1,
        "update_rule": "additive",
        "feature_map": "favor",
        "conv_kernel_size": 3,
        "attention_bias": True,
    },
    "additive_taylor": {
        "window_size": 1,
        "num_sink_tokens": 0,
        "update_rule": "additive",
        "feature_map": "taylor",
        "feature_dim": 4,
        "forget_gate": False,
        "use_qk_norm": True,
    },
    "hybrid": {
        "window_size": 6,
        "num_sink_tokens": 2,
        "layer_types": [KERNEL, FULL, SLIDING],
        "num_hidden_layers": 3,
        "sliding_window": 7,
    },
    "hybrid_softmax_first": {
        "window_size": 4,
        "num_sink_tokens": 1,
        "update_rule": "additive",
        "layer_types": [FULL, KERNEL],
        "conv_kernel_size": 0,
    },
}
PURE_KERNEL = [name for name, setting in SETTINGS.items() if "layer_types" not in setting]


def tiny_config(setting: str | dict = "delta", **overrides) -> KermitConfig:
    """The configuration of that name in `SETTINGS`, or of these arguments, with `overrides`."""
    chosen = SETTINGS[setting] if isinstance(setting, str) else setting
    return KermitConfig(**{**BODY, **chosen, **overrides})


def tiny_model(
    setting: str | dict = "delta", head: type = KermitForCausalLM, implementation: str | None = None, **overrides
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
    """Moves every weight away from its start, which leaves some parts (convolution, far query) without effect."""
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() > 1 and "embed" not in name else 0.1
        parameter.add_(torch.randn_like(parameter) * (1.0 if "embed" in name else scale))


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
