"""Runs the benchmarks, prints tables with ratios, writes results.json and plots, and says which targets hold.

python -m tests.benchmarks                                       # everything, about twenty minutes on two cores
python -m tests.benchmarks --only kermit-forward kermit-decoding
python -m tests.benchmarks --lengths 512 4096 --output /tmp/bench

Three more have their own command: tests.benchmarks.learning (what KERMIT's settings learn), tests.benchmarks.approximation
(how close Nyström attention comes to softmax) and tests.benchmarks.sentences (what that leaves of a sentence encoder).
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from conversion_scripts.machine import machine

from . import kermit, nystrom_decoder, nystrom_encoder
from .measure import Faster, Flat, Result, Section, growth_exponent


SECTIONS = {**kermit.SECTIONS, **nystrom_encoder.SECTIONS, **nystrom_decoder.SECTIONS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; each section has its own by default")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for results and plots")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    print(machine())
    kept = options.output / "results.json"
    report = json.loads(kept.read_text()) if kept.exists() else {}
    holds = True
    for name in options.only or SECTIONS:
        section = SECTIONS[name]
        print(f"\n{name}: {section.title}")
        results: list[Result] = []
        for batch in section.time(tuple(options.lengths or section.lengths)):
            results += batch
            print_batch(batch)
        report[name] = {"machine": machine(), "results": [asdict(result) for result in results]}
        kept.write_text(json.dumps(report, indent=2))
        holds &= check(section, results)
        plot(section, results, options.output / f"{name}.png")
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


def check(section: Section, results: list[Result]) -> bool:
    """Prints how each contender grows and each target with the figure measured; False if one was measured and missed."""
    seconds = {(result.contender, result.length): result.seconds for result in results}
    lengths = sorted({result.length for result in results})
    for name in dict.fromkeys(result.contender for result in results):
        if sum(length >= 2048 and (name, length) in seconds for length in lengths) > 1:
            print(f"  {name}: time grows as length^{growth_exponent(results, name, 2048):.2f}")
    holds = True
    for target in section.targets:
        if isinstance(target, Faster):
            ours, rival = ((name, target.length) for name in (target.contender, target.rival))
            if ours not in seconds or rival not in seconds:
                continue
            ratio = seconds[rival] / seconds[ours]
            figure, met = f"{ratio:.1f}x, target {target.ratio:g}x", ratio >= target.ratio
            what = f"{target.contender} vs {target.rival} at {target.length:,}"
        elif isinstance(target, Flat):
            first, last = lengths[0], lengths[-1]
            if first == last:
                continue
            ratio = seconds[target.contender, last] / seconds[target.contender, first]
            figure, met = f"{ratio:.2f}, target <= {target.ratio:g}", ratio <= target.ratio
            what = f"{target.contender}: time at {last:,} over {first:,}"
        else:
            points = [r for r in results if r.contender == target.contender and r.length >= target.shortest]
            if len(points) < 2 or not all(getattr(point, target.attribute) for point in points):
                continue
            exponent = growth_exponent(results, target.contender, target.shortest, target.attribute)
            figure, met = f"length^{exponent:.2f}, target <= {target.exponent:g}", exponent <= target.exponent
            what = f"{target.contender}: {target.attribute.replace('_', ' ')}"
        print(f"  {'holds ' if met else 'MISSED'}  {what}: {figure}")
        holds &= met
    return holds


def plot(section: Section, results: list[Result], path: Path) -> None:
    """Log-log curves of time, and of memory where it was measured, against length."""
    from matplotlib.figure import Figure

    panels = [("seconds", 1e3, section.unit)]
    if all(result.peak_bytes for result in results):
        panels.append(("peak_bytes", 2.0**-20, "peak memory, MiB"))
    figure = Figure(figsize=(6 * len(panels), 4.2))
    for axis, (attribute, factor, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in dict.fromkeys(result.contender for result in results):
            points = [(r.length, factor * getattr(r, attribute)) for r in results if r.contender == name]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(yscale="log", xlabel="tokens", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.2)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{section.title}\n{machine()}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
