"""Whether results depend on the number of threads."""

from collections.abc import Callable, Sequence

import torch


def assert_equal_on_any_number_of_threads(run: Callable[[], Sequence[torch.Tensor]]) -> None:
    """Calls `run` on one thread and on more, at last on more than there are tasks; its tensors have to be equal to the bit."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5, 64):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)
