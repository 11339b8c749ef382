"""The encoder model: equal to transformers' own where that one works, right where that one fails."""

import pytest
import torch
import transformers
from transformers import BertConfig, BertModel

import nystromformer_hf
from nystromformer_hf import (
    NystromformerHFConfig,
    NystromformerHFForMaskedLM,
    NystromformerHFForMultipleChoice,
    NystromformerHFForSequenceClassification,
    NystromformerHFForTokenClassification,
    NystromformerHFModel,
)
from nystromformer_hf.modeling_nystromformer_hf import AUTO_CLASSES
from tests.nystromformer_hf import test_hub
from tests.nystromformer_hf.helpers import TINY, in_tree_config, padding_masks, random_tokens, tiny_config


HEADS = {name: cls for name, cls in AUTO_CLASSES.items() if name != "AutoModelForMultipleChoice"}
OUTPUTS = ("last_hidden_state", "logits", "start_logits", "end_logits")


def outputs_of(model, **inputs) -> torch.Tensor:
    """All results of a head side by side, (batch, ...)."""
    outputs = model(**inputs)
    return torch.cat([outputs[name].flatten(1) for name in OUTPUTS if name in outputs], dim=1)


@pytest.fixture
def model() -> NystromformerHFModel:
    return NystromformerHFModel(tiny_config()).eval()


@pytest.mark.parametrize("kind", ["nystrom", "softmax"])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_equals_transformers(auto_class, kind):
    """Outputs and gradients of every parameter, to 1e-5 of their size: unpadded, length = segment_means_seq_len.

    One text at a time, since transformers scales the inverse of a whole batch by one number.
    """
    changes = {"nystrom": {}, "softmax": {"num_landmarks": 64}}[kind]
    # Dropout would differ in kind (ours drops keys); everything else is compared in training mode.
    changes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    theirs = getattr(transformers, auto_class).from_config(in_tree_config(**changes)).train()
    ours = AUTO_CLASSES[auto_class].from_nystromformer(theirs).train()
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    assert ours.state_dict().keys() == theirs.state_dict().keys()

    tokens = random_tokens(1, 64)
    if auto_class == "AutoModelForMultipleChoice":
        tokens = tokens[:, None]
    inputs = {"input_ids": tokens, "token_type_ids": torch.randint(2, tokens.shape)}
    results = []
    for head in (theirs, ours):
        output = outputs_of(head, **inputs)
        (output * torch.linspace(-1, 1, output.shape[1])).sum().backward()
        results.append(output.detach())
    torch.testing.assert_close(results[1], results[0], atol=1e-5 * results[0].abs().max().item(), rtol=0)
    for name, parameter in theirs.named_parameters():
        ours_gradient = ours.get_parameter(name).grad
        assert (parameter.grad is None) == (ours_gradient is None), name
        if parameter.grad is not None:
            scale = max(parameter.grad.abs().max().item(), 1.0)
            torch.testing.assert_close(ours_gradient, parameter.grad, atol=1e-5 * scale, rtol=0, msg=name)


def test_losses_equal_transformers():
    tokens = random_tokens(1, 64)
    for auto_class, labels in {
        "AutoModelForMaskedLM": {"labels": tokens.where(torch.rand(1, 64) < 0.2, -100)},
        "AutoModelForSequenceClassification": {"labels": torch.tensor([1])},
        "AutoModelForTokenClassification": {"labels": tokens % 3},
        "AutoModelForQuestionAnswering": {"start_positions": torch.tensor([5]), "end_positions": torch.tensor([20])},
    }.items():
        theirs = getattr(transformers, auto_class).from_config(in_tree_config(num_labels=3)).eval()
        ours = AUTO_CLASSES[auto_class].from_nystromformer(theirs).eval()
        torch.testing.assert_close(ours(tokens, **labels).loss, theirs(tokens, **labels).loss, atol=1e-5, rtol=1e-5)


