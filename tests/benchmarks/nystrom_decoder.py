"""What is timed for the causal Nyströmformer: its attention over a whole text, against causal softmax, and decoding."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM
from nystromformer_hf.causal_nystrom_attention import causal_nystrom_blocked, context_of_whole_text

from . import work
from .decoding import Decoder, Place, compare_decoding, fill_at_random, fill_by_prompt
from .kermit import CONTEXTS, softmax_attention
from .measure import Contender, Limits, Result, Section, Skipped, by_length, generator
from .models import HEAD_DIM, HEADS, LENGTHS, NEAR_SEGMENTS, SEGMENT, SINKS, body
from .targets import Faster, growing


def attention(gamma: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """Causal Nyström attention as a function of query, key and value; gamma: (heads,), or None for pooled landmarks."""

    def attend(query, key, value):
        context = context_of_whole_text(query, key, value, SINKS, regularized=gamma is not None)
        return causal_nystrom_blocked(query, context, SEGMENT, NEAR_SEGMENTS, gamma, HEAD_DIM**-0.5).output

    return attend


def attention_contenders(length: int, backward: bool) -> dict[str, Contender]:
    """Attention over a text without padding, on the same random inputs; "learned γ" keeps every key, see the module."""
    random = generator(length)
    states = [torch.randn(1, HEADS, length, HEAD_DIM, generator=random) for _ in range(3)]

    def once(function: Callable, needed: int) -> Contender:
        """`needed`: multiplications of one head, forward."""

        def run():
            if not backward:
                with torch.no_grad():
                    return function(*states)
            function(*(tensor.detach().requires_grad_() for tensor in states)).sum().backward()

        passes = work.TRAINING if backward else 1
        return Contender(run, passes * HEADS * needed, (3 if backward else 1) * 4 * states[0].nbytes)

    ours = partial(work.causal_nystrom, length, HEAD_DIM, SEGMENT, NEAR_SEGMENTS, SINKS)
    return {
        "softmax (SDPA)": once(softmax_attention, work.softmax_causal(length, HEAD_DIM)),
        "causal Nyström": once(attention(None), ours()),
        "causal Nyström, learned γ": once(attention(torch.full((HEADS,), 2.0)), ours(regularized=True)),
    }


def time_decoding(lengths: tuple[int, ...], limits: Limits) -> Iterator[list[Result | Skipped]]:
    """As `generate()` runs it by default, against a Llama of the same body with the default cache."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**body())).eval()
    at_random = partial(fill_at_random, layers=body()["num_hidden_layers"], heads=HEADS, head_dim=HEAD_DIM)
    decoders = {"Llama": Decoder(llama, partial(DynamicCache, config=llama.config), at_random, rewind=True)}
    for name, gamma in (("causal Nyström", None), ("causal Nyström, learned γ", 2.0)):
        config = NystromformerHFDecoderConfig(**body(), inverse_regularization=gamma)
        model = NystromformerHFDecoderForCausalLM(config).eval()
        tokens = SEGMENT if gamma else 4  # the last token of a segment reads all keys
        fill = partial(fill_by_prompt, model)
        decoders[name] = Decoder(model, partial(DynamicCache, config=config), fill, tokens=tokens)
    return compare_decoding(decoders, {length: Place(length) for length in lengths}, limits)


SECTIONS = {
    "nystrom-prefill": Section(
        "Causal Nyström attention, forward: 8 heads x 64, segments of 64, near field 128",
        by_length(partial(attention_contenders, backward=False)),
        LENGTHS,
        (Faster("causal Nyström", "softmax (SDPA)", 16384, 8.0), *growing(1.6, "causal Nyström")),
    ),
    "nystrom-prefill-training": Section(
        "Causal Nyström attention, forward + backward: 8 heads x 64, segments of 64, near field 128",
        by_length(partial(attention_contenders, backward=True)),
        LENGTHS,
        growing(1.6, "causal Nyström"),
    ),
    "nystrom-decoding": Section(
        "Causal Nyströmformer, decoding: 8 layers x 512, segments of 64, near field 128",
        time_decoding,
        CONTEXTS,
        (
            Faster("causal Nyström", "Llama", 32768, 8.0),
            Faster("causal Nyström, learned γ", "causal Nyström", 32768, 0.5),
        ),
        "milliseconds per token",
    ),
}
