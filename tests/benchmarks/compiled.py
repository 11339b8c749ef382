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


def are_compiled(kernel_backend: Callable[[str], AbstractContextManager]) -> bool:
    """Compiles the kernels of the package of `kernel_backend`, as the first run with them would take too long; False where they
    cannot run."""
    if cpu_misfit(torch.device("cpu")) is not None:
        return False
    package = kernel_backend.__module__.partition(".")[0]
    import_module(f"{package}.cpu_kernels").load_cpu_kernels(package)
    return True


def with_compiled(
    contenders: dict[str, Contender], names: Iterable[str], kernel_backend: Callable[[str], AbstractContextManager]
) -> dict[str, Contender]:
    """`contenders` and once more those of these names, with the backend "cpp" of their package."""
    if not are_compiled(kernel_backend):
        return contenders

    def in_cpp(contender: Contender) -> Contender:
        def run() -> None:
            with kernel_backend("cpp"):
                contender.run()

        return contender._replace(run=run)

    return contenders | {compiled(name): in_cpp(contenders[name]) for name in names}
