"""Padding as kernel layers see it: which tokens of a batch are none, and an order in which those come first."""

from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from .slots import take_slots


class Padding(NamedTuple):
    """Where the new tokens of a batch are padding. Kernel layers see each row with its padding first.

    num_pad: (batch,). order: (batch, seq), the token in each place, None if padding comes first already. inverse: the
    way back.
    """

    num_pad: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> "Padding":
        """`mask`: (batch, seq), nonzero at real tokens."""
        real = mask != 0
        num_pad = (~real).sum(-1)
        order = real.to(torch.uint8).argsort(dim=-1, stable=True)
        if _is_readable(mask) and bool((real[:, 1:] >= real[:, :-1]).all()):
            return cls(num_pad, None, None)
        return cls(num_pad, order, order.argsort(dim=-1))

    def align(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, dim) in the places of kernel layers."""
        return states if self.order is None else take_slots(states, self.order, dim=1)

    def restore(self, states: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The way back, along axis `dim`."""
        return states if self.inverse is None else take_slots(states, self.inverse, dim=dim)

    def is_pad(self, length: int) -> torch.Tensor:
        """(batch, seq), in the places of kernel layers."""
        return torch.arange(length, device=self.num_pad.device) < self.num_pad[:, None]

    @classmethod
    def from_any_mask(
        cls,
        attention_mask: torch.Tensor | dict | None,
        layer_type: str,
        position_ids: torch.Tensor | None,
        batch: int,
        length: int,
        past_key_values: Cache | None,
        is_causal: bool,
    ) -> "Padding | None":
        """What kernel layers need to know of any mask that transformers passes: None, 2D, 4D or a dict of those by layer
        type. Raises `ValueError` for masks of another shape or purpose, and for positions, if given, that do not count tokens."""
        if isinstance(attention_mask, dict) and layer_type not in attention_mask:
            raise ValueError(f"attention_mask has keys {sorted(attention_mask)}; {layer_type!r} must be one of them")
        mask = attention_mask[layer_type] if isinstance(attention_mask, dict) else attention_mask
        compiling = torch.compiler.is_compiling()
        if mask is not None and mask.dim() == 4:
            mask = _padding_of_4d_mask(mask, length, is_causal)
        past_length = 0 if past_key_values is None or compiling else int(past_key_values.get_seq_length())
        if mask is not None and (
            mask.dim() != 2
            or mask.shape[0] != batch
            or mask.shape[1] < length
            # A static cache comes with masks as long as itself.
            or (mask is attention_mask and not compiling and mask.shape[1] not in (length, past_length + length))
        ):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; allowed are (batch, past + seq) = "
                f"{(batch, past_length + length)}, the new tokens alone, or a 4D mask of padding and causality alone"
            )
        if mask is not None:
            mask = mask[:, -length:]
        if position_ids is not None and length > 1 and _is_readable(position_ids):
            _check_positions(position_ids, mask)
        if mask is not None and _is_readable(mask):
            is_first = past_key_values is None and is_causal
            if bool(((mask != 0) if not is_first else (mask[:, :-1] >= mask[:, 1:])).all()):
                # Nothing padded, or only behind the text, where no earlier token looks.
                mask = None
        return None if mask is None else cls.from_mask(mask)


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether its numbers may decide what is done: not while tracing, and on the meta device there are none."""
    return not (torch.compiler.is_compiling() or tensor.is_meta)


def _padding_of_4d_mask(mask: torch.Tensor, length: int, is_causal: bool) -> torch.Tensor:
    """The (batch, keys) padding in a (batch, 1, seq, keys) mask; `ValueError` if it hides anything else."""
    visible = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
    real = visible[:, :, -1:].any(1, keepdim=True)
    allowed = real.expand_as(visible)
    if is_causal:
        allowed = allowed & torch.ones(visible.shape[-2:], dtype=torch.bool, device=mask.device).tril(
            visible.shape[-1] - length
        )
    # Rows of padding queries say nothing, whatever they hold.
    matters = real[..., -length:].transpose(-1, -2)
    if _is_readable(mask) and bool(((visible != allowed) & matters).any()):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} hides more than padding and the future, which kernel layers cannot "
            "follow; allowed are masks of shape (batch, past + seq)"
        )
    return real[:, 0, 0].long()


def _check_positions(position_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    steps = position_ids[..., 1:] - position_ids[..., :-1]
    wrong = steps != 1
    if mask is not None:
        wrong = wrong & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    if bool(wrong.any()):
        raise ValueError(
            "position_ids do not count up by one, but kernel layers go by the order of tokens; allowed are consecutive "
            "positions, one text per row (no packed rows)"
        )
