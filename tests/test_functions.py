"""Autograd functions called without autograd: the same results, and nothing of `apply`."""

import pytest
import torch

from kermit_hf.depthwise_conv import _DepthwiseConv
from kermit_hf.far_field import _Divide
from kermit_hf.feature_maps import _EluPlusOne, _Normalize
from kermit_hf.functions import apply_function
from kermit_hf.kermit_attention import _Rotate
from nystromformer_hf.nystrom_attention import _SegmentMeans


ANGLES = torch.linspace(0.0, 3.0, 4).repeat(2)
CASES = {
    "depthwise_conv": (_DepthwiseConv, torch.linspace(-1.0, 1.0, 24).view(8, 1, 3), 2, 0),
    "divide": (_Divide, torch.linspace(1.0, 2.0, 10).view(2, 5, 1)),
    "elu": (_EluPlusOne,),
    "normalize": (_Normalize,),
    "rotate": (_Rotate, ANGLES.cos(), ANGLES.sin()),
    "segment_means": (_SegmentMeans, 5),
}


def as_tuple(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_apply(name, monkeypatch):
    function, *others = CASES[name]
    others = [other.double() if isinstance(other, torch.Tensor) else other for other in others]
    states = torch.randn(
        (1, 2, 10, 4) if name == "segment_means" else (2, 5, 8), dtype=torch.float64, requires_grad=True
    )
    expected = as_tuple(apply_function(function, states, *others))
    assert all(result.grad_fn is not None for result in expected)
    assert torch.autograd.gradcheck(lambda inputs: apply_function(function, inputs, *others), states)
    assert torch.autograd.gradgradcheck(lambda inputs: apply_function(function, inputs, *others), states)

    monkeypatch.setattr(function, "apply", lambda *inputs: pytest.fail("apply is not needed here"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            results = as_tuple(apply_function(function, states, *others))
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
