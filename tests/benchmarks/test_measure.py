"""The measuring itself: what is skipped and why, ratios, memory, growth, targets, and a whole run of the entry point."""

import json
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kermit_hf import backends, kernel_backend
from kermit_hf.cpu_kernels import cpu_misfit

from . import __main__ as entry
from . import decoding, kermit, measure, models, nystrom_decoder, nystrom_encoder, peers, report, roofline, targets
from .compiled import compiled
from .decoding import Decoder, Place, compare_decoding
from .measure import Contender, Failed, Limits, MatrixProduct, Result, Section, Skipped, by_length, compare
from .roofline import Roofline, measure_roofline


PATIENT = Limits(seconds=1000.0)


@pytest.fixture(autouse=True)
def small_matrices_and_copies(monkeypatch):
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setitem(measure.MATRIX_SIZE, False, 64)
    monkeypatch.setitem(roofline.COPIED_BYTES, False, 2**20)


def result(contender: str, length: int, *rounds: float, peak_bytes: int | None = None) -> Result:
    return Result(contender, length, list(rounds), [50.0] * len(rounds), peak_bytes)


def out_of_memory():
    torch.empty(2**60)


def test_every_contender_runs_in_every_round_and_the_order_is_kept():
    calls = []
    contenders = {name: Contender(lambda name=name: calls.append(name), 7, 8) for name in "ab"}
    first, second = compare(contenders, 5, PATIENT, max_rounds=4)
    assert (first.contender, second.contender, first.length) == ("a", "b", 5)
    assert len(first.rounds) == len(second.rounds) == 4
    assert (first.multiplications, first.bytes) == (7, 8)
    # One run to warm up; then two in each round, of which the second counts.
    assert calls == ["a", "b"] + ["a", "a", "b", "b"] * 4


def test_short_runs_are_repeated_until_they_are_warm(monkeypatch):
    monkeypatch.setattr(measure, "WARM_UP_SECONDS", 0.05)
    monkeypatch.setattr(measure, "seconds_of", lambda run: (run(), 0.02)[1])
    calls = []
    compare({"a": Contender(lambda: calls.append("a"))}, 5, PATIENT, max_rounds=3)
    assert calls == ["a"] + (["a"] * 3 + ["a"]) * 3


def test_long_runs_are_timed_as_they_come(monkeypatch):
    monkeypatch.setattr(measure, "LONGEST_WARM_UP", 0.0)
    calls = []
    compare({name: Contender(lambda name=name: calls.append(name)) for name in "ab"}, 5, PATIENT, max_rounds=3)
    assert calls == ["a", "b"] + ["a", "a", "b", "b"] + ["a", "b"] * 2


def test_memory_that_cannot_be_had_is_a_line_not_an_error():
    contenders = {"a": Contender(lambda: None), "b": Contender(out_of_memory)}
    batch = compare(contenders, 5, PATIENT, max_rounds=3)
    assert batch[1] == Skipped("b", 5, "out of memory")
    assert isinstance(batch[0], Result)


def test_other_errors_are_not_taken_for_want_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        compare({"a": Contender(lambda: torch.ones(2, 3) @ torch.ones(2, 3))}, 5, PATIENT)


def fail_with(error: Exception):
    def run():
        raise error

    return run


def test_a_peer_that_fails_is_a_line_not_an_error():
    """Whatever it raises, and as a whole: errors of flash-linear-attention's backward passes have several lines."""
    failing = Contender(fail_with(AssertionError("not in float32\nsee the manual")), is_peer=True)
    batch = compare({"a": Contender(lambda: None), "b": failing}, 5, PATIENT, max_rounds=3)
    assert isinstance(batch[0], Result)
    assert batch[1] == Skipped("b", 5, "failed with AssertionError: not in float32")


@pytest.mark.parametrize("error", [ValueError("triton 3.5"), RuntimeError("no such kernel")])
def test_on_a_gpu_one_of_ours_that_fails_is_a_line_and_the_run_does_not_hold(error, gpu, capsys):
    batch = compare({"a": Contender(lambda: None), "b": Contender(fail_with(error))}, 5, PATIENT, max_rounds=3)
    assert isinstance(batch[0], Result)
    assert batch[1] == Failed("b", 5, f"{type(error).__name__}: {error}")
    report.print_batch(batch, "tokens")
    assert capsys.readouterr().out.splitlines()[1].endswith(f"FAILED: {batch[1].reason}")


