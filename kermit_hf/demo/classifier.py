"""The second task: the language model of the first, made to read both ways and fine-tuned to classify documents, its
checkpoint chosen by validation."""

import argparse

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from .card import write_card
from .classification import SPLIT_SEED, accuracies, accuracy_table, split_in_words, stratified_split, trainer_options
from .figures import plot_loss
from .record import close_run, stage
from .sources import load_labelled
from .training import fit


def classify(args: argparse.Namespace, run: dict) -> None:
    """Fine-tune a language model of the first task to classify whole documents, beside two baselines."""
    with stage("documents", run):
        corpus, texts, labels = load_labelled(args.data)
        names = sorted(set(labels))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        tokenizer.save_pretrained(args.output)
        documents = tokenizer(texts, verbose=False)["input_ids"]
        examples = [
            {"input_ids": ids[: args.max_length], "labels": names.index(label)}
            for ids, label in zip(documents, labels, strict=True)
        ]
        # Not by year, as for the language model: all messages since 1981 are spoken, and one label tests nothing.
        parts = stratified_split(examples, SPLIT_SEED)
        cut = sum(len(ids) > args.max_length for ids in documents)
        split = split_in_words(parts)
        print(f"{corpus}, {' or '.join(names)}: {split}; {cut} of {len(documents)} cut at {args.max_length:,} tokens")

    with stage("fine-tuning", run):
        set_seed(args.seed)
        label2id = {label: i for i, label in enumerate(names)}
        model = AutoModelForSequenceClassification.from_pretrained(
            args.model,
            is_causal=False,  # scores the mean over all tokens, which learns in far fewer steps than the last token does
            label2id=label2id,
            id2label=dict(enumerate(names)),
        )
        trainer = fit(
            model,
            "classifier",
            args,
            # Of longer documents, states are computed again instead of kept: at 8,192 tokens 0.8 GB instead of 1.8.
            trainer_options(args.batch_size) | {"activation_checkpointing": args.max_length > 4096},
            evaluations=4,  # each takes as long as six steps
            train_dataset=parts["train"],
            eval_dataset=parts["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda output: {"accuracy": float((output[0].argmax(-1) == output[1]).mean())},
        )
        plot_loss({"KERMIT": trainer.state.log_history}, "Whole documents", args.output / "loss.png")
        best = trainer.state.best_global_step
        print(f"kept: step {best} of {args.steps}, where the validation loss is lowest")
    with stage("reload and evaluation", run):
        trainer.model.save_pretrained(args.output)
        model = AutoModelForSequenceClassification.from_pretrained(args.output).to(trainer.model.device).eval()
        accuracy = accuracies("KERMIT", model, parts, len(tokenizer))
    table = accuracy_table(accuracy)
    print(table)
    results = f"""{table}
The weights are those of step {best} of {args.steps}, where the validation loss is lowest. Test documents are read once,
at the end; the language model that was fine-tuned may have read any of them before, without labels. {cut} of
{len(documents)} documents are cut at {args.max_length:,} tokens.

![loss](loss.png)"""
    fields = {
        "summary": f"Tells {corpus} apart: {' or '.join(names)}? Fine-tuned from `{args.model.name}`, reading both ways.",
        "attention": f"exact softmax attention to the tokens less than {model.config.window_size}\naway on either side, and a "
        "kernel memory of everything before and behind",
        "usage": """from transformers import pipeline

print(pipeline("text-classification", ".")("Mr. Speaker, Mr. Vice President, Members of Congress"))""",
        "results": results,
    }
    metric = ("accuracy", accuracy["test"]["KERMIT"])
    longest = max(len(example["input_ids"]) for example in examples)
    write_card(args, model, longest, metric, corpus=corpus, split=split, **fields)
    results = {f"{part}_accuracy": figures for part, figures in accuracy.items()}
    close_run(args, run, **results, best_step=best)
