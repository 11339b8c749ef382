"""The model and its heads: causality, padding, pooling, bad input, saving and loading, precision."""

import inspect
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kermit_hf import (
    KermitConfig,
    KermitForCausalLM,
    KermitForQuestionAnswering,
    KermitForSequenceClassification,
    KermitForTokenClassification,
    KermitModel,
    kernel_backend,
    register_feature_map,
)
from kermit_hf.cpu_kernels import cpu_misfit
from kermit_hf.feature_maps import FEATURE_MAPS, EluFeatureMap

from .tiny_models import (
    KERNEL,
    PAD,
    PURE_KERNEL,
    SETTINGS,
    SLIDING,
    VOCABULARY,
    place,
    positions_of,
    shake,
    tiny_config,
    tiny_model,
    tokens,
)


HEADS = {
    "AutoModel": KermitModel,
    "AutoModelForCausalLM": KermitForCausalLM,
    "AutoModelForSequenceClassification": KermitForSequenceClassification,
    "AutoModelForTokenClassification": KermitForTokenClassification,
    "AutoModelForQuestionAnswering": KermitForQuestionAnswering,
}

CPU_MISFIT = cpu_misfit(torch.device("cpu"))
NEEDS_CPP = pytest.mark.skipif(CPU_MISFIT is not None, reason=f"kernels for CPUs cannot run: {CPU_MISFIT}")

# Rows shorter and longer than every window; 1 is the shortest text there is.
LENGTHS = (13, 1, 22, 4)


def first_tensor(output) -> torch.Tensor:
    """The logits of any head, or the last hidden state."""
    return output.to_tuple()[0]


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
            assert gradient[0, index + 1 :].abs().max() == 0 if index + 1 < length else True
            assert gradient[0, index].abs().max() > 0

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_no_logit_depends_on_a_later_token(self, setting, implementation):
        model = tiny_model(setting, implementation=implementation)
        self.check(model, 23, range(23), use_cache=False)

    @pytest.mark.parametrize("setting", ["delta", "additive", "additive_pure", "delta_pure"])
    def test_around_the_borders_of_chunks_and_blocks(self, setting):
        model = tiny_model(setting)
        self.check(model, 150, [0, 30, 31, 32, 62, 63, 64, 65, 71, 72, 127, 128, 136, 149], use_cache=False)

    @pytest.mark.parametrize("setting", ["delta", "additive", "hybrid"])
    def test_with_a_cache_and_with_padding(self, setting):
        model = tiny_model(setting)
        self.check(model, 23, range(23), use_cache=True)
        mask = torch.ones(1, 23, dtype=torch.long)
        mask[:, :5] = 0
        self.check(model, 23, range(5, 23), use_cache=True, attention_mask=mask)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_every_earlier_token_counts(self, setting):
        # The far field reaches the first token, or causality would be cheap to have.
        model = tiny_model(setting)
        embeddings = model.get_input_embeddings()(tokens(1, 40)).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits[0, -1].square().sum().backward()
        assert (embeddings.grad.abs().amax(-1) > 0).all()

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_an_encoder_looks_both_ways(self, setting):
        model = tiny_model(setting, head=KermitForTokenClassification, is_causal=False)
        embeddings = model.get_input_embeddings()(tokens(1, 40)).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        for index in (0, 20, 39):
            (gradient,) = torch.autograd.grad(logits[0, index].square().sum(), embeddings, retain_graph=True)
            assert (gradient.abs().amax(-1) > 0).all()


