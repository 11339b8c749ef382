"""Our kernels in C++: when they can run, and how they are compiled.

They are compiled by `python -m PACKAGE.compile`, or when a backend that is chosen first needs them, which takes up to a minute, by
`torch.utils.cpp_extension`, and kept in its folder (the environment variable TORCH_EXTENSIONS_DIR, or a cache folder of the user)
for every other process: of those that start together one compiles, and the others wait for it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*_cpu.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# What a compiler may use on a CPU that PyTorch describes so; anything else gets what every CPU of its kind has.
INSTRUCTIONS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


@cache
def cpu_misfit(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, and what helps; None if they can."""
    from torch.utils import cpp_extension

    if device.type != "cpu":
        return f"tensors are on {device.type!r}; move the model to the CPU"
    if sys.platform != "linux":
        return f"its kernels are compiled on Linux only, not on {sys.platform!r}; run there"
    if not SOURCES:
        return "code from the Hub comes without its sources in C++; install the package linear-time-transformers"
    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        return f"the compiler {cpp_extension.get_cxx_compiler()!r} is not installed; install g++ or name another one in CXX"
    if not cpp_extension.is_ninja_available():
        return "ninja, which compiles its kernels, is not installed; run `pip install ninja`"
    return None


def takes_cpu_tensors(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these: float32, with real memory behind them, and neither traced nor transformed."""
    plain = all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    return (
        plain
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def contiguous_rows(states: torch.Tensor) -> torch.Tensor:
    """In float32, with a contiguous last axis: how the kernels take states and their gradients. Expanded axes stay expanded, as
    those of the gradient of a sum."""
    states = states.float()
    if states.stride(-1) == 1:
        return states
    shape = states.shape
    for axis in range(states.dim() - 1):
        if states.stride(axis) == 0 and shape[axis] > 1:
            states = states.narrow(axis, 0, 1)
    return states.contiguous().expand(shape)


@cache
def are_compiled(namespace: str) -> bool:
    """Whether the kernels of this package lie compiled on this machine and can be loaded; looked up once in a process."""
    if sys.platform != "linux" or not SOURCES or not library_of(namespace).exists():
        return False
    try:
        load_cpu_kernels(namespace)
    except RuntimeError as error:
        logger.warning(f"{error}; goes on with PyTorch's operators")
        return False
    return True


def library_of(namespace: str) -> Path:
    """Where these kernels lie once they are compiled, by what they are made from."""
    versions = [torch.__version__, *_flags(), *(file.read_text() for file in (*HEADERS, *SOURCES))]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch_extensions")
    return Path(folder, f"{namespace}_{hashlib.sha256(repr(versions).encode()).hexdigest()[:16]}.so")


@cache
def load_cpu_kernels(namespace: str):
    """The operators that `SOURCES` register under this namespace. Raises `RuntimeError` if they cannot be compiled or loaded."""
    library = library_of(namespace)
    if not library.exists():
        _compile_alone(namespace, library)
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise RuntimeError(
            f"the CPU kernels of {namespace} cannot be loaded: {error}; delete {library}, so that they are compiled anew, or "
            "choose backend 'torch'"
        ) from error
    return getattr(torch.ops, namespace)


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    return ["-O3", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", *INSTRUCTIONS.get(capability, ())]


def _compile_alone(namespace: str, library: Path) -> None:
    """Compiles, or waits for the process that does."""
    from filelock import FileLock
    from torch.utils import cpp_extension

    logger.warning(
        f"Compiling the CPU kernels of {namespace}, or waiting for a process that does, once on this machine: up to a minute."
    )
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.with_suffix(".lock"), mode=0o666):
            if not library.exists():
                _compile(library)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            f"the CPU kernels of {namespace} could not be compiled: {error}; see above what {cpp_extension.get_cxx_compiler()} "
            f"says, name a folder other than {library.parent} in TORCH_EXTENSIONS_DIR, or choose backend 'torch'"
        ) from error


def _compile(library: Path) -> None:
    """Only a process that holds the lock may."""
    from torch.utils import cpp_extension

    # In a folder that nobody used before: torch would wait for ever for one that was cut off, and not try again where one failed.
    for left in library.parent.glob(f"{library.stem}.build-*"):
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f"{library.stem}.build-", dir=library.parent) as folder:
        cpp_extension.load(
            library.stem,
            [str(source) for source in SOURCES],
            extra_cflags=_flags(),
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        # After a failure torch adds a number to the name.
        os.replace(next(Path(folder).glob("*.so")), library)
