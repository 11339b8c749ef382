"""Runs the benchmarks, prints tables with ratios, writes results.json and plots, and says which targets hold.

python -m tests.benchmarks                       # everything, about ten minutes on two cores
python -m tests.benchmarks --only decoding
python -m tests.benchmarks --lengths 512 4096 --output /tmp/bench
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from . import kermit
from .measure import Result, growth_exponent, machine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("forward", "forward + backward", "decoding")
    parser.add_argument("--only", choices=sections, action="append", help="sections to run; all by default")
    parser.add_argument("--lengths", type=int, nargs="+", default=kermit.LENGTHS, help="tokens, for the attention")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for results and plots")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    print(machine())
    kept = options.output / "results.json"
    report = json.loads(kept.read_text()) if kept.exists() else {}
    holds = True
    for section in options.only or sections:
        print(f"\n{section}")
        results: list[Result] = []
        if section == "decoding":
            batches = kermit.time_decoding()
        else:
            batches = kermit.time_attention(section != "forward", tuple(options.lengths))
        for batch in batches:
            results += batch
            print_batch(batch)
        report[section] = {"machine": machine(), "results": [asdict(result) for result in results]}
        holds &= check(section, results)
        kept.write_text(json.dumps(report, indent=2))
        plot(section, results, options.output / f"{section.replace(' ', '').replace('+', '_')}.png")
    print(f"\nresults and plots are in {options.output}")
    return 0 if holds else 1


def print_batch(batch: list[Result]) -> None:
    base = batch[0]
    for result in batch:
        peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:9.0f} MiB"
        print(
            f"  {result.length:7,} tokens  {result.contender:31} {1e3 * result.seconds:10.2f} ms"
            f"  {base.seconds / result.seconds:8.2f}x {base.contender}{peak}  ({result.rounds} rounds)",
            flush=True,
        )


def check(section: str, results: list[Result]) -> bool:
    """Prints each target with the figure measured; False if one was measured and missed."""
    seconds = {(result.contender, result.length): result.seconds for result in results}
    lines, holds = [], True
    for name, other, length, target in kermit.TARGETS.get(section, []):
        if (name, length) in seconds and (other, length) in seconds:
            ratio = seconds[other, length] / seconds[name, length]
            lines.append((f"{name} vs {other} at {length:,}", f"{ratio:.1f}x, target {target:g}x", ratio >= target))
    if section == "decoding":
        lengths = sorted({result.length for result in results})
        first, last = lengths[0], lengths[-1]
        compiled = "KERMIT, static cache, compiled"
        for name in ("KERMIT", compiled):
            growth = seconds[name, last] / seconds[name, first]
            lines.append(
                (f"{name}: ms/token at {last:,} over {first:,}", f"{growth:.2f}, target <= 1.1", growth <= 1.1)
            )
        ratio = seconds["Llama", last] / seconds["KERMIT", last]
        print(f"  KERMIT vs Llama at {last:,}, neither compiled: {ratio:.1f}x")
        ratio = seconds["Llama", last] / seconds[compiled, last]
        lines.append((f"{compiled} vs Llama at {last:,}", f"{ratio:.1f}x, target 25x", ratio >= 25))
    elif len({result.length for result in results if result.length >= 2048}) > 1:
        for name in dict.fromkeys(result.contender for result in results):
            exponent = growth_exponent(results, name, 2048)
            print(f"  {name}: time grows as length^{exponent:.2f}")
        if section != "forward" and all(result.peak_bytes for result in results):
            exponent = growth_exponent(results, "gated delta + window 128", 2048, "peak_bytes")
            lines.append(
                ("training memory, gated delta + window", f"length^{exponent:.2f}, target <= 1.1", exponent <= 1.1)
            )
    for what, figure, met in lines:
        print(f"  {'holds ' if met else 'MISSED'}  {what}: {figure}")
        holds &= met
    return holds


def plot(section: str, results: list[Result], path: Path) -> None:
    """Log-log curves of time, and of memory where it was measured, against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("seconds", 1e3, "milliseconds" + (" per token" if section == "decoding" else ""))]
    if section != "decoding" and all(result.peak_bytes for result in results):
        panels.append(("peak_bytes", 2.0**-20, "peak memory, MiB"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 4.2), squeeze=False)
    for axis, (attribute, factor, label) in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(result.contender for result in results):
            points = [(r.length, factor * getattr(r, attribute)) for r in results if r.contender == name]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(
            xscale="log", yscale="log", xlabel="tokens" if section != "decoding" else "tokens of context", ylabel=label
        )
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{section}: 8 heads x 64, float32\n{machine()}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
