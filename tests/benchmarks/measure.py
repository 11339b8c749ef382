"""Side by side timing: every contender runs in turn, round after round, so that a slow moment of the machine hits all."""

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Result:
    """One contender at one length: median seconds and, where the system tells, peak bytes above the start."""

    contender: str
    length: int
    seconds: float
    peak_bytes: int | None
    rounds: int


def compare(
    contenders: dict[str, Callable[[], object]], length: int, max_rounds: int = 7, budget: float = 30.0
) -> list[Result]:
    """Times all contenders in turn until `max_rounds` rounds or `budget` seconds are spent, at least three rounds.

    The first run of each, not counted, warms up and measures memory.
    """
    peaks = {name: peak_memory(run) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= 3 and time.perf_counter() - start > budget:
            break
        for name, run in contenders.items():
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


def machine() -> str:
    """Processor, threads and torch of this run, to be named beside every figure."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def growth_exponent(results: list[Result], contender: str, shortest: int, attribute: str = "seconds") -> float:
    """Slope of log(time) against log(length) from `shortest` on: 1 is linear, 2 quadratic."""
    points = [(r.length, getattr(r, attribute)) for r in results if r.contender == contender and r.length >= shortest]
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())
