"""Labelled documents: how they are divided and trained on, and the accuracy of a model and of two baselines on them."""

import math
import statistics
from typing import Any

import torch
from transformers import PreTrainedModel


# The documents of each part stay the same whatever --seed is.
SPLIT_SEED = 0


def stratified_split(examples: list[dict], seed: int) -> dict[str, list[dict]]:
    """The documents of each label, shuffled: a quarter for validation, a quarter to test, the rest to train."""
    generator = torch.Generator().manual_seed(seed)
    parts = {"train": [], "validation": [], "test": []}
    for label in sorted({example["labels"] for example in examples}):
        members = [example for example in examples if example["labels"] == label]
        members = [members[i] for i in torch.randperm(len(members), generator=generator)]
        quarter = math.ceil(len(members) / 4)
        parts["validation"] += members[:quarter]
        parts["test"] += members[quarter : 2 * quarter]
        parts["train"] += members[2 * quarter :]
    return parts


def split_in_words(parts: dict[str, list[dict]]) -> str:
    """How `stratified_split` with SPLIT_SEED made these parts."""
    return (
        f"the documents of each label, shuffled with seed {SPLIT_SEED}: the first quarter for validation "
        f"({len(parts['validation'])} documents), the second to test ({len(parts['test'])}), the rest to train "
        f"({len(parts['train'])})"
    )


def trainer_options(batch_size: int) -> dict[str, Any]:
    """`TrainingArguments` for steps of `batch_size` documents, of which the best checkpoint by validation is kept."""
    return {
        # Whole documents, so different in length that padding would be most of a batch.
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": batch_size,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }


def majority_accuracy(train: list[dict], examples: list[dict]) -> float:
    """What can be told without reading: always the label that most documents of `train` have."""
    majority = torch.tensor([example["labels"] for example in train]).bincount().argmax().item()
    return statistics.mean(example["labels"] == majority for example in examples)


def naive_bayes_accuracy(train: list[dict], examples: list[dict], vocab_size: int) -> float:
    """What counting tokens can tell, without any order: multinomial naive Bayes with add-one smoothing."""
    labels = torch.tensor([example["labels"] for example in train])
    priors = labels.bincount()
    counts = torch.ones(len(priors), vocab_size)
    for example in train:
        counts[example["labels"]] += torch.tensor(example["input_ids"]).bincount(minlength=vocab_size)
    log_likelihood = (counts / counts.sum(1, keepdim=True)).log()
    guesses = [(priors.log() + log_likelihood[:, example["input_ids"]].sum(1)).argmax() for example in examples]
    return statistics.mean(int(guess) == example["labels"] for guess, example in zip(guesses, examples, strict=True))


@torch.no_grad()
def model_accuracy(model: PreTrainedModel, examples: list[dict]) -> float:
    """One document at a time, without padding."""
    logits = [model(torch.tensor([example["input_ids"]], device=model.device)).logits for example in examples]
    return statistics.mean(
        int(row.argmax()) == example["labels"] for row, example in zip(logits, examples, strict=True)
    )


def accuracies(
    name: str, model: PreTrainedModel, parts: dict[str, list[dict]], vocab_size: int
) -> dict[str, dict[str, float]]:
    """Of two baselines and of the model called `name`, on validation and on test documents."""
    return {
        part: {
            "majority class": majority_accuracy(parts["train"], parts[part]),
            "naive Bayes on tokens": naive_bayes_accuracy(parts["train"], parts[part], vocab_size),
            name: model_accuracy(model, parts[part]),
        }
        for part in ("validation", "test")
    }


def accuracy_table(accuracy: dict[str, dict[str, float]]) -> str:
    """What `accuracies` returns, in Markdown."""
    rows = "".join(
        f"| {method} | {accuracy['validation'][method]:.3f} | {value:.3f} |\n"
        for method, value in accuracy["test"].items()
    )
    return f"| method | validation accuracy | test accuracy |\n|---|---|---|\n{rows}"
