"""When kernels in C++ can run, what is said where they cannot, and what compiling leaves behind. The kernels have tests of their own."""

import re
import subprocess
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
def folder(monkeypatch, tmp_path) -> Path:
    """Where libraries go, with nothing in it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


@pytest.fixture(params=[cpu_kernels, nystromformer_hf.cpu_kernels])
def module(request):
    return request.param


def load(module):
    return module.load_cpu_kernels.__wrapped__("kermit_hf")


def kinds_in(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def write_library(name: str, sources: list[str], build_directory: str, **options) -> None:
    Path(build_directory, f"{name}.so").write_text("library")


@pytest.mark.parametrize("error", [RuntimeError("Error building"), subprocess.CalledProcessError(1, ["c++", "-v"])])
def test_a_compiler_that_fails_leaves_nothing_and_says_what_helps(error, module, folder, monkeypatch):
    def fail(name: str, sources: list[str], build_directory: str, **options) -> None:
        assert all(Path(source).exists() for source in sources)
        Path(build_directory, "half.o").write_text("half")
        raise error

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(
        RuntimeError, match=rf"could not be compiled: {re.escape(str(error))}; .*choose backend 'torch'"
    ):
        load(module)
    assert kinds_in(folder) == [".lock"]


def test_a_folder_that_cannot_be_written_says_so(module, folder):
    folder.write_text("no folder")
    with pytest.raises(RuntimeError, match=r"could not be compiled: .*File exists.*in TORCH_EXTENSIONS_DIR, or choose"):
        load(module)


def test_of_those_that_start_together_one_compiles(module, folder, monkeypatch):
    compiled, started = [], Barrier(4)

    def compile_slowly(name: str, *others, **options) -> None:
        compiled.append(name)
        time.sleep(0.2)
        write_library(name, *others, **options)

    def start() -> None:
        started.wait()
        load(module)

    monkeypatch.setattr(cpp_extension, "load", compile_slowly)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    with ThreadPoolExecutor(4) as threads:
        for result in [threads.submit(start) for _ in range(4)]:
            result.result(timeout=60)
    assert len(compiled) == 1
    assert kinds_in(folder) == [".lock", ".so"]


def test_what_a_process_left_that_was_cut_off_is_cleared_away(module, folder, monkeypatch):
    monkeypatch.setattr(cpp_extension, "load", write_library)
    load(module)
    (library,) = folder.glob("*.so")
    left = folder / f"{library.stem}.build-cut-off"
    left.mkdir()
    (left / "lock").touch()  # for which torch would wait for ever
    library.unlink()
    load(module)
    assert kinds_in(folder) == [".lock", ".so"]


@pytest.mark.skipif(cpu_kernels.cpu_misfit(CPU) is not None, reason=str(cpu_kernels.cpu_misfit(CPU)))
def test_what_failed_is_tried_again_in_the_same_process(module, folder, monkeypatch, tmp_path):
    """With a compiler, of something small: torch takes a build that failed for one that needs no other."""
    source = tmp_path / "small_cpu.cpp"
    source.write_text("int small() { return 1; }")
    monkeypatch.setattr(module, "SOURCES", [source])
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *{source.name}*) exit 1;; esac\nexec {cpp_extension.get_cxx_compiler()} "$@"'
    )
    compiler.chmod(0o755)
    with monkeypatch.context() as broken:
        broken.setenv("CXX", str(compiler))
        with pytest.raises(RuntimeError, match="Error building extension"):
            load(module)
    assert load(module) is torch.ops.kermit_hf
    assert kinds_in(folder) == [".lock", ".so"]


def test_a_changed_header_is_compiled_anew(module):
    """A library is named after all that it was made from."""
    texts = [file.read_text() for file in (*module.HEADERS, *module.SOURCES)]
    included = {name for text in texts for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)}
    assert "vector_tiles.h" in included
    assert included == {header.name for header in module.HEADERS}


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