def test_one_that_fails_later_leaves_the_others_their_rounds():
    calls = []

    def run():
        calls.append(None)
        if len(calls) > 4:
            out_of_memory()

    batch = compare({"a": Contender(run), "b": Contender(lambda: None)}, 5, PATIENT, max_rounds=3)
    assert batch[0] == Skipped("a", 5, "out of memory")
    assert len(batch[1].rounds) == 3


@pytest.mark.parametrize("is_peer", [False, True])
def test_nothing_runs_after_an_illegal_memory_access(is_peer, gpu, monkeypatch):
    class AcceleratorError(RuntimeError):
        pass

    monkeypatch.setattr(torch, "AcceleratorError", AcceleratorError, raising=False)
    told = "an illegal memory access was encountered"
    for error in (AcceleratorError("CUDA error"), RuntimeError(f"Triton Error [CUDA]: {told}")):
        with pytest.raises(type(error)):
            compare({"a": Contender(fail_with(error), is_peer=is_peer)}, 5, PATIENT)


def test_a_contender_of_ours_that_fails_fails_the_run(tmp_path, quick):
    section = Section("", lambda lengths, limits: [[Failed("a", 8, "wrong")]], (64,))
    assert entry.run({"section": section}, "", ["--output", str(tmp_path)]) == 1


def test_what_would_take_too_long_or_too_much_is_not_run():
    def never():
        raise AssertionError("was run")

    earlier = [result("slow", 10, 1.0), result("slow", 20, 4.0)]
    earlier += [result("large", 10, 0.1, peak_bytes=100), result("large", 20, 0.1, peak_bytes=200)]
    limits = Limits(seconds=60.0, bytes=399)
    batch = compare({"slow": Contender(never), "large": Contender(never)}, 40, limits, earlier)
    assert batch[0].reason == "would take 64 s, 60 are allowed"
    assert batch[1].reason.startswith("would need")
    # What is skipped once stays skipped.
    batch = compare({"slow": Contender(never)}, 80, limits, batch)
    assert batch == [Skipped("slow", 80, "as at 40")]


def test_a_first_run_that_is_too_slow_is_the_last(monkeypatch):
    monkeypatch.setattr(measure, "first_run", lambda run: (20.0, None))
    assert compare({"a": Contender(None)}, 5, Limits(60.0)) == [Skipped("a", 5, "would take 80 s, 60 are allowed")]


@pytest.mark.parametrize(
    ("points", "value"),
    [([], None), ([(10, 2.0)], 8.0), ([(10, 2.0), (20, 8.0)], 32.0), ([(10, 2.0), (20, 2.0)], 4.0)],
    ids=["nothing known", "one point: linear", "quadratic", "at least linear"],
)
def test_expected_goes_on_growing_as_before(points, value):
    length = 2 * points[-1][0] if len(points) > 1 else 40
    assert measure.expected([result("a", n, t) for n, t in points], length, "seconds") == (
        None if value is None else pytest.approx(value)
    )


def test_lengths_go_from_short_to_long_and_remember():
    def contenders(length: int) -> dict[str, Contender]:
        return {"a": Contender(out_of_memory if length == 20 else lambda: None)}

    batches = list(by_length(contenders)((30, 10, 20), PATIENT))
    assert [type(batch[0]) for batch in batches] == [Result, Skipped, Skipped]
    assert batches[2][0].reason == "as at 20"


def test_ratio_is_the_median_of_neighbouring_runs_with_quartiles():
    base, own = result("base", 5, 2.0, 4.0, 6.0, 8.0, 10.0), result("own", 5, 1.0, 1.0, 1.0, 1.0, 1.0)
    assert measure.ratio(base, own) == (6.0, 4.0, 8.0)
    assert measure.ratio(base, base) == (1.0, 1.0, 1.0)


