"""The kernels in C++ for processors with narrower vectors than this one: their tests again, compiled for those."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kermit_hf.cpu_kernels import cpu_misfit


ROOT = Path(__file__).parents[1]
FILES = sorted(str(file) for file in ROOT.glob("tests/*_hf/test_*_cpu.py"))
MISFIT = cpu_misfit(torch.device("cpu"))
# From narrow to wide; names are those of ATEN_CPU_CAPABILITY.
CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.skipif(MISFIT is not None, reason=str(MISFIT))
@pytest.mark.parametrize("capability", ["avx2", pytest.param("default", marks=pytest.mark.slow)])
def test_kernels_hold_on_processors_with_narrower_vectors(capability):
    own = torch.backends.cpu.get_cpu_capability().lower()
    narrower = CAPABILITIES[: CAPABILITIES.index(own)] if own in CAPABILITIES else []
    if capability not in narrower:
        pytest.skip(f"the other tests run on {own} already")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *FILES]
    # A worker of pytest-xdist hands its own settings down.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
