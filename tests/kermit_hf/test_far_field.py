"""The far field's own gradients: of parts of a tensor and of the division by the denominator.

What it gives as a part of the attention is tested in `test_kermit_attention`.
"""

import pytest
import torch

from kermit_hf import far_field
from tests.kermit_hf.test_kermit_attention import relative_error


class TestPartOfATensor:
    """Its gradient meets that of the whole tensor in place: the same sums as autograd's."""

    @pytest.mark.parametrize("uses", ["both", "part", "rest"])
    def test_gradients_are_those_of_a_slice(self, uses):
        tensor, weights = torch.randn(2, 3, 9, 4).requires_grad_(), torch.randn(2, 3, 9, 4)

        def total(part: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            parts = {"part": (part.sin() * weights[:, :, 2:7]).sum(), "rest": (rest.square() * weights).sum()}
            return sum(parts.values()) if uses == "both" else parts[uses]

        taken = far_field._TakePart.apply(tensor, 2, 7)
        (grad,) = torch.autograd.grad(total(*taken), tensor)
        (expected,) = torch.autograd.grad(total(tensor[:, :, 2:7], tensor), tensor)
        assert relative_error(grad, expected) < 1e-6

    def test_a_graph_that_is_kept_gives_the_same_gradient_again(self):
        tensor = torch.randn(2, 3, 9, 4).requires_grad_()
        part, rest = far_field._TakePart.apply(tensor, 0, 5)
        total = part.sin().sum() + rest.square().sum()
        grads = [torch.autograd.grad(total, tensor, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads)


def test_a_tiny_denominator_leaves_the_gradient_finite():
    """The features of a long key are as small as e^-60: dividing by the square of their sum would overflow float32."""
    numerator = torch.full((1, 1, 3, 4), 1e-21).requires_grad_()
    denominator = torch.tensor([1e-21, 1e-25, 1.0]).view(1, 1, 3).requires_grad_()
    far = far_field.FarReadout(numerator, denominator, None, None, None)
    value, logit = far_field.virtual_token(far, far_field.normalized_value(far, None), torch.zeros(1, 1, 3))
    for gradient in torch.autograd.grad(value.sum() + logit.sum(), (numerator, denominator)):
        assert torch.isfinite(gradient).all()


def test_the_gradient_of_the_far_fields_division():
    inputs = torch.randn(2, 3, 4).double().requires_grad_(), (torch.rand(2, 3, 1).double() + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(far_field._Divide.apply, inputs)
    assert torch.autograd.gradgradcheck(far_field._Divide.apply, inputs)