def test_rows_of_a_batch_equal_transformers_one_by_one():
    theirs = transformers.NystromformerModel(in_tree_config()).eval()
    ours = NystromformerHFModel.from_nystromformer(theirs).eval()
    tokens = random_tokens(4, 64)
    expected = torch.cat([theirs(row[None]).last_hidden_state for row in tokens])
    torch.testing.assert_close(ours(tokens).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    hidden = [theirs(row[None], output_hidden_states=True).hidden_states for row in tokens]
    for layer, states in enumerate(ours(tokens, output_hidden_states=True).hidden_states):
        torch.testing.assert_close(states, torch.cat([row[layer] for row in hidden]), atol=1e-5, rtol=1e-5)


def test_loads_a_checkpoint_of_transformers(tmp_path):
    theirs = transformers.NystromformerForMaskedLM(in_tree_config()).eval()
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(1, 64)
    ours, info = NystromformerHFForMaskedLM.from_nystromformer(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)

    # Another head takes the shared weights and draws its own; configuration fields can change on the way.
    other = NystromformerHFForSequenceClassification.from_nystromformer(
        str(tmp_path), num_labels=4, num_landmarks=8, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert (other.config.num_labels, other.config.num_landmarks) == (4, 8)
    assert other.dtype == torch.bfloat16
    assert other.config._attn_implementation == "eager"
    weight = other.nystromformer.encoder.layer[1].attention.self.conv.weight
    assert torch.equal(weight, theirs.nystromformer.encoder.layer[1].attention.self.conv.weight.bfloat16())

    # Only the model type in the checkpoint's config.json changes once it is saved again.
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    assert type(again) is NystromformerHFForMaskedLM
    torch.testing.assert_close(again(tokens).logits, ours(tokens).logits)


def test_takes_over_a_model_or_configuration_in_memory():
    theirs = transformers.NystromformerModel(in_tree_config())
    ours = NystromformerHFForMaskedLM.from_nystromformer(theirs, landmark_refinement_steps=1)
    assert ours.config.landmark_refinement_steps == 1
    assert torch.equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)
    assert NystromformerHFModel.from_nystromformer(theirs.config).config.num_landmarks == 16
    with pytest.raises(ValueError, match="model_type='bert'"):
        NystromformerHFModel.from_nystromformer(
            BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
        )


def test_the_default_configuration_uses_landmarks():
    config = NystromformerHFConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    model = NystromformerHFModel(config).eval()
    tokens = torch.randint(5, 1000, (1, 200))
    exact = NystromformerHFModel.from_pretrained(
        None, config=NystromformerHFConfig(**config.to_dict() | {"num_landmarks": 200}), state_dict=model.state_dict()
    )
    assert (model(tokens).last_hidden_state - exact(tokens).last_hidden_state).abs().max() > 1e-5


@pytest.mark.parametrize(
    "seq_len", [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 129, 257, 500, 1000, 1021, 2049, 4095, 4096]
)
def test_any_length_alone_and_beside_others(seq_len):
    """A row of any length equals itself in a longer batch, padded on either side, beyond the trained positions too."""
    model = NystromformerHFModel(tiny_config(num_hidden_layers=1)).eval()
    tokens = random_tokens(1, seq_len)
    alone = model(tokens).last_hidden_state
    assert alone.shape == (1, seq_len, 32)
    assert alone.isfinite().all()
    batch = random_tokens(3, min(seq_len + 37, 4096))
    batch[0, :seq_len] = batch[1, -seq_len:] = tokens
    mask = torch.ones_like(batch)
    mask[0, seq_len:] = mask[1, :-seq_len] = 0
    together = model(batch, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(together[:1, :seq_len], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1:2, -seq_len:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_length_to_five_times_the_landmarks_in_one_batch(side):
    model = NystromformerHFModel(tiny_config(num_hidden_layers=1)).eval()
    tokens, lengths = random_tokens(80, 80), torch.arange(1, 81)[:, None]
    mask = torch.arange(80) < lengths if side == "right" else torch.arange(80) >= 80 - lengths
    batch = model(tokens, attention_mask=mask).last_hidden_state
    for row, real in enumerate(mask):
        alone = model(tokens[row : row + 1, real]).last_hidden_state[0]
        torch.testing.assert_close(batch[row, real], alone, atol=1e-5, rtol=0)


def test_the_other_start_of_the_inverse():
    """With it transformers' own model ends in a `TypeError`."""
    config = in_tree_config(inv_coeff_init_option=True)
    with pytest.raises(TypeError):
        transformers.NystromformerModel(config)
    ours = NystromformerHFModel.from_nystromformer(config).eval()
    tokens = random_tokens(2, 64)
    output = ours(tokens).last_hidden_state
    ours.config.inverse_init = "original"
    assert output.isfinite().all() and (output - ours(tokens).last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("auto_class", HEADS)
def test_padding_never_changes_a_row(auto_class, attn_implementation):
    """Every kind of padding in one batch: each row equals the same row without its padding."""
    model = HEADS[auto_class](tiny_config(attn_implementation=attn_implementation)).eval()
    masks = torch.stack([mask.long() for mask in padding_masks(90).values()])
    tokens, types = random_tokens(*masks.shape), torch.randint(2, masks.shape)
    batch = model(tokens, attention_mask=masks, token_type_ids=types)
    for row, real in enumerate(masks.bool()):
        alone = model(tokens[row : row + 1, real], token_type_ids=types[row : row + 1, real])
        for name in OUTPUTS:
            if name in batch:
                result = batch[name][row : row + 1]
                result = result if auto_class.endswith("SequenceClassification") else result[:, real]
                torch.testing.assert_close(result, alone[name], atol=1e-5, rtol=0)


def test_what_stands_at_padding_does_not_matter(model):
    masks = torch.stack([mask.long() for mask in padding_masks(90).values()])
    tokens = random_tokens(*masks.shape)
    other = torch.where(masks.bool(), tokens, random_tokens(*masks.shape))
    for attention_mask in (masks, masks.bool(), masks.float()):
        difference = model(tokens, attention_mask).last_hidden_state - model(other, attention_mask).last_hidden_state
        assert difference[masks.bool()].abs().max() < 1e-6


def test_batch_mates_do_not_matter(model):
    tokens = random_tokens(5, 80)
    batch = model(tokens).last_hidden_state
    for row in range(5):
        torch.testing.assert_close(model(tokens[row : row + 1]).last_hidden_state[0], batch[row], atol=1e-6, rtol=0)


def test_a_row_of_padding_only_is_harmless(model):
    tokens, mask = random_tokens(2, 50), torch.ones(2, 50)
    mask[0] = 0
    output = model(tokens, attention_mask=mask).last_hidden_state
    assert output.isfinite().all()
    torch.testing.assert_close(output[1:], model(tokens[1:]).last_hidden_state, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["converted", "autocast"])
def test_low_precision_is_close_to_float32(model, dtype, how):
    masks = torch.stack([mask.long() for mask in padding_masks(90).values()])
    tokens = random_tokens(*masks.shape)
    expected = model(tokens, attention_mask=masks).last_hidden_state
    if how == "autocast":
        with torch.autocast("cpu", dtype=dtype):
            output = model(tokens, attention_mask=masks).last_hidden_state
    else:
        output = model.to(dtype)(tokens, attention_mask=masks).last_hidden_state
        assert output.dtype == dtype
    assert (output.float() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("conv_kernel_size", [None, 1, 4, 65])
def test_any_convolution(conv_kernel_size):
    model = NystromformerHFModel(tiny_config(conv_kernel_size=conv_kernel_size)).eval()
    names = [name for name, _ in model.named_parameters() if "conv" in name]
    assert len(names) == (0 if conv_kernel_size is None else 2)
    tokens = random_tokens(2, 40)
    mask = torch.ones(2, 40)
    mask[0, :22] = 0
    output = model(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output[:1, 22:], model(tokens[:1, 22:]).last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seq_len", [10, 80])
def test_attention_dropout_has_an_effect_in_training_only(seq_len):
    config = tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model, tokens = NystromformerHFModel(config), random_tokens(1, seq_len)
    model.train()
    assert (model(tokens).last_hidden_state - model(tokens).last_hidden_state).abs().max() > 0.01
    model.eval()
    assert torch.equal(model(tokens).last_hidden_state, model(tokens).last_hidden_state)


@pytest.mark.parametrize("inverse_init", ["original", "exact"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_attentions_are_square_and_give_the_output(inverse_init, attn_implementation):
    """Weights times values plus the convolution is the context, for all tokens of every kind of padding."""
    config = tiny_config(inverse_init=inverse_init, attn_implementation=attn_implementation)
    model = NystromformerHFModel(config).eval()
    masks = torch.stack([mask.long() for mask in padding_masks(90).values()])
    tokens = random_tokens(*masks.shape)
    outputs = model(tokens, attention_mask=masks, output_attentions=True, output_hidden_states=True)
    fast = model(tokens, attention_mask=masks).last_hidden_state
    assert (outputs.last_hidden_state - fast)[masks.bool()].abs().max() < 1e-4
    assert len(outputs.attentions) == 2
    for layer, weights in enumerate(outputs.attentions):
        assert weights.shape == (len(masks), TINY["num_attention_heads"], 90, 90)
        assert not weights.masked_select(masks[:, None, None, :] == 0).any()
        error = (weights.sum(-1).transpose(1, 2) - 1).abs().amax(-1)
        assert error[masks.bool()].max() < 0.1  # six iterations; exact for short rows:
        assert error[masks.bool() & (masks.sum(-1, keepdim=True) <= 16)].max() < 1e-6
        attention = model.encoder.layer[layer].attention.self
        hidden = outputs.hidden_states[layer]
        for row, real in enumerate(masks.bool()):
            value = (
                attention.value(hidden[row : row + 1, real])
                .unflatten(-1, (TINY["num_attention_heads"], -1))
                .transpose(1, 2)
            )
            context = weights[row : row + 1][:, :, real][:, :, :, real] @ value + attention.conv(value, None)
            expected, _ = attention(hidden[row : row + 1, real])
            torch.testing.assert_close(context.transpose(1, 2).flatten(2), expected, atol=1e-4, rtol=0)


def test_fast_form_computes_no_attention_weights(model):
    assert model.config._attn_implementation == "sdpa"
    _, weights = model.encoder.layer[0].attention.self(torch.randn(1, 40, 32))
    assert weights is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"inverse_init": "exact", "inverse_iterations": 4},
        {"inverse_regularization": 0.01},
        {"landmark_refinement_steps": 1},
        {"num_landmarks": 1},
        {"conv_kernel_size": None},
        {"hidden_act": "relu", "num_attention_heads": 1},
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_eager_equals_fast(changes, training):
    """With the same random state in training too: both forms drop the same keys."""
    config = tiny_config(**changes)
    model = NystromformerHFModel(config).train(training)
    masks = torch.stack([mask.long() for mask in padding_masks(70).values()])
    tokens, results = random_tokens(*masks.shape), []
    for attn_implementation in ("sdpa", "eager"):
        model.set_attn_implementation(attn_implementation)
        assert model.encoder.layer[0].attention.self.config._attn_implementation == attn_implementation
        torch.manual_seed(3)
        results.append(model(tokens, attention_mask=masks).last_hidden_state[masks.bool()])
    torch.testing.assert_close(*results, atol=2e-5, rtol=0)


def test_positions_beyond_the_table_repeat_it(model):
    """Row 2 + p mod 128 of the table belongs to position p, as in the longer published models."""
    tokens = torch.full((1, 300), 7)
    embedded = model.embeddings(model.get_input_embeddings()(tokens), torch.arange(2, 302)[None])
    torch.testing.assert_close(embedded[:, :128], embedded[:, 128:256])
    torch.testing.assert_close(embedded[:, :44], embedded[:, 256:])
    explicit = model(tokens, position_ids=torch.arange(300)[None] % 128 + 2).last_hidden_state
    torch.testing.assert_close(model(tokens).last_hidden_state, explicit)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input_ids and inputs_embeds"),
        ({"input_ids": random_tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)}, "input_ids and inputs_embeds"),
        ({"input_ids": random_tokens(2, 4), "attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\)"),
        ({"input_ids": random_tokens(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}, r"allowed is \(batch, seq"),
        ({"input_ids": random_tokens(2, 0)}, r"input_ids has shape \(2, 0\)"),
        ({"input_ids": random_tokens(4)}, r"input_ids has shape \(4,\); allowed is \(batch, seq\).* input_ids\[None\]"),
        ({"input_ids": random_tokens(1, 2, 4)}, r"input_ids has shape \(1, 2, 4\); allowed is \(batch, seq\)"),
        (
            {"inputs_embeds": torch.zeros(4, 32)},
            r"inputs_embeds has shape \(4, 32\); allowed is \(batch, seq, hidden_size",
        ),
        (
            {"input_ids": random_tokens(2, 4), "token_type_ids": random_tokens(2, 5)},
            r"token_type_ids has shape \(2, 5\); allowed is \(2, 4\)",
        ),
        (
            {"input_ids": random_tokens(2, 4), "position_ids": random_tokens(4)},
            r"position_ids has shape \(4,\); allowed is \(2, 4\) or \(1, 4\)",
        ),
    ],
)
def test_bad_inputs_are_named(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("auto_class", "labels", "allowed"),
    [
        ("AutoModelForMaskedLM", {"labels": (2, 9)}, "(2, 10)"),
        ("AutoModelForTokenClassification", {"labels": (3, 10)}, "(2, 10)"),
        ("AutoModelForSequenceClassification", {"labels": (3,)}, "(2,) or (2, 1) or (2, 3)"),
        ("AutoModelForQuestionAnswering", {"start_positions": (3,), "end_positions": (2,)}, "(2,) or (2, 1)"),
        ("AutoModelForQuestionAnswering", {"end_positions": (3,), "start_positions": (2,)}, "(2,) or (2, 1)"),
        ("AutoModelForMultipleChoice", {"labels": (3,)}, "(2,)"),
    ],
)
def test_labels_of_a_wrong_shape_are_named(auto_class, labels, allowed):
    model, tokens = AUTO_CLASSES[auto_class](tiny_config(num_labels=3)), random_tokens(2, 10)
    tokens = tokens[:, None] if auto_class == "AutoModelForMultipleChoice" else tokens
    name, shape = next(iter(labels.items()))
    with pytest.raises(ValueError) as error:
        model(tokens, **{field: torch.zeros(size, dtype=torch.long) for field, size in labels.items()})
    assert str(error.value) == f"{name} has shape {shape}; allowed is {allowed}"


def test_choices_need_an_axis_of_their_own():
    model = NystromformerHFForMultipleChoice(tiny_config())
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 9\); allowed is \(batch, num_choices, seq\)"):
        model(random_tokens(2, 9))


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_no_inputs_are_named_by_every_head(auto_class):
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        AUTO_CLASSES[auto_class](tiny_config())()


def test_fields_set_later_are_checked_too(tmp_path):
    config = tiny_config()
    config.num_landmarks = -1
    with pytest.raises(ValueError, match="num_landmarks=-1"):
        NystromformerHFModel(config)
    NystromformerHFModel(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="inverse_init='best'"):
        NystromformerHFModel.from_pretrained(tmp_path, inverse_init="best")


def test_kernels_that_need_other_masks_are_refused():
    for name in ("flex_attention", "flash_attention_2"):
        with pytest.raises((ValueError, ImportError), match="does not support"):
            NystromformerHFModel(tiny_config(attn_implementation=name))


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_auto_classes_build_save_and_load_every_head(auto_class, tmp_path):
    auto = getattr(transformers, auto_class)
    model = auto.from_config(tiny_config(num_labels=3)).eval()
    assert type(model) is AUTO_CLASSES[auto_class]
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_every_head_loads_whichever_was_saved(tmp_path):
    NystromformerHFForTokenClassification(tiny_config()).save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path).auto_map
    assert saved.keys() == {"AutoConfig", *AUTO_CLASSES}
    assert {file.name for file in tmp_path.glob("*.py")} == set(test_hub.TestNystromformerEncoderOnTheHub.code)
    assert not any(line.split(".")[0] == nystromformer_hf.__name__ for line in saved.values())


def test_initialisation_is_complete_on_the_meta_device(tmp_path):
    model = NystromformerHFForMaskedLM(tiny_config())
    kernels = model.nystromformer.encoder.layer[0].attention.self.conv.weight
    assert 0.1 < kernels.std() < 0.3
    model.nystromformer.save_pretrained(tmp_path)
    head = NystromformerHFForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(head.nystromformer.encoder.layer[0].attention.self.conv.weight, kernels)
    assert not head.cls.predictions.bias.any()
    assert head.cls.predictions.decoder.bias is head.cls.predictions.bias
    assert head.cls.predictions.decoder.weight is head.get_input_embeddings().weight


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_runs_on_the_meta_device(auto_class, padded, attn_implementation):
    """Which counts operations and memory without doing anything, and has no values to look at."""
    shape = (2, 3, 50) if auto_class == "AutoModelForMultipleChoice" else (2, 50)
    with torch.device("meta"):
        model = AUTO_CLASSES[auto_class](tiny_config(attn_implementation=attn_implementation))
        mask = torch.ones(shape, dtype=torch.long) if padded else None
        found = model(torch.ones(shape, dtype=torch.long), attention_mask=mask)[0]
    model.to_empty(device="cpu")
    assert found.is_meta and found.shape == model(random_tokens(*shape))[0].shape


def test_vocabulary_can_grow():
    model = NystromformerHFForMaskedLM(tiny_config())
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[69, 3]]), labels=torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)


def test_multiple_choice_treats_choices_as_rows():
    model = NystromformerHFForMultipleChoice(tiny_config()).eval()
    tokens, mask = random_tokens(2, 3, 40), torch.ones(2, 3, 40)
    mask[0, 1, 20:] = mask[1, 2, :25] = 0
    logits = model(tokens, attention_mask=mask).logits
    assert logits.shape == (2, 3)
    for row, choice, real in ((0, 1, slice(20)), (1, 2, slice(25, None))):
        alone = model(tokens[row, choice, real][None, None]).logits
        torch.testing.assert_close(logits[row, choice], alone[0, 0], atol=1e-5, rtol=0)
    loss = model(tokens, attention_mask=mask, labels=torch.tensor([1, 2])).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])))


