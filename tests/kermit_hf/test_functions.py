"""Autograd functions called without autograd: the same results, and nothing of `apply`."""

import pytest
import torch

from kermit_hf.depthwise_conv import _DepthwiseConv
from kermit_hf.far_field import _Divide
from kermit_hf.feature_maps import _EluPlusOne, _Normalize
from kermit_hf.functions import apply_function
from kermit_hf.kermit_attention import _Rotate


ANGLES = torch.linspace(0.0, 3.0, 4).repeat(2)
CASES = {
    "depthwise_conv": (_DepthwiseConv, torch.randn(8, 1, 3), 2, 0),
    "divide": (_Divide, torch.rand(2, 5, 1) + 1.0),
    "elu": (_EluPlusOne,),
    "normalize": (_Normalize,),
    "rotate": (_Rotate, ANGLES.cos(), ANGLES.sin()),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_apply(name, monkeypatch):
    function, *others = CASES[name]
    states = torch.randn(2, 5, 8, requires_grad=True)
    expected = apply_function(function, states, *others)
    assert expected.grad_fn is not None
    expected.sum().backward()
    assert states.grad.isfinite().all() and states.grad.any()

    monkeypatch.setattr(function, "apply", lambda *inputs: pytest.fail("apply is not needed here"))
    with torch.no_grad():
        assert torch.equal(apply_function(function, states, *others), expected)
    with torch.inference_mode():
        assert torch.equal(apply_function(function, states, *others), expected)
