"""How kernels and their choice are tested without a GPU: in processes of their own, through Triton's interpreter, and compiled
for one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch


REPOSITORY = Path(__file__).resolve().parents[1]

# No program may need more shared memory than the smallest GPU of compute capability 8 has, nor keep more than a few registers in
# memory.
SHARED_BYTES = 99 * 1024
STACK_BYTES = 160


def kernel_device() -> str | None:
    """Where our Triton kernels can run in this process: on a CPU through the interpreter, on a GPU, or nowhere."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def run_interpreted(*tests: Path) -> None:
    """Runs test files in a process of its own, because the interpreter has to be chosen before triton is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    chosen = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "KERMIT_BACKEND": "", "NYSTROMFORMER_BACKEND": ""}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests)],
        cwd=REPOSITORY,
        env={**environment, **chosen},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def run_python(program: str, **variables: str) -> subprocess.CompletedProcess:
    """In a process of its own, where the choice of a backend is read from these environment variables."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def compile_kernel(
    kernel, sizes: dict[str, object], kinds: dict[str, str], folder: Path, has_products: bool = True
) -> None:
    """Compiles a kernel as for an H100, for these sizes and launch options, and checks what its programs need.

    kinds: types of arguments by name, as "*bf16" or "i32"; the others are float32 in memory.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    import triton
    from triton.backends.compiler import GPUTarget

    options = {name: sizes[name] for name in ("num_warps", "num_stages") if name in sizes}
    constants = {name: size for name, size in sizes.items() if name not in options}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    # A compiled kernel kept from an earlier run proves nothing.
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder)):
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES
    assert _stack_bytes(compiled.asm["cubin"], folder) <= STACK_BYTES
    assert bool(re.search(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])) == has_products


def _stack_bytes(binary: bytes, folder: Path) -> int:
    """What a thread of a compiled kernel keeps in memory for want of registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"{tool.name} does not come with this triton")
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
