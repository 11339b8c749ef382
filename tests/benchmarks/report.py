"""What a run prints, keeps and draws."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .compiled import IN_CPP
from .measure import Failed, Result, Section, Skipped, ratio
from .roofline import Roofline
from .targets import LABELS, exponents, share_of_peak


def print_batch(batch: Sequence[Result | Skipped], axis: str) -> None:
    """One line for each contender: time, how many times faster than the first one with the quartiles over rounds, share of
    the matrix-product rate reached with the multiplications that are needed, memory."""
    base = batch[0]
    for result in batch:
        start = f"  {result.length:7,} {axis}  {result.contender:34}"
        if isinstance(result, Skipped):
            told = "FAILED" if isinstance(result, Failed) else "skipped"
            print(f"{start} {told}: {result.reason}", flush=True)
            continue
        columns = [f"{1e3 * result.seconds:10.2f} ms"]
        if isinstance(base, Result):
            middle, low, high = ratio(base, result)
            columns.append(f"{middle:7.2f}x ({low:.2f} to {high:.2f}) {base.contender}")
        if result.multiplications:
            columns.append(f"{share_of_peak(result):4.0%} of peak")
        if result.peak_bytes is not None:
            columns.append(f"{result.peak_bytes / 2**20:7,.0f} MiB")
        print(f"{start} {'  '.join(columns)}  ({len(result.rounds)} rounds)", flush=True)


def check(section: Section, results: Sequence[Result]) -> bool:
    """Prints how each contender grows and each target with the figure measured; False if one was measured and missed."""
    for name, fitted in exponents(results):
        grows = ", ".join(f"{LABELS[attribute]} ~ length^{exponent:.2f}" for attribute, exponent in fitted.items())
        print(f"  {name}: {grows}")
    holds = True
    for target in section.targets:
        figure, met = target.check(results) or ("not measured", None)
        print(f"  {({True: 'holds', False: 'MISSED', None: '-'})[met]:6}  {target}: {figure}")
        holds &= met is not False
    return holds


def as_json(batches: Sequence[Sequence[Result | Skipped]]) -> dict[str, list[dict]]:
    """Results, with medians, ratios and shares of peak worked out, and what was skipped."""
    results, skipped = [], []
    for base, result in ((batch[0], result) for batch in batches for result in batch):
        if isinstance(result, Skipped):
            skipped.append(asdict(result))
            continue
        entry = asdict(result) | {"seconds": result.seconds, "matmul_multiplications": result.matmul_multiplications}
        if isinstance(base, Result):
            middle, low, high = ratio(base, result)
            entry["ratio"] = {"to": base.contender, "median": middle, "quartiles": [low, high]}
        if result.multiplications:
            entry["share_of_peak"] = share_of_peak(result)
        results.append(entry)
    return {"results": results, "skipped": skipped}


def plot(section: Section, results: Sequence[Result], roofline: Roofline, machine: str, path: Path) -> None:
    """Log-log curves of time, and of memory where it was measured. Dashed, in the colour of its contender: the time that
    its multiplications take at the measured rate of matrix products. Dotted: that of moving inputs and outputs once. A
    contender with kernels in C++ has the colour of the one without, and squares."""
    from matplotlib.figure import Figure

    panels = [("seconds", 1e3, section.unit)]
    if any(result.peak_bytes for result in results):
        panels.append(("peak_bytes", 2.0**-20, "peak memory, MiB"))
    plain = dict.fromkeys(result.contender.removesuffix(IN_CPP) for result in results)
    colours = {name: f"C{index}" for index, name in enumerate(plain)}
    figure = Figure(figsize=(6.5 * len(panels), 5.2), layout="constrained")
    for axes, (attribute, factor, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in dict.fromkeys(result.contender for result in results):
            own = [result for result in results if result.contender == name]
            points = [(r.length, factor * getattr(r, attribute)) for r in own if getattr(r, attribute)]
            style = {"color": colours[name.removesuffix(IN_CPP)], "markersize": 3, "label": name}
            style |= {"marker": "s", "linewidth": 2.5} if name.endswith(IN_CPP) else {"marker": "o", "linewidth": 1}
            axes.plot(*(zip(*points, strict=True) if points else ([], [])), **style)
            least = [(r.length, 1e3 * r.multiplications / roofline.multiplications) for r in own if r.multiplications]
            if attribute == "seconds" and least:
                axes.plot(*zip(*least, strict=True), "--", color=style["color"], linewidth=0.8)
        moved = {r.length: 1e3 * r.bytes / roofline.bytes for r in results if r.bytes}
        if attribute == "seconds" and moved:
            axes.plot(list(moved), list(moved.values()), ":", color="gray", label="inputs and outputs, copied")
        axes.set(yscale="log", xlabel=section.axis, ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(True, which="both", alpha=0.2)
    if any(result.multiplications for result in results):
        figure.axes[0].plot([], [], "--", color="gray", linewidth=0.8, label="needed multiplications at full rate")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{section.title}\n{machine}\n{roofline}", fontsize=8)
    figure.savefig(path, dpi=120)
