"""When kernels in C++ can run, what is said where they cannot, and what compiling leaves behind. The kernels have tests of their own."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch.utils import cpp_extension

import nystromformer_hf.cpu_kernels
from kermit_hf import cpu_kernels


CPU = torch.device("cpu")


def misfit(device: torch.device = CPU) -> str | None:
    return cpu_kernels.cpu_misfit.__wrapped__(device)


@pytest.fixture
def able(monkeypatch):
    """A machine that has all that is needed."""
    monkeypatch.setattr(cpu_kernels.sys, "platform", "linux")
    monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)


@pytest.mark.parametrize(
    "owner, name, value, message",
    [
        (cpu_kernels.sys, "platform", "darwin", "on Linux only, not on 'darwin'"),
        (cpu_kernels.shutil, "which", lambda name: None, "is not installed; install g++ or name another one in CXX"),
        (cpp_extension, "is_ninja_available", lambda: False, "run `pip install ninja`"),
        (cpu_kernels, "SOURCES", [], "install the package linear-time-transformers"),
    ],
)
def test_what_is_missing_is_named(owner, name, value, message, able, monkeypatch):
    assert misfit() is None
    monkeypatch.setattr(owner, name, value)
    assert message in misfit()


def test_tensors_elsewhere_are_refused(able):
    assert misfit(torch.device("meta")) == "tensors are on 'meta'; move the model to the CPU"


@pytest.fixture
def folder(able, monkeypatch, tmp_path) -> Path:
    """Where libraries go, with nothing in it, on a machine that loads whatever lies there."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    return tmp_path / "extensions"


def kinds_in(folder: Path) -> list[str]:
    return [path.suffix for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("module", [cpu_kernels, nystromformer_hf.cpu_kernels])
def test_a_compiler_that_fails_leaves_nothing_and_says_what_helps(module, folder, monkeypatch):
    def fail(name: str, sources: list[str], build_directory: str, **options) -> None:
        assert all(Path(source).exists() for source in sources)
        Path(build_directory, "half.o").write_text("half")
        raise RuntimeError("Error building extension")

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(RuntimeError, match=r"could not be compiled: .*choose backend 'torch'"):
        module.load_cpu_kernels.__wrapped__("kermit_hf")
    assert kinds_in(folder) == []


@pytest.mark.parametrize("module", [cpu_kernels, nystromformer_hf.cpu_kernels])
def test_of_those_that_start_together_one_compiles(module, folder, monkeypatch):
    compiled, started = [], Barrier(4)

    def compile_slowly(name: str, sources: list[str], build_directory: str, **options) -> None:
        compiled.append(name)
        time.sleep(0.2)
        Path(build_directory, f"{name}.so").write_text("library")

    def load() -> None:
        started.wait()
        module.load_cpu_kernels.__wrapped__("kermit_hf")

    monkeypatch.setattr(cpp_extension, "load", compile_slowly)
    with ThreadPoolExecutor(4) as threads:
        for result in [threads.submit(load) for _ in range(4)]:
            result.result(timeout=60)
    assert len(compiled) == 1
    assert kinds_in(folder) == [".so"]


@pytest.mark.parametrize("module", [cpu_kernels, nystromformer_hf.cpu_kernels])
def test_what_a_process_left_that_was_cut_off_is_not_in_the_way(module, folder, monkeypatch):
    """Above all its lock, for which torch would wait for ever."""
    used = []

    def compile_where_nothing_is(name: str, sources: list[str], build_directory: str, **options) -> None:
        used.append(Path(build_directory))
        assert not any(used[-1].iterdir())
        Path(build_directory, f"{name}.so").write_text("library")

    monkeypatch.setattr(cpp_extension, "load", compile_where_nothing_is)
    module.load_cpu_kernels.__wrapped__("kermit_hf")
    used[0].with_suffix(".so").unlink()
    used[0].mkdir()
    (used[0] / "lock").touch()
    module.load_cpu_kernels.__wrapped__("kermit_hf")
    assert used[0] == used[1]
    assert kinds_in(folder) == [".so"]


@pytest.mark.parametrize("module", [cpu_kernels, nystromformer_hf.cpu_kernels])
def test_a_changed_header_is_compiled_anew(module):
    """A library is named after all that it was made from."""
    texts = [file.read_text() for file in (*module.HEADERS, *module.SOURCES)]
    included = {name for text in texts for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)}
    assert "vector_tiles.h" in included
    assert included == {header.name for header in module.HEADERS}


@pytest.mark.parametrize("module", [cpu_kernels, nystromformer_hf.cpu_kernels])
@pytest.mark.parametrize(
    "states, held",
    [
        (torch.randn(()).expand(2, 3, 5, 8), 8),
        (torch.randn(2, 1, 5, 16)[..., ::2].expand(2, 3, 5, 8), 2 * 5 * 8),
        (torch.randn(2, 3, 8, 5).mT, 2 * 3 * 5 * 8),
        (torch.randn(2, 3, 1, 8).expand(2, 3, 5, 8), 2 * 3 * 8),
    ],
)
def test_rows_become_contiguous_and_expanded_axes_stay_expanded(module, states, held):
    rows = module.contiguous_rows(states)
    assert torch.equal(rows, states) and rows.stride(-1) == 1
    assert rows.untyped_storage().nbytes() == held * rows.element_size()


def test_contiguous_rows_are_not_copied():
    states = torch.randn(2, 5, 3, 8).transpose(1, 2)
    assert cpu_kernels.contiguous_rows(states) is states
