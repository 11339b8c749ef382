"""Tiled attention against one explicit softmax over near and far keys."""

import pytest
import torch

from nystromformer_hf import causal_nystrom_attention
from nystromformer_hf.causal_nystrom_attention import causal_nystrom_blocked, context_of_whole_text
from nystromformer_hf.tiled_attention import Tile, can_tile, tiled_attention


EXACT = {"atol": 1e-10, "rtol": 1e-10}
LENGTH, SLOTS, FAR, HEADS, KV_HEADS, HEAD_DIM = 26, 30, 7, 4, 2, 6


def draw(count, length, dtype=torch.float64):
    return torch.randn(2, count, length, HEAD_DIM, dtype=torch.float64).to(dtype)


def inputs(dtype=torch.float64):
    counts = ((HEADS, LENGTH), (KV_HEADS, SLOTS), (KV_HEADS, SLOTS), (HEADS, FAR), (HEADS, FAR))
    return [draw(*count, dtype) for count in counts]


def random_bias(*shape):
    """Some keys hidden, the first of each query never."""
    bias = torch.randn(shape, dtype=torch.float64)
    hidden = torch.rand(shape) < 0.3
    hidden[:, :1] = False
    return bias.masked_fill(hidden, float("-inf"))


def some_tiles(dtype=torch.float64):
    """Every kind: without a near field, without a far one, one block, several, with windows that overlap or leave gaps."""
    tiles = [
        Tile(0, 2, 2, 0, None, (random_bias(2, 1),)),
        Tile(2, 5, 3, 1, random_bias(3, 4), None),
        Tile(5, 9, 4, 0, random_bias(4, 9), (random_bias(4, 2), random_bias(4, 1))),
        Tile(9, 21, 3, 5, random_bias(3, 8), (random_bias(12, 1), random_bias(12, 4))),
        Tile(21, 25, 2, 26, random_bias(2, 1), (random_bias(4, FAR),)),
        Tile(25, 26, 1, 26, random_bias(1, 4), (random_bias(1, 0), random_bias(1, 3))),
    ]
    return [
        tile._replace(
            near_bias=None if tile.near_bias is None else tile.near_bias.to(dtype),
            far_bias=None if tile.far_bias is None else tuple(part.to(dtype) for part in tile.far_bias),
        )
        for tile in tiles
    ]


def explicit(query, key, value, far_key, far_value, tiles, scaling):
    bias = query.new_full((LENGTH, SLOTS + FAR), float("-inf"), dtype=torch.float64)
    for tile in tiles:
        for index in range(tile.begin, tile.end):
            if tile.near_bias is not None:
                block, row = divmod(index - tile.begin, tile.block)
                low = tile.low + block * tile.block
                bias[index, low : low + tile.near_bias.shape[1]] = tile.near_bias[row].double()
            if tile.far_bias is not None:
                far = torch.cat(tile.far_bias, -1)[index - tile.begin].double()
                bias[index, SLOTS : SLOTS + len(far)] = far
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (key, value))
    keys, values = torch.cat([key, far_key], 2), torch.cat([value, far_value], 2)
    return (query @ keys.mT * scaling + bias).softmax(-1) @ values


