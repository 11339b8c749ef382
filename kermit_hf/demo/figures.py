"""The figures of the demonstration: loss against steps, memory and time against length."""

from pathlib import Path


COLOURS = {"KERMIT": "#1264a3", "softmax": "#d1603d"}


def plot_loss(logs: dict[str, list[dict]], title: str, path: Path) -> None:
    """Training and validation loss of each model against steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, log in logs.items():
        for key, part, style in (("loss", "training", {"alpha": 0.4}), ("eval_loss", "validation", {"marker": "o"})):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=f"{name}, {part}", markersize=4, **style)
    axes.set(xlabel="optimizer steps", ylabel="loss (nats)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_memory(costs: dict[str, list[dict]], path: Path) -> None:
    """Cache bytes and milliseconds per token of each model against context length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = (
        ("cache_bytes", "cache size", "Memory of one sequence", "B"),
        ("ms_per_token", "milliseconds", "Time per token", ""),
    )
    for axes, (key, label, title, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, cost in costs.items():
            lengths = [entry["length"] for entry in cost]
            axes.plot(lengths, [entry[key] for entry in cost], "o-", markersize=4, color=COLOURS[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=40)
        axes.set(xlabel="tokens of context", yscale="log", ylabel=label, title=title)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(unit))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
