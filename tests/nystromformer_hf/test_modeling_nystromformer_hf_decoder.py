"""The decoder and its heads: causality, padding, Llama's weights, cache, generation, training, bad input."""

import copy
import itertools
import json

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from nystromformer_hf import (
    NystromformerHFDecoderConfig,
    NystromformerHFDecoderForCausalLM,
    NystromformerHFDecoderForSequenceClassification,
    NystromformerHFDecoderModel,
    causal_nystrom_attention,
    kernel_backend,
    tiled_attention,
)

from .decoder_models import BODY, PAD, SETTINGS, VOCABULARY, place, positions_of, shake, tiny_config, tiny_model, tokens


# Whole and step by step round differently; logits are of order five.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
HEADS = {
    "AutoModel": NystromformerHFDecoderModel,
    "AutoModelForCausalLM": NystromformerHFDecoderForCausalLM,
    "AutoModelForSequenceClassification": NystromformerHFDecoderForSequenceClassification,
}
# Rows shorter and longer than every near field; 1 is the shortest text there is.
LENGTHS = (13, 1, 42, 4)


@torch.no_grad()
def feed(model, cache, input_ids, sizes, mask=None) -> torch.Tensor:
    """Logits of `input_ids` read in pieces of `sizes` into `cache`; `mask` covers them all."""
    logits, start = [], 0
    for piece, size in zip(input_ids.split(sizes, 1), sizes, strict=True):
        inputs = {}
        if mask is not None:
            inputs["attention_mask"] = mask[:, : start + size]
            inputs["position_ids"] = positions_of(mask)[:, start : start + size]
        logits.append(model(piece, past_key_values=cache, use_cache=True, **inputs).logits)
        start += size
    return torch.cat(logits, 1)


def random_sizes(total: int, largest: int) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, largest + 1, ())), total - sum(sizes)))
    return sizes


def cache_bytes(cache) -> int:
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in layer.tensors())


def assert_rows_are_those_alone(model, logits, input_ids, mask, **close):
    with torch.no_grad():
        for index in range(len(mask)):
            real = mask[index] == 1
            if real.any():
                alone = model(input_ids[index, real][None], use_cache=False).logits[0]
                torch.testing.assert_close(logits[index, real], alone, **close)


class TestCausality:
    """The gradient of every logit to every later embedding is exactly zero."""

    @staticmethod
    def check(model, length, queries, **inputs):
        embeddings = model.get_input_embeddings()(tokens(1, length)).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, **inputs).logits
        for index in queries:
            # A random combination: no sum of logits that happens to cancel.
            combination = (logits[0, index] * torch.randn(VOCABULARY)).sum()
            (gradient,) = torch.autograd.grad(combination, embeddings, retain_graph=True)
            assert gradient[0, index + 1 :].abs().sum() == 0
            assert gradient[0, index].abs().max() > 0
        return gradient

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_no_logit_depends_on_a_later_token_and_every_earlier_one_counts(self, setting, implementation):
        model = tiny_model(setting, implementation=implementation)
        gradient = self.check(model, 33, range(33), use_cache=False)
        assert (gradient.abs().amax(-1) > 0).all()

    @pytest.mark.parametrize("setting", ["pooled", "regularized_conv"])
    def test_around_the_borders_of_blocks(self, setting):
        self.check(tiny_model(setting), 280, [0, 1, 126, 127, 128, 129, 131, 255, 256, 257, 279], use_cache=False)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_with_a_cache_and_with_padding(self, setting):
        model = tiny_model(setting)
        self.check(model, 23, range(23), use_cache=True)
        mask = torch.ones(1, 23, dtype=torch.long)
        mask[:, :5] = 0
        self.check(model, 23, range(5, 23), use_cache=True, attention_mask=mask)


