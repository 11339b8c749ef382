"""Contenders in C++: beside those on PyTorch, and compiled before anything is timed."""

import importlib

import pytest
import torch

from kermit_hf.cpu_kernels import cpu_misfit

from .compiled import with_compiled
from .measure import Contender


MISFIT = cpu_misfit(torch.device("cpu"))


@pytest.mark.skipif(MISFIT is not None, reason=str(MISFIT))
@pytest.mark.parametrize("package", ["kermit_hf", "nystromformer_hf"])
def test_kernels_are_compiled_before_they_are_timed(package, monkeypatch):
    happened = []
    choice = importlib.import_module(f"{package}.backends").CHOICE
    kernels = importlib.import_module(f"{package}.cpu_kernels")
    monkeypatch.setattr(kernels, "load_cpu_kernels", lambda namespace: happened.append(f"compiled {namespace}"))

    def run() -> None:
        happened.append(f"run on {choice.chosen}")

    contenders = {name: Contender(run) for name in ("one", "other")}
    doubled = with_compiled(contenders, ["one"], importlib.import_module(package).kernel_backend)
    assert list(doubled) == ["one", "other", "one, C++"]
    for contender in doubled.values():
        contender.run()
    own = choice.chosen
    assert happened == [f"compiled {package}", f"run on {own}", f"run on {own}", "run on cpp"]
