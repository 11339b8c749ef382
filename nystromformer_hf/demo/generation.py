"""Generation that reports its speed and the memory of its cache."""

import math
import time
from collections.abc import Iterable
from itertools import chain

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, TextStreamer


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors keep alive: whole storages, each once, since a view holds on to all of its own."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of our own cache layers and of transformers'."""
    tensors = (layer.tensors() if hasattr(layer, "tensors") else (layer.keys, layer.values) for layer in cache.layers)
    return bytes_of(chain.from_iterable(tensors))


class ProgressStreamer(TextStreamer):
    """Prints text as it comes and, every `interval` tokens, the speed since the last report and the cache's size."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, cache: DynamicCache, interval: int):
        super().__init__(tokenizer)
        self.cache, self.interval = cache, interval
        self.generated, self.reports = None, []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.generated is None:  # the first call brings the prompt
            self.generated, self.last_report = 0, time.perf_counter()
            return
        self.generated += 1
        if self.generated % self.interval == 0:
            now = time.perf_counter()
            speed, size = self.interval / (now - self.last_report), cache_bytes(self.cache)
            print(f"\n[{self.generated:,} tokens · {speed:.0f} tokens/s · cache {size / 1e6:.2f} MB]", flush=True)
            self.reports.append({"tokens": self.generated, "tokens_per_second": speed, "cache_bytes": size})
            self.last_report = now


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: torch.Tensor, count: int
) -> list[dict]:
    """Sample and print `count` tokens after `prompt`, (1, seq); what `ProgressStreamer` reported."""
    cache = DynamicCache(config=model.config)
    streamer = ProgressStreamer(tokenizer, cache, interval=math.ceil(count / 8))
    settings = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, past_key_values=cache, streamer=streamer, **settings)
    return streamer.reports
