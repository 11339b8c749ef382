"""The second task: an encoder that classifies whole documents, its settings and checkpoint chosen by validation."""

import argparse
import math
import statistics

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from nystromformer_hf import NystromformerHFConfig, NystromformerHFForSequenceClassification

from .card import write_card
from .costs import training_cost
from .figures import plot_cost, plot_loss
from .record import close_run, stage
from .texts import get_tokenizer, load_labelled
from .training import fit


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


def document_classifier(
    tokenizer: PreTrainedTokenizerFast, names: list[str], args: argparse.Namespace, **fields
) -> NystromformerHFForSequenceClassification:
    """A new Nyströmformer encoder that reads documents of any length; `fields` change its configuration."""
    set_seed(args.seed)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden_size,
        "intermediate_size": 4 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_landmarks": args.landmarks,
        "attention_probs_dropout_prob": 0.0,
        # The usual 0.02 is for ten times this width; here it leaves the loss flat for half of the steps.
        "initializer_range": 0.08,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "label2id": {label: i for i, label in enumerate(names)},
        "id2label": dict(enumerate(names)),
    }
    return NystromformerHFForSequenceClassification(NystromformerHFConfig(**config | fields))


def classify(args: argparse.Namespace, run: dict) -> None:
    """Train the encoder to classify whole documents, beside two baselines, and compare its cost with exact attention."""
    with stage("documents", run):
        corpus, texts, labels = load_labelled(args.data)
        names = sorted(set(labels))
        examples = [{"text": text, "labels": names.index(label)} for text, label in zip(texts, labels, strict=True)]
        # Not by year, as for the language model: all messages since 1981 are spoken, and one label tests nothing.
        parts = stratified_split(examples, SPLIT_SEED)
        train, validation, test = parts.values()
        tokenizer = get_tokenizer([example["text"] for example in train], args, args.max_length)
        for example in examples:
            example["input_ids"] = tokenizer(example.pop("text"), truncation=True)["input_ids"]
        longest = max(len(example["input_ids"]) for example in examples)
        split = (
            f"the documents of each label, shuffled with seed {SPLIT_SEED}: the first quarter for validation "
            f"({len(validation)} documents), the second to test ({len(test)}), the rest to train ({len(train)})"
        )
        print(f"{corpus}, {' or '.join(names)}: {split}; the longest has {longest:,} tokens")

    with stage("training", run):
        model = document_classifier(tokenizer, names, args)
        trainer = fit(
            model,
            "classifier",
            args,
            {
                # Whole documents, so different in length that padding would be most of a batch.
                "per_device_train_batch_size": 1,
                "per_device_eval_batch_size": 1,
                "gradient_accumulation_steps": args.batch_size,
                "load_best_model_at_end": True,
                "metric_for_best_model": "eval_loss",
            },
            train_dataset=train,
            eval_dataset=validation,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {"accuracy": float((output[0].argmax(-1) == output[1]).mean())},
        )
        plot_loss({"Nyströmformer": trainer.state.log_history}, "Whole documents", args.output / "loss.png")
        best = trainer.state.best_global_step
        print(f"kept: step {best} of {args.steps}, where the validation loss is lowest")
    with stage("reload and evaluation", run):
        trainer.model.save_pretrained(args.output)
        model = AutoModelForSequenceClassification.from_pretrained(args.output).to(trainer.model.device).eval()
        accuracy = {
            part: {
                "majority class": majority_accuracy(train, parts[part]),
                "naive Bayes on tokens": naive_bayes_accuracy(train, parts[part], len(tokenizer)),
                "Nyströmformer": model_accuracy(model, parts[part]),
            }
            for part in ("validation", "test")
        }
    rows = "".join(
        f"| {method} | {accuracy['validation'][method]:.3f} | {value:.3f} |\n"
        for method, value in accuracy["test"].items()
    )

    with stage("cost", run):
        lengths = [2**power for power in range(8, args.longest_context.bit_length())]
        text = torch.tensor(max((example["input_ids"] for example in train), key=len))
        models = {"Nyströmformer": {}, "softmax": {"num_landmarks": lengths[-1]}}  # as many landmarks: exact attention
        costs = {
            name: training_cost(document_classifier(tokenizer, names, args, **fields), text, lengths)
            for name, fields in models.items()
        }
        plot_cost(costs, ("Kept for the backward pass", "Forward and backward"), args.output / "cost.png")
    ours, exact = (costs[name][-1]["seconds"] for name in models)
    table = f"| method | validation accuracy | test accuracy |\n|---|---|---|\n{rows}"
    print(table)
    results = f"""{table}
The weights are those of step {best} of {args.steps}, where the validation loss is lowest, and the default settings were chosen by the
validation part of the presidential messages. Test documents are read once, at the end.

One document of {lengths[-1]:,} tokens, forward and backward: {ours:.2f} s, with exact attention {exact:.2f} s. Memory is
linear in both, since exact attention runs in a fused kernel. Times depend on the machine.

![loss](loss.png)

![memory and time of one training document against its length](cost.png)"""
    config = model.config
    fields = {
        "summary": f"Tells {corpus} apart: {' or '.join(names)}? It reads documents whole.",
        "attention": f"Attention goes through {config.num_landmarks} landmarks, the means of as many segments of the "
        f"document, plus a convolution over {config.conv_kernel_size} tokens: time and memory are linear in its length.",
        "usage": 'print(pipeline("text-classification", ".")("Mr. Speaker, Mr. Vice President, Members of Congress"))',
        "results": results,
    }
    metric = ("accuracy", accuracy["test"]["Nyströmformer"])
    write_card(args, model, longest, metric, corpus=corpus, split=split, **fields)
    results = {f"{part}_accuracy": figures for part, figures in accuracy.items()}
    close_run(args, run, **results, best_step=best, training_cost=costs)
