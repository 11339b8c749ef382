"""What this machine can do at best: its rate of multiplications and its copy bandwidth, both measured."""

from typing import NamedTuple

import torch

from .measure import on_gpu, seconds_of


# Far larger than any cache, and large enough that starting does not count.
MATRIX_SIZE, COPIED_BYTES = {False: 2048, True: 8192}, {False: 256 * 2**20, True: 2**30}


class Roofline(NamedTuple):
    """multiplications: a second, each with its addition, in matrix products of torch's default dtype; bytes: read and
    written a second, together, by a copy."""

    multiplications: float
    bytes: float

    def best(self, other: "Roofline") -> "Roofline":
        """The higher of both rates: other work on the machine only ever makes it look slower."""
        return Roofline(*map(max, self, other))

    def __str__(self) -> str:
        return f"matrix products {self.multiplications / 1e9:,.1f} G multiplications/s, copies {self.bytes / 1e9:,.1f} GB/s"


def measure_roofline(repeats: int = 5, matrix_size: int | None = None, copied_bytes: int | None = None) -> Roofline:
    """The best of `repeats` square matrix products and copies."""
    size, count = matrix_size or MATRIX_SIZE[on_gpu()], copied_bytes or COPIED_BYTES[on_gpu()]
    left, right = torch.randn(size, size), torch.randn(size, size)
    product = torch.empty_like(left)
    source = torch.ones(count, dtype=torch.uint8)
    target = torch.empty_like(source)
    multiply = min(seconds_of(lambda: torch.matmul(left, right, out=product)) for _ in range(1 + repeats))
    copy = min(seconds_of(lambda: target.copy_(source)) for _ in range(1 + repeats))
    return Roofline(size**3 / multiply, 2 * count / copy)
