"""On whose kernels the attention of whole texts runs: PyTorch's, our own in C++ for CPUs and in Triton for GPUs, or
flash-linear-attention's.

On a CPU those in C++ once `python -m kermit_hf.compile` has compiled them, and PyTorch's otherwise ("compiled"), unless another is
chosen: those for GPUs have not run on one yet, only through Triton's interpreter.

    with kernel_backend("auto"):
        model(**inputs)

or the environment variable KERMIT_BACKEND, which also reaches model code that was loaded from the Hub. With "auto" "cpp" takes
what it has a kernel for on a CPU where it can be compiled; on a GPU "triton", then "fla" where it is installed; and PyTorch the
rest. A backend that is named leaves to PyTorch what it has no kernel for, too, but raises `ValueError` where it cannot run at
all. Inside of `torch.compile` and on the meta device everything is PyTorch's.

    cpp      far field: both rules with any feature map, and the norm behind the delta rule; near field, without dropout, merged
             with any far field; in float32
    triton   far field: the additive rule with the feature map "taylor", up to 64 coordinates; near field, merged with any far
             field, of up to 128 sinks (64 for heads above 128); heads up to 256 in bfloat16, 128 in other dtypes
    fla      far field: both rules with any feature map (delta: up to 256 features), in bfloat16; with a forget gate not on a Hopper
             GPU with triton 3.4 to 3.7.0

For single tokens (decoding), where no gradient is needed, "cpp" has kernels of their own, also of windows that nothing has left yet,
and one of everything between the projections of a layer with any feature map of ours; "triton" and "fla" have none. Explicit weights
always are PyTorch's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib import import_module
from typing import NamedTuple

import torch
from packaging.version import Version
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .cpu_kernels import are_compiled, takes_cpu_tensors
from .feature_maps import (
    DpfpFeatureMap,
    EluFeatureMap,
    FavorFeatureMap,
    FeatureMap,
    HedgehogFeatureMap,
    ReluFeatureMap,
    SiluL2FeatureMap,
    TaylorFeatureMap,
)
from .kernel_attention import KernelReadout
from .kernel_choice import KernelChoice, device_misfit, fits_kernels
from .window_attention import WindowOutput, window_blocked


MAX_COORDINATES = 64
# Feature maps of which a layer's step is one kernel, in the order in which step_cpu.cpp numbers them, and the names of their weights
# for queries and for keys.
LAYER_MAPS = {
    SiluL2FeatureMap: (),
    EluFeatureMap: (),
    ReluFeatureMap: (),
    DpfpFeatureMap: (),
    HedgehogFeatureMap: ("query_projection", "key_projection"),
    TaylorFeatureMap: ("query_projection", "key_projection"),
    FavorFeatureMap: ("directions", "directions"),
}


class Kernel(NamedTuple):
    """A chunked form in place of PyTorch's, one for a single token where there is any, and what prepares queries and keys for
    them. takes_mask: tokens that do not enter the memory are named by `key_mask`, not by features of zero. divides: with
    `divides=True` numerators come divided by their denominators, those below 1e-30 taken as that. whole_texts: the chunked form
    is best given a text as a whole, however long. of_parts: the chunked form of parts, see `slots.Parts`, of kernels whose queries and
    keys need no preparation, and which leave out tokens by `key_mask` or a write strength."""

    chunked: Callable[..., KernelReadout]
    map_queries: Callable
    map_keys: Callable
    step: Callable[..., KernelReadout] | None = None
    takes_mask: bool = False
    divides: bool = False
    whole_texts: bool = False
    of_parts: Callable | None = None


def kernel_backend(name: str) -> AbstractContextManager[None]:
    """Chooses "torch", "cpp", "triton" or "fla" inside the `with`, for all threads; "auto" leaves the choice to the tensors,
    "compiled" does so among PyTorch's and those in C++ that are compiled already.

    Raises `ValueError` if the name is unknown or a package is not installed.
    """
    return CHOICE.use(name)


def find_window(query: torch.Tensor, num_sinks: int) -> Callable[..., WindowOutput]:
    """The form of the near field for these queries, (batch, heads, seq, head_dim): `window_blocked` or one in its place.

    Raises `ValueError` if the chosen backend cannot run on their device.
    """
    if CHOICE.serves("triton", query) and fits_kernels(query) and num_sinks <= max_sinks(query.shape[3]):
        from .window_triton import window_merged

        return window_merged
    return window_blocked


def max_sinks(head_dim: int) -> int:
    """How many sinks our Triton kernel takes: all of them are one tile, which has to fit into a GPU's shared memory beside others."""
    return 128 if head_dim <= 128 else 64


