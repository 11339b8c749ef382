"""The attention functions against a float64 oracle written from the paper, and their properties."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nystromformer_hf import nystrom_attention as na
from tests.nystromformer_hf import oracle


FORMS = [na.nystrom_attention, na.nystrom_attention_eager]
LENGTHS = [1, 5, 15, 16, 17, 40, 64, 100]


def draw(batch: int, seq_len: int, heads: int = 3, head_dim: int = 8, dtype: torch.dtype = torch.float64) -> list:
    return [torch.randn(batch, heads, seq_len, head_dim).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", na.INVERSE_INITS)
@pytest.mark.parametrize("seq_len", LENGTHS)
def test_equals_the_paper(form, init, seq_len):
    query, key, value = draw(2, seq_len)
    output, weights = form(query, key, value, 16, inverse_iterations=5, inverse_init=init)
    for row in range(2):
        expected = oracle.attention_matrix(query[row].numpy(), key[row].numpy(), 16, 5, init)
        np.testing.assert_allclose(output[row].numpy(), expected @ value[row].numpy(), atol=1e-10)
        if weights is not None:
            np.testing.assert_allclose(weights[row].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seq_len", [12, 64, 100])
def test_rows_of_a_batch_do_not_know_each_other(form, seq_len):
    """Every row equals the oracle on its own tokens, whatever follows them and whatever its neighbours are."""
    lengths = torch.tensor([1, 5, 11, 12, min(16, seq_len), min(17, seq_len), min(50, seq_len), seq_len])
    query, key, value = draw(len(lengths), seq_len)
    output, weights = form(query, key, value, 16, lengths=lengths.clamp(max=seq_len))
    for row, length in enumerate(lengths.tolist()):
        own = [x[row, :, :length].numpy() for x in (query, key, value)]
        expected = oracle.attention_matrix(own[0], own[1], 16)
        np.testing.assert_allclose(output[row, :, :length].numpy(), expected @ own[2], atol=1e-10)
        if weights is not None:
            np.testing.assert_allclose(weights[row, :, :length, :length].numpy(), expected, atol=1e-10)
            assert not weights[row, :, :, length:].any()


@settings(max_examples=25)
@given(data=st.data())
def test_eager_equals_fast_with_gradients(data):
    """In float64, so that a difference of method could not hide behind rounding."""
    seq_len = data.draw(st.integers(1, 48), label="seq_len")
    num_landmarks = data.draw(st.integers(1, 12), label="num_landmarks")
    lengths = data.draw(st.none() | st.lists(st.integers(1, seq_len), min_size=2, max_size=2), label="lengths")
    options = {
        "lengths": None if lengths is None else torch.tensor(lengths),
        "dropout": data.draw(st.sampled_from([0.0, 0.3]), label="dropout"),
        "inverse_init": data.draw(st.sampled_from(na.INVERSE_INITS), label="init"),
        "inverse_regularization": data.draw(st.sampled_from([None, 0.01]), label="regularization"),
        "refinement_steps": data.draw(st.sampled_from([0, 2]), label="refinement"),
    }
    inputs = [x.requires_grad_() for x in draw(2, seq_len, heads=2, head_dim=4)]
    results = []
    for form in FORMS:
        torch.manual_seed(1)
        output, _ = form(*inputs, num_landmarks, **options)
        if lengths is not None:
            output = output * (torch.arange(seq_len) < options["lengths"][:, None])[:, None, :, None]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for fast, eager in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-8, rtol=1e-6)


def test_gradients_are_those_of_the_function():
    inputs = [x.requires_grad_() for x in draw(2, 7, heads=2, head_dim=3)]
    for lengths in (None, torch.tensor([2, 6])):
        torch.autograd.gradcheck(lambda *x, n=lengths: na.nystrom_attention(*x, 3, lengths=n)[0], inputs)


@pytest.mark.parametrize("options", [{}, {"inverse_regularization": 0.1}, {"refinement_steps": 1}])
def test_second_derivatives_of_the_eager_form(options):
    """With the convolution, as `attn_implementation="eager"` has it."""
    weight = torch.randn(2, 1, 4, 1, dtype=torch.float64, requires_grad=True)
    for seq_len, lengths in ((6, None), (7, None), (7, torch.tensor([2, 6]))):
        batch = 1 if lengths is None else len(lengths)
        inputs = [x.requires_grad_() for x in draw(batch, seq_len, heads=2, head_dim=2)]

        def attend(query, key, value, weight, lengths=lengths):
            output, _ = na.nystrom_attention_eager(query, key, value, 3, lengths, **options)
            return na.value_convolution(value, weight, lengths, output)

        assert torch.autograd.gradgradcheck(attend, (*inputs, weight))


def test_second_derivatives_of_the_convolution_alone():
    """Which a gradient that does not depend on the output needs as well."""
    value, _, residual = (x.requires_grad_() for x in draw(2, 40, heads=2, head_dim=3))
    weight = torch.randn(2, 1, 5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v, w, r: na.value_convolution(v, w, None, r), (value, weight, residual))


def test_padding_has_no_influence_and_no_gradient():
    query, key, value = (x.requires_grad_() for x in draw(3, 40))
    lengths = torch.tensor([9, 16, 33])
    real = torch.arange(40) < lengths[:, None]
    output = na.nystrom_attention(query, key, value, 16, lengths)[0]
    loss = output.square().sum(dim=(1, 3))[real].sum()
    for gradient in torch.autograd.grad(loss, (query, key, value)):
        assert gradient.isfinite().all()
        assert not gradient.transpose(1, 2)[~real].any()


@pytest.mark.parametrize("seq_len", [8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_exact_where_landmarks_suffice(form, seq_len):
    query, key, value = draw(2, seq_len, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(form(query, key, value, 16)[0], expected, atol=1e-6, rtol=1e-5)
    padded = [F.pad(x, (0, 0, 0, 30), value=3.0) for x in (query, key, value)]
    output, weights = form(*padded, 16, lengths=torch.tensor([seq_len, seq_len]))
    torch.testing.assert_close(output[:, :, :seq_len], expected, atol=1e-6, rtol=1e-5)
    if weights is not None:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, seq_len + 30), atol=1e-6, rtol=0)


def test_error_falls_as_landmarks_grow():
    """On scores that vary smoothly along the text, as those of neighbouring tokens do."""
    smooth = [F.avg_pool1d(x.flatten(0, 1).mT, 9, 1, 4).mT.unflatten(0, (2, 3)) * 3 for x in draw(2, 128)]
    exact = F.scaled_dot_product_attention(*smooth)
    errors = [
        ((na.nystrom_attention(*smooth, m)[0] - exact).norm() / exact.norm()).item() for m in (2, 4, 8, 16, 32, 64, 128)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]
    assert errors[-1] < 1e-12


def test_weights_sum_to_one_as_closely_as_the_inverse_allows():
    query, key, value = draw(2, 60)
    _, weights = na.nystrom_attention_eager(query, key, value, 12)
    *_, landmarks = na.choose_landmarks(query, key, 12)
    middle = na._softmax_scores(landmarks.query, landmarks.key)
    residual = (landmarks.inverse @ middle).sum(-1).sub(1).abs().amax()
    assert weights.sum(-1).sub(1).abs().amax() <= residual + 1e-12
    _, weights = na.nystrom_attention_eager(query, key, value, 12, inverse_iterations=25)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 60).double(), atol=1e-6, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("lengths", [None, torch.tensor([700, 2048])])
def test_memory_is_linear(lengths):
    """Nothing larger than the queries themselves is built: no (n, n), and no (n, m) either."""
    inputs = draw(2, 2048, heads=2, head_dim=16, dtype=torch.float32)
    with LargestTensor() as largest:
        na.nystrom_attention(*inputs, 32, lengths)
    assert largest.numel <= inputs[0].numel()


def test_iterative_inverse_converges():
    matrix = torch.randn(2, 3, 20, 20).double().softmax(-1)
    for init in na.INVERSE_INITS:
        errors = [(matrix @ na.iterative_inverse(matrix, n, init) - torch.eye(20)).norm().item() for n in (4, 10, 30)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 1e-8


def test_original_scale_is_one_per_text_and_exact_scale_one_per_head():
    matrix = torch.randn(4, 3, 6, 6).double().mul(3).softmax(-1)
    original, exact = (na.iterative_inverse(matrix, 2, init) for init in ("original", "exact"))
    torch.testing.assert_close(na.iterative_inverse(matrix[1:2], 2, "original"), original[1:2])
    torch.testing.assert_close(na.iterative_inverse(matrix[1:2, 2:], 2, "original"), exact[1:2, 2:])


def test_ridge_inverse_minimises_what_it_should():
    matrix = torch.randn(2, 3, 10, 10).double().softmax(-1)
    singular = torch.linalg.svd(matrix)
    expected = singular.Vh.mT @ torch.diag_embed(singular.S / (singular.S**2 + 0.01)) @ singular.U.mT
    torch.testing.assert_close(na.ridge_inverse(matrix, 0.01), expected)


def test_refined_landmarks_are_centres_of_their_tokens():
    states = torch.randn(2, 3, 50, 8)
    start = na.segment_means(states, 10)

    def spread(landmarks):
        return torch.cdist(states, landmarks).amin(-1).square().sum()

    spreads = [spread(na.refine_landmarks(start, states, steps)) for steps in (0, 1, 2, 5)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.95 * spreads[0]


def test_refinement_and_ridge_come_closer_to_softmax_attention():
    """On tokens of a few kinds that are scattered over the text, which segment means blur."""
    kinds = torch.randn(2, 3, 16, 8).double()
    which = torch.randint(16, (2, 3, 256))
    query, key = (
        kinds.gather(2, which[..., None].expand(-1, -1, -1, 8)) * 1.5 + 0.2 * noise for noise in draw(2, 256)[:2]
    )
    value = draw(2, 256)[0]
    exact = F.scaled_dot_product_attention(query, key, value)

    def error(**options):
        return (na.nystrom_attention(query, key, value, 32, **options)[0] - exact).norm() / exact.norm()

    assert error(refinement_steps=1) < 0.8 * error()
    assert error(refinement_steps=1, inverse_regularization=0.01) < 0.8 * error()


def test_refinement_sees_real_tokens_only():
    states, lengths = torch.randn(3, 2, 40, 8), torch.tensor([6, 25, 40])
    refined = na.refine_landmarks(na.segment_means(states, 8, lengths), states, 2, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = states[row : row + 1, :, :length]
        expected = na.refine_landmarks(na.segment_means(own, 8), own, 2 if length > 8 else 0)
        torch.testing.assert_close(refined[row : row + 1], expected)


def test_dropout_removes_whole_keys_and_keeps_the_mean():
    query, key, value = draw(1, 40)
    torch.manual_seed(0)
    _, weights = na.nystrom_attention_eager(query, key, value, 8, dropout=0.4)
    gone = (weights == 0).all(dim=2)
    assert 0.2 < gone.double().mean() < 0.6
    _, without = na.nystrom_attention_eager(query, key, value, 8)
    torch.testing.assert_close(weights, torch.where(gone[:, :, None], 0.0, without / 0.6))
    clean = na.nystrom_attention(query, key, value, 8)[0]
    mean = torch.stack([na.nystrom_attention(query, key, value, 8, dropout=0.4)[0] for _ in range(1500)]).mean(0)
    assert (mean - clean).norm() < 0.1 * clean.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["peaked", "flat", "repeated", "one key for all"])
def test_extreme_scores_stay_finite(dtype, kind):
    query, key, value = draw(2, 90, dtype=torch.float32)
    if kind == "peaked":
        query, key = query * 30, key * 30
    elif kind == "flat":
        query, key = query * 0, key * 0
    elif kind == "repeated":
        query, key = query[:, :, :1].expand_as(query), key[:, :, :1].expand_as(key)
    else:
        key = torch.cat([key[:, :, :1] * 50, key[:, :, 1:]], dim=2)
    inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    for lengths in (None, torch.tensor([10, 77])):
        for form in FORMS:
            output, _ = form(*inputs, 16, lengths)
            assert output.dtype == dtype
            assert output.isfinite().all()
            assert all(x.isfinite().all() for x in torch.autograd.grad(output.float().sum(), inputs))


def test_autocast_leaves_means_and_inverses_in_float32():
    query, key, value = draw(2, 90, dtype=torch.float32)
    expected = na.nystrom_attention(query, key, value, 16)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(na.nystrom_attention(query, key, value, 16)[0], expected, atol=0, rtol=0)


@pytest.mark.parametrize("kernel_size", [1, 2, 5, 8, 41])
@pytest.mark.parametrize("seq_len", [1, 6, 30])
def test_convolution_of_any_size(kernel_size, seq_len):
    value, weight = draw(2, seq_len)[0], torch.randn(3, 1, kernel_size, 1).double()
    lengths = torch.tensor([(seq_len + 1) // 2, seq_len])
    output = na.value_convolution(value, weight, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = oracle.convolution(value[row, :, :length].numpy(), weight[:, 0, :, 0].numpy())
        np.testing.assert_allclose(output[row, :, :length].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(na.value_convolution(value, weight)[1], output[1])


@pytest.mark.parametrize("kernel_size", [1, 4, 5, 40, 65])
@pytest.mark.parametrize("seq_len", [1, 31, 32, 70])
@pytest.mark.parametrize("span", [na.CONVOLUTION_SPAN, 1])
def test_convolution_has_the_gradient_of_torchs_own(kernel_size, seq_len, span, monkeypatch):
    """Against `conv2d` and autograd, around the borders of blocks, whose spans are of one block or of all, with a residual;
    float64, so 1e-11 is rounding."""
    monkeypatch.setattr(na, "CONVOLUTION_SPAN", span)
    value, residual, upstream = (x.requires_grad_() for x in draw(2, seq_len))
    weight = torch.randn(3, 1, kernel_size, 1, dtype=torch.float64, requires_grad=True)
    padded = F.pad(value, (0, 0, kernel_size // 2, (kernel_size - 1) // 2))
    expected = residual + F.conv2d(padded, weight, groups=3)
    actual = na.value_convolution(value, weight, residual=residual)
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)
    inputs = (value, weight, residual)
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_means_and_states_share_their_gradient():
    """Whoever uses both, one of them or neither: the gradient is that of a mean and of the states themselves."""
    for uses_states, uses_means in ((1, 1), (1, 0), (0, 1)):
        states = draw(2, 12)[0].requires_grad_()
        joined, means = na._SegmentMeans.apply(states, 4)
        result = uses_states * joined.square().sum() + uses_means * means.exp().sum()
        plain = uses_states * states.square().sum() + uses_means * states.unflatten(2, (4, 3)).mean(3).exp().sum()
        torch.testing.assert_close(torch.autograd.grad(result, states), torch.autograd.grad(plain, states))


@pytest.mark.parametrize("inspect", [True, False])
def test_packing_moves_real_tokens_to_the_front_and_back(inspect):
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    padding = na.read_padding(mask, inspect)
    assert padding.lengths.tolist() == [3, 2, 5, 5]  # a row of padding only counts as real
    states = torch.arange(20.0).view(4, 5, 1)
    packed = padding.pack(states)
    assert packed[0, :3, 0].tolist() == [1, 3, 4]
    assert torch.equal(packed[1:], states[1:])
    assert torch.equal(padding.unpack(packed), states)
    square = torch.rand(4, 2, 5, 5)
    moved = torch.stack([square[i][:, o][:, :, o] for i, o in enumerate(padding.order)])
    assert torch.equal(padding.unpack_attention(moved), square)


def test_padding_on_the_right_needs_no_packing():
    assert na.read_padding(torch.ones(2, 4)) is None
    assert na.read_padding(torch.tensor([[1, 1, 0], [1, 1, 1]])).order is None
