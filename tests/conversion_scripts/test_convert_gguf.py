"""GGUF files as sources of `convert_llama`: written here, so that no network is needed."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conversion_scripts.cards import check_card
from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.convert_llama import TARGETS, convert
from tests.conversion_scripts.llama_checkpoints import CHAT_TEMPLATE, make_model, make_tokenizer


gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")

PARITY = 1e-4  # two float32 evaluations of the same function


def write_gguf(
    path: Path, family: str, *, quantization="F32", scaling: bool = False, num_spare_tokens: int = 0, **config
):
    """A model of `family` in llama.cpp's format, as its own converter lays it out; returns the model."""
    # Quantised rows are whole blocks of 32.
    # Transformers takes Qwen3's size of a head for granted.
    head_dim = 128 if family == "qwen3" else 16
    model = make_model(family, hidden_size=64, intermediate_size=96, head_dim=head_dim, **config)
    config, tokenizer = model.config, make_tokenizer()
    writer = gguf.GGUFWriter(path, family)
    writer.add_license("Apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary += [f"<unused_{index}>" for index in range(config.vocab_size + num_spare_tokens - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)

    architecture = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[family]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if family == "llama" and heads:
            # llama.cpp rotates neighbouring pairs where transformers rotates halves.
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        stem, suffix = name.rsplit(".", 1)
        stored = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@torch.no_grad()
def difference(model, folder: Path) -> float:
    prompt = torch.randint(model.config.vocab_size, (2, 24))
    converted = AutoModelForCausalLM.from_pretrained(folder)
    return float((model(prompt).logits - converted(prompt).logits).abs().max())


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_the_original(family, to, tmp_path):
    model = write_gguf(tmp_path / "model.gguf", family, tie_word_embeddings=family == "llama")
    assert convert(str(tmp_path / "model.gguf"), tmp_path / "output", to) < PARITY
    assert difference(model, tmp_path / "output") < PARITY
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output")
    text = "the state of the union 1,234"
    assert tokenizer(text).input_ids == make_tokenizer()(text).input_ids
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert AutoConfig.from_pretrained(tmp_path / "output").dtype == torch.float32
    card = check_card(tmp_path / "output")
    assert card.data.license == "apache-2.0"
    assert "according to the source's weight file" in card.text
    assert "of `model.gguf` with torch" in card.text
    assert "dequantised to float32" in card.text


def test_quantised_weights_come_out_as_transformers_reads_them(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", quantization="Q4_1")
    convert(str(tmp_path / "model.gguf"), tmp_path / "output", "kermit")
    original = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "output").state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in original.items())


def test_vocabulary_mismatch(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", num_spare_tokens=1)
    with pytest.raises(ConversionError, match="tokenizer has 301 tokens, but the config has vocab_size=300"):
        convert(str(tmp_path / "model.gguf"), tmp_path / "output", "kermit")


def test_truncated_file(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    whole = path.read_bytes()
    for left in (len(whole) // 2, 100, 3):
        path.write_bytes(whole[:left])
        with pytest.raises(ConversionError, match=re.escape(str(path))):
            convert(str(path), tmp_path / "output", "kermit")
    assert list(tmp_path.iterdir()) == [path]


def test_folder_of_gguf_files(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"give the path of one, such as .*model\.gguf"):
        convert(str(tmp_path), tmp_path / "output", "kermit")


def test_rope_scaling_that_transformers_ignores(tmp_path):
    write_gguf(tmp_path / "model.gguf", "llama", scaling=True)
    with pytest.raises(ConversionError, match=r"llama\.rope\.scaling\.type.*cannot be mapped from GGUF"):
        convert(str(tmp_path / "model.gguf"), tmp_path / "output", "kermit")


def test_other_architectures(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="allowed are llama, mistral, qwen2, qwen3"):
        convert(str(tmp_path / "model.gguf"), tmp_path / "output", "kermit")
