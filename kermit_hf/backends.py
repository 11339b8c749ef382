"""On whose kernels the attention of whole texts runs: PyTorch's, our own in Triton, or flash-linear-attention's.

PyTorch's, unless another is chosen, because the others have not run on a GPU yet, only through Triton's interpreter:

    with kernel_backend("auto"):
        model(**inputs)

or the environment variable KERMIT_BACKEND, which also reaches model code that was loaded from the Hub. With "auto" tensors
on a CPU stay PyTorch's; on a GPU, outside of `torch.compile`, "triton" takes what it has a kernel for, then "fla" where it is
installed, and PyTorch the rest. A backend that is named leaves to PyTorch what it has no kernel for, too, but raises
`ValueError` where it cannot run at all.

    triton   far field: the additive rule with the feature map "taylor", up to 64 coordinates; near field, merged with any far
             field; heads up to 256 in bfloat16, 128 in other dtypes
    fla      far field: both rules with any feature map (delta: up to 256 features), in bfloat16

Single tokens (decoding) and explicit weights always are PyTorch's.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from packaging.version import Version

from .feature_maps import FeatureMap, TaylorFeatureMap
from .kernel_attention import KernelReadout
from .window_attention import WindowOutput, window_blocked


BACKENDS = ("torch", "auto", "triton", "fla")
PACKAGES = {"triton": ("triton",), "fla": ("fla-core", "triton")}
MODULES = {"fla-core": "fla"}
# Up to where tiles of our own kernels fit into a GPU's shared memory; head_dim by dtype, float16 being treated as float32.
MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 128}
MAX_COORDINATES, MAX_SINKS = 64, 128

# Read once: `torch.compile` cannot look into the environment.
_chosen: str = os.environ.get("KERMIT_BACKEND") or "torch"


class Kernel(NamedTuple):
    """A chunked form in place of PyTorch's, and what prepares queries and keys for it. takes_mask: tokens that do not enter
    the memory are named by `key_mask`, not by features of zero."""

    chunked: Callable[..., KernelReadout]
    map_queries: Callable
    map_keys: Callable
    takes_mask: bool = False


@contextmanager
def kernel_backend(name: str) -> Iterator[None]:
    """Chooses "torch", "triton" or "fla" inside the `with`, for all threads; "auto" leaves the choice to the tensors.

    Raises `ValueError` if the name is unknown or a package is not installed.
    """
    global _chosen
    _check(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def find_window(query: torch.Tensor, num_sinks: int) -> Callable[..., WindowOutput]:
    """The form of the near field for these queries, (batch, heads, seq, head_dim): `window_blocked` or one in its place.

    Raises `ValueError` if the chosen backend cannot run on their device.
    """
    if _chosen == "torch" or (_chosen == "auto" and not query.is_cuda):
        return window_blocked
    if _serves("triton", query) and _fits_tiles(query) and num_sinks <= MAX_SINKS:
        from .window_triton import window_merged

        return window_merged
    return window_blocked


def find_kernel(
    update_rule: str, map_queries: Callable, map_keys: Callable, query: torch.Tensor, value: torch.Tensor
) -> Kernel | None:
    """What to run instead of PyTorch's chunked form of the far field; None where there is nothing.

    map_queries, map_keys: methods of a `FeatureMap`. query, value: (batch, heads, seq, head_dim), before the feature map.
    Raises `ValueError` if the chosen backend cannot run on their device.
    """
    if _chosen == "torch" or (_chosen == "auto" and not query.is_cuda):
        return None
    feature_map = getattr(map_queries, "__self__", None)
    if _serves("triton", query) and _has_triton_kernel(update_rule, feature_map, value):
        from .taylor_triton import taylor_chunked

        return Kernel(taylor_chunked, feature_map.project_queries, feature_map.project_keys, takes_mask=True)
    if _serves("fla", query) and value.dtype == torch.bfloat16:
        from .fla_kernels import fla_additive_chunked, fla_delta_chunked

        forms = {"additive": fla_additive_chunked, "delta": fla_delta_chunked}
        return Kernel(forms[update_rule], map_queries, map_keys)
    return None


def _has_triton_kernel(update_rule: str, feature_map: FeatureMap | None, value: torch.Tensor) -> bool:
    return (
        update_rule == "additive"
        and type(feature_map) is TaylorFeatureMap
        and feature_map.feature_dim <= MAX_COORDINATES
        and _fits_tiles(value)
    )


def _fits_tiles(states: torch.Tensor) -> bool:
    return states.shape[-1] <= MAX_HEAD_DIM.get(states.dtype, 0)


def _serves(name: str, tensor: torch.Tensor) -> bool:
    if _chosen == "auto":
        return not torch.compiler.is_compiling() and _missing(name) is None and _misfit(name, tensor.device) is None
    _check(_chosen)
    if _chosen != name:
        return False
    misfit = _misfit(name, tensor.device)
    if misfit is not None:
        raise ValueError(f"kernel backend {name!r} cannot run: {misfit}, or choose backend 'torch'")
    return True


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} is unknown; allowed are {', '.join(map(repr, BACKENDS))}")
    missing = _missing(name)
    if missing is not None:
        raise ValueError(
            f"kernel backend {name!r} needs the package {missing}, which is not installed; run `pip install {missing}` or "
            "choose backend 'torch'"
        )


@cache
def _missing(name: str) -> str | None:
    """The package that a backend needs and does not find."""
    for package in PACKAGES.get(name, ()):
        if find_spec(MODULES.get(package, package)) is None:
            return package
    return None


@cache
def _misfit(name: str, device: torch.device) -> str | None:
    """Why a backend whose packages are installed cannot run on a device, and what helps; None if it can."""
    if device.type != "cuda":
        interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else f"tensors are on {device.type!r}; move the model to a CUDA device"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is not supported; take an NVIDIA GPU of compute capability 8.0 or later"
    if name == "fla" and torch.cuda.get_device_capability(device)[0] == 9:
        installed = Version(import_module("triton").__version__)
        if Version("3.4") <= installed < Version("3.7.1"):
            return f"triton {installed} computes its gated rules wrongly on this GPU; install triton 3.7.1 or later"
    return None
