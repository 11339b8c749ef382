"""The three forms of causal Nyström attention against loops over tokens, written from the formulas in float64."""

import math
from unittest import mock

import pytest
import torch

from nystromformer_hf import tiled_attention
from nystromformer_hf.causal_nystrom_attention import (
    Context,
    Landmarks,
    append,
    causal_convolution,
    causal_nystrom_blocked,
    causal_nystrom_reference,
    causal_nystrom_step,
    context_of_whole_text,
)


EXACT = {"atol": 1e-10, "rtol": 1e-10}


def tiled(*arguments, **options):
    """The blocked form with tiles so small that short texts fill several."""
    with mock.patch.multiple(tiled_attention, TILE_BLOCK=2, TILE_SIZE=8, HISTORY_TILE=2):
        return causal_nystrom_blocked(*arguments, **options)


FORMS = {"blocked": causal_nystrom_blocked, "tiled": tiled, "reference": causal_nystrom_reference}


def softmax(scores: list[float]) -> list[float]:
    largest = max(scores)
    terms = [math.exp(score - largest) for score in scores]
    return [term / sum(terms) for term in terms]


def oracle_head(query, key, value, segment_size, near_segments, sinks, gamma, scaling):
    """One head, one token after the other: query, key, value (seq, head_dim) -> (seq, head_dim)."""
    tokens = range(sinks, len(query))
    segments = [list(tokens)[start : start + segment_size] for start in range(0, len(tokens), segment_size)]
    segments = [segment for segment in segments if len(segment) == segment_size]
    mean_keys = [sum(key[j] for j in segment) / segment_size for segment in segments]
    mean_queries = [sum(query[j] for j in segment) / segment_size for segment in segments]

    landmark_values = []
    for index, segment in enumerate(segments):
        landmark = mean_queries[index]

        def mean_of(rows, landmark=landmark):
            weights = softmax([float(landmark @ key[j]) * scaling for j in rows])
            return sum(weight * value[j] for weight, j in zip(weights, rows, strict=True))

        pooled = mean_of(segment)
        if gamma is None:
            landmark_values.append(pooled)
            continue
        everything = mean_of([j for earlier in segments[: index + 1] for j in earlier])
        row = softmax([float(landmark @ other) * scaling for other in mean_keys[: index + 1]])
        right = everything + gamma * pooled
        for weight, earlier in zip(row[:-1], landmark_values, strict=True):
            right = right - weight * earlier
        landmark_values.append(right / (row[-1] + gamma))

    outputs = []
    for i in range(len(query)):
        terms = [(float(query[i] @ key[j]) * scaling, value[j]) for j in range(min(sinks, i + 1))]
        own = (i - sinks) // segment_size
        for j in range(sinks, i + 1):
            if (j - sinks) // segment_size >= own - near_segments:
                terms.append((float(query[i] @ key[j]) * scaling, value[j]))
        for segment in range(max(own - near_segments, 0)):
            score = float(query[i] @ mean_keys[segment]) * scaling + math.log(segment_size)
            terms.append((score, landmark_values[segment]))
        weights = softmax([score for score, _ in terms])
        outputs.append(sum(weight * term for weight, (_, term) in zip(weights, terms, strict=True)))
    return torch.stack(outputs)


def oracle(query, key, value, segment_size, near_segments, sinks, gamma, scaling):
    groups = query.shape[1] // key.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    oracle_head(
                        query[row, head],
                        key[row, head // groups],
                        value[row, head // groups],
                        segment_size,
                        near_segments,
                        sinks,
                        None if gamma is None else float(gamma[head]),
                        scaling,
                    )
                    for head in range(query.shape[1])
                ]
            )
            for row in range(query.shape[0])
        ]
    )


