"""Which settings of KERMIT remember: multi-query associative recall beyond the window.

    python -m tests.benchmarks.recall            # the table behind the defaults, about ten minutes on one core

A sequence begins with pairs (key, value) in random order; later each key comes again and the model has to name its value
(Arora et al. 2023, arXiv 2312.04927, section 3). Between both lie more tokens than the window holds, so only the memory
can know. Two layers of width 64 are trained from scratch for `--steps` steps; reported is the accuracy on fresh sequences.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from kermit_hf import KermitConfig, KermitForCausalLM


SETTINGS = {
    "delta, gate, conv 4 (default)": {},
    "delta, no gate, conv 4": {"forget_gate": False},
    "delta, gate, no conv": {"conv_kernel_size": 0},
    "delta, gate, conv 4, elu": {"feature_map": "elu"},
    "delta, gate, conv 4, dpfp": {"feature_map": "dpfp"},
    "additive, gate, conv 4, hedgehog": {"update_rule": "additive", "feature_map": "hedgehog"},
    "additive, gate, conv 4, elu": {"update_rule": "additive", "feature_map": "elu"},
    "additive, gate, conv 4, taylor": {"update_rule": "additive", "feature_map": "taylor"},
    "additive, gate, conv 4, dpfp": {"update_rule": "additive", "feature_map": "dpfp"},
    "additive, gate, conv 4, favor": {"update_rule": "additive", "feature_map": "favor"},
    "softmax over everything": {"window_size": 128},
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


def accuracy(
    setting: dict, steps: int, length: int = 128, pairs: int = 8, window: int = 32, symbols: int = 64, seed: int = 0
) -> float:
    """Share of values named correctly after training."""
    torch.manual_seed(seed)
    config = KermitConfig(
        **{
            "vocab_size": 2 * symbols + 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "window_size": window,
            **setting,
        }
    )
    model = KermitForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), leave=False):
        tokens, labels = recall_batch(32, length, pairs, symbols, generator)
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    tokens, labels = recall_batch(256, length, pairs, symbols, generator)
    with torch.no_grad():
        predicted = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
    asked = labels[:, 1:] != -100
    return (predicted == labels[:, 1:])[asked].float().mean().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each setting (default 600)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (default 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmarks/recall.json"), help="where results are kept"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for name, setting in SETTINGS.items():
        for seed in range(options.seeds):
            key = f"{name}; {options.steps} steps; seed {seed}"
            if key not in results:
                results[key] = accuracy(setting, options.steps, seed=seed)
                options.output.write_text(json.dumps(results, indent=2))
            print(f"{results[key]:.3f}  {key}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