class TestPadding:
    """A row's result depends neither on its padding nor on its batch mates; 1e-5 is rounding at logits of order one."""

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("use_cache", [False, True])
    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_rows_of_a_batch_equal_rows_alone(self, setting, side, use_cache, implementation):
        model = tiny_model(setting, implementation=implementation)
        input_ids, mask = place([tokens(length) for length in LENGTHS], side)
        for position_ids in (positions_of(mask), None):
            with torch.no_grad():
                logits = model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache).logits
            assert_rows_are_those_alone(model, logits, input_ids, mask, atol=1e-5, rtol=1e-5)
            assert torch.isfinite(logits).all()

    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @pytest.mark.parametrize("setting", ["pooled", "regularized_conv"])
    def test_long_rows(self, setting, side):
        """Blocks of rows whose segments lie at different places."""
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (300, 7, 131)], side)
        with torch.no_grad():
            for use_cache in (False, True):
                logits = model(input_ids, attention_mask=mask, use_cache=use_cache).logits
                assert_rows_are_those_alone(model, logits, input_ids, mask, atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @pytest.mark.parametrize("setting", ["pooled", "regularized", "pooled_conv"])
    def test_eager_weights_lie_at_the_real_tokens(self, setting, side):
        model = tiny_model(setting, implementation="eager")
        rows = [tokens(length) for length in LENGTHS]
        input_ids, mask = place(rows, side)
        with torch.no_grad():
            attentions = model(input_ids, attention_mask=mask, output_attentions=True).attentions
            for index, row in enumerate(rows):
                alone = model(row[None], output_attentions=True).attentions
                real = mask[index] == 1
                for batched, single in zip(attentions, alone, strict=True):
                    assert batched.shape[-2:] == (mask.shape[1], mask.shape[1])
                    torch.testing.assert_close(batched[index][:, real][:, :, real], single[0], atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(single.sum(-1), torch.ones(single.shape[:-1]), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_batch_mates_do_not_matter(self, setting):
        model = tiny_model(setting, head=NystromformerHFDecoderModel)
        input_ids = tokens(5, 80)
        with torch.no_grad():
            batch = model(input_ids).last_hidden_state
            for index in range(5):
                alone = model(input_ids[index : index + 1]).last_hidden_state[0]
                torch.testing.assert_close(alone, batch[index], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32])
    def test_4d_mask_of_padding_and_causality(self, kind):
        model = tiny_model()
        input_ids, mask = place([tokens(length) for length in LENGTHS], "left")
        length = mask.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril() & (mask[:, None, None] == 1)
        four = visible if kind == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo().min)
        with torch.no_grad():
            expected = model(input_ids, attention_mask=mask).logits
            result = model(input_ids, attention_mask=four).logits
        torch.testing.assert_close(result[mask == 1], expected[mask == 1])

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_gradients(self, setting):
        model = tiny_model(setting)
        rows = [tokens(length) for length in LENGTHS]

        def gradients(batches):
            model.zero_grad()
            for input_ids, mask in batches:
                logits = model(input_ids, attention_mask=mask).logits
                # A padding token's own gradient must not turn up as 0 * nan.
                (logits[mask == 1].square().sum() + 0.0 * logits.sum()).backward()
            return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

        alone = gradients([(row[None], torch.ones_like(row[None])) for row in rows])
        for side in ("left", "right", "middle"):
            for batched, single in zip(gradients([place(rows, side)]), alone, strict=True):
                # At c = 1 the gradient to γ is zero, up to rounding.
                atol = 2e-4 * single.abs().max().item() + 1e-4
                torch.testing.assert_close(batched, single, atol=atol, rtol=1e-4)


class TestLengths:
    """Any length from 1 to 4,096, beside others and with its padding on either side; 2e-5 is rounding after the norm."""

    @staticmethod
    def check(model, lengths):
        rows = [tokens(length) for length in lengths]
        with torch.no_grad():
            alone = [model(row[None], use_cache=False).last_hidden_state[0] for row in rows]
            for side in ("left", "right"):
                input_ids, mask = place(rows, side)
                batch = model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
                for index, single in enumerate(alone):
                    torch.testing.assert_close(batch[index, mask[index] == 1], single, atol=2e-5, rtol=0)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_every_short_one(self, setting):
        self.check(tiny_model(setting, head=NystromformerHFDecoderModel, num_hidden_layers=1), range(1, 70))

    @pytest.mark.parametrize("lengths", [(255, 511), (512, 300), (1000, 1021), (2048, 1), (2049, 4096), (4095, 130)])
    @pytest.mark.parametrize("setting", ["pooled", "regularized_conv"])
    def test_long_ones(self, setting, lengths):
        changes = {"segment_size": 16, "num_hidden_layers": 1}
        self.check(tiny_model(setting, head=NystromformerHFDecoderModel, **changes), lengths)


class TestPrecision:
    """Within 2e-2 of float32, at the spread of weights that the encoder's tests have. At larger weights softmax attention
    itself ("softmax" among the settings) leaves that range."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("how", ["converted", "autocast"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_half_precision_is_close(self, setting, how, dtype):
        model = NystromformerHFDecoderModel(tiny_config(setting, initializer_range=0.2)).eval()
        input_ids, mask = place([tokens(90), tokens(40)], "left")
        with torch.no_grad():
            expected = model(input_ids, attention_mask=mask).last_hidden_state
            if how == "autocast":
                with torch.autocast("cpu", dtype=dtype):
                    output = model(input_ids, attention_mask=mask).last_hidden_state
            else:
                output = model.to(dtype)(input_ids, attention_mask=mask).last_hidden_state
                assert output.dtype == dtype
        difference = (output.float() - expected)[mask == 1]
        assert difference.norm() < 2e-2 * expected[mask == 1].norm()


class TestEagerIsTheOracle:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_weights_times_values_and_the_convolution_are_the_output(self, setting):
        model = tiny_model(setting, implementation="eager", head=NystromformerHFDecoderModel)
        attention = model.layers[1].self_attn
        hidden = torch.randn(2, 40, 32)
        positions = model.rotary_emb(hidden, position_ids=torch.arange(40)[None])
        with torch.no_grad():
            output, weights = attention(hidden, positions)
            value = attention._project(hidden)[2]
            expected = weights @ value.repeat_interleave(attention.num_key_value_groups, 1)
            if attention.config.conv_kernel_size is not None:
                taps = attention.config.conv_kernel_size
                padded = torch.nn.functional.pad(value, (0, 0, taps - 1, 0))
                padded = padded.repeat_interleave(attention.num_key_value_groups, 1)
                for tap in range(taps):
                    expected = expected + attention.conv_weight[:, 0, tap][None, :, None] * padded[:, :, tap : tap + 40]
            expected = attention.o_proj(expected.transpose(1, 2).flatten(2))
        assert weights.shape == (2, 4, 40, 40) and not weights.triu(1).any()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 40), atol=1e-5, rtol=0)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("length", [1, 3, 40, 300])
    def test_forward(self, setting, length):
        fast, eager = (tiny_model(setting, implementation=name) for name in ("sdpa", "eager"))
        input_ids = tokens(2, length)
        with torch.no_grad():
            torch.testing.assert_close(fast(input_ids).logits, eager(input_ids).logits, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_gradients(self, setting):
        gradients = []
        for name in ("sdpa", "eager"):
            model = tiny_model(setting, implementation=name)
            torch.manual_seed(1)
            model(tokens(2, 40)).logits.square().mean().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5 * one.abs().max().item() + 1e-7, rtol=1e-3)

    def test_gradients_reach_the_weights(self):
        model = tiny_model("regularized", implementation="eager")
        output = model(tokens(2, 20), output_attentions=True)
        for weights in output.attentions:
            weights.retain_grad()
        output.logits.sum().backward()
        assert all(weights.grad.abs().max() > 0 for weights in output.attentions)


class TestLlamaWeights:
    """Segments of one token, and a near field over the whole text, are the softmax model."""

    SIZE = {name: BODY[name] for name in BODY if name not in ("bos_token_id", "eos_token_id")} | {"head_dim": 16}

    @staticmethod
    def sibling(config, other, **fields):
        shared = {name: getattr(config, name) for name in (*TestLlamaWeights.SIZE, "rms_norm_eps", "rope_parameters")}
        model = NystromformerHFDecoderForCausalLM(NystromformerHFDecoderConfig(**shared, **fields)).eval()
        missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
        assert not unexpected
        assert all("inverse_regularization" in name or "conv_weight" in name for name in missing)
        return model

    @pytest.mark.parametrize("near", [(1, 1, 0), (1, 1, 4), (1, 2, 3), (64, 2, 4), (50, 2, 0)])
    @pytest.mark.parametrize("regularization", [None, 1.5])
    @pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
    def test_logits(self, family, regularization, near):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**self.SIZE, bos_token_id=None, eos_token_id=None)
        other = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        shake(other)
        fields = {"Qwen2": {"attention_bias": True, "attention_output_bias": False}, "Qwen3": {"use_qk_norm": True}}
        segment_size, near_segments, sinks = near
        model = self.sibling(
            config,
            other,
            segment_size=segment_size,
            near_segments=near_segments,
            num_sink_tokens=sinks,
            inverse_regularization=regularization,
            conv_kernel_size=4 if regularization else None,
            **fields.get(family, {}),
        )
        input_ids = tokens(2, 100)
        with torch.no_grad():
            expected = other(input_ids).logits
            torch.testing.assert_close(model(input_ids).logits, expected, **CLOSE)
            torch.testing.assert_close(
                feed(model, DynamicCache(config=model.config), input_ids, [60] + [1] * 40), expected, **CLOSE
            )

    ROPE_TYPES = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
        "longrope": {
            "factor": 4.0,
            "short_factor": [1.0, 1.2, 1.5, 2.0, 2.2, 2.5, 3.0, 3.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
            "original_max_position_embeddings": 64,
        },
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "proportional": {"partial_rotary_factor": 0.5},
    }

    @pytest.mark.parametrize("rope_type", ROPE_TYPES)
    def test_every_rope_type(self, rope_type):
        parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **self.ROPE_TYPES[rope_type]}
        other = LlamaForCausalLM(
            LlamaConfig(**self.SIZE, rope_parameters=parameters, max_position_embeddings=64)
        ).eval()
        shake(other)
        plain = LlamaForCausalLM(LlamaConfig(**self.SIZE)).eval()
        plain.load_state_dict(other.state_dict())
        model = self.sibling(other.config, other, segment_size=1, near_segments=1, max_position_embeddings=64)
        input_ids = tokens(2, 100)
        with torch.no_grad():
            expected = other(input_ids).logits
            torch.testing.assert_close(model(input_ids).logits, expected, **CLOSE)
            assert (plain(input_ids).logits - expected).abs().max() > 0.1

    def test_longer_segments_differ(self):
        # Or equality above would say nothing.
        other = LlamaForCausalLM(LlamaConfig(**self.SIZE)).eval()
        shake(other)
        model = self.sibling(other.config, other, segment_size=4, near_segments=1)
        input_ids = tokens(2, 100)
        with torch.no_grad():
            difference = (model(input_ids).logits - other(input_ids).logits).abs()
        assert difference[:, :12].max() < 1e-4 < 1e-2 < difference[:, 12:].max()


class TestCache:
    """Whole = in chunks of any sizes = token by token."""

    LENGTH = 150
    SIZES = {
        "steps": [1] * LENGTH,
        "whole": [LENGTH],
        "whole_and_steps": [LENGTH - 5] + [1] * 5,
        "around_segments": [3, 1, 1, 4, 8, 5, 12, 116],
        "small": [3] * 50,
    }

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_text(self, setting, sizes):
        model = tiny_model(setting)
        input_ids = tokens(2, self.LENGTH)
        with torch.no_grad():
            expected = model(input_ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        torch.testing.assert_close(feed(model, cache, input_ids, self.SIZES[sizes]), expected, **CLOSE)
        assert cache.get_seq_length() == self.LENGTH

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("largest", [1, 4, 20, 100])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_batch_with_holes(self, setting, largest, kind):
        """Padding anywhere, as where a chat goes on with answers of different lengths."""
        model = tiny_model(setting)
        mask = torch.rand(5, 90).lt(torch.tensor([[0.9], [0.5], [0.2], [1.0], [1.0]])).long()
        mask[:2, 30:50] = torch.tensor([[0], [1]])  # a long run of padding, late, in one row only
        mask[4, :70] = 0
        input_ids = tokens(5, 90)
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=90)
        logits = feed(model, cache, input_ids, random_sizes(90, largest), mask)
        assert torch.isfinite(logits).all()
        assert_rows_are_those_alone(model, logits, input_ids, mask, **CLOSE)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_static_equals_whole(self, setting, implementation):
        model = tiny_model(setting, implementation=implementation)
        input_ids, mask = place([tokens(length) for length in (40, 17, 2)], "left")
        for capacity in (40, 200):
            cache = StaticCache(config=model.config, max_cache_len=capacity)
            logits = feed(model, cache, input_ids, [25, 1, 1, 3, 10], mask)
            assert_rows_are_those_alone(model, logits, input_ids, mask, **CLOSE)
            assert int(cache.get_seq_length()) == 40

    def test_a_cache_that_was_made_for_no_model(self):
        model, cache = tiny_model(), DynamicCache()
        input_ids = tokens(2, 30)
        with torch.no_grad():
            expected = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(feed(model, cache, input_ids, [20, 1, 9]), expected, **CLOSE)
        assert cache.get_seq_length() == 30

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_static_cache_that_is_full(self, setting):
        model = tiny_model(setting)
        input_ids = tokens(2, 41)
        with pytest.raises(ValueError, match=r"holds max_cache_len=40 tokens.* would be 41.* of 41 or more"):
            feed(model, StaticCache(config=model.config, max_cache_len=40), input_ids, [41])
        cache = StaticCache(config=model.config, max_cache_len=40)
        expected = feed(model, cache, input_ids[:, :40], [39, 1])
        with pytest.raises(ValueError, match="max_cache_len=40"):
            feed(model, cache, input_ids[:, 40:], [1])
        cache.reset()
        assert torch.equal(feed(model, cache, input_ids[:, :40], [39, 1]), expected)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_eager_reads_its_cache_too(self, setting):
        model = tiny_model(setting, implementation="eager")
        input_ids = tokens(2, 60)
        with torch.no_grad():
            whole = model(input_ids, output_attentions=True, use_cache=False)
            cache, start = DynamicCache(config=model.config), 0
            for size in (20, 1, 1, 38):
                piece = model(input_ids[:, start : start + size], past_key_values=cache, output_attentions=True)
                torch.testing.assert_close(piece.logits, whole.logits[:, start : start + size], **CLOSE)
                for ours, theirs in zip(piece.attentions, whole.attentions, strict=True):
                    assert ours.shape[-2:] == (size, start + size)
                    # Tokens of the own segment keep their weight, whatever a cache has let go of.
                    torch.testing.assert_close(
                        ours[..., -1], theirs[:, :, start : start + size, start + size - 1], atol=1e-4, rtol=1e-3
                    )
                start += size

    def test_gradients_flow_through_a_cache(self):
        model = tiny_model("regularized_conv")
        input_ids = tokens(1, 40)

        def gradient(sizes):
            model.zero_grad()
            cache = DynamicCache(config=model.config)
            logits = [model(piece, past_key_values=cache).logits for piece in input_ids.split(sizes, 1)]
            torch.cat(logits, 1).square().mean().backward()
            return [parameter.grad.clone() for parameter in model.parameters()]

        for pieces, whole in zip(gradient([13, 1, 26]), gradient([40]), strict=True):
            torch.testing.assert_close(pieces, whole, atol=1e-5 + 1e-5 * whole.abs().max().item(), rtol=1e-3)

    def test_pooled_landmarks_keep_no_key_of_an_older_segment(self):
        model = tiny_model("pooled")
        config = model.config
        sizes = []
        for length in (402, 802):  # behind the sinks, whole segments
            cache = DynamicCache(config=config)
            feed(model, cache, tokens(1, length), [length])
            sizes.append(cache_bytes(cache))
        landmark = config.head_dim * (config.num_key_value_heads + config.num_attention_heads)
        assert sizes[1] - sizes[0] == 4 * config.num_hidden_layers * landmark * 400 // config.segment_size
        kept = 2 * config.num_key_value_heads * (config.near_segments * config.segment_size + config.num_sink_tokens)
        exact = 4 * config.num_hidden_layers * config.head_dim * kept
        assert sizes[0] == exact + 4 * config.num_hidden_layers * landmark * 400 // config.segment_size


class TestTiles:
    """Pieces long enough for PyTorch's `tiled_attention`, here with tiles so small that there are many."""

    # Segments of up to twice TILE_BLOCK can be tiled, and a text of four blocks behind a near field is.
    SETTINGS = [setting for setting in SETTINGS if setting != "longer_than_text"]

    @pytest.fixture(autouse=True)
    def tiles(self, monkeypatch):
        monkeypatch.setattr(tiled_attention, "TILE_BLOCK", 3)
        monkeypatch.setattr(tiled_attention, "TILE_SIZE", 24)
        monkeypatch.setattr(tiled_attention, "HISTORY_TILE", 4)
        tiles, original = [], causal_nystrom_attention.tiled_attention

        def counted(*arguments):
            tiles.append(len(arguments[-2]))
            return original(*arguments)

        monkeypatch.setattr(causal_nystrom_attention, "tiled_attention", counted)
        with kernel_backend("torch"):
            yield tiles

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("side", [None, "left", "right", "middle"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_pieces_and_padding(self, setting, side, kind, tiles):
        model = tiny_model(setting)
        rows = [tokens(150), tokens(150 if side is None else 133), tokens(150 if side is None else 20)]
        input_ids, mask = place(rows, side or "left")
        length = input_ids.shape[1]
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=length)
        logits = feed(model, cache, input_ids, [80, 1, 60, length - 141], None if side is None else mask)
        # The first piece of any batch; a later one where the rows are equally long.
        assert len(tiles) >= model.config.num_hidden_layers * (2 if side is None else 1)
        explicit = tiny_model(setting, implementation="eager")
        assert_rows_are_those_alone(explicit, logits, input_ids, mask, **CLOSE)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_gradients(self, setting, tiles):
        input_ids, mask = place([tokens(90), tokens(71)], "left")
        gradients = []
        for implementation in ("sdpa", "eager"):
            model = tiny_model(setting, implementation=implementation)
            model(input_ids, attention_mask=mask, labels=input_ids.masked_fill(mask == 0, -100)).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            assert tiles
        for fast, eager in zip(*gradients, strict=True):
            torch.testing.assert_close(fast, eager, atol=1e-5 + 1e-5 * eager.abs().max().item(), rtol=1e-3)


class LargestNewTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation makes, views aside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
            given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            self.elements = max([self.elements] + [tensor.numel() for tensor in made if id(tensor) not in given])
        return result


class TestHistory:
    """With a learned regularisation all keys and values are kept, yet a token does not pay for those before it."""

    SETTING = {"segment_size": 50, "near_segments": 1, "num_sink_tokens": 2, "inverse_regularization": 2}

    @pytest.mark.parametrize("kind", ["dynamic", "padded", "static"])
    def test_a_step_copies_nothing_as_long_as_the_text(self, kind):
        model = tiny_model(self.SETTING)
        length = 1502  # sinks and 30 segments
        input_ids, mask = place([tokens(length), tokens(length - (9 if kind == "padded" else 0))], "left")
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=length + 100)
        feed(model, cache, input_ids, [length], mask if kind == "padded" else None)
        with LargestNewTensor() as largest:
            feed(model, cache, tokens(2, 8), [1] * 8)
        assert 0 < largest.elements < length * model.config.head_dim

    def test_room_is_added_ever_more_rarely(self):
        model = tiny_model(self.SETTING, num_hidden_layers=1)
        cache = DynamicCache(config=model.config)
        layer, rooms = cache.layers[0], []
        for _ in range(700):
            feed(model, cache, tokens(1, 1), [1])
            rooms.append(layer.history_keys.shape[2])
        enlarged = [index for index in range(1, 700) if rooms[index] != rooms[index - 1]]
        assert len(enlarged) > 2
        assert all(after - before >= max(64, before // 8) for before, after in itertools.pairwise(enlarged))
        assert all(index < room <= index + 1 + max(64, (index + 1) // 8) for index, room in enumerate(rooms))

    def test_padded_rows_read_it_one_by_one(self, monkeypatch):
        """Only rows that complete a segment at a step, here one at each of two steps."""
        model = tiny_model(self.SETTING, num_hidden_layers=1)
        input_ids, mask = place([tokens(90), tokens(87)], "left")
        cache = DynamicCache(config=model.config)
        feed(model, cache, input_ids, [90], mask)
        rows, attention = [], torch.nn.functional.scaled_dot_product_attention

        def count_rows(query, *args, **kwargs):
            rows.append(query.shape[0])
            return attention(query, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count_rows)
        read = []
        for _ in range(20):
            before = len(rows)
            feed(model, cache, tokens(2, 1), [1])
            read.append(rows[before:])
        assert [index for index, step in enumerate(read) if step] == [11, 14]  # 2 sinks, 100 tokens behind them
        assert read[11] == read[14] == [1]

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("setting", ["regularized", "regularized_conv", "softmax"])
    def test_crop_where_the_room_ends(self, setting, padded):
        """Tokens taken back on either side of every border, of segments and of the buffer."""
        model = tiny_model(setting)
        input_ids, mask = place([tokens(160), tokens(160 - 7 * padded)], "left")
        cache = DynamicCache(config=model.config)
        feed(model, cache, input_ids[:, :20], [20], mask[:, :20] if padded else None)
        cache.activate_past_recording()
        logits, start = [], 20
        for size in [3] * 40 + [20]:
            feed(model, cache, tokens(2, 2 + size), [2 + size])
            cache.crop(-(2 + size))
            logits.append(feed(model, cache, input_ids[:, start : start + size], [size]))
            cache.crop(0)
            start += size
        logits = torch.cat([logits[0].new_zeros(2, 20, VOCABULARY), *logits], 1)
        for row in range(2):
            real = mask[row] == 1
            with torch.no_grad():
                alone = model(input_ids[row, real][None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, 20:], alone[-140:], **CLOSE)

    def test_modes_of_autograd_may_change_between_calls(self):
        """Reading a prompt in inference mode, a piece with gradients, and steps without: each sees what the others wrote."""
        model = tiny_model("regularized")
        text = tokens(2, 60)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(text[:, :20], past_key_values=cache)
        steps = feed(model, cache, text[:, 20:23], [1, 1, 1])
        with_gradient = model(text[:, 23:40], past_key_values=cache).logits
        rest = feed(model, cache, text[:, 40:], [1] * 20)
        with_gradient.square().sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        logits = torch.cat([steps, with_gradient.detach(), rest], 1)
        torch.testing.assert_close(logits, expected[:, 20:], **CLOSE)


class TestTakingBack:
    """After `crop(-n)` everything continues as if the n tokens had never been."""

    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("before", [0, 3, 30, 100])
    def test_repeatedly(self, setting, before):
        model = tiny_model(setting)
        text = tokens(1, before + 120)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        if before:
            feed(model, cache, text[:, :before], [before])
        cache.activate_past_recording()
        done = before
        # (tokens read, of which taken back): drafts of assisted generation, kept in part, wholly, or not at all.
        for read, back in [(5, 2), (1, 0), (6, 6), (9, 0), (12, 11), (1, 1), (20, 4), (3, 3), (40, 30), (2, 1)]:
            draft = text[:, done : done + read].clone()
            kept = read - back
            draft[:, kept:] = tokens(1, back)
            logits = feed(model, cache, draft, [read])
            torch.testing.assert_close(logits[:, :kept], expected[:, done : done + kept], **CLOSE)
            cache.crop(-back)
            done += kept
            assert cache.get_seq_length() == done
        rest = text[:, done : done + 30]
        torch.testing.assert_close(feed(model, cache, rest, [30]), expected[:, done : done + 30], **CLOSE)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_in_a_padded_batch(self, setting):
        model = tiny_model(setting)
        input_ids, mask = place([tokens(50), tokens(21), tokens(17)], "left")
        cache = DynamicCache(config=model.config)
        feed(model, cache, input_ids[:, :35], [35], mask[:, :35])
        cache.activate_past_recording()
        ones = torch.ones(3, 7, dtype=torch.long)
        with torch.no_grad():
            for _ in range(2):
                for size in (4, 3):
                    model(tokens(3, size), past_key_values=cache, attention_mask=ones[:, :size])
                cache.crop(-7)
            logits = model(input_ids[:, 35:], attention_mask=mask, past_key_values=cache).logits
            for index, length in enumerate((50, 21, 17)):
                alone = model(input_ids[index, -length:][None]).logits[0, -15:]
                torch.testing.assert_close(logits[index], alone, **CLOSE)

    def test_what_cannot_be_taken_back(self):
        model = tiny_model("pooled")
        cache = DynamicCache(config=model.config)
        cache.crop(-3)  # an empty cache has nothing to remove
        feed(model, cache, tokens(1, 32), [32])
        cache.crop(-2)  # the open segment is there without recording
        with pytest.raises(RuntimeError, match=r"crop\(-3\).*activate_past_recording"):
            cache.crop(-3)
        with pytest.raises(ValueError, match=r"crop\(5\).*negative"):
            cache.crop(5)
        with pytest.raises(ValueError, match="static"):
            StaticCache(config=model.config, max_cache_len=8).layers[0].activate_past_recording()


class TestBatchOperations:
    CACHES = {
        "dynamic": lambda config: DynamicCache(config=config),
        "static": lambda config: StaticCache(config=config, max_cache_len=60),
    }

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("kind", CACHES)
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_reorder_select_and_repeat(self, setting, kind, padded):
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (40, 40 if not padded else 13, 40)], "left")
        operations = {"reorder": lambda cache, index: cache.reorder_cache(torch.tensor(index))}
        if kind == "dynamic":
            operations |= {
                "select": lambda cache, index: cache.batch_select_indices(torch.tensor(index)),
                "repeat": lambda cache, index: cache.batch_repeat_interleave(2),
            }
        for name, operation in operations.items():
            index = {"select": [1], "repeat": [0, 0, 1, 1, 2, 2]}.get(name, [2, 0, 0])
            cache = self.CACHES[kind](model.config)
            feed(model, cache, input_ids[:, :30], [30], mask[:, :30])
            operation(cache, index)
            logits = feed(model, cache, input_ids[index, 30:], [1, 9])
            expected = feed(model, self.CACHES[kind](model.config), input_ids[index], [40], mask[index])
            torch.testing.assert_close(logits, expected[:, 30:], **CLOSE)

    @pytest.mark.parametrize("kind", CACHES)
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_reset_and_deep_copy(self, setting, kind):
        model = tiny_model(setting)
        cache = self.CACHES[kind](model.config)
        input_ids, mask = place([tokens(length) for length in (40, 7)], "left")
        feed(model, cache, input_ids, [30, 10], mask)
        cache.reset()
        text = tokens(2, 30)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits
        torch.testing.assert_close(feed(model, cache, text[:, :21], [20, 1]), expected[:, :21], **CLOSE)
        twin = copy.deepcopy(cache)
        feed(model, cache, tokens(2, 9), [9])
        torch.testing.assert_close(feed(model, twin, text[:, 21:], [9]), expected[:, 21:], **CLOSE)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_offload_and_prefetch_around_every_step(self, setting):
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (40, 17)], "left")
        cache, logits, start = DynamicCache(config=model.config), [], 0
        for size in [30] + [1] * 10:
            for layer in cache.layers:
                layer.prefetch()
            piece = slice(start, start + size)
            with torch.no_grad():
                logits.append(
                    model(input_ids[:, piece], attention_mask=mask[:, : start + size], past_key_values=cache).logits
                )
            for layer in cache.layers:
                layer.offload()
            start += size
        assert_rows_are_those_alone(model, torch.cat(logits, 1), input_ids, mask, **CLOSE)

    @pytest.mark.parametrize("kind", CACHES)
    def test_every_tensor_is_listed(self, kind):
        model = tiny_model("regularized_conv")
        cache = self.CACHES[kind](model.config)
        feed(model, cache, *place([tokens(20), tokens(9)], "left")[:1], [20], torch.ones(2, 20, dtype=torch.long))
        for layer in cache.layers:
            named = {id(tensor) for tensor in layer.tensors()}
            held = {id(value) for value in vars(layer).values() if isinstance(value, torch.Tensor)}
            assert held - {id(layer.cumulative_length)} == named
            assert layer.context is None

    @pytest.mark.parametrize(
        "other",
        [
            {"segment_size": 8},
            {"near_segments": 1},
            {"num_sink_tokens": 3},
            {"num_key_value_heads": 4},
            {"inverse_regularization": 2},
            {"conv_kernel_size": 3},
            {"num_hidden_layers": 1},
        ],
    )
    def test_the_cache_of_another_model_or_batch(self, other):
        model = tiny_model("pooled")
        cache = DynamicCache(config=tiny_config("pooled", **other))
        feed(tiny_model("pooled", **other), cache, tokens(1, 30), [30])
        with pytest.raises(ValueError, match="past_key_values"):
            feed(model, cache, tokens(1, 2), [2])
        with pytest.raises(ValueError, match=r"past_key_values.*DynamicCache\(config=model.config\)"):
            model(tokens(1, 5), past_key_values=DynamicCache(config=LlamaConfig(num_hidden_layers=2)))
        with pytest.raises(ValueError, match=r"past_key_values.*StaticCache\(config=model.config"):
            model(tokens(1, 5), past_key_values=StaticCache(LlamaConfig(num_hidden_layers=2), max_cache_len=9))
        cache = DynamicCache(config=model.config)
        text = tokens(2, 30)
        feed(model, cache, text[:, :20], [20])
        with pytest.raises(ValueError, match="past_key_values"):
            feed(model, cache, tokens(3, 1), [1])
        with torch.no_grad():
            expected = model(text, use_cache=False).logits[:, 20:]
        torch.testing.assert_close(feed(model, cache, text[:, 20:], [10]), expected, **CLOSE)


class TestHeads:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_sequence_classification_pools_the_last_real_token(self, setting, side):
        model = tiny_model(setting, head=NystromformerHFDecoderForSequenceClassification, num_labels=3)
        rows = [tokens(length) for length in LENGTHS]
        input_ids, mask = place(rows, side)
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask).logits
            found = model(input_ids.masked_fill(mask == 0, PAD)).logits
            torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
            for index, row in enumerate(rows):
                hidden = model.model(row[None]).last_hidden_state[0]
                torch.testing.assert_close(logits[index], model.score(hidden[-1]), atol=1e-5, rtol=1e-5)

    def test_losses(self):
        input_ids, mask = place([tokens(length) for length in LENGTHS], "left")
        model = tiny_model()
        labels = input_ids.masked_fill(mask == 0, -100)
        output = model(input_ids, attention_mask=mask, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
        model = tiny_model(head=NystromformerHFDecoderForSequenceClassification, num_labels=3)
        labels = torch.tensor([0, 2, 1, 1])
        output = model(input_ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))

    @pytest.mark.parametrize("kind", [None, "dynamic", "static"])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("auto", HEADS)
    @pytest.mark.parametrize("setting", ["pooled", "regularized_conv"])
    def test_runs_on_the_meta_device(self, setting, auto, padded, kind):
        """Which counts operations and memory without doing anything, and has no values to look at."""
        with torch.device("meta"):
            model = HEADS[auto](tiny_config(setting))
            input_ids = torch.ones(2, 50, dtype=torch.long)
            inputs = {"attention_mask": input_ids} if padded else {}
            inputs["position_ids"] = torch.arange(50).expand(2, -1)
            cache = StaticCache(config=model.config, max_cache_len=60) if kind == "static" else None
            whole = model(input_ids, past_key_values=cache, use_cache=kind is not None, **inputs)
            assert whole[0].is_meta and whole[0].shape[0] == 2
            if kind is not None:
                step = model(input_ids[:, :1], attention_mask=input_ids[:, :1], past_key_values=whole.past_key_values)
                assert step[0].is_meta and step[0].shape[0] == 2

    def test_dropout_does_something(self):
        model = tiny_model(attention_dropout=0.5).train()
        input_ids = tokens(1, 30)
        assert not torch.equal(model(input_ids).logits, model(input_ids).logits)

    @pytest.mark.parametrize("auto", HEADS)
    @pytest.mark.parametrize("setting", ["pooled", "regularized_conv"])
    def test_saved_and_loaded_by_an_auto_class(self, setting, auto, tmp_path):
        model = tiny_model(setting, head=HEADS[auto])
        model.save_pretrained(tmp_path)
        auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "configuration_nystromformer_hf_decoder.NystromformerHFDecoderConfig",
            **{name: f"modeling_nystromformer_hf_decoder.{head.__name__}" for name, head in HEADS.items()},
        }
        loaded = getattr(transformers, auto).from_pretrained(tmp_path).eval()
        assert type(loaded) is HEADS[auto]
        input_ids = tokens(2, 30)
        with torch.no_grad():
            assert torch.equal(loaded(input_ids)[0], model(input_ids)[0])

    def test_fewer_layers_than_the_checkpoint(self, tmp_path):
        """As Llama: the first ones, with a cache of as many, saved and loaded again."""
        model = tiny_model()
        model.save_pretrained(tmp_path / "two")
        loaded = NystromformerHFDecoderForCausalLM.from_pretrained(tmp_path / "two", num_hidden_layers=1).eval()
        loaded.save_pretrained(tmp_path / "one")
        again = NystromformerHFDecoderForCausalLM.from_pretrained(tmp_path / "one").eval()
        config = NystromformerHFDecoderConfig(**{**model.config.to_dict(), "num_hidden_layers": 3})
        assert [len(c.layer_types) for c in (loaded.config, again.config, model.config, config)] == [1, 1, 2, 3]
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
        input_ids = tokens(2, 30)
        with torch.no_grad():
            expected = model(input_ids, use_cache=False).logits
        for fewer in (loaded, again, model):
            logits = feed(fewer, DynamicCache(config=fewer.config), input_ids, [20, 10])
            torch.testing.assert_close(logits, expected, **CLOSE)

    def test_a_checkpoint_that_lacks_weights(self, tmp_path):
        tiny_model("pooled").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.self_attn\.k_norm\.weight"):
            NystromformerHFDecoderForCausalLM.from_pretrained(tmp_path, use_qk_norm=True)
        more = NystromformerHFDecoderForCausalLM.from_pretrained(
            tmp_path, conv_kernel_size=3, inverse_regularization=1e6
        ).eval()
        input_ids = tokens(1, 40)
        with torch.no_grad():
            torch.testing.assert_close(more(input_ids).logits, tiny_model("pooled")(input_ids).logits, **CLOSE)
        with pytest.raises(ValueError, match="segment_size=0"):
            NystromformerHFDecoderForCausalLM.from_pretrained(tmp_path, segment_size=0)

    @pytest.mark.parametrize("gamma", [1.0001, 1.5, 100])
    def test_gamma_starts_where_the_config_says(self, gamma):
        model = NystromformerHFDecoderModel(tiny_config(inverse_regularization=gamma))
        for layer in model.layers:
            start = layer.self_attn.regularization()
            torch.testing.assert_close(start, torch.full((4,), float(gamma)), atol=1e-6, rtol=1e-5)
            assert (start > 1).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("field", "value", "allowed"),
        [
            ("segment_size", 0, "from 1"),
            ("segment_size", "long", "int"),
            ("use_qk_norm", 3, "bool"),
            ("near_segments", 0, "from 1"),
            ("num_sink_tokens", -1, "from 0"),
            ("inverse_regularization", 1, "above 1"),
            ("inverse_regularization", 0.5, "above 1"),
            ("inverse_regularization", float("nan"), "above 1"),
            ("conv_kernel_size", 1, "from 2"),
            ("conv_kernel_size", 0, "from 2"),
            ("layer_types", ["full_attention"] * 2, "causal_nystrom_attention"),
            ("num_attention_heads", 0, "from 1"),
            ("num_attention_heads", 5, "num_attention_heads=5"),
            ("num_key_value_heads", 3, "num_key_value_heads=3"),
            ("head_dim", 7, "even"),
            ("vocab_size", 0, "from 1"),
            ("hidden_size", 30, "num_attention_heads=4"),
            ("attention_dropout", 1.5, "0 <= p < 1"),
            ("hidden_act", "step", "silu"),
        ],
    )
    def test_config_names_field_value_and_what_is_allowed(self, field, value, allowed):
        with pytest.raises(ValueError) as error:
            tiny_config(**{field: value})
        message = str(error.value)
        assert field in message and allowed in message
        assert isinstance(value, list) or str(value) in message

    @pytest.mark.parametrize("shape", [(2, 9), (2, 11), (3, 10), (1, 10), (10,), (2, 1, 10)])
    def test_mask_of_wrong_shape(self, shape):
        with pytest.raises(ValueError, match="attention_mask") as error:
            tiny_model()(tokens(2, 10), attention_mask=torch.ones(shape, dtype=torch.long))
        assert str(tuple(shape)) in str(error.value) and "(2, 10)" in str(error.value)

    @pytest.mark.parametrize("length", [1, 4, 31, 33])
    def test_mask_of_wrong_length_behind_a_cache(self, length):
        model = tiny_model()
        cache = model(tokens(2, 30), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=rf"attention_mask has shape \(2, {length}\).*\(2, 32\)"):
            model(tokens(2, 2), attention_mask=torch.ones(2, length, dtype=torch.long), past_key_values=cache)

    @pytest.mark.parametrize("shape", [(2, 0), (5,), (1, 2, 5)])
    @pytest.mark.parametrize("head", HEADS.values())
    def test_inputs_of_wrong_shape(self, head, shape):
        allowed = "one token or more" if shape == (2, 0) else r"\(batch, seq"
        for name, inputs in {"input_ids": tokens(*shape), "inputs_embeds": torch.zeros(*shape, 32)}.items():
            with pytest.raises(ValueError, match=rf"{name} has shape .*; allowed (is|are) {allowed}"):
                tiny_model(head=head)(attention_mask=torch.ones(shape), **{name: inputs})
        with pytest.raises(ValueError, match="input_ids has shape"):
            tiny_model(head=head)(tokens(*shape))

    def test_4d_mask_that_hides_more(self):
        visible = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
        visible[:, :, 7, 2] = False
        with pytest.raises(ValueError, match=r"attention_mask.*more than padding"):
            tiny_model()(tokens(2, 10), attention_mask=visible)

    def test_packed_rows(self):
        with pytest.raises(ValueError, match=r"position_ids.*consecutive"):
            tiny_model()(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))

    @pytest.mark.parametrize("inputs", [{}, {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}])
    @pytest.mark.parametrize("head", HEADS.values())
    def test_both_or_no_inputs(self, head, inputs):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            tiny_model(head=head)(**inputs)

    def test_labels_of_wrong_shape(self):
        with pytest.raises(ValueError, match=r"labels has shape \(2, 9\)"):
            tiny_model()(tokens(2, 10), labels=tokens(2, 9))

    def test_classification_of_a_batch_without_a_mask(self):
        model = tiny_model(head=NystromformerHFDecoderForSequenceClassification, pad_token_id=None)
        with pytest.raises(ValueError, match="attention_mask=None"):
            model(tokens(2, 10))
