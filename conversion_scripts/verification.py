"""Is the result the original? Both read the same tokens, where their attention is the same."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from conversion_scripts.card_facts import Parity
from conversion_scripts.checkpoint_files import ConversionError


# Largest difference of two outputs that verification accepts: absolute in float32; in the half precisions, whose rounding
# grows with the numbers, a share of the largest output (bfloat16 keeps 8 bits, float16 11).
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
VERIFIED_TOKENS = 256


def random_tokens(vocab_size: int, length: int, seed: int) -> torch.LongTensor:
    """A text (1, length)."""
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def compare(
    load_original: Callable[..., PreTrainedModel],
    load_converted: Callable[..., PreTrainedModel],
    inputs: dict[str, Any],
    dtype: str,
    say: Callable[[str], None],
) -> Parity:
    """How far two models' outputs for `inputs` are apart. `ConversionError` above the tolerance.

    Args:
        load_original, load_converted: make the models in the dtype they are given; one is gone before the other comes.
        inputs: with `input_ids` among them.
        dtype: key of `TOLERANCES`.
        say: takes the verdict.
    """

    @torch.no_grad()
    def outputs(load: Callable[..., PreTrainedModel]) -> dict[str, torch.Tensor]:
        result = load(dtype=getattr(torch, dtype)).eval()(**inputs)
        names = ("logits", "start_logits", "end_logits", "last_hidden_state")
        return {name: result[name].float() for name in names if name in result}

    original, converted = outputs(load_original), outputs(load_converted)
    difference = float(max((original[name] - converted[name]).abs().max() for name in converted))
    largest = float(max(tensor.abs().max() for tensor in original.values()))
    tolerance = TOLERANCES[dtype] * (1.0 if dtype == "float32" else largest)
    what = "hidden state" if "last_hidden_state" in converted else "logit"
    verdict = (
        f"largest {what} difference {difference:.1e} over {inputs['input_ids'].shape[-1]} tokens in {dtype} (tolerance "
        f"{tolerance:.1e})"
    )
    if not difference <= tolerance:  # NaN is no agreement either
        raise ConversionError(
            f"the result is not the original: {verdict}; the checkpoint uses something that is not mapped. Nothing was kept"
        )
    say(f"verified: {verdict}")
    return Parity(difference, inputs["input_ids"].shape[-1], dtype, tolerance, f"{what}s")
