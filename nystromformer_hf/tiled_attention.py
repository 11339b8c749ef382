"""Exact softmax over a near field that moves along with the queries, and over a far field that all of them share, tile by tile.

Near and far field are two calls of torch's flash attention kernel for CPUs, which also gives the logarithm of the sum of
exponentials, by which the two outputs merge into that of one softmax. So a block of queries meets no keys but its own.
`tile_text` and `tile_history` cut what causal Nyström attention has to attend into such tiles.

Backwards, the kernel given the *merged* output and logarithm finds the weights of the merged softmax, hence its gradient (as in
ring attention, Liu et al. 2023, arXiv 2310.01889). Sums and exponentials are in float32 or wider.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .functions import first_derivative_only


# Queries of a block, about, and of a tile of many blocks: both as fast as any on the processors tried.
TILE_BLOCK, TILE_SIZE = 64, 1024
# Queries of a block by itself, at most.
LONGEST_BLOCK = 512
# Landmarks that read the history together.
HISTORY_TILE = 32


class Tile(NamedTuple):
    """Queries `begin` ... `end`, in blocks of `block`. Block i sees the slots from low + i * block on, as many as near_bias
    (block, slots) has columns, and each query the first far keys, as many as the parts of far_bias, (end - begin, keys) each,
    have columns together.

    The biases are added to the scores; a field that is None does not exist. Every query sees something of every field.
    """

    begin: int
    end: int
    block: int
    low: int
    near_bias: torch.Tensor | None
    far_bias: tuple[torch.Tensor, ...] | None


def tile_text(
    start: int,
    end: int,
    first: int,
    sinks: int,
    segment_size: int,
    near_segments: int,
    bias: Callable[..., torch.Tensor],
) -> list[Tile]:
    """For the queries of tokens `start` ... `end`, most of which have a whole near field, on slots whose first is token
    `first`; far keys are `sinks`, then landmarks. None where segments are too long for blocks or queries too few.

    Blocks of whole segments, alike but for the number of older landmarks, and single blocks in front of and behind them.
    bias(begin, stop, low, high, sinks=0, landmarks=0): what is added to the scores of tokens begin ... stop for landmarks, sinks
    and tokens low ... high, (stop - begin, all of these).
    """
    block = max(round(TILE_BLOCK / segment_size), 1) * segment_size
    if block > 4 * TILE_BLOCK:
        return []
    behind = near_segments * segment_size
    # One segment behind the first whole near field, so that there is a landmark to see.
    uniform = max(-(-start // segment_size) * segment_size, behind + segment_size)
    if end - uniform < 4 * block:
        return []
    rest, size = uniform + (end - uniform) // block * block, TILE_SIZE // block * block
    front = [*range(start, 0, LONGEST_BLOCK), *range(max(start, 0), uniform, LONGEST_BLOCK)]
    borders = [*front, *range(uniform, rest, size), rest, *([end] if rest < end else [])]

    # Every uniform tile sees a part of what the last one sees.
    last = uniform + (rest - 1 - uniform) // size * size
    near = bias(uniform, uniform + block, uniform - behind, uniform + block)
    steps = bias(last, last + size, 0, 0, landmarks=(last + size - 1) // segment_size - near_segments)
    every_sink = steps.new_zeros(size, sinks)

    tiles = []
    for begin, stop in itertools.pairwise(borders):
        seen = max((stop - 1) // segment_size - near_segments, 0)
        if uniform <= begin < rest:
            offset = (last - begin) // segment_size
            far = (every_sink[: stop - begin], steps[: stop - begin, offset : offset + seen])
            tiles.append(Tile(begin - start, stop - start, block, begin - behind - first, near, far))
            continue
        low = max((begin // segment_size - near_segments) * segment_size, 0)
        own = bias(begin, stop, low, stop) if begin >= 0 else None
        far = (bias(begin, stop, 0, 0, sinks=sinks), bias(begin, stop, 0, 0, landmarks=seen)) if sinks + seen else None
        tiles.append(Tile(begin - start, stop - start, stop - begin, low - first, own, far))
    return tiles


def tile_history(complete: int, count: int, tokens: int, segment_size: int, like: torch.Tensor) -> list[Tile]:
    """For `count` landmarks behind `complete` older ones, each of which sees all of `tokens` up to the end of its own segment.

    None where they are too few. like: a tensor of the biases' dtype and device.
    """
    if count <= HISTORY_TILE:
        return []
    last = (count - 1) // HISTORY_TILE * HISTORY_TILE
    seen = torch.arange(last + 1, last + HISTORY_TILE + 1, device=like.device)[:, None] + complete
    token = torch.arange((complete + last + HISTORY_TILE) * segment_size, device=like.device)
    bias = torch.where(token < seen * segment_size, like.new_zeros(()), float("-inf"))
    tiles = []
    for begin in range(0, count, HISTORY_TILE):
        end = min(begin + HISTORY_TILE, count)
        low, size = (last - begin) * segment_size, min((complete + end) * segment_size, tokens)
        tiles.append(Tile(begin, end, end - begin, 0, None, (bias[: end - begin, low : low + size],)))
    return tiles


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    far_key: torch.Tensor,
    far_value: torch.Tensor,
    tiles: list[Tile],
    scaling: float,
) -> torch.Tensor:
    """query (batch, heads, seq, head_dim); key, value (batch, kv_heads, slots, head_dim); far_key, far_value (batch, heads,
    far keys, head_dim); `tiles` cover all queries. Returns (batch, heads, seq, head_dim), at least in float32."""
    # The kernel takes the last axis for contiguous without looking.
    tensors = [
        tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value, far_key, far_value)
    ]
    return _TiledAttention.apply(*tensors, tiles, scaling)


def can_tile(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the kernel serves: plain CPU tensors without dropout, neither traced nor transformed."""
    return (
        query.device.type == "cpu"
        and dropout == 0.0
        and query.shape[-1] == value.shape[-1]
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
    )


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, far_key, far_value, tiles, scaling):
        dtype = torch.promote_types(query.dtype, torch.float32)
        output, total = query.new_empty(query.shape, dtype=dtype), query.new_empty(query.shape[:3], dtype=dtype)
        for tile in tiles:
            part, part_total = output[:, :, tile.begin : tile.end], total[:, :, tile.begin : tile.end]
            if tile.near_bias is not None:
                for heads, kv_heads in _groups(query, key):
                    near, near_total = _attend(
                        _blocks(query[heads], tile).to(dtype),
                        _windows(key[kv_heads], tile, dtype),
                        _windows(value[kv_heads], tile, dtype),
                        tile.near_bias,
                        scaling,
                    )
                    _blocks(output[heads], tile).copy_(near)
                    _blocks(total[heads], tile).copy_(near_total)
            if tile.far_bias is not None:
                bias = torch.cat(tile.far_bias, -1)
                far, far_total = _attend(
                    query[:, :, tile.begin : tile.end].to(dtype),
                    far_key[:, :, : bias.shape[-1]].to(dtype),
                    far_value[:, :, : bias.shape[-1]].to(dtype),
                    bias,
                    scaling,
                )
                if tile.near_bias is None:
                    part.copy_(far)
                    part_total.copy_(far_total)
                else:
                    merged = torch.logaddexp(part_total, far_total)
                    part.mul_((part_total - merged).exp_()[..., None]).addcmul_(
                        far, (far_total - merged).exp_()[..., None]
                    )
                    part_total.copy_(merged)
        ctx.save_for_backward(query, key, value, far_key, far_value, output, total)
        ctx.tiles, ctx.scaling = tiles, scaling
        return output

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad):
        query, key, value, far_key, far_value, output, total = ctx.saved_tensors
        dtype, scaling = output.dtype, ctx.scaling
        grad_query = torch.empty_like(query, dtype=dtype)
        others = [torch.zeros_like(tensor, dtype=dtype) for tensor in (key, value, far_key, far_value)]
        grad_key, grad_value, *grad_far = others
        for tile in ctx.tiles:
            rows = slice(tile.begin, tile.end)
            grad_tile = grad[:, :, rows].contiguous()
            if tile.near_bias is not None:
                for heads, kv_heads in _groups(query, key):
                    near = _attend_backward(
                        grad_tile[heads].unflatten(1, (-1, tile.block)),
                        _blocks(query[heads], tile).to(dtype),
                        _windows(key[kv_heads], tile, dtype),
                        _windows(value[kv_heads], tile, dtype),
                        _blocks(output[heads], tile),
                        _blocks(total[heads], tile),
                        tile.near_bias,
                        scaling,
                    )
                    _blocks(grad_query[heads], tile).copy_(near[0])
                    _add_windows(grad_key[kv_heads], near[1], tile)
                    _add_windows(grad_value[kv_heads], near[2], tile)
            if tile.far_bias is not None:
                bias = torch.cat(tile.far_bias, -1)
                far = _attend_backward(
                    grad_tile,
                    query[:, :, rows].to(dtype),
                    far_key[:, :, : bias.shape[-1]].to(dtype),
                    far_value[:, :, : bias.shape[-1]].to(dtype),
                    output[:, :, rows],
                    total[:, :, rows],
                    bias,
                    scaling,
                )
                if tile.near_bias is None:
                    grad_query[:, :, rows] = far[0]
                else:
                    grad_query[:, :, rows] += far[0]
                for whole, new in zip(grad_far, far[1:], strict=True):
                    whole[:, :, : new.shape[2]] += new
        grads = zip((grad_query, *others), (query, key, value, far_key, far_value), strict=True)
        return (*(gradient.to(tensor.dtype) for gradient, tensor in grads), None, None)


