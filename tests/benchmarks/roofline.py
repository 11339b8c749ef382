"""What this machine can do at best: its rate of multiplications and its copy bandwidth, both measured."""

from typing import NamedTuple

import torch

from .measure import MatrixProduct, on_gpu, seconds_of


# Far larger than any cache; on a GPU or not.
COPIED_BYTES = {False: 256 * 2**20, True: 2**30}


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


def measure_roofline(repeats: int = 5) -> Roofline:
    """The best of `repeats` matrix products and copies."""
    product = MatrixProduct()
    source = torch.ones(COPIED_BYTES[on_gpu()], dtype=torch.uint8)
    target = torch.empty_like(source)
    multiplications = max(product.rate() for _ in range(1 + repeats))
    copy = min(seconds_of(lambda: target.copy_(source)) for _ in range(1 + repeats))
    return Roofline(multiplications, 2 * source.nbytes / copy)
