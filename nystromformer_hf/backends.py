"""On whose kernels causal Nyström attention of whole texts runs: PyTorch's or our own in Triton.

PyTorch's, unless another is chosen, because ours have not run on a GPU yet, only through Triton's interpreter:

    with kernel_backend("auto"):
        model(**inputs)

or the environment variable NYSTROMFORMER_BACKEND, which also reaches model code that was loaded from the Hub. With "auto" tensors
on a CPU stay PyTorch's, as does everything inside of `torch.compile`; on a GPU, "triton" takes what it has kernels for: heads up
to 256 in bfloat16, 128 in other dtypes, without dropout. "triton" by name leaves the same to PyTorch, but raises `ValueError`
where it cannot run at all.

Single tokens (decoding) and explicit weights always are PyTorch's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .kernel_choice import KernelChoice, device_misfit, fits_kernels


CHOICE = KernelChoice("NYSTROMFORMER_BACKEND", {"cpp": {}, "triton": {"triton": "triton"}}, device_misfit)


def kernel_backend(name: str) -> AbstractContextManager[None]:
    """Chooses "torch" or "triton" inside the `with`, for all threads; "auto" leaves the choice to the tensors.

    Raises `ValueError` if the name is unknown or triton is not installed.
    """
    return CHOICE.use(name)


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
