"""What our Triton kernels share: tiles of matrices in memory, products of tiles, and the running softmax.

Rows and columns are vectors of indices; matrices in memory are contiguous. Indices inside a matrix are int32, which reaches to
2^31 entries, 8 million tokens of 256; where the matrix of a head begins has to be int64.
"""

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("these GPU kernels need the package triton: pip install triton") from error


# The least size of each side of a matrix product.
SMALLEST = 16


def padded(size: int) -> int:
    """The size of a tile that holds `size` columns."""
    return max(triton.next_power_of_2(size), SMALLEST)


def tile_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """bfloat16 if all are, else float32: float16 does not reach as far as sums over a long text."""
    return torch.bfloat16 if all(tensor.dtype == torch.bfloat16 for tensor in tensors) else torch.float32


@triton.jit
def load(pointer, rows, columns, num_rows, num_columns: tl.constexpr):
    """Entries of a matrix (num_rows, num_columns), zero outside of it."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(pointer + rows[:, None] * num_columns + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store(pointer, entries, rows, columns, num_rows, num_columns: tl.constexpr):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    entries = entries.to(pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * num_columns + columns[None, :], entries, mask=inside)


# Triton's interpreter takes the bits of bfloat16 for whole numbers where it multiplies matrices.
INTERPRETED = tl.constexpr(not isinstance(load, triton.JITFunction))


@triton.jit
def dot(left, right, dtype: tl.constexpr):
    """Matrix product of operands rounded to `dtype`, summed in float32; of float32 nearly all digits count."""
    left, right = left.to(dtype), right.to(dtype)
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="tf32x3")


@triton.jit
def take_up(largest, total, output, logits, values, dtype: tl.constexpr):
    """The running softmax of each row with more tokens: its largest logit, and relative to that the sum of exponentials and
    their sum with the values."""
    larger = tl.maximum(largest, tl.max(logits, 1))
    weights, shrink = tl.exp(logits - larger[:, None]), tl.exp(largest - larger)
    return larger, total * shrink + tl.sum(weights, 1), output * shrink[:, None] + dot(weights, values, dtype)
