"""Whose kernels run in place of PyTorch's: one choice for each package, made by a context manager or an environment variable.

"compiled", unless another is chosen: on a CPU those in C++, where they have been compiled. Those for GPUs have only run through
Triton's interpreter yet. With "auto" every backend is taken for tensors on the device it is made for, if it can run there; that in
C++ is compiled where it has not been. On the meta device and inside of `torch.compile` PyTorch's serve, whatever is chosen.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

from .cpu_kernels import cpu_misfit


# Up to where tiles of our own kernels fit into a GPU's shared memory; head_dim by dtype, float16 being treated as float32.
MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}
# CUDA's limit on the second and third axis of a grid, along which our kernels count the heads of a batch.
MAX_ROWS = 65_535


class KernelChoice:
    """packages: what each backend but PyTorch's needs, and as what it is imported. misfit(backend, device): why it cannot run
    there and what helps, None if it can. are_compiled(): whether the kernels in C++ are.

    The environment variable is read once: `torch.compile` cannot look into the environment.
    """

    def __init__(
        self,
        variable: str,
        packages: dict[str, dict[str, str]],
        misfit: Callable[[str, torch.device], str | None],
        are_compiled: Callable[[], bool],
    ):
        self.packages, self.misfit, self.are_compiled = packages, misfit, are_compiled
        self.chosen = os.environ.get(variable) or "compiled"

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside the `with`, for all threads. Raises `ValueError` if the name is unknown or a package is not installed."""
        self.check(name)
        before, self.chosen = self.chosen, name
        try:
            yield
        finally:
            self.chosen = before

    def serves(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a backend is to be taken for this tensor; none is on the meta device, where nothing is computed, and inside of
        `torch.compile`, which cannot look into the launch of a kernel. Raises `ValueError` if it is the chosen one and cannot run."""
        if self.chosen == "torch" or tensor.device.type == "meta" or torch.compiler.is_compiling():
            return False
        if self.chosen == "compiled":
            return name == "cpp" and tensor.device.type == "cpu" and self.are_compiled()
        if self.chosen == "auto":
            if tensor.device.type != ("cpu" if name == "cpp" else "cuda"):
                return False
            return self.missing(name) is None and self.is_fit(name, self.misfit(name, tensor.device))
        self.check(self.chosen)
        return self.chosen == name and self.is_fit(name, self.misfit(name, tensor.device))

    def is_fit(self, name: str, misfit: str | None) -> bool:
        """Whether there is no misfit that keeps a backend from running. Raises `ValueError` if there is one and it is the chosen one."""
        if misfit is not None and self.chosen == name:
            raise ValueError(f"kernel backend {name!r} cannot run: {misfit}, or choose backend 'torch'")
        return misfit is None

    def check(self, name: str) -> None:
        """Raises `ValueError` if the name is unknown or a package is not installed."""
        allowed = "compiled", "torch", "auto", *self.packages
        if name not in allowed:
            raise ValueError(f"kernel backend {name!r} is unknown; allowed are {', '.join(map(repr, allowed))}")
        missing = self.missing(name)
        if missing is not None:
            raise ValueError(
                f"kernel backend {name!r} needs the package {missing}, which is not installed; run `pip install {missing}` "
                "or choose backend 'torch'"
            )

    def missing(self, name: str) -> str | None:
        """The package that a backend needs and does not find."""
        needed = self.packages.get(name, {})
        return next((package for package, module in needed.items() if not _is_installed(module)), None)


def fits_kernels(states: torch.Tensor) -> bool:
    """Whether our own kernels take states (batch, heads, seq, head_dim)."""
    batch, heads, _, head_dim = states.shape
    return head_dim <= MAX_HEAD_DIM.get(states.dtype, 0) and batch * heads <= MAX_ROWS


@cache
def device_misfit(name: str, device: torch.device) -> str | None:
    """Why this backend cannot run on a device, and what helps; None if it can."""
    if name == "cpp":
        return cpu_misfit(device)
    if device.type != "cuda":
        interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"tensors are on {device.type!r}; move the model to a CUDA device"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is not supported; take an NVIDIA GPU of compute capability 8.0 or later"
    return None


@cache
def _is_installed(module: str) -> bool:
    return find_spec(module) is not None
