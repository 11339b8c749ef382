"""What is timed for KERMIT: the attention alone, against softmax attention and transformers' own delta rule, and decoding."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kermit_hf import FEATURE_MAPS, KermitConfig, KermitForCausalLM, kernel_backend
from kermit_hf.kermit_attention import kermit_attention
from kermit_hf.slots import slots_of_text

from . import peers, work
from .compiled import are_compiled, compiled, with_compiled
from .decoding import Decoder, Place, compare_decoding, fill_at_random, fill_by_prompt
from .measure import Contender, Limits, Result, Section, Skipped, by_length, generator
from .models import HEAD_DIM, HEADS, LENGTHS, SINKS, WINDOW, body
from .targets import Faster, Flat, OfPeak, growing


CONTEXTS = (256, 1024, 4096, 16384, 32768, 65536)
FAVOR_FEATURES = 128
LINEAR = (
    "additive",
    "additive + window 128",
    f"additive, {FAVOR_FEATURES} random features",
    "gated delta",
    "gated delta + window 128",
)


def attention(length: int, update_rule: str, feature_map: str, window_size: int) -> Callable[..., torch.Tensor]:
    """KERMIT's attention, feature map included, as a function of query, key, value and the gates of the rule."""
    features = FEATURE_MAPS[feature_map](HEAD_DIM, None, HEADS, HEADS)
    features.init_weights()
    features.unit_norm = update_rule == "delta"
    norm = LlamaRMSNorm(HEAD_DIM).requires_grad_(False)
    sinks = SINKS if window_size else 0

    # A model makes them once for all of its layers.
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    rotary = (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)) if window_size else None

    def attend(query, key, value, **gates):
        slots = slots_of_text(key, value, gates, 0, sinks)
        return kermit_attention(
            query,
            slots,
            rotary,
            window_size,
            update_rule,
            features.map_queries,
            features.map_keys,
            query.new_zeros(query.shape[:3]),
            norm,
            scaling=HEAD_DIM**-0.5,
        ).output

    return attend


def attention_contenders(length: int, backward: bool) -> dict[str, Contender]:
    """Attention of 8 heads, on the same random inputs."""
    states, gates = random_inputs(length)
    once = partial(one_pass, states, backward)
    near = work.window(length, HEAD_DIM, WINDOW, SINKS)
    additive, delta = (rule(length, HEAD_DIM, HEAD_DIM, 64) for rule in (work.additive, work.delta))
    favor = work.additive(length, FAVOR_FEATURES, HEAD_DIM, 64) + work.random_features(length, FAVOR_FEATURES, HEAD_DIM)
    contenders = {
        "softmax (SDPA)": once(softmax_attention, work.softmax_causal(length, HEAD_DIM)),
        "additive": once(attention(length, "additive", "elu", 0), additive),
        "additive + window 128": once(attention(length, "additive", "elu", WINDOW), additive + near),
        f"additive, {FAVOR_FEATURES} random features": once(attention(length, "additive", "favor", 0), favor),
        "gated delta": once(attention(length, "delta", "silu_l2", 0), delta, **gates),
        "gated delta + window 128": once(attention(length, "delta", "silu_l2", WINDOW), delta + near, **gates),
        "transformers gated delta": once(transformers_gated_delta(), delta, **gates),
    }
    contenders = with_compiled(contenders, LINEAR, kernel_backend)
    timed = {name: once(peer) for name, peer in peers.causal_peers(HEAD_DIM, FAVOR_FEATURES).items()}
    if peers.has("flash-linear-attention"):
        timed["flash-linear-attention gated delta"] = once(peers.flash_gated_delta, **gates)
    return contenders | peers.as_peers(timed)


