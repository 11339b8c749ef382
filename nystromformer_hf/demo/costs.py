"""Time and memory of decoding after a long context, and of training on a long document."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from .generation import bytes_of, cache_bytes


# After each context.
TIMED_TOKENS = 16


@torch.no_grad()
def decoding_cost(model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int]) -> list[dict]:
    """Cache bytes and median seconds per token at each context length, on one cache that grows through them.

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
        costs.append({"length": length, "bytes": cache_bytes(cache), "seconds": statistics.median(seconds)})
    return costs


def training_cost(model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int]) -> list[dict]:
    """Seconds of one document forward and backward at each length, and the bytes its forward pass keeps for that.

    tokens: (seq,), repeated as often as the longest document asks.
    """
    model.train()
    tokens = tokens.repeat(math.ceil(lengths[-1] / len(tokens)))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    label = torch.zeros(1, dtype=torch.long)
    kept, costs = [], []
    hooks = (lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)
    for length in [lengths[0], *lengths]:  # the first is there to warm up
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = model(tokens[None, :length], labels=label).loss
        loss.backward()
        seconds = time.perf_counter() - start
        size = bytes_of(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in weights)
        costs.append({"length": length, "bytes": size, "seconds": seconds})
        kept.clear()
        model.zero_grad()
    return costs[1:]
