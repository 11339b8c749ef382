"""Side by side timing: every contender runs in turn, round after round, so that a slow moment of the machine hits all.

What is timed lives on torch's default device and in its default dtype, which the entry point sets.
"""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch


MIN_ROUNDS = 3
# How long a contender runs before each run that is timed, at least once; one that takes longer than the second number is timed as
# it comes, for the sake of time.
WARM_UP_SECONDS, LONGEST_WARM_UP = 0.1, 5.0
# Edge of a square matrix large enough that its product runs at the machine's full rate; on a GPU or not.
MATRIX_SIZE = {False: 1536, True: 8192}


class Contender(NamedTuple):
    """`run` does the whole work once. multiplications: as many as the algorithm needs for it, see `work`; bytes: of its
    inputs and outputs; both None where not known. is_peer: other people's code."""

    run: Callable[[], object]
    multiplications: int | None = None
    bytes: int | None = None
    is_peer: bool = False


@dataclass
class Result:
    """One contender at one length: seconds of each round, multiplications a second of a large matrix product right after it
    and, where the system tells, peak bytes above the start."""

    contender: str
    length: int
    rounds: list[float]
    matmul_rates: list[float]
    peak_bytes: int | None = None
    multiplications: int | None = None
    bytes: int | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.rounds)

    @property
    def matmul_multiplications(self) -> float:
        """How many multiplications a large matrix product does in the time of a round: a measure of time that does not grow
        when the machine slows down."""
        return statistics.median(own * rate for own, rate in zip(self.rounds, self.matmul_rates, strict=True))


@dataclass
class Skipped:
    """A contender that was not timed at a length, and why."""

    contender: str
    length: int
    reason: str


class Failed(Skipped):
    """One that should have run: the whole run then does not hold."""


class Limits(NamedTuple):
    """What one contender may take at one length: seconds for its least rounds and the run that measures memory; bytes of memory,
    None for what is free."""

    seconds: float = 120.0
    bytes: int | None = None


@dataclass
class Section:
    """One table and one picture. `time(lengths, limits)` yields what came out at one length after the other, the contender
    that the others are compared with first, and may yield before these what a check found; `targets` are what has to hold, see
    `targets`."""

    title: str
    time: Callable[[tuple[int, ...], Limits], Iterator[list[Result | Skipped]]]
    lengths: tuple[int, ...]
    targets: tuple = ()
    unit: str = "milliseconds"
    axis: str = "tokens"


def by_length(
    contenders: Callable[[int], dict[str, Contender]], check: Callable[[], Sequence[Skipped]] = tuple
) -> Callable[..., Iterator[list[Result | Skipped]]]:
    """The `time` of a section whose contenders are made for one length. `check()` comes first: what it finds is not timed."""

    def time_lengths(lengths: tuple[int, ...], limits: Limits) -> Iterator[list[Result | Skipped]]:
        earlier: list[Result | Skipped] = list(check())
        if earlier:
            yield list(earlier)
        for length in sorted(lengths):
            batch = compare(contenders(length), length, limits, earlier)
            earlier += batch
            yield batch

    return time_lengths


