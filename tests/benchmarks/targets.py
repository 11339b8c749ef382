"""What has to hold, checked on the results of a section, and how time and memory grow.

Growth and shares of peak compare moments that may lie apart: there time is `Result.matmul_multiplications`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .measure import Result, ratio


# Growth is fitted from this length on; over less than four times the length it is not fitted at all, noise would decide.
SHORTEST, LEAST_SPAN = 4096, 4


class Faster(NamedTuple):
    """`contender` takes at most 1 / `ratio` of the time of `rival` at `length` tokens."""

    contender: str
    rival: str
    length: int
    ratio: float

    def __str__(self) -> str:
        return f"{self.contender} at least {self.ratio:g}x as fast as {self.rival} at {self.length:,}"

    def check(self, results: Sequence[Result]) -> tuple[str, bool] | None:
        """The figure measured and whether it holds; None where it was not measured. So do the other targets."""
        own, rival = (find(results, name, self.length) for name in (self.contender, self.rival))
        if own is None or rival is None:
            return None
        measured = ratio(rival, own)[0]
        return f"{measured:.1f}x", measured >= self.ratio


class Flat(NamedTuple):
    """`contender` takes at the greatest length at most `ratio` times as long as at the smallest; both in the same rounds."""

    contender: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.contender}: time at the greatest length at most {self.ratio:g} of that at the smallest"

    def check(self, results: Sequence[Result]) -> tuple[str, bool] | None:
        own = sorted((r.length, r.seconds) for r in results if r.contender == self.contender)
        if len(own) < 2:
            return None
        (shortest, before), (longest, after) = own[0], own[-1]
        return f"{after / before:.2f}, {longest:,} over {shortest:,}", after / before <= self.ratio


class OfPeak(NamedTuple):
    """`contender` does the multiplications it needs at a `share` of the machine's rate or more, at each of `lengths`."""

    contender: str
    lengths: tuple[int, ...]
    share: float

    def __str__(self) -> str:
        return f"{self.contender}: at least {self.share:.0%} of peak at {self.lengths[0]:,} to {self.lengths[-1]:,}"

    def check(self, results: Sequence[Result]) -> tuple[str, bool] | None:
        own = [result for length in self.lengths if (result := find(results, self.contender, length))]
        if not own:
            return None
        lowest = min(share_of_peak(result) for result in own)
        return f"{lowest:.0%} at least", lowest >= self.share


def share_of_peak(result: Result) -> float:
    """The rate of the multiplications that are needed over that of a large matrix product, timed in turn."""
    return result.multiplications / result.matmul_multiplications


class Growth(NamedTuple):
    """`attribute` of `contender`, "matmul_multiplications" or "peak_bytes", grows at most as length^exponent from 4,096 tokens on."""

    contender: str
    attribute: str
    exponent: float

    def __str__(self) -> str:
        return f"{self.contender}: {LABELS[self.attribute]} grows at most as length^{self.exponent:g}"

    def check(self, results: Sequence[Result]) -> tuple[str, bool] | None:
        exponent = growth_exponent(results, self.contender, self.attribute)
        return None if exponent is None else (f"length^{exponent:.2f}", exponent <= self.exponent)


LABELS = {"matmul_multiplications": "time", "peak_bytes": "memory"}


def growing(exponent: float, *contenders: str) -> tuple[Growth, ...]:
    """Time and memory of each of `contenders` grow at most as length^exponent."""
    return tuple(Growth(name, attribute, exponent) for name in contenders for attribute in LABELS)


def find(results: Sequence[Result], contender: str, length: int) -> Result | None:
    return next((r for r in results if (r.contender, r.length) == (contender, length)), None)


def exponents(results: Sequence[Result]) -> Iterator[tuple[str, dict[str, float]]]:
    """(contender, fitted exponents of time and memory), as far as they can be fitted."""
    for name in dict.fromkeys(result.contender for result in results):
        fitted = {attribute: growth_exponent(results, name, attribute) for attribute in LABELS}
        if any(exponent is not None for exponent in fitted.values()):
            yield name, {attribute: exponent for attribute, exponent in fitted.items() if exponent is not None}


def growth_exponent(
    results: Sequence[Result], contender: str, attribute: str = "matmul_multiplications"
) -> float | None:
    """Slope of log(attribute) against log(length) from 4,096 tokens on: 1 is linear, 2 quadratic. None where lengths span
    too little, or the attribute was not measured."""
    points = [(r.length, getattr(r, attribute)) for r in results if r.contender == contender and r.length >= SHORTEST]
    lengths = [length for length, _ in points]
    if not points or max(lengths) < LEAST_SPAN * min(lengths) or not all(value for _, value in points):
        return None
    x, y = (torch.tensor(values, dtype=torch.float64, device="cpu").log() for values in zip(*points, strict=True))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())
