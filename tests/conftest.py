"""Settings shared by all tests: one thread per xdist worker, fixed seeds."""

import gc
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec


# Workers that each open a thread per core slow each other down several times; the variable also reaches subprocesses.
# It has to be set before torch starts its thread pool.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests import triton_kernels


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from tests.triton_interpreter import hasten

    hasten()

# Examples that differ from run to run, and deadlines that depend on the machine's load, have no place in CI.
settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")


def pytest_collection_finish() -> None:
    """What imports and collecting left stays to the end: looking through it at every collection takes time."""
    gc.freeze()


@pytest.fixture
def on_kernel_device() -> Iterator[None]:
    """Tensors are made where our Triton kernels can run."""
    device = triton_kernels.kernel_device()
    if device is None:
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    # A CPU is where they are made anyway, and `torch.compile` would trace the mode at every operation.
    with nullcontext() if device == "cpu" else torch.device(device):
        yield


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whichever worker runs it and in whichever order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