class TestPadding:
    """A row's result depends neither on its padding nor on its batch mates; 1e-5 is rounding at logits of order one."""

    @pytest.mark.parametrize("use_cache", [False, True])
    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_rows_of_a_batch_equal_rows_alone(self, setting, side, use_cache):
        if side == "middle" and SLIDING in tiny_config(setting).layer_types:
            pytest.skip("sliding attention counts padding inside the text as tokens, in transformers' own models too")
        model = tiny_model(setting)
        rows = [tokens(length) for length in LENGTHS]
        input_ids, mask = place(rows, side)
        position_ids = positions_of(mask)
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache).logits
            for index, row in enumerate(rows):
                alone = model(row[None], use_cache=use_cache).logits[0]
                torch.testing.assert_close(logits[index, mask[index] == 1], alone, atol=1e-5, rtol=1e-5)
        assert torch.isfinite(logits).all()

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("setting", ["delta", "additive_favor", "hybrid"])
    def test_without_position_ids(self, setting, side):
        model = tiny_model(setting)
        rows = [tokens(length) for length in LENGTHS]
        input_ids, mask = place(rows, side)
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask).logits
            for index, row in enumerate(rows):
                alone = model(row[None]).logits[0]
                torch.testing.assert_close(logits[index, mask[index] == 1], alone, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_encoder(self, setting, side):
        model = tiny_model(setting, head=KermitForTokenClassification, is_causal=False)
        rows = [tokens(length) for length in LENGTHS]
        input_ids, mask = place(rows, side)
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask).logits
            for index, row in enumerate(rows):
                alone = model(row[None]).logits[0]
                torch.testing.assert_close(logits[index, mask[index] == 1], alone, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_favor"])
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

    @pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
    def test_mask_of_any_dtype(self, dtype):
        model = tiny_model()
        input_ids, mask = place([tokens(length) for length in LENGTHS], "left")
        with torch.no_grad():
            expected = model(input_ids, attention_mask=mask).logits
            assert torch.equal(model(input_ids, attention_mask=mask.to(dtype)).logits, expected)

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

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive"])
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
                torch.testing.assert_close(batched, single, atol=2e-4 * single.abs().max().item(), rtol=1e-4)


class TestHeads:
    @pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_sequence_classification_pools_real_tokens(self, setting, is_causal, side, given):
        model = tiny_model(setting, head=KermitForSequenceClassification, is_causal=is_causal, num_labels=3)
        rows = [tokens(length) for length in LENGTHS]
        input_ids, mask = place(rows, side)
        inputs = {"input_ids": input_ids}
        if given == "inputs_embeds":
            inputs = {"inputs_embeds": model.get_input_embeddings()(input_ids)}
        with torch.no_grad():
            logits = model(**inputs, attention_mask=mask).logits
            for index, row in enumerate(rows):
                hidden = model.model(row[None]).last_hidden_state[0]
                pooled = hidden[-1] if is_causal else hidden.mean(0)
                torch.testing.assert_close(logits[index], model.score(pooled), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_sequence_classification_finds_the_pad_tokens_itself(self, is_causal, side):
        model = tiny_model("delta", head=KermitForSequenceClassification, is_causal=is_causal)
        rows = [tokens(length) for length in LENGTHS]
        rows[0][4] = PAD  # inside a text it is a token like any other
        input_ids, mask = place(rows, side)
        input_ids = input_ids.masked_fill(mask == 0, PAD)
        with torch.no_grad():
            expected = model(input_ids, attention_mask=mask).logits
            torch.testing.assert_close(model(input_ids).logits, expected)
            for index in range(len(rows)):
                alone = model(input_ids[index : index + 1]).logits[0]
                torch.testing.assert_close(alone, expected[index], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("labels", "num_labels"),
        [
            (torch.tensor([0, 2, 1, 1]), 3),
            (torch.tensor([0.5, -1.0, 2.0, 0.0]), 1),
            (torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]), 3),
        ],
    )
    def test_sequence_classification_losses(self, labels, num_labels):
        model = tiny_model("delta", head=KermitForSequenceClassification, num_labels=num_labels)
        input_ids, mask = place([tokens(length) for length in LENGTHS], "right")
        output = model(input_ids, attention_mask=mask, labels=labels)
        if labels.dim() == 2:
            expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels)
        elif labels.is_floating_point():
            expected = torch.nn.functional.mse_loss(output.logits.squeeze(-1), labels)
        else:
            expected = torch.nn.functional.cross_entropy(output.logits, labels)
        torch.testing.assert_close(output.loss, expected)

    def test_token_classification(self):
        model = tiny_model("delta", head=KermitForTokenClassification, num_labels=5)
        input_ids, mask = place([tokens(length) for length in LENGTHS], "right")
        labels = torch.randint(0, 5, mask.shape).masked_fill(mask == 0, -100)
        output = model(input_ids, attention_mask=mask, labels=labels)
        assert output.logits.shape == (*mask.shape, 5)
        real = mask == 1
        torch.testing.assert_close(
            output.loss, torch.nn.functional.cross_entropy(output.logits[real], labels[real]), atol=1e-6, rtol=1e-6
        )

    def test_question_answering(self):
        model = tiny_model("delta", head=KermitForQuestionAnswering)
        input_ids, mask = place([tokens(length) for length in LENGTHS], "right")
        start, end = torch.tensor([1, 0, 3, 2]), torch.tensor([5, 0, 20, 3])
        output = model(input_ids, attention_mask=mask, start_positions=start, end_positions=end)
        assert output.start_logits.shape == output.end_logits.shape == mask.shape
        losses = [
            torch.nn.functional.cross_entropy(output.start_logits, start),
            torch.nn.functional.cross_entropy(output.end_logits, end),
        ]
        torch.testing.assert_close(output.loss, sum(losses) / 2)
        # Shape (batch, 1), as some collators make them.
        same = model(input_ids, attention_mask=mask, start_positions=start[:, None], end_positions=end[:, None])
        assert torch.equal(same.loss, output.loss)

    def test_causal_loss_is_the_mean_over_next_tokens(self):
        model = tiny_model("delta")
        input_ids, mask = place([tokens(length) for length in LENGTHS], "left")
        labels = input_ids.masked_fill(mask == 0, -100)
        output = model(input_ids, attention_mask=mask, labels=labels)
        expected = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        torch.testing.assert_close(output.loss, expected)

    def test_logits_to_keep(self):
        model = tiny_model("delta")
        input_ids = tokens(2, 20)
        logits = model(input_ids).logits
        # A product with fewer rows may round differently.
        torch.testing.assert_close(model(input_ids, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(model(input_ids, logits_to_keep=torch.tensor([4, 7])).logits, logits[:, [4, 7]])

    @pytest.mark.parametrize("setting", ["delta", "hybrid"])
    def test_recorded_outputs(self, setting):
        model = tiny_model(setting, implementation="eager")
        output = model(tokens(2, 20), output_hidden_states=True, output_attentions=True)
        layers = model.config.num_hidden_layers
        assert [tuple(states.shape) for states in output.hidden_states] == [(2, 20, 32)] * (layers + 1)
        assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 20, 20)] * layers
        as_tuple = model(tokens(2, 20), return_dict=False)
        assert isinstance(as_tuple, tuple)