class FakeGpu:
    """Stands for a GPU: what was called of `torch.cuda`, in which order, and figures in bytes."""

    def __init__(self, monkeypatch):
        self.called = []
        figures = {
            "memory_allocated": 10,
            "max_memory_allocated": 70,
            "memory_reserved": 40,
            "mem_get_info": (500, 1000),
        }
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", *figures):
            monkeypatch.setattr(torch.cuda, name, partial(self.call, name, figures.get(name)))
        monkeypatch.setattr(measure, "on_gpu", lambda: True)
        monkeypatch.setitem(measure.MATRIX_SIZE, True, 64)

    def call(self, name: str, figure):
        self.called.append(name)
        return figure


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


def test_on_a_gpu_the_second_run_is_the_first_that_counts(gpu):
    """The first one compiles and tunes kernels, which takes time and memory."""

    def run():
        if "run" not in gpu.called:
            time.sleep(0.2)
        gpu.called.append("run")

    (first,) = compare({"a": Contender(run)}, 5, Limits(0.4), max_rounds=3)
    assert isinstance(first, Result)
    assert first.peak_bytes == 60
    first_run = gpu.called.index("run")
    before_second = gpu.called[first_run + 1 : gpu.called.index("run", first_run + 1)]
    assert before_second[:3] == ["synchronize", "empty_cache", "reset_peak_memory_stats"]


def test_what_torch_holds_free_of_a_gpu_is_free(gpu):
    assert measure.free_memory() == 500 + 40 - 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_what_the_run_held_at_once():
    def run():
        torch.ones(16 * 2**20)  # 64 MiB, freed before the next
        torch.ones(8 * 2**20)

    peak = measure.first_run(run)[1]
    if peak is None:
        pytest.skip("this kernel does not reset the high-water mark")
    assert 60 * 2**20 <= peak <= 90 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_free_memory_is_a_limit_that_turns_into_a_skipped_line():
    """In a process of its own: the limit stays. 256 MiB stand for what is free."""
    code = """
import torch
from tests.benchmarks import measure
measure.free_memory = lambda: 2**28
measure.keep_to_free_memory()
contenders = {"fits": measure.Contender(lambda: torch.ones(2**22)), "not": measure.Contender(lambda: torch.ones(2**27))}
print([type(r).__name__ for r in measure.compare(contenders, 1, measure.Limits(bytes=2**40), max_rounds=3)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "['Result', 'Skipped']", done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to do")
def test_memory_that_is_freed_is_there_for_the_next_tensor():
    """In a process of its own, whose allocator stays so. 64 MiB in pages of 4 KiB, or of 2 MiB where the system gives them unasked,
    would be 16,384 faults, or 32. The first tensors may leave holes too small for the next."""
    code = """
import resource, torch
from tests.benchmarks import measure
measure.keep_freed_memory()
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16


def test_roofline_of_this_machine():
    best = measure_roofline(repeats=2)
    assert best.multiplications > 1e6
    assert best.bytes > 1e6


def test_the_best_of_several_rooflines_has_the_best_of_both_rates():
    assert Roofline(2.0, 5.0).best(Roofline(3.0, 4.0)) == Roofline(3.0, 5.0)


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_growth_is_fitted_from_4096_tokens_on(exponent):
    results = [result("a", n, 3e-9 * n**exponent, peak_bytes=5 * n) for n in (4096, 8192, 16384)]
    short = [result("a", 512, 1.0, peak_bytes=10**9)]
    assert targets.growth_exponent(results + short, "a") == pytest.approx(exponent)
    time, memory = targets.growing(1.1, "a")
    assert time.check(results + short)[1] == (exponent <= 1.1)
    assert memory.check(results + short) == ("length^1.00", True)


def test_growth_is_not_fitted_over_too_short_a_span_or_without_figures():
    results = [result("a", n, 1e-3 * n) for n in (2048, 4096, 8192)]
    assert targets.growth_exponent(results, "a") is None
    assert targets.Growth("a", "peak_bytes", 1.1).check([*results, result("a", 16384, 16.0)]) is None