def random_inputs(length: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Query, key and value, (1, heads, length, head_dim), and the gates of both rules, (1, heads, length)."""
    random = generator(length)
    states = [torch.randn(1, HEADS, length, HEAD_DIM, generator=random) for _ in range(3)]
    gates = {
        "write_strength": torch.rand(1, HEADS, length, generator=random),
        "log_forget": -0.1 * torch.rand(1, HEADS, length, generator=random),
    }
    return states, gates


def one_pass(
    states: list[torch.Tensor],
    backward: bool,
    function: Callable[..., torch.Tensor],
    needed: int | None = None,
    **extra: torch.Tensor,
) -> Contender:
    """A forward pass, with `backward` also the gradients of `states` and `extra`. needed: multiplications of one head,
    forward."""

    def run():
        if not backward:
            with torch.no_grad():
                return function(*states, **extra)
        inputs = [tensor.detach().requires_grad_() for tensor in states]
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in extra.items()}
        function(*inputs, **leaves).sum().backward()

    # Query, key, value and output; backward these again, and the gradient of each.
    moved = (3 if backward else 1) * 4 * states[0].nbytes
    passes = work.TRAINING if backward else 1
    return Contender(run, None if needed is None else passes * HEADS * needed, moved)


def softmax_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """On a GPU in half precision this is torch's flash kernel."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def transformers_gated_delta() -> Callable[..., torch.Tensor]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def attend(query, key, value, write_strength, log_forget):
        states = (tensor.transpose(1, 2) for tensor in (query, key, value))
        gates = {"g": log_forget.transpose(1, 2), "beta": write_strength.transpose(1, 2)}
        return torch_chunk_gated_delta_rule(*states, **gates, use_qk_l2norm_in_kernel=True)[0]

    return attend


def time_decoding(lengths: tuple[int, ...], limits: Limits) -> Iterator[list[Result | Skipped]]:
    """KERMIT, also one such as a conversion of a Llama makes, as `generate()` runs it by default, on PyTorch and with our kernels, and
    with a static cache and `torch.compile`; a Llama of the same body with the default cache."""
    torch.manual_seed(0)
    kermit = KermitForCausalLM(KermitConfig(**body(), window_size=WINDOW)).eval()
    converted = {"window_size": WINDOW, "update_rule": "additive", "conv_kernel_size": 0}
    additive = KermitForCausalLM(KermitConfig(**body(), **converted)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**body())).eval()
    static = partial(StaticCache, config=kermit.config, max_cache_len=2 * max(lengths))
    prompt = partial(fill_by_prompt, kermit)
    at_random = partial(fill_at_random, layers=body()["num_hidden_layers"], heads=HEADS, head_dim=HEAD_DIM)
    decoders = {
        "Llama": Decoder(llama, partial(DynamicCache, config=llama.config), at_random, rewind=True),
        "KERMIT": Decoder(kermit, partial(DynamicCache, config=kermit.config), prompt),
        ADDITIVE: Decoder(additive, partial(DynamicCache, config=additive.config), partial(fill_by_prompt, additive)),
        "KERMIT, static cache, compiled": Decoder(torch.compile(kermit, fullgraph=True), static, prompt),
    }
    if are_compiled(kernel_backend):
        for name in ("KERMIT", ADDITIVE):
            decoders[compiled(name)] = decoders[name]._replace(backend=partial(kernel_backend, "cpp"))
    return compare_decoding(decoders, {length: Place(length) for length in lengths}, limits)


ADDITIVE = "KERMIT, additive"
PURE = ("additive", "gated delta")
NEAR_AND_FAR = "additive + window 128"
EVERYONE = (*LINEAR, *map(compiled, LINEAR))
FROM_1024 = tuple(
    Faster(name, "softmax (SDPA)", length, 1.0)
    for name in (*PURE, *map(compiled, PURE))
    for length in LENGTHS
    if length >= 1024
)
AT_HALF_PEAK = tuple(OfPeak(name, (4096, 8192, 16384, 32768), 0.5) for name in (*PURE, *map(compiled, PURE)))
SECTIONS = {
    "kermit-forward": Section(
        "KERMIT attention, forward: 8 heads x 64",
        by_length(partial(attention_contenders, backward=False)),
        LENGTHS,
        (
            *FROM_1024,
            *(Faster(name, "softmax (SDPA)", 16384, 20.0) for name in ("additive", compiled("additive"))),
            *(Faster(name, "softmax (SDPA)", 16384, 8.0) for name in (NEAR_AND_FAR, compiled(NEAR_AND_FAR))),
            *AT_HALF_PEAK,
            *growing(1.1, *EVERYONE),
        ),
    ),
    "kermit-training": Section(
        "KERMIT attention, forward + backward: 8 heads x 64",
        by_length(partial(attention_contenders, backward=True)),
        LENGTHS,
        (
            *FROM_1024,
            *(Faster(name, "softmax (SDPA)", 16384, 20.0) for name in ("additive", compiled("additive"))),
            *(Faster(name, "softmax (SDPA)", 16384, 8.0) for name in (NEAR_AND_FAR, compiled(NEAR_AND_FAR))),
            *(Faster(name, "softmax (SDPA)", 16384, 8.0) for name in ("gated delta", compiled("gated delta"))),
            Faster("gated delta", "transformers gated delta", 16384, 25.0),
            *AT_HALF_PEAK,
            *growing(1.1, *EVERYONE),
        ),
    ),
    "kermit-decoding": Section(
        "KERMIT decoding: 8 layers x 512",
        time_decoding,
        CONTEXTS,
        (
            *(Flat(name, 1.1) for name in ("KERMIT", ADDITIVE, compiled("KERMIT"), compiled(ADDITIVE))),
            *(
                Faster(compiled(name), "Llama", context, 1.0)
                for name in ("KERMIT", ADDITIVE)
                for context in CONTEXTS
                if context >= 1024
            ),
            Flat("KERMIT, static cache, compiled", 1.1),
            Faster("KERMIT, static cache, compiled", "Llama", 32768, 25.0),
        ),
        "milliseconds per token",
    ),
}
