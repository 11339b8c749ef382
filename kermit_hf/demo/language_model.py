"""The first task: KERMIT beside the same class and size with softmax attention."""

import argparse
import math

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from kermit_hf import KermitConfig, KermitForCausalLM

from .card import write_card
from .costs import decoding_cost
from .figures import plot_loss, plot_memory
from .generation import generate
from .record import close_run, stage
from .texts import load_corpus, token_blocks, train_tokenizer
from .training import fit


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


def language_model(args: argparse.Namespace, run: dict) -> None:
    """Train KERMIT and its softmax twin on the same text, compare them, save, reload, generate, measure."""
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
    plot_loss(logs, "Same size, same data, same steps", args.output / "loss.png")

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
        reports = generate(model, tokenizer, prompt, args.new_tokens)

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
        "attention": f"exact softmax attention to the last {args.window_size} tokens and the first\n"
        f"{model.config.num_sink_tokens}, and a kernel memory of constant size for everything before",
        "usage": """from transformers import pipeline

print(pipeline("text-generation", ".")("The state of the Union", max_new_tokens=200, do_sample=True))""",
        "results": results,
    }
    metric = ("perplexity", perplexity["KERMIT"])
    write_card(args, model, args.sequence_length, metric, corpus=corpus.name, split=corpus.split, **fields)
    close_run(args, run, test_perplexity=perplexity, generation=reports, decoding_cost=costs)
