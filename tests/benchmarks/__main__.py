"""Runs the benchmarks, prints tables with ratios, writes results.json and plots, and says which targets hold.

python -m tests.benchmarks                                       # everything, an hour or two on two cores
python -m tests.benchmarks --longest 8192                        # everything up to 8,192 tokens
python -m tests.benchmarks --only kermit-forward kermit-decoding
python -m tests.benchmarks --lengths 512 4096 --output bench

"% of peak" is the rate of the multiplications that an algorithm needs, over that of a large matrix product timed right
after it. Growth with length is that of time counted in such products, as no machine is equally fast all the time.
New memory comes from the system as the allocator decides: glibc's asks for it at each tensor above 32 MiB, whose times then grow with
what the system takes to provide it. --keep-memory leaves that out.
Contenders that do not fit in memory or in --budget are skipped, and so are peers that are not installed or fail; the output says so.
On a machine with a CUDA device everything runs there. results.json is written after each length.

More have their own command: tests.benchmarks.gpu (kernels for a GPU beside each other), tests.benchmarks.learning (what
KERMIT's settings learn), tests.benchmarks.approximation (how close Nyström attention comes to softmax) and
tests.benchmarks.sentences (what that leaves of a sentence encoder).
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from conversion_scripts.machine import machine

from . import kermit, models, nystrom_decoder, nystrom_encoder
from .measure import Failed, Limits, Result, Section, keep_freed_memory, keep_to_free_memory
from .nystrom_encoder import LANDMARKS
from .peers import missing_peers
from .report import as_json, check, plot, print_batch
from .roofline import measure_roofline
from .targets import exponents


SECTIONS = {**kermit.SECTIONS, **nystrom_encoder.SECTIONS, **nystrom_decoder.SECTIONS, **models.SECTIONS}


def main(arguments: list[str] | None = None) -> int:
    return run(SECTIONS, __doc__, arguments)


def run(
    sections: dict[str, Section], description: str, arguments: list[str] | None = None, needs_gpu: bool = False
) -> int:
    """The command line over `sections`. Returns 0 if all targets hold that were measured, 1 if one does not or a contender of ours
    failed, 2 if `needs_gpu` and there is none."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sections, nargs="+", metavar="NAME", help=f"of {', '.join(sections)}")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help=f"tokens, multiples of {LANDMARKS}; each section has its own by default"
    )
    parser.add_argument("--longest", type=positive, help="leave out lengths beyond this many tokens")
    parser.add_argument("--batches", type=positive, nargs="+", help="texts, for decoding-batch (default 1 8 64)")
    parser.add_argument(
        "--budget",
        type=float,
        default=Limits().seconds,
        help=f"seconds one contender may take at one length (default {Limits().seconds:g}); slower ones are skipped",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for results and plots")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="keep memory that is freed for the next tensor, as other allocators do, where glibc's gives it back to the system",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32, on a GPU bfloat16")
    options = parser.parse_args(arguments)
    for length in options.lengths or ():
        if length < 1 or length % LANDMARKS:
            parser.error(f"--lengths {length}: multiples of {LANDMARKS}, as transformers' Nyströmformer wants them")
    if needs_gpu and not torch.cuda.is_available():
        print("no CUDA device here: there is nothing to measure", file=sys.stderr)
        return 2

    torch.set_num_threads(options.threads)
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    torch.set_default_dtype(getattr(torch, options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")))
    where = f"{machine()}, {torch.get_default_dtype()}".replace("torch.", "")
    keep_to_free_memory()
    if options.keep_memory:
        if not keep_freed_memory():
            parser.error("--keep-memory: only glibc can be told to; leave it out")
        where += ", freed memory kept"
    options.output.mkdir(parents=True, exist_ok=True)
    print(where)
    for package, reason in missing_peers().items():
        print(f"{package} is left out: {reason}")
    kept = options.output / "results.json"
    report = json.loads(kept.read_text()) if kept.exists() else {}
    holds, roofline = True, measure_roofline()
    for name in options.only or sections:
        section = sections[name]
        lengths = chosen_lengths(section, options.lengths, options.longest, options.batches)
        print(f"\n{name}: {section.title}")
        batches, results = [], []
        for batch in section.time(lengths, Limits(options.budget)) if lengths else ():
            roofline = measure_roofline().best(roofline)
            print_batch(batch, section.axis)
            batches.append(batch)
            results += [result for result in batch if isinstance(result, Result)]
            holds &= not any(isinstance(result, Failed) for result in batch)
            # After each length, so that a run that is cut off leaves what it measured.
            report[name] = {"machine": where, "roofline": roofline._asdict(), "missing_peers": missing_peers()}
            report[name] |= as_json(batches) | {"growth": dict(exponents(results))}
            write_whole(kept, json.dumps(report, indent=2))
        print(f"  {roofline}")
        holds &= check(section, results)
        try:
            plot(section, results, roofline, where, options.output / f"{name}.png")
        except ImportError as error:
            print(f"  there is no plot: {error}")
    print(f"\nresults and plots are in {options.output}")
    return 0 if holds else 1


def write_whole(path: Path, text: str) -> None:
    """So that the file never holds a part of it, whenever the process ends."""
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number


def chosen_lengths(
    section: Section, lengths: list[int] | None, longest: int | None, batches: list[int] | None
) -> tuple[int, ...]:
    """What to time a section at: the options that are for its axis, else its own."""
    if section.axis != "tokens":
        return tuple(sorted(batches or section.lengths))
    return tuple(length for length in sorted(lengths or section.lengths) if longest is None or length <= longest)


if __name__ == "__main__":
    sys.exit(main())
