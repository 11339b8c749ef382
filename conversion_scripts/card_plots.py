"""The plots of a model card."""

from pathlib import Path


def plot_perplexity(buckets: list[list[int]], perplexity: dict[str, list[float]], path: Path) -> None:
    """Perplexity of each model in each bucket of positions (start, end)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, values in perplexity.items():
        axes.plot(range(len(buckets)), values, "o-", markersize=4, label=name)
    axes.set_xticks(range(len(buckets)), [bucket_name(bucket) for bucket in buckets], rotation=30)
    axes.set(xlabel="position in the text", ylabel="perplexity", yscale="log", title="Perplexity by position")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(ScalarFormatter())
    axes.grid(alpha=0.25, which="both")
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_cost(costs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Milliseconds per token and, of models that have a cache, its bytes against length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panels = [("seconds_per_token", "s", "time per token"), ("cache_bytes", "B", "cache")]
    panels = [panel for panel in panels if any(panel[0] in entry for entries in costs.values() for entry in entries)]
    lengths = sorted({entry["length"] for entries in costs.values() for entry in entries})
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    for axes, (key, unit, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, entries in costs.items():
            points = [(entry["length"], entry[key]) for entry in entries if key in entry]
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=40)
        axes.set(xlabel="tokens", ylabel=label, yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(unit))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=150)


def bucket_name(bucket: list[int]) -> str:
    return f"{bucket[0]:,}–{bucket[1]:,}"
