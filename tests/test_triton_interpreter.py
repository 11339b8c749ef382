"""The hastened interpreter computes what Triton's own does, to the bit; tests of kernels run on a GPU instead where there is one."""

import pytest
import torch

from tests import triton_kernels
from tests.triton_kernels import run_python


pytest.importorskip("triton", reason="triton is not installed")

# Outputs and gradients of every attention that has kernels in Triton.
PROGRAM = """
import hashlib
import torch
from kermit_hf.taylor_triton import taylor_chunked
from kermit_hf.window_triton import window_merged
from nystromformer_hf.landmark_triton import landmark_attention

states = [torch.randn(1, 2, length, 8, requires_grad=True) for length in (70, 70, 70, 9, 9)]
gate = torch.nn.functional.logsigmoid(torch.randn(1, 2, 70)).requires_grad_()
results = [
    landmark_attention(*states, 0, 0, 2, 2, 4, 1, 8**-0.5),
    window_merged(*states[:3], 5).output,
    *taylor_chunked(*states[:3], gate)[:2],
    landmark_attention(*(state.bfloat16() for state in states), 0, 0, 2, 2, 4, 1, 8**-0.5),
]
results += torch.autograd.grad(sum(result.square().sum() for result in results), [*states, gate])
digest = hashlib.sha256()
for result in results:
    assert result.isfinite().all()
    digest.update(result.detach().numpy().tobytes())
print("digest", digest.hexdigest())
"""


def test_what_kernels_compute_stays_the_same():
    digests = []
    for hasten in ("", "from tests.triton_interpreter import hasten; hasten()\n"):
        seed = "import torch; torch.manual_seed(0); torch.set_num_threads(1)\n"
        result = run_python(hasten + seed + PROGRAM, TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stderr[-2000:]
        digests.append(result.stdout.split("digest ")[1])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("variable", ["1", "0", ""])
def test_kernels_are_interpreted_on_a_cpu_or_run_on_a_gpu(variable, has_gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert triton_kernels.kernel_device() == ("cpu" if variable == "1" else "cuda" if has_gpu else None)


def test_tests_of_kernels_make_their_tensors_there(request, monkeypatch):
    """A device that every machine has stands for the GPU."""
    monkeypatch.setattr(triton_kernels, "kernel_device", lambda: "meta")
    request.getfixturevalue("on_kernel_device")
    assert torch.empty(0).device.type == "meta"
