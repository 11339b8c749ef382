"""Multiplications as formulas agree with sums over pairs of tokens, and with what torch counts in the implementations."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kermit_hf
import nystromformer_hf

from . import kermit, models, nystrom_decoder, nystrom_encoder, work


LENGTH = 320
CORES = ("softmax (SDPA)", "ours", "transformers")


def sdpa_flops(query: tuple, key: tuple, value: tuple, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def baddbmm_flops(_, left: tuple, right: tuple, *, out_shape=None, **__) -> int:
    return 2 * math.prod(left) * right[-1]


def executed(run) -> int:
    """Multiplications in the matrix products that `run` really does; torch counts them and their additions, of these two
    operations only if told how."""
    aten = torch.ops.aten
    uncounted = {aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flops, aten.baddbmm_: baddbmm_flops}
    # What kernels in C++ multiply torch does not see.
    with (
        kermit_hf.kernel_backend("torch"),
        nystromformer_hf.kernel_backend("torch"),
        FlopCounterMode(display=False, custom_mapping=uncounted) as counter,
    ):
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("window", [1, 3, 7, 20, None])
def test_causal_pairs_are_those_of_the_mask(window):
    distance = torch.arange(12)[:, None] - torch.arange(12)
    seen = (distance >= 0) & (distance < (window or 12))
    assert work.causal_pairs(12, window) == seen.sum()


def test_window_adds_the_sinks_behind_it():
    """Six tokens, windows of three, one sink: 1 + 2 + 3 * 4 pairs, and three queries that have left the sink behind."""
    assert work.window(6, head_dim=5, window_size=3, sinks=1) == 2 * 5 * (1 + 2 + 3 * 4 + 3)


@pytest.mark.parametrize("length", [3, 4, 9, 40, 67])
@pytest.mark.parametrize("near_segments", [0, 1, 3])
def test_causal_nystrom_counts_every_pair(length, near_segments):
    sinks, segment = 2, 4
    pairs = 0
    for query in range(length):
        own = (query - sinks) // segment
        exact = [key < sinks or key >= sinks + segment * (own - near_segments) for key in range(query + 1)]
        pairs += sum(exact) + (max(own - near_segments, 0) if query >= sinks else 0)
    pairs += (length - sinks) // segment * segment  # pooling: each landmark over its own segment
    assert work.causal_nystrom(length, 5, segment, near_segments, sinks) == 2 * 5 * pairs


@pytest.mark.parametrize("name", ["softmax (SDPA)", "additive", "additive, 128 random features", "gated delta"])
def test_kermit_does_what_is_needed_and_at_most_double(name):
    """Blocks of causal products are half wasted, the rest is needed."""
    contender = kermit.attention_contenders(LENGTH, backward=False)[name]
    assert contender.multiplications <= executed(contender.run) <= 2 * contender.multiplications


def test_training_needs_three_times_the_forward_pass():
    """What the backward pass of the additive rule multiplies is twice the forward pass, block by block."""
    forward, training = (kermit.attention_contenders(LENGTH, backward)["additive"] for backward in (False, True))
    assert training.multiplications == 3 * forward.multiplications
    assert executed(training.run) / executed(forward.run) == pytest.approx(3, rel=0.1)


def test_encoder_does_what_is_needed_and_little_more():
    """Nothing is causal there. Ours pads its convolution; transformers' class multiplies F Z first, which costs more."""
    softmax, ours, theirs = (nystrom_encoder.attention_cores(LENGTH)[name] for name in CORES)
    assert executed(softmax.run) == pytest.approx(softmax.multiplications, rel=0.01)
    assert ours.multiplications == theirs.multiplications
    assert ours.multiplications <= executed(ours.run) < executed(theirs.run) <= 1.1 * ours.multiplications


def test_causal_nystrom_blocks_do_what_is_needed_and_little_more():
    contender = nystrom_decoder.attention_contenders(1024, backward=False)["causal Nyström"]
    assert contender.multiplications <= executed(contender.run) <= 2.5 * contender.multiplications


@pytest.mark.parametrize("name", ["Llama", "KERMIT, additive, no window", "causal Nyström"])
def test_whole_models_are_linear_layers_and_attention(name):
    """At this length linear layers dominate; the rest is what causal blocks waste."""
    contender = models.layers(LENGTH)[name]
    assert contender.multiplications <= executed(contender.run) <= 1.15 * contender.multiplications
