"""Slots taken from a text, and their gradients."""

import pytest
import torch

from kermit_hf.slots import TakePart, slots_of_text, take_slots, with_sinks_taken
from tests.kermit_hf.test_kermit_attention import relative_error


# Of the second row one slot twice, as of a row that is shorter than its sinks.
PARTS = {"slice": slice(2, 7), "slots": torch.tensor([[0, 1, 2], [5, 8, 8]])}


class TestPartOfATensor:
    """Its gradient meets that of the whole tensor in place: the same sums as autograd's."""

    @pytest.mark.parametrize("slots", PARTS.values(), ids=PARTS)
    @pytest.mark.parametrize("uses", ["both", "part", "rest"])
    def test_gradients_are_those_of_taking_it_by_itself(self, uses, slots):
        tensor, weights = torch.randn(2, 3, 9, 4).requires_grad_(), torch.randn(2, 3, 9, 4)

        def total(part: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            parts = {"part": (part.sin() * take(weights)).sum(), "rest": (rest.square() * weights).sum()}
            return sum(parts.values()) if uses == "both" else parts[uses]

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:, :, slots] if isinstance(slots, slice) else take_slots(tensor, slots, dim=2)

        taken = TakePart.apply(tensor, slots)
        assert torch.equal(taken[0], take(tensor))
        assert torch.equal(taken[1], tensor)
        (grad,) = torch.autograd.grad(total(*taken), tensor)
        (expected,) = torch.autograd.grad(total(take(tensor), tensor), tensor)
        assert relative_error(grad, expected) < 1e-6

    @pytest.mark.parametrize("slots", PARTS.values(), ids=PARTS)
    def test_a_graph_that_is_kept_gives_the_same_gradient_again(self, slots):
        tensor = torch.randn(2, 3, 9, 4).requires_grad_()
        part, rest = TakePart.apply(tensor, slots)
        total = part.sin().sum() + rest.square().sum()
        grads = [torch.autograd.grad(total, tensor, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads)


@pytest.mark.parametrize("first_real", [0, 3, torch.tensor([0, 7])])
def test_sinks_are_the_first_real_tokens(first_real):
    """The second row of the last case has two tokens for three sinks: it repeats its last one."""
    keys, values = torch.randn(2, 2, 2, 9, 4).requires_grad_()
    slots = slots_of_text(keys, values, {}, first_real, 3)
    for row in range(2):
        first = int(first_real[row]) if isinstance(first_real, torch.Tensor) else first_real
        expected = [min(first + index, 8) for index in range(3)]
        assert torch.equal(slots.sink_keys[row], keys[row, :, expected])
        assert torch.equal(slots.sink_values[row], values[row, :, expected])


@pytest.mark.parametrize("first_real", [0, 3, torch.tensor([0, 7])])
def test_sinks_taken_from_tokens_are_the_same_with_the_same_gradients(first_real):
    states = torch.randn(2, 2, 2, 9, 4).requires_grad_()
    slots = slots_of_text(*states, {}, first_real, 3)
    taken = with_sinks_taken(slots)
    names = ("keys", "values", "sink_keys", "sink_values")
    grads = []
    for each in (slots, taken):
        total = sum((index + getattr(each, name).sin().square()).sum() for index, name in enumerate(names))
        grads.append(torch.autograd.grad(total, states, retain_graph=True)[0])
    assert relative_error(grads[1], grads[0]) < 1e-6
    for name in names:
        assert torch.equal(getattr(taken, name), getattr(slots, name))
        assert getattr(taken, name).grad_fn.name() == "TakePartBackward"
