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

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from packaging.version import Version

from .feature_maps import FeatureMap, TaylorFeatureMap
from .kernel_attention import KernelReadout
from .kernel_choice import KernelChoice, device_misfit, fits_kernels
from .window_attention import WindowOutput, window_blocked


MAX_COORDINATES, MAX_SINKS = 64, 128


class Kernel(NamedTuple):
    """A chunked form in place of PyTorch's, and what prepares queries and keys for it. takes_mask: tokens that do not enter
    the memory are named by `key_mask`, not by features of zero."""

    chunked: Callable[..., KernelReadout]
    map_queries: Callable
    map_keys: Callable
    takes_mask: bool = False


def kernel_backend(name: str) -> AbstractContextManager[None]:
    """Chooses "torch", "triton" or "fla" inside the `with`, for all threads; "auto" leaves the choice to the tensors.

    Raises `ValueError` if the name is unknown or a package is not installed.
    """
    return CHOICE.use(name)


def find_window(query: torch.Tensor, num_sinks: int) -> Callable[..., WindowOutput]:
    """The form of the near field for these queries, (batch, heads, seq, head_dim): `window_blocked` or one in its place.

    Raises `ValueError` if the chosen backend cannot run on their device.
    """
    if CHOICE.serves("cpp", query) and _fits_cpu_kernels(query):
        from .window_cpu import window_fused

        return window_fused
    if CHOICE.serves("triton", query) and fits_kernels(query) and num_sinks <= MAX_SINKS:
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
    feature_map = getattr(map_queries, "__self__", None)
    if CHOICE.serves("triton", query) and _has_triton_kernel(update_rule, feature_map, query, value):
        from .taylor_triton import taylor_chunked

        return Kernel(taylor_chunked, feature_map.project_queries, feature_map.project_keys, takes_mask=True)
    if CHOICE.serves("fla", query) and value.dtype == torch.bfloat16:
        from .fla_kernels import fla_additive_chunked, fla_delta_chunked

        forms = {"additive": fla_additive_chunked, "delta": fla_delta_chunked}
        return Kernel(forms[update_rule], map_queries, map_keys)
    return None


def _fits_cpu_kernels(states: torch.Tensor) -> bool:
    """Whether our kernels for CPUs take such states: neither `torch.compile` nor `torch.func` can look into them."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return states.dtype == torch.float32 and not traced


def _has_triton_kernel(
    update_rule: str, feature_map: FeatureMap | None, query: torch.Tensor, value: torch.Tensor
) -> bool:
    return (
        update_rule == "additive"
        and type(feature_map) is TaylorFeatureMap
        and feature_map.feature_dim <= MAX_COORDINATES
        and fits_kernels(query)
        and fits_kernels(value)
    )


@cache
def _misfit(name: str, device: torch.device) -> str | None:
    """Why a backend whose packages are installed cannot run on a device, and what helps; None if it can."""
    misfit = device_misfit(name, device)
    if misfit is None and name == "fla" and torch.cuda.get_device_capability(device)[0] == 9:
        installed = Version(import_module("triton").__version__)
        if Version("3.4") <= installed < Version("3.7.1"):
            return f"triton {installed} computes its gated rules wrongly on this GPU; install triton 3.7.1 or later"
    return misfit


PACKAGES = {"cpp": {}, "triton": {"triton": "triton"}, "fla": {"fla-core": "fla", "triton": "triton"}}
CHOICE = KernelChoice("KERMIT_BACKEND", PACKAGES, _misfit)
