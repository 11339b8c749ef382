"""The Triton kernels of the Taylor map: right through Triton's interpreter, and compiled for a GPU. Neither needs one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton", reason="triton is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_kernels_are_right_through_the_interpreter():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    tests = Path(__file__).with_name("interpreted_kernels.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        cwd=REPOSITORY,
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "KERMIT_BACKEND": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


# Compiled as for an H100. No program may need more shared memory than the smallest GPU of compute capability 8 has, nor
# keep more than a few registers in memory.
SHARED_BYTES = 99 * 1024
STACK_BYTES = 160

# Arguments of the kernels: those of the values' dtype, whole numbers, those that a rule without gates and padding lacks.
STATES = {"query", "key", "value", "states", "rows", "grad_queries", "grad_keys", "grad_values"}
INTEGERS = {"first": "*i32", "second": "*i32", "length": "i32", "num_chunks": "i32", "size": "i32"}
GATES = {"keep", "coarse", "fine", "decay_in", "weight", "write", "decay", "grad_decays"}


@pytest.mark.parametrize("head_dim, coordinates, gated", [(64, 16, True), (128, 16, False)])
@pytest.mark.parametrize("name", ["write", "carry", "read", "query_gradient", "key_gradient"])
def test_the_kernels_compile_for_a_gpu(name, head_dim, coordinates, gated, tmp_path, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from kermit_hf import taylor_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a compiled kernel kept from an earlier run proves nothing
    kernel = getattr(taylor_triton, f"_{name}_kernel")
    states = torch.empty(1, 2, 1, coordinates, dtype=torch.bfloat16)
    sizes = taylor_triton._sizes(states, head_dim, 1, 256)
    options = {option: sizes.pop(option) for option in ("num_warps", "num_stages")}
    if name == "carry":
        sizes = {"REVERSE": True, "CARRIED": taylor_triton.CARRIED}
    absent = {argument: None for argument in kernel.arg_names if argument in GATES | {"sums"} and not gated}
    constants = {**sizes, **absent}
    signature = {
        argument: "constexpr"
        if argument in constants
        else INTEGERS.get(argument, "*bf16" if argument in STATES else "*fp32")
        for argument in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED_BYTES
    assert stack_bytes(compiled.asm["cubin"], tmp_path) <= STACK_BYTES
    if name != "carry":
        assert re.search(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])


def stack_bytes(binary: bytes, folder: Path) -> int:
    """What a thread of a compiled kernel keeps in memory for want of registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"{tool.name} does not come with this triton")
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    usage = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
