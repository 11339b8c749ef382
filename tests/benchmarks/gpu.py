"""Times kernels for a GPU: ours in PyTorch and Triton, flash-linear-attention's, and softmax attention's flash kernel.

python -m tests.benchmarks.gpu                                   # everything, in bfloat16
python -m tests.benchmarks.gpu --only gpu-training --longest 16384

Tables, results.json, plots and targets are those of tests.benchmarks. Without a CUDA device there is nothing to measure.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch

import kermit_hf
import nystromformer_hf
from kermit_hf import backends

from . import nystrom_decoder, peers, work
from .__main__ import run
from .kermit import attention, one_pass, random_inputs, softmax_attention, time_decoding
from .measure import Contender, Section, by_length
from .models import HEAD_DIM, HEADS, NEAR_SEGMENTS, SEGMENT, SINKS, WINDOW
from .targets import Faster, Flat, growing


LENGTHS = (8192, 16384, 32768, 65536)
CONTEXTS = (4096, 65536, 1048576)
COORDINATES = 16
TAYLOR_FEATURES = 1 + COORDINATES + COORDINATES * (COORDINATES + 1) // 2
CHUNK = 64

# Feature map, rule and the backends that have a kernel for them besides PyTorch.
RULES = {
    "Taylor": ("taylor", "additive", ("triton", "fla")),
    "elu": ("elu", "additive", ("fla",)),
    "gated delta": ("silu_l2", "delta", ("fla",)),
}


def contenders(length: int, backward: bool) -> dict[str, Contender]:
    """KERMIT's attention of 8 heads of 64, on the same random inputs."""
    states, gates = random_inputs(length)
    once = partial(one_pass, states, backward)
    needed = {
        "Taylor": work.additive(length, TAYLOR_FEATURES, HEAD_DIM, CHUNK),
        "elu": work.additive(length, HEAD_DIM, HEAD_DIM, CHUNK),
        "gated delta": work.delta(length, HEAD_DIM, HEAD_DIM, CHUNK),
    }
    timed = {"softmax (SDPA)": once(softmax_attention, work.softmax_causal(length, HEAD_DIM))}
    near = work.window(length, HEAD_DIM, WINDOW, SINKS)
    for name, (feature_map, rule, kernels) in RULES.items():
        extra = gates if rule == "delta" else {}
        for backend in ("torch", *(kernel for kernel in kernels if has(kernel, is_gated=bool(extra)))):
            function = on_backend(kermit_hf.kernel_backend, backend, attention(length, rule, feature_map, 0))
            timed[f"{name}, {backend}"] = once(function, needed[name], **extra)
        # "triton" has the near field alone, but for the Taylor map; "auto" also takes the far field's kernels from "fla".
        for backend in ("torch", "triton", "auto") if has("triton") else ("torch",):
            function = on_backend(kermit_hf.kernel_backend, backend, attention(length, rule, feature_map, WINDOW))
            timed[f"{name} + window {WINDOW}, {backend}"] = once(function, needed[name] + near, **extra)
    if not peers.has("flash-linear-attention"):
        return timed
    return timed | peers.as_peers(
        {
            "flash-linear-attention Based": once(peers.flash_based(COORDINATES), needed["Taylor"]),
            "flash-linear-attention elu": once(peers.flash_linear_attention, needed["elu"]),
            "flash-linear-attention gated delta": once(peers.flash_gated_delta, needed["gated delta"], **gates),
        }
    )


def nystrom_contenders(length: int, backward: bool) -> dict[str, Contender]:
    """Causal Nyström attention, likewise; "learned γ" reads every key for each landmark."""
    states, _ = random_inputs(length)
    once = partial(one_pass, states, backward)
    needed = partial(work.causal_nystrom, length, HEAD_DIM, SEGMENT, NEAR_SEGMENTS, SINKS)
    timed = {"softmax (SDPA)": once(softmax_attention, work.softmax_causal(length, HEAD_DIM))}
    for name, gamma in (("causal Nyström", None), ("causal Nyström, learned γ", torch.full((HEADS,), 2.0))):
        for backend in ("torch", "triton") if has("triton") else ("torch",):
            function = on_backend(nystromformer_hf.kernel_backend, backend, nystrom_decoder.attention(gamma))
            timed[f"{name}, {backend}"] = once(function, needed(regularized=gamma is not None))
    return timed


def on_backend(
    kernel_backend: Callable[[str], AbstractContextManager], backend: str, attend: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    def chosen(*states, **gates):
        with kernel_backend(backend):
            return attend(*states, **gates)

    return chosen


def has(backend: str, is_gated: bool = False) -> bool:
    """Whether a backend has kernels for tensors on the default device and of the default dtype: "fla" is for bfloat16, where another
    would silently be PyTorch's, and not everywhere for rules with a forget gate."""
    device = torch.get_default_device()
    if backends.CHOICE.missing(backend) is not None or backends.CHOICE.misfit(backend, device) is not None:
        return False
    if backend != "fla":
        return True
    return torch.get_default_dtype() == torch.bfloat16 and not (is_gated and backends.gates_misfit(device))


OWN_AND_PEER = {
    "Taylor, triton": "flash-linear-attention Based",
    "elu, fla": "flash-linear-attention elu",
    "gated delta, fla": "flash-linear-attention gated delta",
}
AS_FAST = tuple(Faster(own, peer, length, 1.0) for own, peer in OWN_AND_PEER.items() for length in LENGTHS)
AHEAD = tuple(Faster(own, "softmax (SDPA)", 65536, 6.0) for own in OWN_AND_PEER)
NYSTROM = "causal Nyström, triton"
NYSTROM_TARGETS = (
    *(Faster(NYSTROM, "causal Nyström, torch", length, 1.0) for length in LENGTHS),
    Faster(NYSTROM, "softmax (SDPA)", 65536, 6.0),
    *growing(1.6, NYSTROM),
)
SECTIONS = {
    "gpu-forward": Section(
        "Kernels on a GPU, forward: 8 heads x 64", by_length(partial(contenders, backward=False)), LENGTHS, AS_FAST
    ),
    "gpu-training": Section(
        "Kernels on a GPU, forward + backward: 8 heads x 64",
        by_length(partial(contenders, backward=True)),
        LENGTHS,
        (*AS_FAST, *AHEAD, *growing(1.1, *OWN_AND_PEER)),
    ),
    "gpu-nystrom-forward": Section(
        "Causal Nyström kernels on a GPU, forward: 8 heads x 64, segments of 64, near field 128",
        by_length(partial(nystrom_contenders, backward=False)),
        LENGTHS,
        NYSTROM_TARGETS,
    ),
    "gpu-nystrom-training": Section(
        "Causal Nyström kernels on a GPU, forward + backward: 8 heads x 64, segments of 64, near field 128",
        by_length(partial(nystrom_contenders, backward=True)),
        LENGTHS,
        NYSTROM_TARGETS,
    ),
    "gpu-decoding": Section(
        "KERMIT decoding on a GPU: 8 layers x 512",
        time_decoding,
        CONTEXTS,
        (Flat("KERMIT", 1.1), Flat("KERMIT, static cache, compiled", 1.1)),
        "milliseconds per token",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    return run(SECTIONS, __doc__, arguments, needs_gpu=True)


if __name__ == "__main__":
    sys.exit(main())
