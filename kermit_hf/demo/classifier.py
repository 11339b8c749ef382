"""The second task: the language model of the first, fine-tuned to classify whole documents."""

import argparse
import math

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from .card import write_card
from .record import close_run, new_run, previous_run, stage
from .sources import stop
from .texts import labelled_documents
from .training import fit


def stratified_split(examples: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Three quarters of every label to train, one quarter to test."""
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in sorted({example["labels"] for example in examples}):
        members = [example for example in examples if example["labels"] == label]
        members = [members[i] for i in torch.randperm(len(members), generator=generator)]
        border = math.ceil(len(members) / 4)
        test += members[:border]
        train += members[border:]
    return train, test


def naive_bayes_accuracy(train: list[dict], test: list[dict], vocab_size: int, num_labels: int) -> float:
    """What counting tokens can tell, without any order: multinomial naive Bayes with add-one smoothing."""
    counts, documents = torch.ones(num_labels, vocab_size), torch.zeros(num_labels)
    for example in train:
        counts[example["labels"]] += torch.bincount(torch.tensor(example["input_ids"]), minlength=vocab_size)
        documents[example["labels"]] += 1
    log_likelihood = (counts / counts.sum(1, keepdim=True)).log()
    scores = [documents.log() + log_likelihood[:, example["input_ids"]].sum(1) for example in test]
    return sum(int(score.argmax()) == example["labels"] for score, example in zip(scores, test, strict=True)) / len(
        test
    )


def classify(args: argparse.Namespace) -> None:
    """Fine-tune a language model of the first task to classify whole documents, beside two baselines."""
    if not (args.model / "config.json").is_file():
        stop(
            f"--model {args.model} holds no checkpoint to fine-tune; make one with `python -m kermit_hf.quickstart`, "
            "or name the folder of a KERMIT checkpoint"
        )
    run = previous_run(args) or new_run(args)
    with stage("documents", run):
        name, texts, labels = labelled_documents(args.data)
        names = sorted(set(labels))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.save_pretrained(args.output)
        documents = tokenizer(texts)["input_ids"]
        examples = [
            {"input_ids": [*ids[: args.max_length - 1], tokenizer.eos_token_id], "labels": names.index(label)}
            for ids, label in zip(documents, labels, strict=True)
        ]
        # Not by year, as for the language model: all messages since 1981 are spoken, and one label tests nothing.
        train, test = stratified_split(examples, args.seed)
        split = f"stratified by label at random, {len(train)} documents to train, {len(test)} to test"
        cut = sum(len(ids) >= args.max_length for ids in documents)
        print(f"{name}, {' or '.join(names)}: {split}; {cut} of {len(documents)} are cut at {args.max_length:,} tokens")
        frequency = torch.bincount(torch.tensor([example["labels"] for example in test]))
        accuracy = {
            "majority class": frequency.max().item() / len(test),
            "naive Bayes on tokens": naive_bayes_accuracy(train, test, len(tokenizer), len(names)),
        }

    with stage("fine-tuning", run):
        set_seed(args.seed)
        label2id = {label: i for i, label in enumerate(names)}
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model, label2id=label2id, id2label=dict(enumerate(names))
        )
        trainer = fit(
            model,
            "classifier",
            args,
            # Little padding, and activations computed again instead of kept: 2 x 8,192 tokens would take 8 GB.
            {"train_sampling_strategy": "group_by_length", "activation_checkpointing": True},
            train_dataset=train,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {"accuracy": float((output[0].argmax(-1) == output[1]).mean())},
        )
    with stage("evaluation", run):
        accuracy["KERMIT"] = trainer.evaluate(test, metric_key_prefix="test")["test_accuracy"]
        trainer.model.save_pretrained(args.output)
    rows = "".join(f"| {method} | {value:.3f} |\n" for method, value in accuracy.items())
    results = f"| method | test accuracy |\n|---|---|\n{rows}"
    print(results)
    fields = {
        "summary": f"Tells {name} apart: {' or '.join(names)}? Fine-tuned from `{args.model.name}`.",
        "usage": """from transformers import pipeline

print(pipeline("text-classification", ".")("Mr. Speaker, Mr. Vice President, Members of Congress, ..."))""",
        "results": results,
    }
    metric = ("accuracy", accuracy["KERMIT"])
    write_card(args, model, args.max_length, metric, corpus=name, split=split, **fields)
    close_run(args, run, test_accuracy=accuracy)
