"""What is timed for the causal Nyströmformer: its attention over a whole text, against causal softmax, and decoding."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM
from nystromformer_hf.causal_nystrom_attention import causal_nystrom_blocked, context_of_whole_text

from .measure import (
    Decoder,
    Faster,
    Growth,
    Result,
    Section,
    by_length,
    compare_decoding,
    fill_at_random,
    fill_by_prompt,
)


HEADS, HEAD_DIM, SEGMENT, NEAR_SEGMENTS, SINKS = 8, 64, 64, 2, 4
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CONTEXTS = (256, 1024, 4096, 16384, 32768)


def attention_contenders(length: int, backward: bool) -> dict[str, Callable[[], object]]:
    """Attention over a text without padding, on the same random inputs; "learned γ" keeps every key, see the module."""
    generator = torch.Generator().manual_seed(length)
    states = [torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3)]

    def nystrom(gamma: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        def attend(query, key, value):
            context = context_of_whole_text(query, key, value, SINKS, regularized=gamma is not None)
            return causal_nystrom_blocked(query, context, SEGMENT, NEAR_SEGMENTS, gamma, HEAD_DIM**-0.5).output

        return attend

    def once(function: Callable) -> Callable[[], object]:
        def run():
            if not backward:
                with torch.no_grad():
                    return function(*states)
            function(*(tensor.detach().requires_grad_() for tensor in states)).sum().backward()

        return run

    return {
        "softmax (SDPA)": once(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "causal Nyström": once(nystrom(None)),
        "causal Nyström, learned γ": once(nystrom(torch.full((HEADS,), 2.0))),
    }


def time_decoding(lengths: tuple[int, ...]) -> Iterator[list[Result]]:
    """As `generate()` runs it by default, against a Llama of the same body with the default cache."""
    body = {
        "vocab_size": 32000,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 65536,
    }
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**body)).eval()
    at_random = partial(fill_at_random, layers=body["num_hidden_layers"], heads=HEADS, head_dim=HEAD_DIM)
    decoders = {"Llama": Decoder(llama, partial(DynamicCache, config=llama.config), at_random, rewind=True)}
    for name, gamma in (("causal Nyström", None), ("causal Nyström, learned γ", 2.0)):
        config = NystromformerHFDecoderConfig(**body, inverse_regularization=gamma)
        model = NystromformerHFDecoderForCausalLM(config).eval()
        tokens = SEGMENT if gamma else 4  # the last token of a segment reads all keys
        fill = partial(fill_by_prompt, model)
        decoders[name] = Decoder(model, partial(DynamicCache, config=config), fill, tokens=tokens)
    return compare_decoding(decoders, lengths)


SECTIONS = {
    "nystrom-prefill": Section(
        "Causal Nyström attention, forward: 8 heads x 64, segments of 64, near field 128, float32",
        by_length(partial(attention_contenders, backward=False)),
        LENGTHS,
        (Faster("causal Nyström", "softmax (SDPA)", 16384, 8.0),),
    ),
    "nystrom-prefill-training": Section(
        "Causal Nyström attention, forward + backward: 8 heads x 64, segments of 64, near field 128, float32",
        by_length(partial(attention_contenders, backward=True)),
        LENGTHS,
        (Growth("causal Nyström", "seconds", 1.6),),
    ),
    "nystrom-decoding": Section(
        "Causal Nyströmformer, decoding: 8 layers x 512, segments of 64, near field 128, float32",
        time_decoding,
        CONTEXTS,
        (
            Faster("causal Nyström", "Llama", 32768, 8.0),
            Faster("causal Nyström, learned γ", "causal Nyström", 32768, 0.5),
        ),
        "milliseconds per token",
    ),
}
