"""Our Triton kernels: right through Triton's interpreter, and compiled for a GPU. Neither needs one."""

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
    tests = [str(Path(__file__).with_name(f"interpreted_{name}.py")) for name in ("taylor", "window", "models")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
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

# Arguments of the kernels: those of the values' dtype, whole numbers, and those that are absent without gates and padding.
STATES = {"query", "key", "value", "states", "rows", "grad_queries", "grad_keys", "grad_values"}
INTEGERS = {"first": "*i32", "second": "*i32", "first_real": "*i32"}
INTEGERS |= dict.fromkeys(("length", "slots", "num_chunks", "size"), "i32")
GATES = {"keep", "coarse", "fine", "decay_in", "weight", "write", "decay", "grad_decays", "sums"}


@pytest.mark.parametrize("head_dim, gated", [(64, True), (128, False)])
@pytest.mark.parametrize("name", ["write", "carry", "read", "query_gradient", "key_gradient"])
def test_the_taylor_kernels_compile_for_a_gpu(name, head_dim, gated, compile_kernel):
    from kermit_hf import taylor_triton

    kernel = getattr(taylor_triton, f"_{name}_kernel")
    sizes = taylor_triton._sizes(torch.empty(1, 2, 1, 16, dtype=torch.bfloat16), head_dim, 1, 256)
    if name == "carry":
        sizes = {"REVERSE": True, "CARRIED": taylor_triton.CARRIED}
    absent = {argument: None for argument in kernel.arg_names if argument in GATES and not gated}
    compile_kernel(kernel, {**sizes, **absent}, has_products=name != "carry")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["merge", "query_gradient", "key_gradient"])
def test_the_window_kernels_compile_for_a_gpu(name, head_dim, compile_kernel):
    from kermit_hf import window_triton

    states = torch.empty(1, 2, 1, head_dim, dtype=torch.bfloat16)
    sizes = window_triton._sizes(states, states[:, :1], 128, True)
    if name == "merge":
        sizes |= {"NUM_SINKS": 4, "SINKS": 16}
    compile_kernel(getattr(window_triton, f"_{name}_kernel"), sizes)


@pytest.fixture
def compile_kernel(tmp_path, monkeypatch):
    """Compiles a kernel for these sizes and launch options, and checks what its programs need."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # a compiled kernel kept from an earlier run proves nothing

    def check(kernel, sizes: dict[str, object], has_products: bool = True) -> None:
        options = {name: sizes[name] for name in ("num_warps", "num_stages") if name in sizes}
        constants = {name: size for name, size in sizes.items() if name not in options}
        signature = {
            name: "constexpr" if name in constants else INTEGERS.get(name, "*bf16" if name in STATES else "*fp32")
            for name in kernel.arg_names
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= SHARED_BYTES
        assert stack_bytes(compiled.asm["cubin"], tmp_path) <= STACK_BYTES
        assert bool(re.search(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])) == has_products

    return check


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
