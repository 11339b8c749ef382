"""The adapters call their packages with the right layouts: results are those of the packages' definitions in float64."""

import pytest
import torch

from . import peers


HEAD_DIM, LENGTH = 8, 128


@pytest.fixture
def states():
    return [torch.randn(1, 2, LENGTH, HEAD_DIM) for _ in range(3)]


@pytest.fixture(params=[True, False], ids=["causal", "bidirectional"])
def is_causal(request):
    return request.param


def weighted(scores: torch.Tensor, value: torch.Tensor, extra: torch.Tensor | float = 0.0) -> torch.Tensor:
    return scores @ value.double() / (scores.sum(-1, keepdim=True) + extra)


def test_performer_is_normalised_attention_with_its_random_features(states, is_causal):
    pytest.importorskip("performer_pytorch")
    from performer_pytorch.performer_pytorch import softmax_kernel

    attention = peers.performer(HEAD_DIM, 16, is_causal)
    projection = attention.projection_matrix.double()
    query, key = (
        softmax_kernel(tensor.double(), projection_matrix=projection, is_query=is_query)
        for tensor, is_query in zip(states[:2], (True, False), strict=True)
    )
    scores = query @ key.mT
    if is_causal:  # the package then adds 1e-6 to each feature's sum over keys
        expected = weighted(scores.tril(), states[2], 1e-6 * query.sum(-1, keepdim=True))
    else:
        expected = weighted(scores, states[2])
    torch.testing.assert_close(attention(*states).double(), expected, atol=1e-4, rtol=1e-4)


def test_linear_attention_transformer_sees_earlier_buckets_only(states):
    pytest.importorskip("linear_attention_transformer")
    query, key, value = states
    output = peers.blind_linear_attention(query, key, value)
    scores = query.double().softmax(-1) @ key.double().exp().mT
    assert output[:, :, :64].abs().max() == 0
    expected = weighted(scores[:, :, 64:, :64], value[:, :, :64])
    torch.testing.assert_close(output[:, :, 64:].double(), expected, atol=1e-5, rtol=1e-4)


def test_bidirectional_peers_take_heads_as_they_are(states):
    for name, attention in peers.bidirectional_peers(HEAD_DIM, 16).items():
        assert attention(*states).shape == states[2].shape, name