def inputs(length, heads=4, kv_heads=2, batch=2, head_dim=6, scale=1.5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return (torch.randn(batch, count, length, head_dim, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def gammas(regularized, heads=4, dtype=torch.float64):
    return torch.linspace(1.05, 3.0, heads, dtype=dtype) if regularized else None


def attend(form, query, key, value, segment_size, near_segments, sinks, gamma, **options):
    context = context_of_whole_text(query, key, value, sinks, gamma is not None)
    return FORMS[form](query, context, segment_size, near_segments, gamma, query.shape[-1] ** -0.5, **options)


def softmax_attention(query, key, value):
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value


SHAPES = [(4, 1, 2), (4, 2, 0), (1, 1, 3), (3, 1, 5), (8, 3, 1), (5, 2, 4)]  # segment_size, near_segments, sinks


class TestAgainstTheFormulas:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("regularized", [False, True])
    @pytest.mark.parametrize(("segment_size", "near_segments", "sinks"), SHAPES)
    @pytest.mark.parametrize("length", [1, 2, 7, 30])
    def test_short(self, length, segment_size, near_segments, sinks, regularized, form):
        query, key, value = inputs(length)
        gamma = gammas(regularized)
        settings = (segment_size, near_segments, sinks, gamma)
        expected = oracle(query, key, value, *settings, query.shape[-1] ** -0.5)
        torch.testing.assert_close(attend(form, query, key, value, *settings).output, expected, **EXACT)

    @pytest.mark.parametrize("regularized", [False, True])
    @pytest.mark.parametrize(("segment_size", "near_segments", "sinks"), [(8, 2, 3), (100, 2, 1), (1, 1, 2)])
    def test_around_the_borders_of_blocks(self, segment_size, near_segments, sinks, regularized):
        query, key, value = inputs(400)
        gamma = gammas(regularized)
        blocked, tiled, reference = (
            attend(form, query, key, value, segment_size, near_segments, sinks, gamma).output for form in FORMS
        )
        torch.testing.assert_close(blocked, reference, **EXACT)
        torch.testing.assert_close(tiled, reference, **EXACT)
        few = slice(0, 290)
        expected = oracle_head(
            query[1, 3, few], key[1, 1, few], value[1, 1, few], segment_size, near_segments, sinks,
            None if gamma is None else float(gamma[3]), query.shape[-1] ** -0.5,
        )  # fmt: skip
        torch.testing.assert_close(blocked[1, 3, few], expected, **EXACT)

    @pytest.mark.parametrize("regularized", [False, True])
    @pytest.mark.parametrize(("segment_size", "near_segments", "sinks"), SHAPES)
    def test_weights_are_row_stochastic_causal_and_make_the_output(
        self, segment_size, near_segments, sinks, regularized
    ):
        query, key, value = inputs(30)
        result = attend("reference", query, key, value, segment_size, near_segments, sinks, gammas(regularized))
        assert result.weights.shape == (2, 4, 30, 30)
        torch.testing.assert_close(result.weights.sum(-1), torch.ones(2, 4, 30, dtype=torch.float64), **EXACT)
        assert result.weights.triu(1).abs().max() == 0
        torch.testing.assert_close(result.values, value, **EXACT)
        assert result.unweighted.abs().max() == 0
        torch.testing.assert_close(result.weights @ value.repeat_interleave(2, 1), result.output, **EXACT)
        if not regularized:
            assert result.weights.min() >= 0


class TestExactCases:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("regularized", [False, True])
    @pytest.mark.parametrize("sinks", [0, 3])
    def test_segments_of_one_token_are_softmax_attention(self, sinks, regularized, form):
        query, key, value = inputs(150)
        result = attend(form, query, key, value, 1, 1, sinks, gammas(regularized)).output
        torch.testing.assert_close(result, softmax_attention(query, key, value), **EXACT)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("segment_size", "near_segments"), [(150, 1), (16, 10), (1000, 3), (80, 1)])
    def test_a_near_field_over_everything_is_softmax_attention(self, segment_size, near_segments, form):
        query, key, value = inputs(150)
        result = attend(form, query, key, value, segment_size, near_segments, 2, gammas(True)).output
        torch.testing.assert_close(result, softmax_attention(query, key, value), **EXACT)

    def test_a_large_gamma_is_pooling(self):
        query, key, value = inputs(60)
        gamma = torch.full((4,), 1e9, dtype=torch.float64)
        result = attend("blocked", query, key, value, 4, 1, 2, gamma).output
        torch.testing.assert_close(
            result, attend("blocked", query, key, value, 4, 1, 2, None).output, atol=1e-7, rtol=0
        )


class TestCausality:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("regularized", [False, True])
    @pytest.mark.parametrize(("segment_size", "near_segments", "sinks"), SHAPES)
    def test_the_gradient_to_every_later_token_is_exactly_zero(
        self, segment_size, near_segments, sinks, regularized, form
    ):
        tensors = [tensor.requires_grad_() for tensor in inputs(30)]
        result = attend(form, *tensors, segment_size, near_segments, sinks, gammas(regularized)).output
        for index in range(30):
            target = (result[:, :, index] * torch.randn_like(result[:, :, index])).sum()
            for gradient in torch.autograd.grad(target, tensors, retain_graph=True):
                assert gradient[:, :, index + 1 :].abs().sum() == 0
        last = torch.autograd.grad((result[:, :, -1] * torch.randn_like(result[:, :, -1])).sum(), tensors[1:])
        assert all((gradient.abs().amax((0, 1, 3)) > 0).all() for gradient in last)

    @pytest.mark.parametrize("length", [300, 1500])
    @pytest.mark.parametrize("regularized", [False, True])
    def test_a_later_token_changes_no_bit(self, regularized, length):
        query, key, value = inputs(length, dtype=torch.float32)
        arguments = (16, 2, 4, gammas(regularized, dtype=torch.float32))
        before = attend("blocked", query, key, value, *arguments).output
        key[:, :, 200:], value[:, :, 200:], query[:, :, 200:] = 100.0, -100.0, 50.0
        assert torch.equal(attend("blocked", query, key, value, *arguments).output[:, :, :200], before[:, :, :200])

    @pytest.mark.parametrize("regularized", [False, True])
    def test_gradients_of_the_forms_agree(self, regularized):
        gradients = []
        gamma = gammas(regularized)
        for form in FORMS:
            tensors = [tensor.requires_grad_() for tensor in inputs(300)]
            if regularized:
                gamma = gammas(True).requires_grad_()
                tensors.append(gamma)
            attend(form, *tensors[:3], 8, 2, 3, gamma).output.square().sum().backward()
            gradients.append([tensor.grad for tensor in tensors])
        for *others, reference in zip(*gradients, strict=True):
            for other in others:
                torch.testing.assert_close(other, reference, atol=1e-8, rtol=1e-8)

    @pytest.mark.parametrize("regularized", [False, True])
    def test_second_derivatives_of_the_reference(self, regularized):
        tensors = [tensor.requires_grad_() for tensor in inputs(9, heads=2, kv_heads=1, batch=1, head_dim=2)]
        gamma = gammas(True)[:2].requires_grad_()
        if regularized:
            tensors.append(gamma)

        def form(query, key, value, gamma=None):
            return attend("reference", query, key, value, 2, 1, 1, gamma).output

        assert torch.autograd.gradgradcheck(form, tensors)


class TestStep:
    @pytest.mark.parametrize("regularized", [False, True])
    @pytest.mark.parametrize(("segment_size", "near_segments", "sinks"), SHAPES)
    def test_one_query_behind_any_past(self, segment_size, near_segments, sinks, regularized):
        """A context put together by hand: landmarks of all complete segments before, near field and open segment behind."""
        length = 31
        query, key, value = inputs(length)
        gamma = gammas(regularized)
        whole = attend("blocked", query, key, value, segment_size, near_segments, sinks, gamma)
        for index in range(sinks, length):
            start = index - sinks
            complete = start // segment_size
            first = max(complete - near_segments, 0) * segment_size
            seen = slice(first + sinks, index + 1)
            context = Context(
                keys=key[:, :, seen],
                values=value[:, :, seen],
                first=first,
                start=start,
                first_query_slot=(start - first, start - first),
                num_sink_tokens=sinks,
                sink_keys=key[:, :, :sinks],
                sink_values=value[:, :, :sinks],
                landmarks=Landmarks(*(tensor[:, :, :complete] for tensor in whole.landmarks)),
                num_complete=complete,
                open_queries=query[:, :, complete * segment_size + sinks : index + 1],
                open_slot=complete * segment_size - first,
                history_keys=key[:, :, sinks : index + 1] if regularized else None,
                history_values=value[:, :, sinks : index + 1] if regularized else None,
            )
            new = query[:, :, index : index + 1]
            for form in (causal_nystrom_step, causal_nystrom_blocked):
                result = form(new, context, segment_size, near_segments, gamma, query.shape[-1] ** -0.5)
                torch.testing.assert_close(result.output[:, :, 0], whole.output[:, :, index], **EXACT)
                now = (start + 1) // segment_size
                torch.testing.assert_close(result.landmarks.values, whole.landmarks.values[:, :, :now], **EXACT)


class TestStability:
    """|ṽ| <= (1 + γ) / (γ - 1 + 2 min L_ll) max|v| on scores of every kind, and finite gradients."""

    SCORES = ("normal", "peaked", "flat", "repeated", "sink", "alternating", "growing")

    @staticmethod
    def tensors(kind, length, dtype):
        query, key, value = inputs(length, dtype=torch.float64, scale=1.0)
        if kind == "peaked":
            query, key = query * 20, key * 20
        elif kind == "flat":
            query, key = query * 0, key * 0
        elif kind == "repeated":
            query, key = query[:, :, :1].expand_as(query) * 3, key[:, :, :1].expand_as(key) * 3
        elif kind == "sink":  # everyone looks at the first segment: L_ll underflows
            query, key = torch.ones_like(query) * 10, key.clone()
            key[:, :, :8] = 10
            key[:, :, 8:] = -10
        elif kind == "alternating":
            sign = torch.where(torch.arange(length) // 4 % 2 == 0, 1.0, -1.0)[:, None]
            query, key = query.abs() * 5, key.abs() * sign * 5
            value = value.abs() * sign
        elif kind == "growing":
            ramp = torch.linspace(0, 30, length)[:, None]
            query, key = query.abs() * ramp, -key.abs() * ramp
        return [tensor.to(dtype).contiguous() for tensor in (query, key, value)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", SCORES)
    @pytest.mark.parametrize("gamma", [1.001, 1.5, 10.0, None])
    def test_bound_and_finite_gradients(self, gamma, kind, dtype):
        query, key, value = (tensor.requires_grad_() for tensor in self.tensors(kind, 120, dtype))
        gamma = None if gamma is None else torch.full((4,), gamma, requires_grad=True)
        result = attend("blocked", query, key, value, 4, 1, 0, gamma)
        largest = value.detach().float().abs().max()
        bound = largest
        if gamma is not None:
            mean_query, mean_key = (
                tensor.detach().float().unflatten(2, (-1, 4)).mean(3) for tensor in (query, key.repeat_interleave(2, 1))
            )
            scores = mean_query @ mean_key.mT * query.shape[-1] ** -0.5
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            diagonal = scores.masked_fill(hidden, float("-inf")).softmax(-1).diagonal(dim1=-2, dim2=-1).min()
            bound = (1 + gamma.max()) / (gamma.min() - 1 + 2 * diagonal) * largest
        # Two units in the last place of the stored values.
        assert result.landmarks.values.abs().max() <= bound * (1 + 2 * torch.finfo(dtype).eps)
        assert torch.isfinite(result.output).all()
        result.output.float().square().mean().backward()
        for tensor in (query, key, value, *(() if gamma is None else (gamma,))):
            assert torch.isfinite(tensor.grad).all()

    @pytest.mark.parametrize("gamma", [1.05, 1.5, None])
    def test_an_adversary_does_not_get_beyond_the_bound(self, gamma):
        """Scores and values climb the gradient of the largest landmark value, in float64, from several starts."""
        gamma = None if gamma is None else torch.full((4,), gamma, dtype=torch.float64)
        climbed = [tensor.requires_grad_() for tensor in inputs(24, batch=6, scale=1.0)]
        optimizer = torch.optim.Adam(climbed, lr=0.3, maximize=True)
        largest = []
        for _ in range(80):
            query, key, value = climbed[0], climbed[1], climbed[2].tanh()  # |v| <= 1
            landmarks = attend("blocked", query, key, value, 2, 1, 0, gamma).landmarks
            bound = torch.ones(())
            if gamma is not None:
                mean_query, mean_key = (
                    x.detach().unflatten(2, (-1, 2)).mean(3) for x in (query, key.repeat_interleave(2, 1))
                )
                scores = mean_query @ mean_key.mT * query.shape[-1] ** -0.5
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                diagonal = scores.masked_fill(hidden, float("-inf")).softmax(-1).diagonal(dim1=-2, dim2=-1)
                bound = (1 + gamma[0]) / (gamma[0] - 1 + 2 * diagonal.amin(-1))
            reached = landmarks.values.abs().amax((2, 3))
            assert (reached <= bound * (1 + 1e-12)).all()
            largest.append(reached.max().item())
            optimizer.zero_grad()
            reached.sum().backward()
            assert all(tensor.grad.isfinite().all() for tensor in climbed)
            optimizer.step()
        # It did climb: beyond the values themselves where γ is finite, up to them where it is not.
        assert largest[-1] > (0.99 if gamma is None else 1.1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("regularized", [False, True])
    def test_half_precision_is_close(self, regularized, dtype):
        tensors = [tensor.to(dtype) for tensor in inputs(200, scale=1.0)]
        exact = attend("blocked", *(tensor.double() for tensor in tensors), 8, 2, 4, gammas(regularized)).output
        result = attend("blocked", *tensors, 8, 2, 4, gammas(regularized, dtype=torch.float32)).output
        torch.testing.assert_close(result.double(), exact, atol=2e-2, rtol=2e-2)


class TestConvolution:
    @pytest.mark.parametrize("taps", [2, 3, 8, 65])
    @pytest.mark.parametrize("start", [0, 5, 20])
    def test_against_a_loop(self, taps, start):
        _, _, value = inputs(30)
        weight = torch.randn(4, 1, taps, 1, dtype=torch.float64)
        result = causal_convolution(value, weight, start, 30 - start)
        for index in range(start, 30):
            for head in range(4):
                expected = sum(
                    weight[head, 0, taps - 1 - back, 0] * value[:, head // 2, index - back]
                    for back in range(min(taps, index + 1))
                )
                torch.testing.assert_close(result[:, head, index - start], expected, **EXACT)
        rows = causal_convolution(value, weight, torch.tensor([start, start]), 30 - start)
        torch.testing.assert_close(rows, result, **EXACT)


class TestAppend:
    @pytest.mark.parametrize("filled", [-2, 0, 1, 3])
    def test_rows_and_ints_agree(self, filled):
        past, new = torch.randn(2, 1, 3, 2), torch.randn(2, 1, 4, 2)
        one = append(past, new, filled)
        rows = append(past, new, torch.tensor([filled, filled]))
        assert torch.equal(one, rows[:, :, : one.shape[2]])
        assert one.shape[2] == 4 + filled
        torch.testing.assert_close(append(past, new, torch.tensor([filled, 0]), size=2)[0], one[0, :, :2])