class TestBadConfig:
    @pytest.mark.parametrize(
        ("field", "value", "allowed"),
        [
            ("feature_map", "sine", "hedgehog"),
            ("update_rule", "hebbian", "additive, delta"),
            ("layer_types", [KERNEL, "mamba"], SLIDING),
            ("layer_types", [KERNEL], "num_hidden_layers=2"),
            ("layer_types", [KERNEL, SLIDING], "sliding_window"),
            ("num_attention_heads", 0, "from 1"),
            ("num_attention_heads", 5, "num_attention_heads=5"),
            ("num_key_value_heads", 3, "num_key_value_heads=3"),
            ("num_key_value_heads", 0, "from 1"),
            ("head_dim", 7, "even"),
            ("window_size", -1, "from 0"),
            ("window_size", "wide", "int"),
            ("window_size", 2.5, "int"),
            ("forget_gate", "yes", "bool"),
            ("num_sink_tokens", -2, "from 0"),
            ("num_sink_tokens", 9, "window_size"),
            ("conv_kernel_size", -1, "from 0"),
            ("conv_kernel_size", 1, "from 2"),
            ("vocab_size", 0, "from 1"),
            ("num_hidden_layers", 0, "from 1"),
            ("hidden_size", 30, "num_attention_heads=4"),
            ("hidden_act", "siluu", "silu"),
        ],
    )
    def test_names_field_value_and_what_is_allowed(self, field, value, allowed):
        with pytest.raises(ValueError) as error:
            tiny_config("delta", **{field: value})
        message = str(error.value)
        assert field in message
        assert allowed in message
        assert (repr(value[-1]) if isinstance(value, list) else str(value)) in message or isinstance(value, list)

    @pytest.mark.parametrize(
        ("feature_map", "feature_dim", "allowed"),
        [
            ("favor", 0, "from 1"),
            ("hedgehog", -1, "from 1"),
            ("taylor", 9, "head_dim=8"),
            ("taylor", 0, "from 1"),
            ("dpfp", 8, "head_dim=16"),
            ("dpfp", 24, "head_dim=16"),
            ("elu", 4, "head_dim=8"),
            ("silu_l2", 16, "head_dim=8"),
        ],
    )
    def test_feature_dimensions_that_do_not_fit(self, feature_map, feature_dim, allowed):
        with pytest.raises(ValueError, match=f"feature_dim={feature_dim}") as error:
            tiny_config("delta", feature_map=feature_map, feature_dim=feature_dim)
        assert allowed in str(error.value)

    def test_signed_features_cannot_be_added_up(self):
        with pytest.raises(ValueError, match=r"feature_map='silu_l2'.*hedgehog"):
            tiny_config("additive", feature_map="silu_l2")

    def test_a_field_of_the_wrong_type(self):
        with pytest.raises(Exception, match="window_size"):
            tiny_config("delta", window_size="eight")

    def test_a_feature_map_of_ones_own(self):
        @register_feature_map("test_own_map")
        class OwnFeatureMap(EluFeatureMap):
            pass

        try:
            model = tiny_model("additive", feature_map="test_own_map")
            assert torch.isfinite(model(tokens(1, 20)).logits).all()
            with pytest.raises(ValueError, match="'elu' is taken by EluFeatureMap"):
                register_feature_map("elu")(OwnFeatureMap)
        finally:
            del FEATURE_MAPS["test_own_map"]