def find_fused_window(query: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """What to run instead of rotary positions, scores of sinks and near field of these queries, where nothing is dropped out; None
    where there is nothing. Raises as `find_window` does."""
    if CHOICE.serves("cpp", query) and takes_cpu_tensors(query):
        from .window_cpu import window_fused

        return window_fused
    return None


def find_window_step(query: torch.Tensor, *others: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """What to run instead of rotary positions, scores of sinks and near field of a single query, where none of the states that it
    reads needs a gradient; None where there is nothing. Raises as `find_window` does."""
    if CHOICE.serves("cpp", query) and takes_cpu_tensors(query, *others):
        from .step_cpu import need_gradient, window_step_fused

        return None if need_gradient(query, *others) else window_step_fused
    return None


def find_layer_step(
    update_rule: str, feature_map: FeatureMap, norms: list[Callable], *states: torch.Tensor | None
) -> Callable | None:
    """What to run between the projections of a layer for a token whose window is full; None where there is nothing: it has the feature
    maps of `LAYER_MAPS`, gives no gradients, calls no hooks of norms and has one epsilon for all of them. states: and weights, the
    first one not None.

    Raises `ValueError` if the chosen backend cannot run on their device.
    """
    if type(feature_map) not in LAYER_MAPS or feature_map.unit_norm != (update_rule == "delta"):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not CHOICE.serves("cpp", states[0]):
        return None
    if not takes_cpu_tensors(*(tensor for tensor in states if tensor is not None)):
        return None
    if any(type(norm) is not LlamaRMSNorm or _is_hooked(norm) for norm in norms):
        return None
    if len({norm.variance_epsilon for norm in norms}) > 1:
        return None
    from .step_cpu import layer_step_fused

    return partial(layer_step_fused, feature_map=list(LAYER_MAPS).index(type(feature_map)))


def layer_map_weights(feature_map: FeatureMap) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What `find_layer_step`'s form reads of a feature map for queries and for keys."""
    names = LAYER_MAPS.get(type(feature_map))
    return tuple(getattr(feature_map, name, None) for name in names) if names else (None, None)


def find_kernel(
    update_rule: str,
    map_queries: Callable,
    map_keys: Callable,
    query: torch.Tensor,
    value: torch.Tensor,
    is_gated: bool = False,
) -> Kernel | None:
    """What to run instead of PyTorch's chunked form of the far field; None where there is nothing.

    map_queries, map_keys: methods of a `FeatureMap`. query, value: (batch, heads, seq, head_dim), before the feature map. is_gated:
    with a forget gate.
    Raises `ValueError` if the chosen backend cannot run on their device.
    """
    feature_map = getattr(map_queries, "__self__", None)
    if CHOICE.serves("triton", query) and _has_triton_kernel(update_rule, feature_map, query, value):
        from .taylor_triton import taylor_chunked

        return Kernel(taylor_chunked, feature_map.project_queries, feature_map.project_keys, takes_mask=True)
    if CHOICE.serves("fla", query) and value.dtype == torch.bfloat16 and _takes_gates(is_gated, query.device):
        from .fla_kernels import fla_additive_chunked, fla_delta_chunked

        forms = {"additive": fla_additive_chunked, "delta": fla_delta_chunked}
        return Kernel(forms[update_rule], map_queries, map_keys)
    if CHOICE.serves("cpp", query) and takes_cpu_tensors(query, value):
        return _find_in_cpp(update_rule, map_queries, map_keys)
    return None


def _takes_gates(is_gated: bool, device: torch.device) -> bool:
    return not is_gated or CHOICE.is_fit("fla", gates_misfit(device))


def find_step_kernel(
    update_rule: str, map_queries: Callable, map_keys: Callable, query: torch.Tensor, value: torch.Tensor
) -> Kernel | None:
    """`find_kernel` for a single query, among those with a form for it."""
    if CHOICE.serves("cpp", query) and takes_cpu_tensors(query, value):
        return _find_in_cpp(update_rule, map_queries, map_keys)
    return None


def _find_in_cpp(update_rule: str, map_queries: Callable, map_keys: Callable) -> Kernel:
    feature_map = getattr(map_queries, "__self__", None)
    return {"additive": _additive_in_cpp, "delta": _delta_in_cpp}[update_rule](feature_map, map_queries, map_keys)


def _additive_in_cpp(feature_map: FeatureMap | None, map_queries: Callable, map_keys: Callable) -> Kernel:
    from .additive_cpu import additive_elu_fused, additive_elu_of_parts, additive_fused
    from .step_cpu import additive_elu_step_fused, additive_step_fused

    if type(feature_map) is EluFeatureMap and not feature_map.unit_norm:
        unmapped = _unmapped_queries, _unmapped_keys
        options = {"takes_mask": True, "divides": True, "whole_texts": True, "of_parts": additive_elu_of_parts}
        return Kernel(additive_elu_fused, *unmapped, additive_elu_step_fused, **options)
    if type(feature_map) is FavorFeatureMap and not feature_map.unit_norm:
        from .favor_cpu import favor_keys, favor_queries

        directions = feature_map.directions
        map_queries, map_keys = (partial(form, directions=directions) for form in (favor_queries, favor_keys))
    return Kernel(additive_fused, map_queries, map_keys, additive_step_fused, divides=True)


def _delta_in_cpp(feature_map: FeatureMap | None, map_queries: Callable, map_keys: Callable) -> Kernel:
    from .delta_cpu import delta_fused, delta_silu_fused, delta_silu_of_parts
    from .step_cpu import delta_silu_step_fused, delta_step_fused

    if type(feature_map) is SiluL2FeatureMap and feature_map.unit_norm:
        unmapped = _unmapped_queries, _unmapped_keys
        options = {"whole_texts": True, "of_parts": delta_silu_of_parts}
        return Kernel(delta_silu_fused, *unmapped, delta_silu_step_fused, **options)
    return Kernel(delta_fused, map_queries, map_keys, delta_step_fused, whole_texts=True)


def _unmapped_queries(query: torch.Tensor) -> tuple[torch.Tensor, None]:
    return query, None


def _unmapped_keys(key: torch.Tensor) -> torch.Tensor:
    return key


def find_norm(norm: Callable, states: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The norm of what the delta rule reads, or one in its place for these states, which may overwrite them; never for a norm
    with hooks.

    Raises `ValueError` if the chosen backend cannot run on their device.
    """
    if not takes_cpu_tensors(states) or type(norm) is not LlamaRMSNorm or _is_hooked(norm):
        return norm
    if norm.weight.dtype == torch.float32 and CHOICE.serves("cpp", states):
        from .delta_cpu import rms_norm_fused

        return partial(rms_norm_fused, weight=norm.weight, eps=norm.variance_epsilon)
    return norm


def _is_hooked(module: torch.nn.Module) -> bool:
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any(hooks) or "forward" in vars(module)


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
def gates_misfit(device: torch.device) -> str | None:
    """Why "fla" cannot run rules with a forget gate on a GPU on which it runs others, and what helps; None if it can."""
    if torch.cuda.get_device_capability(device)[0] == 9:
        installed = Version(import_module("triton").__version__)
        if Version("3.4") <= installed < Version("3.7.1"):
            return f"triton {installed} computes its gated rules wrongly on this GPU; install triton 3.7.1 or later"
    return None


PACKAGES = {"cpp": {}, "triton": {"triton": "triton"}, "fla": {"fla-core": "fla", "triton": "triton"}}
CHOICE = KernelChoice("KERMIT_BACKEND", PACKAGES, device_misfit, partial(are_compiled, "kermit_hf"))