def test_a_slow_moment_of_the_machine_changes_neither_share_nor_growth():
    def results_of(slowness: dict[int, list[int]]) -> list[Result]:
        return [
            Result("a", n, [n / 1e3 * f for f in factors], [40e3 / f for f in factors], None, 20 * n)
            for n, factors in slowness.items()
        ]

    steady = results_of({4096: [1, 1, 1, 1], 8192: [1, 1, 1, 1], 16384: [1, 1, 1, 1]})
    slow = results_of({4096: [1, 2, 1, 2], 8192: [2, 2, 2, 2], 16384: [4, 2, 2, 4]})
    for results in (steady, slow):
        assert [targets.share_of_peak(r) for r in results] == pytest.approx([0.5] * 3)
        assert targets.growth_exponent(results, "a") == pytest.approx(1.0)


def test_every_round_has_the_rate_of_a_product_beside_it(monkeypatch):
    rates = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(MatrixProduct, "rate", lambda self: next(rates))
    first, second = compare({name: Contender(lambda: None) for name in "ab"}, 5, PATIENT, max_rounds=3)
    assert (first.matmul_rates, second.matmul_rates) == ([1.0, 3.0, 5.0], [2.0, 4.0, 6.0])
    products = sorted(own * rate for own, rate in zip(first.rounds, first.matmul_rates, strict=True))
    assert first.matmul_multiplications == products[1]


def test_a_product_is_of_the_size_and_takes_the_time(monkeypatch):
    products = []

    def half_a_second(run) -> float:
        products.append(run())
        return 0.5

    monkeypatch.setattr(measure, "seconds_of", half_a_second)
    assert MatrixProduct().rate() == 64**3 / 0.5
    assert [product.shape for product in products] == [(64, 64)]


def test_faster_and_flat_say_what_was_measured():
    results = [result("a", 10, 1.0), result("b", 10, 3.0), result("a", 20, 1.2)]
    assert targets.Faster("a", "b", 10, 2.0).check(results) == ("3.0x", True)
    assert targets.Faster("a", "b", 10, 4.0).check(results)[1] is False
    assert targets.Faster("a", "b", 20, 2.0).check(results) is None
    assert targets.Flat("a", 1.1).check(results) == ("1.20, 20 over 10", False)


def test_share_of_peak_is_the_lowest_of_the_lengths_that_were_measured():
    results = [Result("a", 10, [1.0], [50.0], None, 40), Result("a", 20, [2.0], [50.0], None, 60)]
    assert targets.OfPeak("a", (10, 20, 40), 0.6).check(results) == ("60% at least", True)
    assert targets.OfPeak("a", (10, 20, 40), 0.7).check(results) == ("60% at least", False)
    assert targets.OfPeak("a", (40,), 0.5).check(results) is None


def test_a_missed_target_fails_the_run_and_one_without_figures_does_not(capsys):
    results = [result("a", 10, 1.0), result("b", 10, 3.0)]
    held, missed, unmeasured = (targets.Faster("a", "b", n, r) for n, r in ((10, 2.0), (10, 4.0), (20, 2.0)))
    assert report.check(Section("", None, (), (held, unmeasured)), results)
    assert not report.check(Section("", None, (), (held, missed)), results)
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["holds", "-", "holds", "MISSED"]


def test_share_of_peak_and_ratio_are_printed_and_kept(capsys):
    base = Result("base", 10, [4.0, 4.0], [50.0, 50.0], 2**20, multiplications=100, bytes=8)
    own = Result("own", 10, [2.0, 2.0], [50.0, 50.0], 2**21, multiplications=50, bytes=8)
    batch = [base, own, Skipped("peer", 10, "out of memory")]
    report.print_batch(batch, "tokens")
    lines = capsys.readouterr().out.splitlines()
    assert "2.00x (2.00 to 2.00) base" in lines[1]
    assert "50% of peak" in lines[1]
    assert lines[2].endswith("skipped: out of memory")
    kept = report.as_json([batch])
    assert kept["results"][1]["ratio"] == {"to": "base", "median": 2.0, "quartiles": [2.0, 2.0]}
    assert kept["results"][1]["share_of_peak"] == 0.5
    assert kept["skipped"] == [{"contender": "peer", "length": 10, "reason": "out of memory"}]


def test_without_its_base_a_batch_has_no_ratios(capsys):
    report.print_batch([Skipped("base", 10, "out of memory"), result("own", 10, 1.0)], "tokens")
    assert " x" not in capsys.readouterr().out.splitlines()[1]


