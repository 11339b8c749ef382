"""Tiny random checkpoints of every family that `convert_llama` takes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


VOCABULARY = 300  # enough for two special tokens, the 256 bytes and a few merges
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<pad>{% endfor %}"
FAMILIES = {
    "llama": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def make_model(family: str, **config) -> PreTrainedModel:
    """Wide weights, and biases and norms that are not their start: each of them shows in the logits."""
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **FAMILIES[family],
        **config,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0))
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the state of the union"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=CHAT_TEMPLATE
    )


def save_checkpoint(
    folder: Path, family: str = "llama", *, dtype=torch.float32, shard="1GB", **config
) -> PreTrainedModel:
    """A model with tokenizer, chat template and generation config of its own in `folder`; returns the model."""
    model = make_model(family, **config).to(dtype)
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=7)
    model.save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return model
