"""Our Triton kernels: right through Triton's interpreter, and compiled for a GPU. Neither needs one."""

from pathlib import Path

import pytest
import torch

from tests.triton_kernels import compile_kernel, run_interpreted


pytest.importorskip("triton", reason="triton is not installed")


def test_the_kernels_are_right_through_the_interpreter():
    run_interpreted(*(Path(__file__).with_name(f"interpreted_{name}.py") for name in ("taylor", "window", "models")))


# Arguments of the kernels: those of the values' dtype, whole numbers, and those that are absent without gates and padding.
STATES = ("query", "key", "value", "states", "rows", "grad_queries", "grad_keys", "grad_values")
KINDS = dict.fromkeys(STATES, "*bf16") | dict.fromkeys(("first", "second", "first_real"), "*i32")
KINDS |= dict.fromkeys(("length", "slots", "num_chunks", "size"), "i32")
GATES = {"keep", "coarse", "fine", "decay_in", "weight", "write", "decay", "grad_decays", "sums"}


@pytest.mark.parametrize("head_dim, gated", [(64, True), (128, False)])
@pytest.mark.parametrize("name", ["write", "carry", "read", "query_gradient", "key_gradient"])
def test_the_taylor_kernels_compile_for_a_gpu(name, head_dim, gated, tmp_path):
    from kermit_hf import taylor_triton

    kernel = getattr(taylor_triton, f"_{name}_kernel")
    sizes = taylor_triton._sizes(torch.empty(1, 2, 1, 16, dtype=torch.bfloat16), head_dim, 1, 256)
    if name == "carry":
        sizes = {"REVERSE": True, "CARRIED": taylor_triton.CARRIED}
    absent = {argument: None for argument in kernel.arg_names if argument in GATES and not gated}
    compile_kernel(kernel, {**sizes, **absent}, KINDS, tmp_path, has_products=name != "carry")


@pytest.mark.parametrize("dtype, head_dim", [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 16)])
@pytest.mark.parametrize("name", ["merge", "query_gradient", "key_gradient"])
def test_the_window_kernels_compile_for_a_gpu(name, dtype, head_dim, tmp_path):
    """With as many sinks as they take."""
    from kermit_hf import window_triton
    from kermit_hf.backends import max_sinks

    states = torch.empty(1, 2, 1, head_dim, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    sizes = window_triton._sizes(states, states[:, :1], 128, True)
    if name == "merge":
        sizes |= {"NUM_SINKS": max_sinks(head_dim), "SINKS": max_sinks(head_dim)}
    kinds = KINDS | dict.fromkeys(STATES, f"*{dtype}")
    compile_kernel(getattr(window_triton, f"_{name}_kernel"), sizes, kinds, tmp_path)
