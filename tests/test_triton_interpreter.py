"""The hastened interpreter computes what Triton's own does, to the bit."""

import pytest

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