def _attend(query, key, value, bias, scaling):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias[None, None], scale=scaling
    )


def _attend_backward(grad, query, key, value, output, total, bias, scaling):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, total, 0.0, False, attn_mask=bias[None, None], scale=scaling
    )


def _groups(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[tuple, tuple]]:
    """Indices of (kv_heads, ...) queries and of their keys: for each row of the batch, one head of every group at a time.

    The blocks of a text take the place of an axis that the kernel knows, so that overlapping windows need no copy.
    """
    groups = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        for member in range(groups):
            yield (row, slice(member, None, groups)), (row,)


def _blocks(tensor: torch.Tensor, tile: Tile) -> torch.Tensor:
    """(heads, seq, ...) -> (heads, blocks, block, ...)"""
    return tensor[:, tile.begin : tile.end].unflatten(1, (-1, tile.block))


def _windows(tensor: torch.Tensor, tile: Tile, dtype: torch.dtype) -> torch.Tensor:
    """(kv_heads, slots, head_dim) -> (kv_heads, blocks, slots of a block, head_dim), overlapping views."""
    size = tile.near_bias.shape[-1]
    high = tile.low + tile.end - tile.begin - tile.block + size
    return tensor[:, tile.low : high].to(dtype).unfold(1, size, tile.block).mT


def _add_windows(tensor: torch.Tensor, windows: torch.Tensor, tile: Tile) -> None:
    """Adds each of `windows`, as of `_windows`, where it was taken from."""
    for start, part in enumerate(windows.split(tile.block, 2)):
        low, size = tile.low + start * tile.block, part.shape[2]
        high = low + (part.shape[1] - 1) * tile.block + size
        tensor[:, low:high].unfold(1, size, tile.block).mT.add_(part)