class TestTiledAttention:
    def test_output_and_gradients_are_those_of_one_softmax(self):
        tiles, weight = some_tiles(), draw(HEADS, LENGTH)
        results = []
        for form in (tiled_attention, explicit):
            torch.manual_seed(0)
            tensors = [tensor.requires_grad_() for tensor in inputs()]
            output = form(*tensors, tiles, 0.4)
            results.append((output, *torch.autograd.grad((output * weight).sum(), tensors)))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, **EXACT)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_half_precision_is_that_of_its_inputs_alone(self, dtype):
        tensors, tiles = [tensor.requires_grad_() for tensor in inputs(dtype)], some_tiles(torch.float32)
        output = tiled_attention(*tensors, tiles, 0.4)
        assert output.dtype == torch.float32
        expected = explicit(*(tensor.double() for tensor in tensors), tiles, 0.4)
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        output.sum().backward()
        assert all(tensor.grad.dtype == dtype and torch.isfinite(tensor.grad).all() for tensor in tensors)

    def test_any_layout_of_memory(self):
        """As projections leave it, with the last axis not contiguous, and a gradient of one repeated number."""
        tiles, tensors = some_tiles(), inputs()
        expected = tiled_attention(*tensors, tiles, 0.4)
        for axes in ((1, 2), (2, 3), (0, 1)):
            strided = [t.transpose(*axes).contiguous().transpose(*axes).requires_grad_() for t in tensors]
            output = tiled_attention(*strided, tiles, 0.4)
            torch.testing.assert_close(output, expected, **EXACT)
            gradients = torch.autograd.grad(output.sum(), strided)
            one_by_one = torch.autograd.grad((tiled_attention(*strided, tiles, 0.4) * 1.0).sum(), strided)
            for one, other in zip(gradients, one_by_one, strict=True):
                torch.testing.assert_close(one, other, **EXACT)

    def test_numerical_gradient(self):
        tiles = some_tiles()
        tensors = [tensor.requires_grad_() for tensor in inputs()]
        assert torch.autograd.gradcheck(lambda *t: tiled_attention(*t, tiles, 0.4), tensors, fast_mode=True)

    @pytest.mark.parametrize("loss", [torch.sum, lambda output: output.square().sum()])
    def test_second_derivatives_are_refused(self, loss):
        """To any of the inputs, also in front of them, where torch would leave the attention out."""
        tiles, tensors = some_tiles(), [tensor.requires_grad_() for tensor in inputs()]
        for tensor in tensors:
            output = loss(tiled_attention(*(2 * tensor for tensor in tensors), tiles, 0.4))
            with pytest.raises(RuntimeError, match=r"second derivatives.*attn_implementation='eager'"):
                torch.autograd.grad(output, tensor, create_graph=True)


class TestWhereItServes:
    @staticmethod
    def attend(query, key, value, dropout=0.0):
        context = context_of_whole_text(query, key, value, 2, False)
        return causal_nystrom_blocked(query, context, 16, 2, None, query.shape[-1] ** -0.5, dropout).output

    @pytest.fixture
    def calls(self, monkeypatch):
        """How many tiles each call was given."""
        calls = []

        def counted(*arguments):
            calls.append(len(arguments[-2]))
            return tiled_attention(*arguments)

        monkeypatch.setattr(causal_nystrom_attention, "tiled_attention", counted)
        return calls

    def test_a_long_text_on_a_cpu(self, calls):
        # 2 sinks; 48 tokens up to the first that sees a landmark; 33 blocks of 64 in tiles of 1,024; 3 tokens
        self.attend(*(draw(2, 2 + 48 + 33 * 64 + 3) for _ in range(3)))
        assert calls == [1 + 1 + 3 + 1]
        self.attend(*(draw(2, 2 + 48 + 3 * 64) for _ in range(3)))
        assert len(calls) == 1

    @pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
    def test_not_with_dropout_compiled_or_transformed(self, calls):
        query, key, value = (draw(2, 400) for _ in range(3))
        expected = self.attend(query, key, value)
        assert calls.pop()
        assert not can_tile(query, value, 0.1)
        assert not can_tile(query.to("meta"), value.to("meta"), 0.0)
        self.attend(query, key, value, dropout=0.1)
        mapped = torch.func.vmap(self.attend)(*(tensor[None] for tensor in (query, key, value)))[0]
        torch.testing.assert_close(mapped, expected, **EXACT)
        slope = torch.func.grad(lambda tensor: self.attend(tensor, key, value).sum())(query)
        compiled = torch.compile(self.attend, backend="eager", fullgraph=True)(query, key, value)
        torch.testing.assert_close(compiled, expected, **EXACT)
        assert not calls
        query.requires_grad_()
        torch.testing.assert_close(slope, torch.autograd.grad(self.attend(query, key, value).sum(), query)[0], **EXACT)
        assert calls
