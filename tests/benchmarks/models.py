"""What is timed for whole decoders of the same body: a layer, a training step, prefill, and decoding in batches."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kermit_hf import KermitConfig, KermitForCausalLM, kernel_backend
from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM

from . import work
from .compiled import are_compiled, compiled, with_compiled
from .decoding import Decoder, Place, compare_decoding, fill_at_random, fill_by_prompt
from .measure import Contender, Limits, Result, Section, Skipped, by_length
from .targets import growing


HEADS, HEAD_DIM, WINDOW, SINKS, SEGMENT, NEAR_SEGMENTS = 8, 64, 128, 4, 64, 2
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
BATCHES = (1, 8, 64)
BATCH_CONTEXT = 1024
TRAINED_WORDS = 4096
LINEAR = ("KERMIT", "KERMIT, additive, no window")

# Multiplications of one head of one layer, as a function of length.
ATTENTION: dict[str, Callable[[int], int]] = {
    "Llama": lambda n: work.softmax_causal(n, HEAD_DIM),
    "KERMIT": lambda n: work.delta(n, HEAD_DIM, HEAD_DIM, 64) + work.window(n, HEAD_DIM, WINDOW, SINKS),
    "KERMIT, additive, no window": lambda n: work.additive(n, HEAD_DIM, HEAD_DIM, 64),
    "causal Nyström": lambda n: work.causal_nystrom(n, HEAD_DIM, SEGMENT, NEAR_SEGMENTS, SINKS),
}


def body(layers: int = 8, vocabulary: int = 32000) -> dict[str, int]:
    """Fields that the configs of all decoders share."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 1408,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 65536,
    }


def decoders(**fields: int) -> dict[str, PreTrainedModel]:
    """A Llama with SDPA and our decoders, of one body."""
    torch.manual_seed(0)
    nystrom = {"segment_size": SEGMENT, "near_segments": NEAR_SEGMENTS, "num_sink_tokens": SINKS}
    pure = {"update_rule": "additive", "feature_map": "elu", "window_size": 0, "conv_kernel_size": 0}
    models = {
        "Llama": LlamaForCausalLM(LlamaConfig(**fields)),
        "KERMIT": KermitForCausalLM(KermitConfig(**fields, window_size=WINDOW)),
        "KERMIT, additive, no window": KermitForCausalLM(KermitConfig(**fields, **pure)),
        "causal Nyström": NystromformerHFDecoderForCausalLM(NystromformerHFDecoderConfig(**fields, **nystrom)),
    }
    return {name: model.eval() for name, model in models.items()}


def multiplications(name: str, model: PreTrainedModel, length: int, logits: int) -> int:
    """Of a forward pass that computes the logits of so many tokens."""
    attention = model.config.num_hidden_layers * HEADS * ATTENTION[name](length)
    head = logits * model.lm_head.weight.numel()
    return work.linear_layers(model, length, without=("lm_head",)) + attention + head


def layers(length: int) -> dict[str, Contender]:
    """One layer and the last norm, forward, of hidden states (1, length, 512)."""
    hidden = torch.randn(1, length, HEADS * HEAD_DIM)

    def contender(name: str, model: PreTrainedModel) -> Contender:
        run = torch.no_grad()(partial(model.model, inputs_embeds=hidden, use_cache=False))
        return Contender(run, multiplications(name, model, length, logits=0), 2 * hidden.nbytes)

    timed = {name: contender(name, model) for name, model in decoders(**body(layers=1, vocabulary=64)).items()}
    return with_compiled(timed, LINEAR, kernel_backend)


def training_steps(length: int) -> dict[str, Contender]:
    """Loss of one text, its gradient, and AdamW's step; two layers, so that 65,536 tokens have a chance to fit."""
    tokens = torch.randint(3, TRAINED_WORDS, (1, length))

    def contender(name: str, model: PreTrainedModel) -> Contender:
        optimizer = torch.optim.AdamW(model.train().parameters())

        def step() -> None:
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return Contender(step, work.TRAINING * multiplications(name, model, length, logits=length))

    timed = {
        name: contender(name, model) for name, model in decoders(**body(layers=2, vocabulary=TRAINED_WORDS)).items()
    }
    return with_compiled(timed, LINEAR, kernel_backend)


def prefills(length: int) -> dict[str, Contender]:
    """A prompt read in one call into an empty cache, up to the logits of its last token."""
    prompt = torch.randint(3, 32000, (1, length))

    def contender(name: str, model: PreTrainedModel) -> Contender:
        @torch.no_grad()
        def read() -> None:
            cache = DynamicCache(config=model.config)
            model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return Contender(read, multiplications(name, model, length, logits=1))

    timed = {name: contender(name, model) for name, model in decoders(**body()).items()}
    return with_compiled(timed, LINEAR, kernel_backend)


def time_batches(batches: tuple[int, ...], limits: Limits) -> Iterator[list[Result | Skipped]]:
    """One step of decoding after 1,024 tokens of each text, as `generate()` runs it by default."""
    models = decoders(**body())
    del models["KERMIT, additive, no window"]
    at_random = partial(fill_at_random, layers=body()["num_hidden_layers"], heads=HEADS, head_dim=HEAD_DIM)
    timed = {}
    for name, model in models.items():
        fill = at_random if name == "Llama" else partial(fill_by_prompt, model)
        timed[name] = Decoder(model, partial(DynamicCache, config=model.config), fill, rewind=name == "Llama")
    if are_compiled(kernel_backend):
        timed[compiled("KERMIT")] = timed["KERMIT"]._replace(backend=partial(kernel_backend, "cpp"))
    return compare_decoding(timed, {batch: Place(BATCH_CONTEXT, batch) for batch in batches}, limits)


TARGETS = (*growing(1.1, *LINEAR, *map(compiled, LINEAR)), *growing(1.6, "causal Nyström"))
SECTIONS = {
    "decoder-layer": Section(
        "One decoder layer, forward: width 512, 8 heads",
        by_length(layers),
        LENGTHS,
        TARGETS,
    ),
    "training-step": Section(
        "Training step of a whole model, AdamW: 2 layers x 512, 8 heads, 4,096 words",
        by_length(training_steps),
        LENGTHS,
        TARGETS,
    ),
    "prefill": Section(
        "Prefill of a whole model: 8 layers x 512, 8 heads",
        by_length(prefills),
        LENGTHS,
        TARGETS,
    ),
    "decoding-batch": Section(
        f"Decoding in batches after {BATCH_CONTEXT:,} tokens: 8 layers x 512, 8 heads",
        time_batches,
        BATCHES,
        unit="milliseconds per token of each text",
        axis="texts",
    ),
}
