"""What goes along with the weights: tokenizer, config, the code that the Hub loads, and files kept as they are."""

import sys
from collections.abc import Collection
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save

from conversion_scripts.checkpoint_files import ConversionError, in_one_line, keep_files, read_json


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


def load_config(folder: Path, model_types: Collection[str], gguf_file: str | None = None) -> PreTrainedConfig:
    """The source's config, of one of `model_types`; code that comes with a checkpoint is never run."""
    path, allowed = folder / (gguf_file or "config.json"), ", ".join(model_types)

    def check(model_type: str | None) -> None:
        if model_type not in model_types:
            raise ConversionError(
                f"model_type={model_type!r} in {path} is no architecture that can be mapped; allowed are {allowed}"
            )

    if gguf_file is None:
        check(read_json(path).get("model_type"))
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
    except Exception as error:  # fields may hold anything, and GGUF files raise whatever the reader stumbles upon
        raise ConversionError(
            f"the config in {path} cannot be read ({in_one_line(error)}); repair it, or give one of {allowed}"
        ) from error
    check(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise ConversionError(
            "quantization_config: quantised weights cannot be mapped; load the model, `dequantize()` it and save it, or "
            "convert the original checkpoint"
        )
    return config


def load_tokenizer(folder: Path, gguf_file: str | None = None) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer, None where it has none."""
    if gguf_file is None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer raises its own
        raise ConversionError(
            f"the tokenizer of {folder} cannot be read ({in_one_line(error)}); repair it, install what it asks for, or take "
            "its files away"
        ) from error


def check_vocabulary(config: PreTrainedConfig, num_tokens: int | None) -> None:
    """`ConversionError` if token ids exceed the embedding; `num_tokens` is the tokenizer's number of them."""
    if num_tokens is not None and num_tokens > config.vocab_size:
        raise ConversionError(
            f"the tokenizer has {num_tokens} tokens, but the config has vocab_size={config.vocab_size}: it belongs to "
            "another checkpoint, or tokens were added without `resize_token_embeddings`; put the right tokenizer files there"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(config, name)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and token >= config.vocab_size:
                raise ConversionError(
                    f"{name}={token} lies outside of vocab_size={config.vocab_size}; repair config.json"
                )


def write_companions(
    partial: Path,
    folder: Path,
    model: PreTrainedModel,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    gguf_file: str | None = None,
) -> None:
    """Everything but the weights, as the model's own `save_pretrained` leaves it: config, what is kept, and the code, which
    transformers' own classes do without."""
    config, modeling = model.config, sys.modules[type(model).__module__]
    config.architectures = [type(model).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    if hasattr(modeling, "AUTO_CLASSES"):
        module = modeling.__name__.split(".")[-1]
        config.auto_map = {auto: f"{module}.{head.__name__}" for auto, head in modeling.AUTO_CLASSES.items()}
        custom_object_save(model, partial, config=config)
    config.save_pretrained(partial)
    if gguf_file:
        tokenizer.save_pretrained(partial)
    else:
        keep_files(folder, partial)
    if model.can_generate() and not (partial / "generation_config.json").is_file():
        GenerationConfig.from_model_config(config).save_pretrained(partial)


def check_tokenizer(partial: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Sees to it that the tokenizer loads from beside our config, where its class cannot be told by the model type."""
    if tokenizer is None:
        return
    text = "The quick brown fox, 1,234 times: naïve café\n\n\tdef f(x): return x"

    def behaviour(tokenizer: PreTrainedTokenizerBase) -> tuple:
        # Of a pair as well, whose token types tell an encoder which text is which.
        encoded = dict(tokenizer(text)), dict(tokenizer(text, text))
        return *encoded, tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.chat_template

    def same() -> bool:
        try:
            kept = AutoTokenizer.from_pretrained(partial, trust_remote_code=True)
        except Exception:  # each kind of tokenizer raises its own
            return False
        return behaviour(kept) == behaviour(tokenizer)

    if not same():
        tokenizer.save_pretrained(partial)
        if not same():
            raise ConversionError("the tokenizer does not come out as it went in; save it anew with `save_pretrained`")
