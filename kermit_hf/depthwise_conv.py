"""A depthwise convolution along the tokens whose channels lie next to each other, as projections leave them.

torch's `conv1d` wants the tokens of a channel next to each other instead. On a CPU, turning queries, keys and values around costs
more than the attention behind it, and all that comes after has to read strided heads.
"""

import torch
import torch.nn.functional as F

from .functions import apply_function


# Tokens at a time whose gradients, in float32 and up to a thousand channels, stay in a core's caches.
BLOCK = 256


def depthwise_conv(states: torch.Tensor, weight: torch.Tensor, behind: int, ahead: int) -> torch.Tensor:
    """states (batch, seq, channels), taken as zero outside; weight (channels, 1, taps).

    Returns (batch, seq + behind + ahead + 1 - taps, channels): the first one's taps begin `behind` tokens before the first, the
    last one's end `ahead` tokens after the last.
    """
    if states.device.type != "cpu" or torch.compiler.is_compiling():
        return F.conv1d(F.pad(states.mT, (behind, ahead)), weight, groups=len(weight)).mT
    return apply_function(_DepthwiseConv, states, weight, behind, ahead)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(states, weight, behind, ahead):
        # As a picture of one row, its channels last, which is a layout that torch has kernels for.
        picture, padding = states.contiguous().mT[:, :, None], max(behind, ahead)
        result = F.conv2d(picture, weight[:, :, None], padding=(0, padding), groups=len(weight))[:, :, 0].mT
        return result[:, padding - behind : result.shape[1] - (padding - ahead)]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.borders = inputs[2:]

    @staticmethod
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        before_all, after_all = (weight.shape[-1] - 1 - border for border in ctx.borders)
        grad_states = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_states = depthwise_conv(grad, weight.flip(-1).to(grad.dtype), before_all, after_all)
        if ctx.needs_input_grad[1]:
            grad_weight = _correlate(states, grad, weight, ctx.borders[0])
        return grad_states, grad_weight, None, None


def _correlate(states: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, behind: int) -> torch.Tensor:
    """The gradient of the weights: those of a tap from the states that it was multiplied with."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    taps = []
    for shift in range(-behind, weight.shape[-1] - behind):
        seen, part = states[:, max(shift, 0) :], grad[:, max(-shift, 0) :]
        length = min(seen.shape[1], part.shape[1])
        sums = grad.new_zeros(grad.shape[0], BLOCK, grad.shape[2], dtype=dtype)
        for one, other in zip(seen[:, :length].split(BLOCK, 1), part[:, :length].split(BLOCK, 1), strict=True):
            sums[:, : one.shape[1]].addcmul_(one, other)
        taps.append(sums.sum((0, 1)))
    return torch.stack(taps, -1)[:, None].to(weight.dtype)
