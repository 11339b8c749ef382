"""The second task: an encoder that classifies whole documents, its settings and checkpoint chosen by validation."""

import argparse

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    set_seed,
)

from nystromformer_hf import NystromformerHFConfig, NystromformerHFForSequenceClassification

from .card import write_card
from .classification import SPLIT_SEED, accuracies, accuracy_table, split_in_words, stratified_split, trainer_options
from .costs import training_cost
from .figures import plot_cost, plot_loss
from .record import close_run, stage
from .sources import load_labelled
from .texts import get_tokenizer
from .training import fit


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
        tokenizer = get_tokenizer([example["text"] for example in parts["train"]], args, args.max_length)
        for example in examples:
            example["input_ids"] = tokenizer(example.pop("text"), truncation=True)["input_ids"]
        longest = max(len(example["input_ids"]) for example in examples)
        split = split_in_words(parts)
        print(f"{corpus}, {' or '.join(names)}: {split}; the longest has {longest:,} tokens")

    with stage("training", run):
        model = document_classifier(tokenizer, names, args)
        trainer = fit(
            model,
            "classifier",
            args,
            trainer_options(args.batch_size),
            train_dataset=parts["train"],
            eval_dataset=parts["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {"accuracy": float((output[0].argmax(-1) == output[1]).mean())},
        )
        plot_loss({"Nyströmformer": trainer.state.log_history}, "Whole documents", args.output / "loss.png")
        best = trainer.state.best_global_step
        print(f"kept: step {best} of {args.steps}, where the validation loss is lowest")
    with stage("reload and evaluation", run):
        trainer.model.save_pretrained(args.output)
        model = AutoModelForSequenceClassification.from_pretrained(args.output).to(trainer.model.device).eval()
        accuracy = accuracies("Nyströmformer", model, parts, len(tokenizer))

    with stage("cost", run):
        lengths = [2**power for power in range(8, args.longest_context.bit_length())]
        text = torch.tensor(max((example["input_ids"] for example in parts["train"]), key=len))
        models = {"Nyströmformer": {}, "softmax": {"num_landmarks": lengths[-1]}}  # as many landmarks: exact attention
        costs = {
            name: training_cost(document_classifier(tokenizer, names, args, **fields), text, lengths)
            for name, fields in models.items()
        }
        plot_cost(costs, ("Kept for the backward pass", "Forward and backward"), args.output / "cost.png")
    ours, exact = (costs[name][-1]["seconds"] for name in models)
    table = accuracy_table(accuracy)
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
