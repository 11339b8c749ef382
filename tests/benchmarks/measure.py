"""Side by side timing: every contender runs in turn, round after round, so that a slow moment of the machine hits all."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Cache, PreTrainedModel


@dataclass
class Result:
    """One contender at one length: median seconds and, where the system tells, peak bytes above the start."""

    contender: str
    length: int
    seconds: float
    peak_bytes: int | None
    rounds: int


class Faster(NamedTuple):
    """`contender` takes at most 1 / `ratio` of the time of `rival` at `length` tokens."""

    contender: str
    rival: str
    length: int
    ratio: float


class Flat(NamedTuple):
    """`contender` takes at the greatest length at most `ratio` times as long as at the smallest."""

    contender: str
    ratio: float


class Growth(NamedTuple):
    """`attribute` of `contender`, "seconds" or "peak_bytes", grows at most as length^exponent from `shortest` on."""

    contender: str
    attribute: str
    exponent: float
    shortest: int = 2048


@dataclass
class Section:
    """One table and one picture. `time(lengths)` yields the results of one length after the other, the contender that the
    others are compared with first; `targets` are what has to hold."""

    title: str
    time: Callable[[tuple[int, ...]], Iterator[list[Result]]]
    lengths: tuple[int, ...]
    targets: tuple[Faster | Flat | Growth, ...] = ()
    unit: str = "milliseconds"


def by_length(contenders: Callable[[int], dict[str, Callable[[], object]]]) -> Callable[..., Iterator[list[Result]]]:
    """The `time` of a section whose contenders are made for one length."""

    def time_lengths(lengths: tuple[int, ...]) -> Iterator[list[Result]]:
        for length in lengths:
            yield compare(contenders(length), length)

    return time_lengths


class Decoder(NamedTuple):
    """A model and an empty cache for it. `fill(cache, tokens)` brings the cache to that many tokens of context.

    `rewind` takes the new tokens out of the cache again, for models whose time depends on their number. `tokens`: new ones
    of a run, as many as it takes until the cost of each comes round again.
    """

    model: PreTrainedModel
    cache: Callable[[], Cache]
    fill: Callable[[Cache, int], None]
    rewind: bool = False
    tokens: int = 4


def compare_decoding(decoders: dict[str, Decoder], lengths: tuple[int, ...]) -> Iterator[list[Result]]:
    """Seconds per generated token at each context length, all of them in one interleaved run."""

    @torch.no_grad()
    def decode(decoder: Decoder, cache: Cache, context: int) -> None:
        for index in range(decoder.tokens):
            position = torch.tensor([[context + index]])
            decoder.model(torch.tensor([[3]]), past_key_values=cache, use_cache=True, position_ids=position)
        if decoder.rewind:
            cache.crop(-decoder.tokens)

    contenders = {}
    for name, decoder in decoders.items():
        for context in lengths:
            cache = decoder.cache()
            decoder.fill(cache, context)
            contenders[name, context] = partial(decode, decoder, cache, context)
    results = compare(contenders, 0, max_rounds=9, budget=40.0)
    for result in results:
        result.contender, result.length = result.contender
        result.seconds /= decoders[result.contender].tokens
        result.peak_bytes = None  # of a few steps, which says nothing
    for context in lengths:
        yield [result for result in results if result.length == context]


def fill_by_prompt(model: PreTrainedModel, cache: Cache, context: int) -> None:
    """Reads a random prompt, in pieces, so that memory stays small."""
    prompt = torch.randint(3, model.config.vocab_size, (1, context))
    with torch.no_grad():
        for piece in prompt.split(4096, 1):
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)


def fill_at_random(cache: Cache, context: int, layers: int, heads: int, head_dim: int) -> None:
    """Random keys and values: what an ordinary cache holds does not change the time."""
    for layer in range(layers):
        states = torch.randn(1, heads, context, head_dim)
        cache.update(states, states, layer)


def compare(
    contenders: dict[object, Callable[[], object]], length: int, max_rounds: int = 7, budget: float = 30.0
) -> list[Result]:
    """Times all contenders in turn until `max_rounds` rounds or `budget` seconds are spent, at least three rounds.

    The first run of each, not counted, warms up and measures memory. Before a run of less than a second comes another that
    is not counted: as in a loop of training steps, the contender then finds its own memory, not that of the one before.
    """
    peaks = {name: peak_memory(run) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for name, run in contenders.items():
            if not times[name] or times[name][-1] < 1.0:
                run()
            before = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - before)
    return [Result(name, length, statistics.median(t), peaks[name], len(t)) for name, t in times.items()]


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes of resident memory that `run` needed above what was there, None where the kernel does not tell."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0)
    except OSError:
        run()
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status")


def growth_exponent(results: list[Result], contender: str, shortest: int, attribute: str = "seconds") -> float:
    """Slope of log(time) against log(length) from `shortest` on: 1 is linear, 2 quadratic."""
    points = [(r.length, getattr(r, attribute)) for r in results if r.contender == contender and r.length >= shortest]
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())
