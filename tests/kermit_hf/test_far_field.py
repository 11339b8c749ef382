"""The far field's own gradients: of the division by the denominator.

What it gives as a part of the attention is tested in `test_kermit_attention`.
"""

import torch

from kermit_hf import far_field


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
