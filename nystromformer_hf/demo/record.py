"""The record of a run, `run.json`: its settings, the seconds of its stages, its results."""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .sources import stop


@contextmanager
def stage(title: str, run: dict) -> Iterator[None]:
    """Announce a stage and note how long it takes."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    run["seconds"][title] = round(time.perf_counter() - start, 1)


def previous_run(args: argparse.Namespace) -> dict | None:
    """What --resume continues, or None once it is clear that a new run overwrites nothing that it could continue."""
    path = args.output / "run.json"
    previous = json.loads(path.read_text()) if path.is_file() else None
    if args.resume:
        if previous is None:
            stop(f"--resume: {path} does not exist, so there is no run to continue; start one without --resume")
        before = previous["settings"]
        if changed := [name for name, value in run_settings(args).items() if value != before.get(name)]:
            was = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
            stop(f"--resume: the run in {args.output} has {was}; repeat that, or start another with a new --output")
        return previous
    if previous is not None and "results" not in previous and any(args.output.glob("checkpoints/*/checkpoint-*")):
        stop(f"{args.output} holds an unfinished run: continue it with --resume, delete it, or choose another --output")
    if previous is None and args.output.is_dir() and any(args.output.iterdir()):
        stop(f"--output {args.output} holds other files; choose a folder that is new or empty")
    return None


def run_settings(args: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(args).items() if name not in ("output", "resume")}


def new_run(args: argparse.Namespace) -> dict:
    """The record of a run that begins in --output."""
    shutil.rmtree(args.output / "checkpoints", ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    run = {"settings": run_settings(args), "seconds": {}}
    (args.output / "run.json").write_text(json.dumps(run, indent=2))
    return run


def close_run(args: argparse.Namespace, run: dict, **results) -> None:
    """Write results and seconds, and say where everything is."""
    run["results"] = results
    (args.output / "run.json").write_text(json.dumps(run, indent=2))
    print("\nSeconds:", ", ".join(f"{title} {seconds:.0f}" for title, seconds in run["seconds"].items()))
    print(f"All results are in {args.output}/ (README.md first). Total: {sum(run['seconds'].values()):.0f} seconds.")
