"""What is timed for KERMIT: the attention alone, against softmax attention and transformers' own delta rule, and decoding."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kermit_hf import FEATURE_MAPS, KermitConfig, KermitForCausalLM
from kermit_hf.kermit_attention import Slots, kermit_attention

from .measure import (
    Decoder,
    Faster,
    Flat,
    Growth,
    Result,
    Section,
    by_length,
    compare_decoding,
    fill_at_random,
    fill_by_prompt,
)


HEADS, HEAD_DIM, WINDOW, SINKS = 8, 64, 128, 4
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CONTEXTS = (256, 1024, 4096, 16384, 32768)


def attention(update_rule: str, feature_map: str, window_size: int) -> Callable[..., torch.Tensor]:
    """KERMIT's attention, feature map included, as a function of query, key, value and the gates of the rule."""
    features = FEATURE_MAPS[feature_map](HEAD_DIM, None, HEADS, HEADS)
    features.unit_norm = update_rule == "delta"
    sinks = SINKS if window_size else 0

    def attend(query, key, value, **gates):
        length = query.shape[2]
        angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        angles = torch.cat([angles, angles], -1)
        slots = Slots(key, value, gates, 0, key[:, :, :sinks], value[:, :, :sinks])
        return kermit_attention(
            query,
            slots,
            (angles.cos(), angles.sin()) if window_size else None,
            window_size,
            update_rule,
            features.map_queries,
            features.map_keys,
            query.new_zeros(query.shape[:3]),
            lambda states: F.rms_norm(states, (HEAD_DIM,)),
            scaling=HEAD_DIM**-0.5,
        ).output

    return attend


def attention_contenders(length: int, backward: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a function that runs it once), on the same random inputs."""
    generator = torch.Generator().manual_seed(length)
    states = [torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3)]
    gates = {
        "write_strength": torch.rand(1, HEADS, length, generator=generator),
        "log_forget": -0.1 * torch.rand(1, HEADS, length, generator=generator),
    }

    def once(function: Callable, **extra: torch.Tensor) -> Callable[[], object]:
        def run():
            if not backward:
                with torch.no_grad():
                    return function(*states, **extra)
            inputs = [tensor.detach().requires_grad_() for tensor in states]
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in extra.items()}
            function(*inputs, **leaves).sum().backward()

        return run

    yield "softmax (SDPA)", once(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    yield "additive", once(attention("additive", "elu", 0))
    yield "additive + window 128", once(attention("additive", "elu", WINDOW))
    yield "gated delta", once(attention("delta", "silu_l2", 0), **gates)
    yield "gated delta + window 128", once(attention("delta", "silu_l2", WINDOW), **gates)
    if length <= 16384:
        yield "transformers gated delta", once(transformers_gated_delta(), **gates)


def transformers_gated_delta() -> Callable[..., torch.Tensor]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def attend(query, key, value, write_strength, log_forget):
        states = (tensor.transpose(1, 2) for tensor in (query, key, value))
        gates = {"g": log_forget.transpose(1, 2), "beta": write_strength.transpose(1, 2)}
        return torch_chunk_gated_delta_rule(*states, **gates, use_qk_l2norm_in_kernel=True)[0]

    return attend


def time_decoding(lengths: tuple[int, ...]) -> Iterator[list[Result]]:
    """KERMIT as `generate()` runs it by default and with a static cache and `torch.compile`; a Llama of the same body with
    the default cache."""
    body = {
        "vocab_size": 32000,
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 65536,
    }
    torch.manual_seed(0)
    kermit = KermitForCausalLM(KermitConfig(**body, window_size=WINDOW)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**body)).eval()
    static = partial(StaticCache, config=kermit.config, max_cache_len=65536)
    prompt = partial(fill_by_prompt, kermit)
    at_random = partial(fill_at_random, layers=body["num_hidden_layers"], heads=HEADS, head_dim=HEAD_DIM)
    decoders = {
        "Llama": Decoder(llama, partial(DynamicCache, config=llama.config), at_random, rewind=True),
        "KERMIT": Decoder(kermit, partial(DynamicCache, config=kermit.config), prompt),
        "KERMIT, static cache, compiled": Decoder(torch.compile(kermit, fullgraph=True), static, prompt),
    }
    return compare_decoding(decoders, lengths)


SECTIONS = {
    "kermit-forward": Section(
        "KERMIT attention, forward: 8 heads x 64, float32",
        by_length(lambda length: dict(attention_contenders(length, backward=False))),
        LENGTHS,
        (
            Faster("additive", "softmax (SDPA)", 16384, 15.0),
            Faster("additive + window 128", "softmax (SDPA)", 16384, 8.0),
        ),
    ),
    "kermit-training": Section(
        "KERMIT attention, forward + backward: 8 heads x 64, float32",
        by_length(lambda length: dict(attention_contenders(length, backward=True))),
        LENGTHS,
        (
            Faster("additive", "softmax (SDPA)", 16384, 15.0),
            Faster("additive + window 128", "softmax (SDPA)", 16384, 8.0),
            Faster("gated delta", "softmax (SDPA)", 16384, 5.0),
            Faster("gated delta", "transformers gated delta", 16384, 25.0),
            Growth("gated delta + window 128", "peak_bytes", 1.1),
        ),
    ),
    "kermit-decoding": Section(
        "KERMIT decoding: 8 layers x 512, float32",
        time_decoding,
        CONTEXTS,
        (
            Flat("KERMIT", 1.1),
            Flat("KERMIT, static cache, compiled", 1.1),
            Faster("KERMIT, static cache, compiled", "Llama", 32768, 25.0),
        ),
        "milliseconds per token",
    ),
}
