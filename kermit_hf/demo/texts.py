"""Texts, the tokenizer learned from them, and the blocks that language models are trained on."""

from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .sources import SPEECHES, load_speeches, read_text, stop


class Corpus(NamedTuple):
    """Documents in three parts, and how they were divided."""

    name: str
    split: str
    train: list[str]
    validation: list[str]
    test: list[str]


def load_corpus(data: Path | None) -> Corpus:
    """The messages split by year, or the user's own text with its last tenth held out."""
    if data is None:
        speeches = load_speeches()
        year = speeches["year"]
        parts = [list(speeches["text"][part]) for part in (year < 1980, (year >= 1980) & (year < 2000), year >= 2000)]
        return Corpus(SPEECHES, "train before 1980, validation 1980–1999, test from 2000", *parts)
    paths = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    if not paths:
        stop(f"--data: no .txt file in {data}; give a text file or a folder with .txt files")
    documents = [read_text(path) for path in paths]
    total = sum(map(len, documents))
    borders = [0, int(0.9 * total), int(0.95 * total), total]
    parts, position = ([], [], []), 0
    for document in documents:
        for part, start, end in zip(parts, borders, borders[1:], strict=False):
            if piece := document[max(start - position, 0) : max(end - position, 0)]:
                part.append(piece)
        position += len(document)
    return Corpus(data.name, "files in name order, 90 % of the text train, 5 % validation, 5 % test", *parts)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text, and decoding gives it back byte for byte."""
    alphabet, special_tokens = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"vocab_size": vocab_size, "special_tokens": special_tokens, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options, show_progress=False))
    end, pad = special_tokens
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=pad, model_input_names=inputs
    )


def token_blocks(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int, part: str, least: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Documents, each closed by the end token, laid end to end and cut into blocks of `length` tokens."""
    documents = tokenizer(texts)["input_ids"] if texts else []
    ids = [i for document in documents for i in [*document, tokenizer.eos_token_id]]
    whole = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    blocks = [{"input_ids": block, "labels": block} for block in whole]
    if len(blocks) < least:
        needed = f"the {part} text has {len(ids):,} tokens, but at least {least * length:,} are needed"
        stop(f"{needed}; give more text with --data, or lower --sequence-length or --batch-size")
    return blocks