@pytest.mark.parametrize("chosen", [None, "tanh"])
def test_activation_of_the_classifiers(chosen):
    """The published models' by default: `hidden_act` for whole texts, ReLU for choices."""
    config = tiny_config(num_labels=3, hidden_act="relu", classifier_activation=chosen)
    tokens = random_tokens(2, 20)
    model = NystromformerHFForSequenceClassification(config).eval()
    function = torch.tanh if chosen else torch.relu
    first = model.nystromformer(tokens).last_hidden_state[:, 0]
    expected = model.classifier.out_proj(function(model.classifier.dense(first)))
    torch.testing.assert_close(model(tokens).logits, expected)
    config.hidden_act = "gelu"
    model = transformers.AutoModelForMultipleChoice.from_config(config).eval()
    first = model.nystromformer(tokens).last_hidden_state[:, 0]
    expected = model.classifier(function(model.pre_classifier(first))).T
    torch.testing.assert_close(model(tokens[None]).logits, expected)


def test_embeddings_and_tuples_are_accepted(model):
    tokens = random_tokens(2, 30)
    embedded = model.get_input_embeddings()(tokens)
    expected = model(tokens).last_hidden_state
    torch.testing.assert_close(model(inputs_embeds=embedded).last_hidden_state, expected)
    outputs = model(tokens, return_dict=False, output_hidden_states=True, output_attentions=True)
    assert isinstance(outputs, tuple)
    assert [len(part) for part in outputs[1:]] == [3, 2]
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_compiles_without_a_graph_break(model, padded):
    tokens = random_tokens(3, 50)
    mask = torch.stack(list(padding_masks(50).values())[2:5]).long() if padded else None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    result, expected = (m(tokens, attention_mask=mask).last_hidden_state for m in (compiled, model))
    real = torch.ones(3, 50).bool() if mask is None else mask.bool()
    torch.testing.assert_close(result[real], expected[real], atol=1e-5, rtol=1e-5)


def test_chunked_feed_forward_changes_nothing(model):
    tokens = random_tokens(1, 64)
    expected = model(tokens).last_hidden_state
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 16
    torch.testing.assert_close(model(tokens).last_hidden_state, expected)
