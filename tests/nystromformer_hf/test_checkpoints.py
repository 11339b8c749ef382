"""Checkpoints that are damaged or of another architecture, for encoder and decoder: the error names file and keys."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nystromformer_hf import (
    NystromformerHFDecoderForCausalLM,
    NystromformerHFDecoderForSequenceClassification,
    NystromformerHFForMaskedLM,
    NystromformerHFForSequenceClassification,
)

from . import decoder_models, helpers


HEADS = {
    "encoder": (NystromformerHFForMaskedLM, lambda: helpers.tiny_config(), "nystromformer.encoder.layer"),
    "decoder": (NystromformerHFDecoderForCausalLM, lambda: decoder_models.tiny_config("regularized"), "model.layers"),
}


@pytest.fixture(params=HEADS)
def saved(request, tmp_path):
    """Class, folder and prefix of the layers of a saved model."""
    head, config, layers = HEADS[request.param]
    head(config()).save_pretrained(tmp_path)
    return head, tmp_path, layers


def table_of(path: Path) -> dict:
    """Where a safetensors file keeps each tensor: its table of contents."""
    whole = path.read_bytes()
    table = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    table.pop("__metadata__", None)
    return table


def test_a_truncated_file_is_named_with_the_keys_it_lacks(saved):
    head, folder, _ = saved
    path = folder / "model.safetensors"
    whole, table = path.read_bytes(), table_of(path)
    last = max(table, key=lambda key: table[key]["data_offsets"][1])
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors lacks {last}; copy or download it again")):
        head.from_pretrained(folder)
    for kept in (100, 3, 0):
        path.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"model\.safetensors lacks every key"):
            head.from_pretrained(folder)
    path.write_bytes(whole[:8] + b"x" * (len(whole) - 8))
    with pytest.raises(ValueError, match=r"model\.safetensors lacks every key \(its table of contents is unreadable\)"):
        head.from_pretrained(folder)


def test_of_several_files_the_truncated_one_is_named(saved):
    head, folder, _ = saved
    head.from_pretrained(folder).save_pretrained(folder / "shards", max_shard_size="15KB")
    shards = sorted((folder / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-4])
    with pytest.raises(ValueError) as error:
        head.from_pretrained(folder, subfolder="shards")
    assert [shard.name in str(error.value) for shard in shards] == [shard is shards[1] for shard in shards]


def test_missing_keys_of_the_body_are_named(saved):
    head, folder, layers = saved
    path = folder / "model.safetensors"
    weights = load_file(path)
    gone = next(
        key for key in weights if key.startswith(f"{layers}.1") and key.endswith(("key.weight", "k_proj.weight"))
    )
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"it lacks {gone}. A checkpoint of another model is")):
        head.from_pretrained(folder)
    _, info = head.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {gone}


def test_a_foreign_checkpoint_is_named_with_the_keys_it_has_instead(saved):
    head, folder, layers = saved
    config = transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2Model(config).save_pretrained(folder / "foreign")
    (folder / "foreign" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        head.from_pretrained(folder)
    message = str(error.value)
    assert (
        str(folder) in message and f"lacks {layers.split('.')[0]}." in message and "h.0.attn.c_attn.weight" in message
    )


@pytest.mark.parametrize(
    ("head", "config"),
    [
        (NystromformerHFForSequenceClassification, helpers.tiny_config),
        (NystromformerHFDecoderForSequenceClassification, decoder_models.tiny_config),
    ],
)
def test_a_missing_head_is_what_fine_tuning_starts_from(head, config, tmp_path):
    base = head(config()).base_model
    base.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    for name, tensor in base.state_dict().items():
        assert torch.equal(loaded.base_model.state_dict()[name], tensor), name
    assert all(torch.isfinite(tensor).all() for tensor in loaded.state_dict().values())


def test_the_convolution_may_be_switched_on_for_an_encoder_trained_without(tmp_path):
    NystromformerHFForMaskedLM(helpers.tiny_config(conv_kernel_size=None)).save_pretrained(tmp_path)
    loaded = NystromformerHFForMaskedLM.from_pretrained(tmp_path, conv_kernel_size=5)
    assert loaded.nystromformer.encoder.layer[1].attention.self.conv.weight.shape == (2, 1, 5, 1)


def test_one_missing_convolution_is_damage(saved):
    """The others were trained with theirs: drawing a single one anew would change the model silently."""
    head, folder, layers = saved
    config = {"conv_kernel_size": 3} if head is NystromformerHFDecoderForCausalLM else {}
    model = head.from_pretrained(folder, **config)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    (lost,) = [
        key for key in weights if key.startswith(f"{layers}.1.") and key.endswith(("conv.weight", "conv_weight"))
    ]
    del weights[lost]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"it lacks {re.escape(lost)}"):
        head.from_pretrained(folder)
