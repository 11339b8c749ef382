"""Streams a long text from a model and records what each token costs; the figures go into the model's card.

python -m conversion_scripts.long_generation MODEL --new-tokens 20000 --original SOURCE
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


if not __package__:
    # As a plain script: the folder above holds the packages.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils.logging import disable_progress_bar

from conversion_scripts.card_facts import THIS_MODEL, Cost, read_facts
from conversion_scripts.cards import write_card
from conversion_scripts.checkpoint_files import ConversionError
from conversion_scripts.machine import machine
from conversion_scripts.perplexity import load_model, load_tokenizer
from kermit_hf.demo.costs import TIMED_TOKENS, decoding_cost
from kermit_hf.demo.generation import ProgressStreamer


ORIGINAL = "original"


class MemoryStreamer(ProgressStreamer):
    """Also records the memory of the process."""

    def put(self, value: torch.Tensor) -> None:
        reported = len(self.reports)
        super().put(value)
        if len(self.reports) > reported:
            self.reports[-1]["process_bytes"] = psutil.Process().memory_info().rss


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, interval: int
) -> list[dict]:
    """Samples and prints `new_tokens` after `prompt`; what was reported every `interval` tokens."""
    cache = DynamicCache(config=model.config)
    streamer = MemoryStreamer(tokenizer, cache, interval)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    model.generate(
        **inputs,
        past_key_values=cache,
        streamer=streamer,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    return streamer.reports


def measure_cost(models: dict[str, PreTrainedModel], lengths: Sequence[int], seed: int = 0) -> Cost:
    """Median seconds per token and bytes of cache after contexts of random tokens of these `lengths`, in ascending order."""
    costs = {}
    for name, model in models.items():
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (lengths[-1] + 64,), generator=generator)
        costs[name] = [
            {
                "length": entry["length"],
                "seconds_per_token": entry["ms_per_token"] / 1e3,
                "cache_bytes": entry["cache_bytes"],
            }
            for entry in decoding_cost(model, tokens, lengths)
        ]
    return Cost(machine(), costs)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion_scripts.long_generation",
        description="Streams a long text from MODEL and reports speed, cache and memory as it grows; measures what a token costs "
        "after contexts of several lengths, and puts that into the card of MODEL, where that is a folder.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--original", metavar="SOURCE", help="what MODEL was converted from, to compare the cost with")
    parser.add_argument("--prompt", default="The state of the Union is", help="(default: %(default)r)")
    parser.add_argument(
        "--new-tokens", type=int, default=20_000, metavar="N", help="0 streams nothing (default: %(default)s)"
    )
    parser.add_argument(
        "--interval", type=int, default=1000, metavar="N", help="tokens between reports (default: 1000)"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="*",
        default=[256, 1024, 4096, 16384],
        metavar="N",
        help="contexts after which a token's cost is measured; none leaves the card as it is (default: 256 1024 4096 16384)",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="everything that was measured")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    lengths = sorted(args.lengths)
    if args.new_tokens < 0 or args.interval < 1:
        parser.error("--new-tokens may be 0, --interval is positive")
    if any(longer - shorter <= TIMED_TOKENS for shorter, longer in pairwise([-TIMED_TOKENS, *lengths])):
        parser.error(
            f"--lengths are positive and more than {TIMED_TOKENS} apart, for as many tokens are timed after each"
        )
    disable_progress_bar()
    set_seed(args.seed)
    try:
        dtype = getattr(torch, args.dtype)
        model, folder = load_model(args.model, dtype)
        models = {THIS_MODEL: model}
        if args.original:
            models[ORIGINAL] = load_model(args.original, dtype)[0]
        results = {"machine": machine(), "dtype": args.dtype}
        if args.new_tokens:
            tokenizer = load_tokenizer(args.model)
            results["stream"] = stream(model, tokenizer, args.prompt, args.new_tokens, args.interval)
        if lengths:
            cost = measure_cost(models, lengths, args.seed)
            results["cost"] = dataclasses.asdict(cost)
            for name, entries in cost.costs.items():
                for entry in entries:
                    milliseconds, megabytes = 1e3 * entry["seconds_per_token"], entry["cache_bytes"] / 1e6
                    print(
                        f"{name}: {entry['length']:,} tokens, {milliseconds:.1f} ms a token, cache {megabytes:.2f} MB"
                    )
            if Path(args.model).expanduser().is_dir():
                write_card(folder, dataclasses.replace(read_facts(folder), cost=cost))
    except ConversionError as error:
        raise SystemExit(f"long_generation: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
