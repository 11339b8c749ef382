"""On whose kernels Nyström attention of whole texts runs: PyTorch's or our own, in C++ for CPUs and in Triton for GPUs.

On a CPU those in C++ once `python -m nystromformer_hf.compile` has compiled them, and PyTorch's otherwise ("compiled"), unless
another is chosen: those in Triton have not run on a GPU yet, only through its interpreter.

    with kernel_backend("auto"):
        model(**inputs)

or the environment variable NYSTROMFORMER_BACKEND, which also reaches model code that was loaded from the Hub. With "auto" a
backend takes what it has kernels for, on its device, and PyTorch the rest. A backend that is named leaves the same to PyTorch, but
raises `ValueError` where it cannot run at all. Inside of `torch.compile` everything is PyTorch's.

    cpp      the encoder, in float32, without dropout of keys; heads of a multiple of 16; rows longer than there are landmarks,
             whose inverse is iterated
    triton   the causal model, without dropout; heads up to 256 in bfloat16, 128 in other dtypes

Single tokens (decoding) and explicit weights always are PyTorch's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

from .cpu_kernels import are_compiled, takes_cpu_tensors
from .kernel_choice import KernelChoice, device_misfit, fits_kernels


# The vectors of the kernels in C++ are 4, 8 or 16 floats wide, and rows are made of whole vectors.
HEAD_DIM_UNIT = 16
PACKAGES = {"cpp": {}, "triton": {"triton": "triton"}}
CHOICE = KernelChoice("NYSTROMFORMER_BACKEND", PACKAGES, device_misfit, partial(are_compiled, "nystromformer_hf"))


def kernel_backend(name: str) -> AbstractContextManager[None]:
    """Chooses "torch", "cpp" or "triton" inside the `with`, for all threads; "auto" leaves the choice to the tensors, "compiled" does so
    among PyTorch's and those in C++ that are compiled already.

    Raises `ValueError` if the name is unknown or triton is not installed.
    """
    return CHOICE.use(name)


def find_fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_landmarks: int,
    lengths: torch.Tensor | None,
    kernels: torch.Tensor | None,
    *,
    dropout: float,
    refinement_steps: int,
    inverse_regularization: float | None,
    **inverse_options,
) -> Callable[..., torch.Tensor] | None:
    """`nystrom_attention_fused` with these options if it is to serve, else None; arguments as those of `nystrom_attention`, and
    the kernels (heads, kernel_size) of the convolution. Raises `ValueError` if the chosen backend cannot run on their device."""
    if not CHOICE.serves("cpp", query) or dropout > 0.0 or refinement_steps > 0 or inverse_regularization is not None:
        return None
    tensors = query, key, value, *(() if kernels is None else (kernels,))
    if not takes_cpu_tensors(*tensors) or query.shape[-1] % HEAD_DIM_UNIT:
        return None
    shortest = query.shape[2] if lengths is None else lengths.min()
    if shortest <= num_landmarks:
        return None
    from .encoder_cpu import nystrom_attention_fused

    return partial(nystrom_attention_fused, **inverse_options)


def find_landmark_attention(
    query: torch.Tensor, value: torch.Tensor, dropout: float
) -> Callable[..., torch.Tensor] | None:
    """`landmark_attention` if it is to serve queries and values (..., head_dim), else None. Raises `ValueError` if the chosen
    backend cannot run on their device."""
    if not _serve(query, value) or dropout > 0.0:
        return None
    from .landmark_triton import landmark_attention

    return landmark_attention


def find_history_attention(query: torch.Tensor, value: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """`history_attention`, likewise."""
    if not _serve(query, value):
        return None
    from .landmark_triton import history_attention

    return history_attention


def _serve(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether our own kernels are to take these states."""
    fit = fits_kernels(query) and fits_kernels(value) and query.shape[-1] == value.shape[-1]
    return CHOICE.serves("triton", query) and fit