def test_decoding_time_is_per_token_and_in_the_order_of_decoders():
    class Cache:
        tokens = 0

    def model(tokens, past_key_values, use_cache, position_ids):
        assert tokens.shape == position_ids.shape == (2, 1)
        past_key_values.tokens += 1

    def fill(cache, place):
        cache.filled = place

    def fail(cache, place):
        out_of_memory()

    decoders = {"a": Decoder(model, Cache, fail), "b": Decoder(model, Cache, fill, tokens=3)}
    (batch,) = compare_decoding(decoders, {7: Place(context=5, batch=2)}, PATIENT)
    assert batch[0] == Skipped("a", 7, "out of memory")
    assert (batch[1].contender, batch[1].length, batch[1].peak_bytes) == ("b", 7, None)
    assert 0 < batch[1].seconds < 1


def test_new_tokens_are_decoded_on_the_backend_that_is_asked_for(monkeypatch):
    seen = []

    def model(*arguments, **options):
        seen.append(backends.CHOICE.chosen)

    decoder = Decoder(model, SimpleNamespace, lambda cache, place: None, tokens=1)
    decoders = {"own": decoder, "C++": decoder._replace(backend=partial(kernel_backend, "cpp"))}
    monkeypatch.setattr(decoding, "compare", lambda *arguments, **_: compare(*arguments, max_rounds=1))
    list(compare_decoding(decoders, {1: Place(1)}, PATIENT))
    assert set(seen) == {backends.CHOICE.chosen, "cpp"}


def run_entry(tmp_path, *arguments: str) -> dict:
    """results.json of a run."""
    entry.main([*arguments, "--output", str(tmp_path), "--threads", "1"])
    return json.loads((tmp_path / "results.json").read_text())