class TestBadInput:
    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "hybrid"])
    @pytest.mark.parametrize("dtype", [torch.long, torch.bool])
    @pytest.mark.parametrize("shape", [(2, 9), (2, 11), (3, 10), (1, 10), (10,), (2, 1, 10)])
    def test_mask_of_wrong_shape(self, shape, dtype, setting):
        model = tiny_model(setting)
        with pytest.raises(ValueError, match=r"attention_mask") as error:
            model(tokens(2, 10), attention_mask=torch.ones(shape, dtype=dtype))
        assert str(tuple(shape)) in str(error.value)
        assert "(2, 10)" in str(error.value)

    def test_mask_that_does_not_fit_the_cache(self):
        model = tiny_model("delta")
        cache = model(tokens(2, 10)).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 14\).*\(2, 13\)"):
            model(tokens(2, 3), attention_mask=torch.ones(2, 14, dtype=torch.long), past_key_values=cache)

    def test_4d_mask_that_hides_more(self):
        visible = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
        visible[:, :, 7, 2] = False
        with pytest.raises(ValueError, match=r"attention_mask.*more than padding"):
            tiny_model()(tokens(2, 10), attention_mask=visible)

    def test_packed_rows(self):
        with pytest.raises(ValueError, match=r"position_ids.*consecutive"):
            tiny_model()(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))

    @pytest.mark.parametrize("inputs", [{}, {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 32)}])
    def test_both_or_no_inputs(self, inputs):
        for head in HEADS.values():
            with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
                tiny_model(head=head)(**inputs)

    @pytest.mark.parametrize(
        ("head", "labels"),
        [
            (KermitForCausalLM, {"labels": tokens(2, 9)}),
            (KermitForCausalLM, {"labels": tokens(20)}),
            (KermitForSequenceClassification, {"labels": tokens(3)}),
            (KermitForSequenceClassification, {"labels": tokens(2, 10)}),
            (KermitForTokenClassification, {"labels": tokens(2)}),
            (KermitForTokenClassification, {"labels": tokens(10, 2)}),
            (KermitForQuestionAnswering, {"start_positions": tokens(3), "end_positions": tokens(2)}),
            (KermitForQuestionAnswering, {"start_positions": tokens(2), "end_positions": tokens(2, 10)}),
        ],
    )
    def test_labels_of_wrong_shape(self, head, labels):
        model = tiny_model(head=head)
        with pytest.raises(ValueError, match=r"has shape \(.*\); allowed is \(2") as error:
            model(tokens(2, 10), attention_mask=torch.ones(2, 10), **labels)
        assert any(name in str(error.value) for name in labels)

    def test_an_encoder_does_not_generate(self):
        with pytest.raises(ValueError, match="is_causal=False"):
            KermitForCausalLM(tiny_config(is_causal=False))
        encoder = tiny_model(head=KermitModel, is_causal=False)
        with pytest.raises(ValueError, match="is_causal=False"):
            encoder(tokens(1, 3), past_key_values=tiny_model(head=KermitModel)(tokens(1, 3)).past_key_values)
        # Without a cache to pass, `use_cache=True` of the config means nothing to it.
        assert encoder(tokens(1, 3), use_cache=True).past_key_values is None

    @pytest.mark.parametrize("pad_token_id", [None, PAD])
    def test_classification_of_a_batch_whose_padding_is_unknown(self, pad_token_id):
        model = tiny_model(head=KermitForSequenceClassification, pad_token_id=pad_token_id)
        batch = tokens(2, 5)
        embeddings = model.get_input_embeddings()(batch)
        with pytest.raises(ValueError, match=f"attention_mask=None.*pad_token_id={pad_token_id}"):
            model(inputs_embeds=embeddings)
        if pad_token_id is None:
            with pytest.raises(ValueError, match=r"attention_mask=None.*pad_token_id=None"):
                model(batch)
        assert model(batch[:1]).logits.shape == (1, 2)


