"""The figures of the demonstration: loss against steps, memory and time against length."""

from pathlib import Path


COLOURS = {"Nyströmformer": "#1264a3", "softmax": "#d1603d"}


def plot(path: Path, panels: dict[str, list[tuple]], xlabel: str, ylabels: tuple[str, ...], costs: bool) -> None:
    """One panel for each title, of lines (model, label, x, y); `costs` are drawn on logarithmic axes, with prefixes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.2), layout="constrained")
    for axes, ylabel, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], ylabels, panels.items(), strict=True
    ):
        for name, label, x, y in lines:
            style = {"alpha": 0.4} if "training" in label else {"marker": "o", "markersize": 4}
            axes.plot(x, y, color=COLOURS[name], label=label, **style)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if costs:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{length:,}" for length in x], rotation=40)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(EngFormatter("s" if ylabel == "seconds" else "B"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=150)


def plot_loss(logs: dict[str, list[dict]], title: str, path: Path) -> None:
    """What the Trainer logged: training and validation loss."""
    lines = []
    for name, log in logs.items():
        for key, part in (("loss", "training"), ("eval_loss", "validation")):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            lines.append((name, f"{name}, {part}", *zip(*points, strict=True)))
    plot(path, {title: lines}, "optimizer steps", ("loss (nats)",), costs=False)


def plot_cost(costs: dict[str, list[dict]], titles: tuple[str, str], path: Path) -> None:
    """Bytes and seconds of each model against length, under one title each."""
    panels = {
        title: [(name, name, [e["length"] for e in cost], [e[key] for e in cost]) for name, cost in costs.items()]
        for title, key in zip(titles, ("bytes", "seconds"), strict=True)
    }
    plot(path, panels, "tokens", ("memory", "seconds"), costs=True)
