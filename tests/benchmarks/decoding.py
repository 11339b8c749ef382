"""Timing of decoding: seconds for one more token, after contexts of different lengths or for different batch sizes."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from .measure import Contender, Limits, Result, Skipped, compare, unless_it_fails


class Place(NamedTuple):
    """How much is in the cache: `context` tokens of each of `batch` texts."""

    context: int
    batch: int = 1


class Decoder(NamedTuple):
    """A model and an empty cache for it. `fill(cache, place)` brings the cache there.

    `rewind` takes the new tokens out of the cache again, for models whose time depends on their number. `tokens`: new ones
    of a run, as many as it takes until the cost of each comes round again. `backend()`: the kernels that new tokens run on.
    """

    model: PreTrainedModel
    cache: Callable[[], Cache]
    fill: Callable[[Cache, Place], None]
    rewind: bool = False
    tokens: int = 4
    backend: Callable[[], AbstractContextManager] = nullcontext


def compare_decoding(
    decoders: dict[str, Decoder], places: dict[int, Place], limits: Limits
) -> Iterator[list[Result | Skipped]]:
    """Seconds per generated token (of each text of a batch) at each of `places`, all of them in one interleaved run. The
    results' `length` is the key of their place."""

    @torch.no_grad()
    def decode(decoder: Decoder, cache: Cache, place: Place) -> None:
        token = torch.full((place.batch, 1), 3)
        with decoder.backend():
            for index in range(decoder.tokens):
                position = torch.full((place.batch, 1), place.context + index)
                decoder.model(token, past_key_values=cache, use_cache=True, position_ids=position)
        if decoder.rewind:
            cache.crop(-decoder.tokens)

    contenders, unfilled = {}, {}
    for name, decoder in decoders.items():
        for length, place in places.items():
            cache = decoder.cache()
            with unless_it_fails(unfilled, (name, length), length):
                decoder.fill(cache, place)
                contenders[name, length] = Contender(partial(decode, decoder, cache, place))
    # A first step may compile, which says nothing about the others. Each makes the text longer, so that few come uncounted.
    limits = limits._replace(seconds=math.inf)
    results = compare(contenders, 0, limits, max_rounds=9, seconds=40.0, warm_up_seconds=0.0)
    results += unfilled.values()
    for result in results:
        result.contender, result.length = result.contender
        if isinstance(result, Result):
            result.rounds = [seconds / decoders[result.contender].tokens for seconds in result.rounds]
            result.peak_bytes = None  # of a few steps, which says nothing
    order = list(decoders)
    for length in places:
        batch = [result for result in results if result.length == length]
        yield sorted(batch, key=lambda result: order.index(result.contender))


def fill_by_prompt(model: PreTrainedModel, cache: Cache, place: Place) -> None:
    """Reads a random prompt, in pieces, so that memory stays small."""
    prompt = torch.randint(3, model.config.vocab_size, (place.batch, place.context))
    with torch.no_grad():
        for piece in prompt.split(max(4096 // place.batch, 1), 1):
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


def fill_at_random(cache: Cache, place: Place, layers: int, heads: int, head_dim: int) -> None:
    """Random keys and values: what an ordinary cache holds does not change the time."""
    for layer in range(layers):
        states = torch.randn(place.batch, heads, place.context, head_dim)
        cache.update(states, states, layer)
