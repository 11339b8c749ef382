"""Compiles the kernels of this package in C++, in up to a minute; from then on every process on this machine uses them on a CPU."""

import argparse
import sys

import torch

from .cpu_kernels import cpu_misfit, library_of, load_cpu_kernels


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 after saying why they cannot be compiled here."""
    argparse.ArgumentParser(prog=f"python -m {__package__}.compile", description=__doc__).parse_args(arguments)
    misfit = cpu_misfit(torch.device("cpu"))
    if misfit is not None:
        print(f"the CPU kernels of {__package__} cannot be compiled: {misfit}", file=sys.stderr)
        return 1
    try:
        load_cpu_kernels(__package__)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The CPU kernels of {__package__} are compiled: {library_of(__package__)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
