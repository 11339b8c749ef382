"""The feature map "favor" as kernels for CPUs, in float32: what `FavorFeatureMap` computes, in one pass. See favor_cpu.cpp."""

import torch
import torch.nn.functional as F

from .cpu_kernels import contiguous_rows, load_cpu_kernels
from .functions import first_derivative_only


# Rows are padded to whole vectors, of at most this many numbers.
LANES = 16


def favor_queries(query: torch.Tensor, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`FavorFeatureMap.forward_queries`. First derivatives only."""
    return _FavorFeatures.apply(query, directions, True)


def favor_keys(key: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """`FavorFeatureMap.forward_keys`, for keys that are summed. First derivatives only."""
    return _FavorFeatures.apply(key, directions, False)[0]


def _pad(matrix: torch.Tensor) -> torch.Tensor:
    return F.pad(matrix, (0, -matrix.shape[1] % LANES)).contiguous()


class _FavorFeatures(torch.autograd.Function):
    """Returns features and log scale, which keys do not have."""

    @staticmethod
    def forward(ctx, states, directions, are_queries):
        states = contiguous_rows(states)
        directions = directions.float() * states.shape[3] ** -0.25
        features, log_scale = load_cpu_kernels("kermit_hf").favor_forward(
            states, _pad(directions.T), len(directions), are_queries
        )
        ctx.save_for_backward(states, directions, features)
        ctx.are_queries = are_queries
        return features, log_scale

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_features, grad_log_scale):
        states, directions, features = ctx.saved_tensors
        grad = load_cpu_kernels("kermit_hf").favor_backward(
            states, _pad(directions), features, contiguous_rows(grad_features), grad_log_scale, ctx.are_queries
        )
        return grad, None, None
