"""When kernels in C++ can run, what is said where they cannot, and what compiling leaves behind. The kernels have tests of their own."""

import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch.utils import cpp_extension

import nystromformer_hf.cpu_kernels
from kermit_hf import cpu_kernels
from tests.triton_kernels import run_python


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


@pytest.fixture
def loaded(monkeypatch) -> list[Path]:
    """Libraries that a test loads, which need not be any."""
    paths = []
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    return paths


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


def test_of_those_that_start_together_one_compiles(module, folder, loaded, monkeypatch):
    compiled, started = [], Barrier(4)

    def compile_slowly(name: str, *others, **options) -> None:
        compiled.append(name)
        time.sleep(0.2)
        write_library(name, *others, **options)

    def start() -> None:
        started.wait()
        load(module)

    monkeypatch.setattr(cpp_extension, "load", compile_slowly)
    with ThreadPoolExecutor(4) as threads:
        for result in [threads.submit(start) for _ in range(4)]:
            result.result(timeout=60)
    assert len(compiled) == 1
    assert kinds_in(folder) == [".lock", ".so"]
    assert loaded == [*folder.glob("*.so")] * 4


def test_what_a_process_left_that_was_cut_off_is_cleared_away(module, folder, loaded, monkeypatch):
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


def test_they_lie_where_torch_keeps_extensions(module, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert module.library_of("kermit_hf").parent == Path(cpp_extension.get_default_build_root())


def test_those_compiled_before_are_found(module, folder, loaded, monkeypatch):
    are_compiled = module.are_compiled.__wrapped__
    monkeypatch.setattr(module, "load_cpu_kernels", module.load_cpu_kernels.__wrapped__)
    assert not are_compiled("kermit_hf") and not folder.exists()
    folder.mkdir()
    library = module.library_of("kermit_hf")
    library.touch()
    assert are_compiled("kermit_hf") and not are_compiled("other")
    assert loaded == [library]
    monkeypatch.setattr(module, "SOURCES", [])  # as in code from the Hub
    assert not are_compiled("kermit_hf")


def test_a_library_that_cannot_be_loaded_is_named_and_left_alone(module, folder, monkeypatch):
    """As one compiled on a newer system, where machines share a home folder."""
    folder.mkdir()
    library = module.library_of("kermit_hf")
    library.write_text("no library")
    with pytest.raises(
        RuntimeError, match=rf"cannot be loaded: .*; delete {library}, so that .* choose backend 'torch'"
    ):
        load(module)
    warnings = []
    monkeypatch.setattr(module, "load_cpu_kernels", module.load_cpu_kernels.__wrapped__)
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    assert not module.are_compiled.__wrapped__("kermit_hf")
    (warning,) = warnings
    assert str(library) in warning and warning.endswith("goes on with PyTorch's operators")


@pytest.mark.parametrize("package", ["kermit_hf", "nystromformer_hf"])
def test_the_command_compiles_and_says_where(package, folder, loaded, monkeypatch, capsys):
    command, module = (import_module(f"{package}.{name}") for name in ("compile", "cpu_kernels"))
    monkeypatch.setattr(command, "cpu_misfit", lambda device: None)
    monkeypatch.setattr(command, "load_cpu_kernels", module.load_cpu_kernels.__wrapped__)
    monkeypatch.setattr(cpp_extension, "load", write_library)
    assert command.main([]) == 0
    (library,) = folder.glob("*.so")
    assert library.stem.startswith(f"{package}_") and str(library) in capsys.readouterr().out

    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("no folder")
    assert command.main([]) == 1
    assert "File exists" in capsys.readouterr().err
    monkeypatch.setattr(command, "cpu_misfit", lambda device: "there is no compiler")
    assert command.main([]) == 1
    assert capsys.readouterr().err == f"the CPU kernels of {package} cannot be compiled: there is no compiler\n"


USED = """
import sys, torch
from kermit_hf import KermitConfig, KermitModel, backends
sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, window_size=4)
model = KermitModel(KermitConfig(**sizes))
with torch.no_grad():
    model(torch.ones(1, 12, dtype=torch.long))
print(backends.CHOICE.chosen, "kermit_hf.window_cpu" in sys.modules, "torch.utils.cpp_extension" in sys.modules)
"""


@pytest.mark.skipif(cpu_kernels.cpu_misfit(CPU) is not None, reason=str(cpu_kernels.cpu_misfit(CPU)))
def test_by_default_kernels_serve_once_they_are_compiled(tmp_path):
    """And nothing is compiled unasked."""
    cpu_kernels.load_cpu_kernels("kermit_hf")
    result = run_python(USED, KERMIT_BACKEND="")
    assert result.stdout.strip() == "compiled True False", result.stderr
    result = run_python(USED, KERMIT_BACKEND="", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert result.stdout.strip() == "compiled False False", result.stderr
    assert not any(tmp_path.iterdir())


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