class TestSavingAndLoading:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_config_round_trip(self, setting, tmp_path):
        config = tiny_config(setting, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0})
        config.save_pretrained(tmp_path)
        again = transformers.AutoConfig.from_pretrained(tmp_path)
        assert type(again) is KermitConfig
        ours, theirs = config.to_dict(), again.to_dict()
        assert {**ours, "auto_map": None, "_name_or_path": None} == {**theirs, "auto_map": None, "_name_or_path": None}

    def test_a_config_file_with_a_bad_value_says_so(self, tmp_path):
        tiny_config().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "window_size": -3}))
        with pytest.raises(ValueError, match="window_size=-3"):
            KermitConfig.from_pretrained(tmp_path)

    @pytest.mark.parametrize("setting", ["delta", "additive_favor", "additive_taylor", "hybrid"])
    @pytest.mark.parametrize("auto_class", HEADS)
    def test_every_head_comes_back_through_its_auto_class(self, auto_class, setting, tmp_path):
        model = tiny_model(setting, head=HEADS[auto_class])
        model.save_pretrained(tmp_path)
        again, info = getattr(transformers, auto_class).from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is HEADS[auto_class]
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        inputs = {"input_ids": tokens(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
        assert torch.equal(first_tensor(model(**inputs)), first_tensor(again.eval()(**inputs)))
        assert type(getattr(transformers, auto_class).from_config(model.config)) is HEADS[auto_class]

    def test_a_head_on_the_body_of_another(self, tmp_path):
        language_model = tiny_model()
        language_model.save_pretrained(tmp_path)
        classifier, info = KermitForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {"score.weight"}
        assert torch.isfinite(classifier.score.weight).all() and classifier.score.weight.std() > 0
        input_ids = tokens(1, 20)
        assert torch.equal(
            classifier.eval().model(input_ids).last_hidden_state, language_model.model(input_ids).last_hidden_state
        )

    @pytest.mark.parametrize("setting", ["delta", "hybrid"])
    def test_tied_weights(self, setting, tmp_path):
        model = tiny_model(setting, tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        again = KermitForCausalLM.from_pretrained(tmp_path)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        input_ids = tokens(1, 20)
        assert torch.equal(model(input_ids).logits, again.eval()(input_ids).logits)
        model.resize_token_embeddings(VOCABULARY + 3)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model(tokens(1, 5)).logits.shape[-1] == VOCABULARY + 3

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_model_born_on_the_meta_device_comes_out_whole(self, setting):
        # What from_pretrained does for weights that a checkpoint lacks, here all of them.
        config = tiny_config(setting)
        torch.manual_seed(0)
        ordinary = KermitForCausalLM(config)
        model = KermitForCausalLM.from_pretrained(None, config=config, state_dict={})
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert tensor.device.type == "cpu", name
            assert torch.isfinite(tensor).all(), name
            start = dict([*ordinary.named_parameters(), *ordinary.named_buffers()])[name]
            # The same distribution as a model made in the ordinary way: same mean and spread.
            tolerance = max(0.5 * start.float().std(correction=0).item(), 1e-6)
            assert abs(tensor.float().mean() - start.float().mean()) <= tolerance, name
            assert abs(tensor.float().std(correction=0) - start.float().std(correction=0)) <= tolerance, name

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_loading_leaves_no_weight_at_its_start(self, setting, tmp_path):
        model = tiny_model(setting)
        model.save_pretrained(tmp_path)
        again = KermitForCausalLM.from_pretrained(tmp_path)
        for (name, ours), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(ours, theirs), name

    def test_a_truncated_file(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1000])
        last = max(json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")]).items(), key=_end_of_entry)[0]
        with pytest.raises(ValueError, match=rf"model\.safetensors lacks .*{re.escape(last)}"):
            KermitForCausalLM.from_pretrained(tmp_path)
        path.write_bytes(whole[:100])
        with pytest.raises(ValueError, match=r"model\.safetensors lacks every key .*table of contents"):
            KermitForCausalLM.from_pretrained(tmp_path)

    def test_a_truncated_file_of_several(self, tmp_path):
        tiny_model().save_pretrained(tmp_path, max_shard_size="15KB")
        shards = sorted(tmp_path.glob("*.safetensors"))
        assert len(shards) > 2
        shards[1].write_bytes(shards[1].read_bytes()[:-4])
        with pytest.raises(ValueError) as error:
            KermitForCausalLM.from_pretrained(tmp_path)
        assert [shard.name in str(error.value) for shard in shards] == [shard is shards[1] for shard in shards]

    def test_a_checkpoint_that_lacks_keys_of_the_body(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.1.self_attn.k_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=re.escape("model.layers.1.self_attn.k_proj.weight")):
            KermitForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=re.escape("layers.1.self_attn.k_proj.weight")):
            KermitModel.from_pretrained(tmp_path)

    def test_a_foreign_checkpoint(self, tmp_path):
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
        )
        transformers.BertModel(config).save_pretrained(tmp_path)
        tiny_config().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"embed_tokens\.weight") as error:
            KermitForCausalLM.from_pretrained(tmp_path)
        assert "encoder.layer.0" in str(error.value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"window_size": 1}, "num_sink_tokens=2 exceeds window_size=1"),
            ({"window_size": -4}, "window_size=-4"),
            ({"update_rule": "additive"}, "feature_map='silu_l2'"),
            ({"feature_map": "sine"}, "feature_map='sine'"),
            ({"layer_types": [KERNEL, "mamba"]}, "mamba"),
        ],
    )
    def test_changes_that_do_not_fit(self, changes, message, tmp_path):
        """Said while loading, not at the first step or the next save."""
        tiny_model("delta").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=re.escape(message)):
            KermitForCausalLM.from_pretrained(tmp_path, **changes)

    @pytest.mark.parametrize("setting", ["delta", "hybrid"])
    def test_fewer_layers(self, setting, tmp_path):
        """The first ones, as for any model of transformers; the config then says so."""
        model = tiny_model(setting)
        model.save_pretrained(tmp_path / "whole")
        shorter = KermitForCausalLM.from_pretrained(tmp_path / "whole", num_hidden_layers=1)
        assert shorter.config.layer_types == [KERNEL]
        shorter.save_pretrained(tmp_path / "shorter")
        input_ids = tokens(1, 20)
        del model.model.layers[1:]
        model.config.num_hidden_layers = 1
        logits = KermitForCausalLM.from_pretrained(tmp_path / "shorter")(input_ids).logits
        assert torch.equal(logits, model(input_ids).logits)

    def test_more_layers_of_the_same_kind(self, tmp_path):
        tiny_config("delta").save_pretrained(tmp_path)
        config = KermitConfig.from_pretrained(tmp_path, num_hidden_layers=3)
        assert torch.isfinite(KermitForCausalLM(config)(tokens(1, 12)).logits).all()
        with pytest.raises(ValueError, match=r"layers\.2\..*conversion_scripts"):
            tiny_model("delta").save_pretrained(tmp_path)
            KermitForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)

    def test_a_checkpoint_of_another_size(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        # The report that transformers logs before it raises names the keys.
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            KermitForCausalLM.from_pretrained(tmp_path, config=tiny_config(hidden_size=64))


class TestPrecision:
    # Three decimal digits of bfloat16 through two layers; logits are of order ten.
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_half_precision_is_close(self, setting, dtype, tolerance):
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (90, 40)], "left")
        with torch.no_grad():
            # The same rounded weights: what is compared is the arithmetic.
            model.to(dtype)
            low = model(input_ids, attention_mask=mask).logits
            high = model.float()(input_ids, attention_mask=mask).logits
        assert low.dtype == dtype and torch.isfinite(low).all()
        error = (low.float() - high)[mask == 1].norm() / high[mask == 1].norm()
        assert error < tolerance

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_model_made_in_half_precision_starts_as_in_float32(self, dtype):
        """Heads that remember longest forget so little that one minus it is one in half precision."""
        low, high = (
            transformers.AutoModelForCausalLM.from_config(tiny_config(), dtype=d) for d in (dtype, torch.float32)
        )
        assert all(parameter.isfinite().all() for parameter in low.parameters())
        for name, parameter in low.named_parameters():
            if "forget_proj.bias" in name:
                assert torch.equal(parameter, high.get_parameter(name).to(dtype)), name

    @pytest.mark.parametrize("setting", ["delta", "additive_favor", "additive"])
    def test_autocast(self, setting):
        model = tiny_model(setting)
        input_ids = tokens(2, 60)
        with torch.no_grad():
            expected = model(input_ids).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = model(input_ids).logits
        assert (result.float() - expected).norm() / expected.norm() < 0.05

    def test_float64_stays_float64(self):
        model = tiny_model("delta").double()
        input_ids = tokens(1, 30)
        double = model(input_ids).logits
        assert double.dtype == torch.float64
        torch.testing.assert_close(model.float()(input_ids).logits, double.float(), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=NEEDS_CPP)])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_gradient_checkpointing_changes_nothing(self, setting, backend, use_reentrant):
        model = tiny_model(setting).train()
        input_ids, mask = place([tokens(length) for length in LENGTHS], "right")
        labels = input_ids.masked_fill(mask == 0, -100)

        def gradients():
            model.zero_grad()
            with kernel_backend(backend):
                loss = model(input_ids, attention_mask=mask, labels=labels, use_cache=False).loss
                loss.backward()
            return loss, {name: p.grad for name, p in model.named_parameters()}

        loss, expected = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        checkpointed_loss, result = gradients()
        assert torch.equal(loss, checkpointed_loss)
        for name, gradient in expected.items():
            if gradient is None:
                assert result[name] is None, name
            else:
                torch.testing.assert_close(result[name], gradient, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive_favor", "hybrid"])
    def test_every_weight_gets_a_gradient(self, setting):
        model = tiny_model(setting).train()
        shake(model)
        model(tokens(2, 60), labels=tokens(2, 60)).loss.backward()
        for name, parameter in model.named_parameters():
            if model.config.window_size == 0 and re.search("far_query|far_bias", name):
                continue  # a softmax over the far field alone is one, whatever its logit
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_pure"])
def test_second_derivatives(setting):
    """The eager form has them, the others say that they have none; torch alone would leave their part out and say nothing."""
    model = tiny_model(setting, implementation="eager")
    states = model.get_input_embeddings()(tokens(1, 20)).detach().double().requires_grad_()
    direction = torch.randn_like(states)
    model.double()

    def gradient(states, **options):
        logits = model(inputs_embeds=states, use_cache=False).logits
        return torch.autograd.grad(logits.square().sum(), states, **options)[0]

    (product,) = torch.autograd.grad((gradient(states, create_graph=True) * direction).sum(), states)
    step = 1e-3  # the norms of transformers calculate in float32
    difference = gradient(states + step * direction) - gradient(states - step * direction)
    torch.testing.assert_close(product, difference / (2 * step), atol=0.02 * float(product.abs().max()), rtol=0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"second derivatives.*attn_implementation='eager'"):
        gradient(states, create_graph=True)


@pytest.mark.parametrize("head", HEADS)
def test_arguments_come_in_the_order_of_llamas(head):
    theirs = getattr(transformers.models.llama.modeling_llama, HEADS[head].__name__.replace("Kermit", "Llama"))
    names = [[*inspect.signature(model.forward).parameters] for model in (HEADS[head], theirs)]
    assert [name for name in names[1] if name in names[0]] == names[0]


@pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive_favor"])
def test_an_exported_model_computes_the_same(setting):
    """Also with gradients, where nobody may write to one of several views of a tensor."""
    model, input_ids = tiny_model(setting), tokens(2, 30)
    exported = torch.export.export(model, (input_ids,), kwargs={"use_cache": False}, strict=False).module()
    logits, expected = exported(input_ids, use_cache=False).logits, model(input_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("setting", ["delta", "delta_longer_than_text"])
def test_one_graph_serves_lengths_of_as_many_blocks(setting):
    """Its sizes follow from numbers of blocks; written with the length alone, sympy took minutes over them."""
    sizes = []

    def note_sizes(graph, _):
        for node in graph.graph.nodes:
            tensor = node.meta.get("example_value")
            sizes.extend(map(str, tensor.shape) if isinstance(tensor, torch.Tensor) else ())
        return graph.forward

    torch._dynamo.reset()
    model = tiny_model(setting, num_hidden_layers=1)
    compiled = torch.compile(model, backend=note_sizes, dynamic=True, fullgraph=True)
    for length in (100, 118):
        input_ids = tokens(1, length)
        with torch.no_grad():
            logits = compiled(input_ids, use_cache=False).logits
            torch.testing.assert_close(logits, model(input_ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
        count = len(sizes)
        assert count > 100
        assert max(map(len, sizes)) < 40, max(sizes, key=len)
    assert len(sizes) == count


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive_favor"])
@pytest.mark.parametrize("head", HEADS.values())
def test_shapes_on_the_meta_device(head, setting, padded):
    with torch.device("meta"):
        model, input_ids = head(tiny_config(setting)), torch.zeros(2, 30, dtype=torch.long)
    mask = torch.ones_like(input_ids) if padded else None
    output = model(input_ids, attention_mask=mask)
    assert first_tensor(output).shape == first_tensor(tiny_model(setting, head)(tokens(2, 30))).shape
    first_tensor(output).sum().backward()
    if head is KermitForCausalLM:
        cache = output.past_key_values
        assert model(input_ids[:, :1], past_key_values=cache).logits.shape == (2, 1, VOCABULARY)


def _end_of_entry(item: tuple[str, dict]) -> int:
    return item[1].get("data_offsets", [0, 0])[1]


def test_a_long_text_is_averaged_in_float32():
    """Its sum does not fit into half precision."""
    model = tiny_model("delta", head=KermitForSequenceClassification, is_causal=False).half()
    states = torch.full((1, 40_000, model.config.hidden_size), 2.0, dtype=torch.float16)
    for mask in (None, torch.ones(1, 40_000)):
        torch.testing.assert_close(model._pool(states, mask), states[:, 0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "one token or more"),
        ({"input_ids": tokens(2, 6), "attention_mask": torch.ones(2, 9)}, "attention_mask has shape"),
        ({"input_ids": tokens(2, 6), "attention_mask": {"full_attention": None}}, "kernel_attention"),
    ],
)
def test_inputs_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("delta")(**arguments)


def test_an_integer_4d_mask():
    model, input_ids = tiny_model("delta"), tokens(1, 12)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.long).tril()
    torch.testing.assert_close(model(input_ids, attention_mask=mask).logits, model(input_ids).logits)


def test_an_impossible_dropout():
    with pytest.raises(ValueError, match=r"attention_dropout=1.5"):
        tiny_config("delta", attention_dropout=1.5)
