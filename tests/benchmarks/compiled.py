"""Contenders of ours with our kernels in C++, where these can be compiled."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib import import_module

import torch

from kermit_hf.cpu_kernels import cpu_misfit

from .measure import Contender


IN_CPP = ", C++"


def compiled(name: str) -> str:
    return name + IN_CPP


def with_compiled(
    contenders: dict[str, Contender], names: Iterable[str], kernel_backend: Callable[[str], AbstractContextManager]
) -> dict[str, Contender]:
    """`contenders` and once more those of these names, with the backend "cpp" of their package, whose kernels are compiled now: the
    first run would take too long."""
    if cpu_misfit(torch.device("cpu")) is not None:
        return contenders
    package = kernel_backend.__module__.partition(".")[0]
    import_module(f"{package}.cpu_kernels").load_cpu_kernels(package)

    def in_cpp(contender: Contender) -> Contender:
        def run() -> None:
            with kernel_backend("cpp"):
                contender.run()

        return contender._replace(run=run)

    return contenders | {compiled(name): in_cpp(contenders[name]) for name in names}