@pytest.fixture
def quick(monkeypatch):
    """Without the roofline's large matrices, and without a limit on the memory of the process that runs the tests; restores what
    the entry point sets for all of it."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(entry, "measure_roofline", lambda: Roofline(1e9, 1e9))
    monkeypatch.setattr(entry, "keep_to_free_memory", lambda: None)
    peers.missing_peers.cache_clear()
    yield
    peers.missing_peers.cache_clear()
    torch.set_num_threads(threads)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_missing_peers_are_named_and_left_out(tmp_path, monkeypatch, capsys, quick):
    for module in peers.PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert not any(peers.has(package) for package in peers.PACKAGES)
    report = run_entry(tmp_path, "--only", "nystrom-core", "--lengths", "64")
    lines = capsys.readouterr().out.splitlines()
    for package in peers.PACKAGES:
        assert sum(line.startswith(f"{package} is left out: ") for line in lines) == 1
    section = report["nystrom-core"]
    assert set(section["missing_peers"]) == set(peers.PACKAGES)
    assert {entry["contender"] for entry in section["results"]} - {nystrom_encoder.COMPILED} == {
        "softmax (SDPA)",
        "ours",
        "transformers",
    }


def test_the_roofline_is_the_best_of_the_whole_run(tmp_path, quick, monkeypatch):
    rates = iter([1e9, 4e9, 2e9])
    monkeypatch.setattr(entry, "measure_roofline", lambda: Roofline(next(rates), 1e9))
    section = run_entry(tmp_path, "--only", "nystrom-prefill", "--lengths", "64", "128")["nystrom-prefill"]
    assert section["roofline"]["multiplications"] == 4e9


def test_a_section_is_printed_kept_and_drawn(tmp_path, quick, capsys):
    arguments = ("--only", "nystrom-prefill", "--lengths", "64", "128", "--longest", "64", "--dtype", "bfloat16")
    section = run_entry(tmp_path, *arguments)["nystrom-prefill"]
    assert section["skipped"] == []
    assert [entry["length"] for entry in section["results"]] == [64, 64, 64]
    assert all(entry["seconds"] > 0 and entry["share_of_peak"] > 0 for entry in section["results"])
    assert section["results"][0]["ratio"]["median"] == 1.0
    assert "of peak" in capsys.readouterr().out
    assert (tmp_path / "nystrom-prefill.png").stat().st_size > 0


def test_what_was_measured_says_whether_memory_was_kept(tmp_path, quick, monkeypatch, capsys):
    section = {"sums": Section("Sums", by_length(lambda length: {"sum": Contender(lambda: None)}), (64,))}
    wanted = []
    monkeypatch.setattr(entry, "keep_freed_memory", lambda: wanted.append(1) or len(wanted) == 1)
    for options, kept in (([], False), (["--keep-memory"], True)):
        entry.run(section, "Sums.", ["--output", str(tmp_path), *options])
        told = json.loads((tmp_path / "results.json").read_text())["sums"]["machine"]
        assert ("freed memory kept" in told) == ("freed memory kept" in capsys.readouterr().out) == kept
    with pytest.raises(SystemExit):
        entry.run(section, "Sums.", ["--output", str(tmp_path), "--keep-memory"])
    assert "--keep-memory: only glibc" in capsys.readouterr().err


def test_what_was_measured_is_kept_when_the_run_is_cut_off(tmp_path, quick):
    def time_lengths(lengths, limits):
        yield [result("a", 64, 1.0)]
        raise KeyboardInterrupt

    section = Section("", time_lengths, (64, 128))
    with pytest.raises(KeyboardInterrupt):
        entry.run({"section": section}, "", ["--output", str(tmp_path)])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [entry["length"] for entry in kept["section"]["results"]] == [64]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    entry.write_whole(file, "old")

    def cut_off(path, text):
        Path.open(path, "w").write(text[:1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        entry.write_whole(file, "new")
    assert file.read_text() == "old"


def test_without_matplotlib_there_is_no_plot_and_the_run_goes_on(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    section = Section("", lambda lengths, limits: [[result("a", 64, 1.0)]], (64,))
    assert entry.run({"first": section, "second": section}, "", ["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("there is no plot: ") == 2


CONTENDERS = {
    "kermit": partial(kermit.attention_contenders, backward=True),
    "encoder": partial(nystrom_encoder.attention_cores, backward=True),
    "encoder layers": nystrom_encoder.encoder_layers,
    "decoder layers": models.layers,
    "training steps": models.training_steps,
}


@pytest.mark.parametrize("contenders", CONTENDERS.values(), ids=CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_contender_runs(contenders, dtype, monkeypatch):
    # On many a CPU training in half precision is slow.
    monkeypatch.setattr(models, "TRAINED_WORDS", 64)
    torch.set_default_dtype(dtype)
    try:
        for contender in contenders(64).values():
            contender.run()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("time", [models.time_batches, nystrom_decoder.time_decoding], ids=["batches", "nystrom"])
def test_decoding_runs(time, monkeypatch):
    """One layer instead of eight, contexts of a few tokens, one round."""
    monkeypatch.setattr(decoding, "compare", lambda *arguments, **_: compare(*arguments, max_rounds=1))
    for module in (models, nystrom_decoder):
        monkeypatch.setattr(module, "body", partial(models.body, layers=1, vocabulary=64))
    monkeypatch.setattr(models, "BATCH_CONTEXT", 70)
    batches = list(time((2, 3), PATIENT))
    names = [[result.contender for result in batch] for batch in batches]
    assert [[result.length for result in batch] for batch in batches] == [[2] * len(names[0]), [3] * len(names[1])]
    assert names[0] == names[1] and len(set(names[0]) - {compiled("KERMIT")}) == 3
    assert (compiled("KERMIT") in names[0]) == (time is models.time_batches and cpu_misfit(torch.device("cpu")) is None)
    assert all(isinstance(result, Result) for batch in batches for result in batch)


@pytest.mark.parametrize("length", ["0", "100"])
def test_lengths_that_do_not_fit_the_landmarks_are_refused(length, capsys):
    with pytest.raises(SystemExit):
        entry.main(["--lengths", length])
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith("multiples of 64, as transformers' Nyströmformer wants them")
    )


def test_lengths_are_for_tokens_and_batches_for_texts():
    tokens, texts = (Section("", None, (8, 16, 32), axis=axis) for axis in ("tokens", "texts"))
    assert entry.chosen_lengths(tokens, None, 20, [1]) == (8, 16)
    assert entry.chosen_lengths(tokens, [4, 2], None, [1]) == (2, 4)
    assert entry.chosen_lengths(texts, [4, 2], 20, None) == (8, 16, 32)
    assert entry.chosen_lengths(texts, None, None, [2, 1]) == (1, 2)
