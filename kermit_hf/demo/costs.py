"""Time and memory of decoding after a long context."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from .generation import cache_bytes


# After each context.
TIMED_TOKENS = 16


@torch.no_grad()
def decoding_cost(model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int]) -> list[dict]:
    """Cache bytes and median milliseconds per token at each context length, on one cache that grows through them.

    tokens: (seq,), repeated as often as the longest context asks.
    """
    chunk_size = 1024
    model.eval()
    tokens = tokens.repeat(math.ceil((lengths[-1] + TIMED_TOKENS) / len(tokens))).to(model.device)
    cache = DynamicCache(config=model.config)
    costs, position = [], 0
    for length in lengths:
        for chunk in tokens[position:length].split(chunk_size):
            model(chunk[None], past_key_values=cache, logits_to_keep=1)
        seconds = []
        for token in tokens[length : length + TIMED_TOKENS]:
            start = time.perf_counter()
            model(token[None, None], past_key_values=cache).logits.argmax().item()
            seconds.append(time.perf_counter() - start)
        position = length + TIMED_TOKENS
        milliseconds = 1e3 * statistics.median(seconds)
        costs.append({"length": length, "cache_bytes": cache_bytes(cache), "ms_per_token": milliseconds})
    return costs