def compare(
    contenders: dict[object, Contender],
    length: int,
    limits: Limits,
    earlier: Sequence[Result | Skipped] = (),
    max_rounds: int = 7,
    seconds: float = 30.0,
    warm_up_seconds: float | None = None,
) -> list[Result | Skipped]:
    """Times all contenders in turn until `max_rounds` rounds or `seconds` are spent, at least three rounds.

    The first run of each, not counted, warms up and measures memory; on a GPU the second does. Before other runs, if
    they are no longer than `LONGEST_WARM_UP`, come some that are not counted: as in a loop of training steps, the contender then
    finds its own memory, and a system that no longer takes care of what the one before has freed. warm_up_seconds: for how long,
    `WARM_UP_SECONDS` by default. After each run comes a large matrix product, which tells how fast the machine is at that moment.
    Contenders that would not keep to `limits`, judging by their `earlier` results or by that run, are skipped, and so are those
    that fail, see `unless_it_fails`.
    """
    product = MatrixProduct()
    peaks: dict[object, int | None] = {}
    skipped: dict[object, Skipped] = {}
    for name, contender in contenders.items():
        reason = too_much(name, length, limits, earlier)
        if reason is None:
            with unless_it_fails(skipped, name, length, contender.is_peer):
                taken, peaks[name] = first_run(contender.run)
                reason = too_slow(taken, limits)
        if reason is not None:
            skipped[name] = Skipped(name, length, reason)

    timed = {name: contender for name, contender in contenders.items() if name not in skipped}
    rounds: dict[object, list[float]] = {name: [] for name in timed}
    rates: dict[object, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, contender in timed.items():
            if name in skipped:
                continue
            with unless_it_fails(skipped, name, length, contender.is_peer):
                if not rounds[name] or rounds[name][-1] < LONGEST_WARM_UP:
                    warm_up(contender.run, WARM_UP_SECONDS if warm_up_seconds is None else warm_up_seconds)
                rounds[name].append(seconds_of(contender.run))
                rates[name].append(product.rate())
    return [
        skipped.get(name)
        or Result(*(name, length, rounds[name], rates[name], peaks[name]), contender.multiplications, contender.bytes)
        for name, contender in contenders.items()
    ]


@contextmanager
def unless_it_fails(skipped: dict[object, Skipped], name: object, length: int, is_peer: bool = False) -> Iterator[None]:
    """Puts a contender that fails inside of the `with` into `skipped`, so that the others can go on: for want of memory; if it is a
    peer; and on a GPU. On a CPU, where the tests run all of them, an error of ours is raised, and so is everywhere one after
    which nothing more can run."""
    try:
        yield
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        if is_out_of_memory(error):
            skipped[name] = Skipped(name, length, "out of memory")
        elif ends_everything(error) or not (is_peer or on_gpu()):
            raise
        elif is_peer:
            skipped[name] = Skipped(name, length, f"failed with {told}")
        else:
            skipped[name] = Failed(name, length, told)


def ratio(base: Result, result: Result) -> tuple[float, float, float]:
    """How many times faster than `base`: median and quartiles over the rounds, each a pair of neighbouring runs."""
    ratios = [theirs / own for theirs, own in zip(base.rounds, result.rounds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return middle, low, high


def too_much(contender: object, length: int, limits: Limits, earlier: Sequence[Result | Skipped]) -> str | None:
    """Why a contender need not be tried at `length`, in words; None where nothing speaks against it."""
    own = [result for result in earlier if result.contender == contender]
    for result in own:
        if isinstance(result, Skipped):
            return f"as at {result.length:,}"
    available, needed = limits.bytes or free_memory(), expected(own, length, "peak_bytes")
    if needed and available and needed > available:
        return f"would need {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} can be had"
    return too_slow(expected(own, length, "seconds") or 0.0, limits)


def too_slow(seconds: float, limits: Limits) -> str | None:
    """Why a contender that takes `seconds` for a run is skipped, in words; None if it is fast enough."""
    needed = (1 + MIN_ROUNDS) * seconds
    return f"would take {needed:.0f} s, {limits.seconds:g} are allowed" if needed > limits.seconds else None


def expected(results: Sequence[Result], length: int, attribute: str) -> float | None:
    """`attribute` at `length` if it goes on growing as it did between the last two lengths, at least linearly and at most
    quadratically; None without results."""
    known = [(result.length, getattr(result, attribute)) for result in results if getattr(result, attribute)]
    if not known:
        return None
    exponent = 1.0
    if len(known) > 1:
        (earlier, before), (later, after) = known[-2:]
        exponent = min(max(math.log(after / before) / math.log(later / earlier), 1.0), 2.0)
    last, value = known[-1]
    return value * (length / last) ** exponent


def is_out_of_memory(error: Exception) -> bool:
    """torch raises an error class of its own on a GPU, and a plain RuntimeError on a CPU, as Triton does on a GPU."""
    told = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "can't allocate memory" in told
        or "out of memory" in told
    )


def ends_everything(error: Exception) -> bool:
    """Whether the GPU takes nothing more from this process, as after an illegal memory access. torch before 2.8 has no class of its
    own for that, nor has Triton."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "illegal memory access" in str(error)


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def generator(seed: int) -> torch.Generator:
    """Random numbers of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def synchronize() -> None:
    """Waits until a GPU has done what it was given."""
    if on_gpu():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def warm_up(run: Callable[[], object], seconds: float) -> None:
    spent = seconds_of(run)
    while spent < seconds:
        spent += seconds_of(run)


class MatrixProduct:
    """A large product of square matrices of torch's default dtype, which everything else is measured against."""

    def __init__(self):
        size = MATRIX_SIZE[on_gpu()]
        self._factors = torch.randn(size, size), torch.randn(size, size)
        self._result = torch.matmul(*self._factors)

    def rate(self) -> float:
        """Multiplications a second, each with its addition."""
        return self._result.shape[0] ** 3 / seconds_of(lambda: torch.matmul(*self._factors, out=self._result))


def first_run(run: Callable[[], object]) -> tuple[float, int | None]:
    """Seconds, and bytes of memory that `run` needed above what was there: of the GPU, where another run comes before, or resident
    memory of this process, None where the kernel does not tell."""
    gc.collect()
    if on_gpu():
        # Compiling and tuning kernels takes time and memory that later runs do not.
        run()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return seconds_of(run), torch.cuda.max_memory_allocated() - before
    try:
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _proc_bytes("/proc/self/status", "VmRSS")
    except OSError:
        return seconds_of(run), None
    seconds = seconds_of(run)
    return seconds, max(_proc_bytes("/proc/self/status", "VmHWM") - before, 0)


def free_memory() -> int | None:
    """Bytes that can be had on the default device, None where the system does not tell."""
    if on_gpu():
        # What torch took from the GPU and holds for later is not free there, but is for a contender.
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    give_back_memory()
    try:
        return _proc_bytes("/proc/meminfo", "MemAvailable")
    except OSError:
        return None


def keep_to_free_memory() -> None:
    """From now on an allocation beyond what is free now fails, where it would otherwise end the whole run."""
    available = free_memory()
    if on_gpu() or available is None:
        return
    import resource

    limit = _proc_bytes("/proc/self/status", "VmData") + available
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def keep_freed_memory() -> bool:
    """From now on memory that a contender frees stays in the process until `give_back_memory`; False where there is no glibc to tell.
    By itself glibc gives tensors above 32 MiB back to the system, and smaller ones depending on what the process did before. Pages
    that our kernels in C++ asked to be huge stay so for whoever has them next."""
    trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    return bool(libc.mallopt(trim_threshold, -1) and libc.mallopt(mmap_max, 0))


def give_back_memory() -> None:
    """What the process holds free goes back to the system, where there is glibc."""
    with suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _proc_bytes(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in {path}")
