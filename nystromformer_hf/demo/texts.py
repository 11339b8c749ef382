"""Texts, the tokenizer learned from them, and the blocks that language models are trained on."""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .sources import SPEECHES, load_speeches, read_text, stop


def load_corpus(data: Path | None) -> tuple[str, str, dict[str, list[str]]]:
    """Name, how it is divided, and the texts of each part: messages by year, or the user's own with its end held out."""
    if data is None:
        speeches = load_speeches()
        year = speeches["year"]
        masks = {"train": year < 1980, "validation": (year >= 1980) & (year < 2000), "test": year >= 2000}
        parts = {part: list(speeches["text"][mask]) for part, mask in masks.items()}
        return SPEECHES, "train before 1980, validation 1980–1999, test from 2000", parts
    paths = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    if not paths:
        stop(f"--data: no .txt file in {data}; give a text file or a folder with .txt files")
    text = "\n\n".join(read_text(path) for path in paths)
    borders = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
    spans = zip(("train", "validation", "test"), borders, borders[1:], strict=False)
    parts = {part: [text[start:end]] for part, start, end in spans}
    return data.name, "files in name order, 90 % of the text train, 5 % validation, 5 % test", parts


def get_tokenizer(texts: list[str], args: argparse.Namespace, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which encodes any text and opens it with the token that stands between texts.

    Learned from `texts` and saved in --output, or what a resumed run finds there.
    """
    if args.resume and (args.output / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(args.output)
    end, pad = special_tokens = ["<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": special_tokens, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=args.vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    first = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=first)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(args.output)
    return fast


def token_blocks(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int, part: str, least: int
) -> list[dict[str, torch.Tensor]]:
    """Texts laid end to end and cut into blocks of `length` tokens."""
    ids = [i for document in tokenizer(texts, verbose=False)["input_ids"] for i in document]
    blocks = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    if len(blocks) < least:
        needed = f"the {part} text has {len(ids):,} tokens, but at least {least * length:,} are needed"
        stop(f"{needed}; give more text with --data, or lower --sequence-length or --batch-size")
    return [{"input_ids": block, "labels": block} for block in blocks]
