"""The encoder's configuration: bad fields are named, transformers' own configurations are understood."""

import pytest
import transformers
from transformers import AutoConfig, BertConfig, NystromformerConfig

from nystromformer_hf import NystromformerHFConfig, NystromformerHFForSequenceClassification
from tests.nystromformer_hf.helpers import in_tree_config, tiny_config


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_landmarks", 0, "from 1"),
        ("num_landmarks", "many", "int"),
        ("num_hidden_layers", 0, "from 1"),
        ("vocab_size", -3, "from 1"),
        ("max_position_embeddings", 0, "from 1"),
        ("hidden_size", 31, "multiples of num_attention_heads=2"),
        ("num_attention_heads", 0, "from 1"),
        ("conv_kernel_size", 0, "from 1"),
        ("conv_kernel_size", 2.5, "int"),
        ("inverse_iterations", 0, "from 1"),
        ("inverse_init", "best", "original, exact"),
        ("inverse_regularization", 0.0, "above 0"),
        ("inverse_regularization", float("nan"), "above 0"),
        ("landmark_refinement_steps", -1, "from 0"),
        ("attention_probs_dropout_prob", 1.5, "0 ≤"),
        ("hidden_dropout_prob", -0.1, "0 ≤"),
        ("hidden_act", "step", "gelu"),
        ("classifier_activation", "step", "None and"),
        ("is_decoder", True, "encoder"),
        ("pad_token_id", 60, "vocab_size - 1 = 59"),
        ("segment_means_seq_len", 64, "num_landmarks"),
        ("inv_coeff_init_option", False, "inverse_init"),
    ],
)
def test_bad_fields_are_named_with_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        tiny_config(**{field: value})
    assert field in str(error.value)
    assert str(value) in str(error.value)
    assert allowed in str(error.value)


def test_saves_and_loads(tmp_path):
    config = tiny_config(num_labels=5, inverse_init="exact", inverse_regularization=0.01, conv_kernel_size=None)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is NystromformerHFConfig
    assert loaded.to_diff_dict() == config.to_diff_dict() | {"auto_map": loaded.auto_map}


def test_takes_over_a_configuration_of_transformers(tmp_path):
    source = in_tree_config(num_labels=3, hidden_act="relu", pad_token_id=4)
    source.save_pretrained(tmp_path)
    for taken in (NystromformerHFConfig.from_nystromformer(x) for x in (source, tmp_path, str(tmp_path))):
        assert taken.model_type == "nystromformer_hf"
        assert not hasattr(taken, "segment_means_seq_len")
        for name in set(source.to_dict()) & set(NystromformerHFConfig.default_config_fields()):
            if name not in ("model_type", "architectures", "transformers_version"):
                assert getattr(taken, name) == getattr(source, name), name
    changed = NystromformerHFConfig.from_nystromformer(tmp_path, num_landmarks=8, num_labels=7, inverse_init="exact")
    assert (changed.num_landmarks, changed.num_labels, changed.inverse_init) == (8, 7, "exact")
    with pytest.raises(ValueError, match="num_landmarks=0"):
        NystromformerHFConfig.from_nystromformer(source, num_landmarks=0)


def test_understands_the_fields_of_transformers():
    assert NystromformerHFConfig.from_nystromformer(in_tree_config(inv_coeff_init_option=True)).inverse_init == "exact"
    assert NystromformerHFConfig.from_nystromformer(in_tree_config()).inverse_init == "original"


def test_a_published_checkpoint_means_the_same_however_it_is_loaded(tmp_path):
    """Whoever passes it to `from_pretrained` gets what `from_nystromformer` makes of it."""
    transformers.NystromformerForSequenceClassification(in_tree_config(num_labels=3)).save_pretrained(tmp_path)
    source = in_tree_config(num_landmarks=64, segment_means_seq_len=16, inv_coeff_init_option=True, num_labels=3)
    source.save_pretrained(tmp_path)
    taken = NystromformerHFConfig.from_nystromformer(tmp_path).to_dict()
    assert (taken["num_landmarks"], taken["inverse_init"], taken["model_type"]) == (16, "exact", "nystromformer_hf")
    assert NystromformerHFConfig.from_pretrained(tmp_path).to_dict() == taken | {"_name_or_path": ""}
    assert NystromformerHFConfig.from_dict(source.to_dict()).num_landmarks == 16
    assert NystromformerHFForSequenceClassification.from_pretrained(tmp_path).config.num_landmarks == 16
    changed, rest = NystromformerHFConfig.from_pretrained(
        tmp_path, num_landmarks=8, num_labels=5, other=1, return_unused_kwargs=True
    )
    assert (changed.num_landmarks, changed.num_labels, rest) == (8, 5, {"other": 1})


def test_landmarks_that_were_never_used_stay_unused():
    """transformers' default is softmax attention, since its landmarks equal its segment length."""
    assert NystromformerHFConfig.from_nystromformer(NystromformerConfig()).num_landmarks == 510


def test_landmarks_and_length_that_were_swapped():
    """The authors' released configuration for 512 tokens says `num_landmarks=512, seq_len=64`."""
    source = in_tree_config(num_landmarks=64, segment_means_seq_len=16)
    assert NystromformerHFConfig.from_nystromformer(source).num_landmarks == 16


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model_type='bert' cannot be taken over; allowed is 'nystromformer'"):
        NystromformerHFConfig.from_nystromformer(BertConfig())


def test_registration_leaves_the_model_of_transformers_alone():
    assert type(AutoConfig.for_model("nystromformer")) is NystromformerConfig
    assert type(AutoConfig.for_model("nystromformer_hf")) is NystromformerHFConfig
    model = transformers.AutoModelForMaskedLM.from_config(in_tree_config())
    assert type(model) is transformers.NystromformerForMaskedLM
