"""Our Triton kernels: right through Triton's interpreter, and compiled for a GPU. Neither needs one."""

from pathlib import Path

import pytest
import torch

from tests.triton_kernels import compile_kernel, run_interpreted


pytest.importorskip("triton", reason="triton is not installed")


def test_the_kernels_are_right_through_the_interpreter():
    run_interpreted(*(Path(__file__).with_name(f"interpreted_{name}.py") for name in ("landmarks", "decoders")))


# Arguments of the kernels: those of the dtype of the states, and whole numbers.
STATES = ("query", "key", "value", "far_key", "far_value", "grad_queries", "grad_keys", "grad_values")
INTEGERS = ("length", "slots", "num_far", "num_keys", "sinks", "part_rows")
# Token indices, `start` and `first`, of one row.
ROWS = torch.zeros(2, 1, dtype=torch.int32)
TEXT_SIZES = [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 16), ("fp32", 64), ("fp32", 128)]


@pytest.mark.parametrize("dtype, head_dim", TEXT_SIZES)
@pytest.mark.parametrize("name", ["attend", "query_gradient", "key_gradient", "far_key_gradient"])
def test_the_kernels_of_texts_compile_for_a_gpu(name, dtype, head_dim, tmp_path):
    from nystromformer_hf.landmark_triton import text_layout

    layout = text_layout(*ROWS, sinks=4, num_sink_tokens=4, segment_size=64, near_segments=2)
    compile_landmark_kernel(name, layout, dtype, head_dim, tmp_path, far_groups=1)


@pytest.mark.parametrize("dtype, head_dim", [("bf16", 64), ("fp32", 128)])
@pytest.mark.parametrize("name", ["attend", "query_gradient", "far_key_gradient"])
def test_the_kernels_of_histories_compile_for_a_gpu(name, dtype, head_dim, tmp_path):
    from nystromformer_hf.landmark_triton import history_layout

    layout = history_layout(*ROWS, segment_size=64)
    compile_landmark_kernel(name, layout, dtype, head_dim, tmp_path, far_groups=2)


def compile_landmark_kernel(name: str, layout, dtype: str, head_dim: int, folder: Path, far_groups: int) -> None:
    """With two heads to a key."""
    from nystromformer_hf import landmark_triton

    states = torch.empty(1, 2, 1, head_dim, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    sizes = landmark_triton._sizes(states, states[:, :1], layout, head_dim**-0.5)
    if name.endswith("key_gradient"):
        is_far = name.startswith("far")
        sizes |= {"IS_FAR": is_far, "VALUE_GROUPS": far_groups if is_far else 2}
    else:
        sizes |= {"FAR_GROUPS": far_groups}
    kinds = dict.fromkeys(STATES, f"*{dtype}") | dict.fromkeys(("starts", "firsts"), "*i32")
    kinds |= dict.fromkeys(INTEGERS, "i32")
    compile_kernel(getattr(landmark_triton, f"_{name.removeprefix('far_')}_kernel"), sizes, kinds, folder)
