"""Tests and benchmarks. They run on PyTorch's operators unless they, or the environment, choose other kernels: whether some lie
compiled on this machine must not change what is tested."""

import os


for variable in ("KERMIT_BACKEND", "NYSTROMFORMER_BACKEND"):
    os.environ.setdefault(variable, "torch")
