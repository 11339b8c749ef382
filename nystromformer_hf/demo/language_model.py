"""The first task: a causal Nyströmformer beside a Llama with the same first weights."""

import argparse
import math

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM

from .card import write_card
from .costs import decoding_cost
from .figures import plot_cost, plot_loss
from .generation import generate
from .record import close_run, stage
from .texts import get_tokenizer, load_corpus, token_blocks
from .training import fit


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
