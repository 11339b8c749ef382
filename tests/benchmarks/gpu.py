"""Times kernels for a GPU: ours in PyTorch and Triton, flash-linear-attention's, and softmax attention's flash kernel.

python -m tests.benchmarks.gpu                                   # everything, in bfloat16
python -m tests.benchmarks.gpu --only gpu-training --longest 16384

Tables, results.json, plots and targets are those of tests.benchmarks. Kernels whose output or gradients are not PyTorch's are not timed,
and the exit status is 1. Without a CUDA device there is nothing to measure.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch

import kermit_hf
import nystromformer_hf
from kermit_hf import backends

from . import nystrom_decoder, peers, work
from .__main__ import run
from .agreement import Form, disagreeing
from .kermit import attention, one_pass, random_inputs, softmax_attention, time_decoding
from .measure import Contender, Result, Section, Skipped, by_length
from .models import HEAD_DIM, HEADS, NEAR_SEGMENTS, SEGMENT, SINKS, WINDOW
from .targets import Faster, Flat, growing


LENGTHS = (8192, 16384, 32768, 65536)
CONTEXTS = (4096, 65536, 1048576)
COORDINATES = 16
TAYLOR_FEATURES = 1 + COORDINATES + COORDINATES * (COORDINATES + 1) // 2
CHUNK = 64
# Tokens at which kernels are compared with PyTorch: several chunks of the far field; more landmarks than their history is PyTorch's up
# to.
KERMIT_CHECKED, NYSTROM_CHECKED = 1024, 4096

# Feature map, rule and the backends that have a kernel for them besides PyTorch.
RULES = {
    "Taylor": ("taylor", "additive", ("triton", "fla")),
    "elu": ("elu", "additive", ("fla",)),
    "gated delta": ("silu_l2", "delta", ("fla",)),
}


def kermit_forms(length: int) -> dict[str, Form]:
    """KERMIT's attention of 8 heads of 64."""
    needed = {
        "Taylor": work.additive(length, TAYLOR_FEATURES, HEAD_DIM, CHUNK),
        "elu": work.additive(length, HEAD_DIM, HEAD_DIM, CHUNK),
        "gated delta": work.delta(length, HEAD_DIM, HEAD_DIM, CHUNK),
    }
    near = work.window(length, HEAD_DIM, WINDOW, SINKS)
    forms = {"softmax (SDPA)": Form(softmax_attention, work.softmax_causal(length, HEAD_DIM))}
    for name, (feature_map, rule, kernels) in RULES.items():
        is_gated = rule == "delta"
        serving = [kernel for kernel in kernels if has(kernel, is_gated)]
        far = attention(length, rule, feature_map, 0)
        forms |= on_backends(kermit_hf.kernel_backend, name, far, needed[name], serving, is_gated)
        # "triton" has the near field alone, but for the Taylor map; "auto" also takes the far field's kernels from "fla".
        serving = ["triton", "auto"] if has("triton") else []
        merged = attention(length, rule, feature_map, WINDOW)
        name, work_of_both = f"{name} + window {WINDOW}", needed[name] + near
        forms |= on_backends(kermit_hf.kernel_backend, name, merged, work_of_both, serving, is_gated)
    if peers.has("flash-linear-attention"):
        based = peers.flash_based(COORDINATES)
        forms |= {
            "flash-linear-attention Based": Form(based, needed["Taylor"], is_peer=True),
            "flash-linear-attention elu": Form(peers.flash_linear_attention, needed["elu"], is_peer=True),
            "flash-linear-attention gated delta": Form(
                peers.flash_gated_delta, needed["gated delta"], is_gated=True, is_peer=True
            ),
        }
    return forms


def nystrom_forms(length: int) -> dict[str, Form]:
    """Causal Nyström attention, likewise; "learned γ" reads every key for each landmark."""
    needed = partial(work.causal_nystrom, length, HEAD_DIM, SEGMENT, NEAR_SEGMENTS, SINKS)
    forms = {"softmax (SDPA)": Form(softmax_attention, work.softmax_causal(length, HEAD_DIM))}
    serving = ["triton"] if has("triton") else []
    for name, gamma in (("causal Nyström", None), ("causal Nyström, learned γ", torch.full((HEADS,), 2.0))):
        attend, regularized = nystrom_decoder.attention(gamma), gamma is not None
        forms |= on_backends(nystromformer_hf.kernel_backend, name, attend, needed(regularized=regularized), serving)
    return forms


def on_backends(
    kernel_backend: Callable[[str], AbstractContextManager],
    name: str,
    attend: Callable[..., torch.Tensor],
    needed: int,
    serving: list[str],
    is_gated: bool = False,
) -> dict[str, Form]:
    """The same attention in PyTorch and, compared with that, on each backend of `serving`."""
    torch_s = f"{name}, torch"
    forms = {torch_s: Form(on_backend(kernel_backend, "torch", attend), needed, is_gated)}
    for backend in serving:
        forms[f"{name}, {backend}"] = Form(on_backend(kernel_backend, backend, attend), needed, is_gated, torch_s)
    return forms


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


def contenders(make_forms: Callable[[int], dict[str, Form]], length: int, backward: bool) -> dict[str, Contender]:
    """All forms on the same random inputs."""
    states, gates = random_inputs(length)
    timed = {}
    for name, form in make_forms(length).items():
        contender = one_pass(states, backward, form.attend, form.needed, **(gates if form.is_gated else {}))
        timed[name] = contender._replace(is_peer=form.is_peer)
    return timed


def checked(
    make_forms: Callable[[int], dict[str, Form]], length: int, backward: bool
) -> Callable[..., Iterator[list[Result | Skipped]]]:
    """The `time` of a section: kernels that do not agree with PyTorch at `length` tokens are not timed."""

    def check() -> list[Skipped]:
        return disagreeing(make_forms(length), *random_inputs(length))

    return by_length(partial(contenders, make_forms, backward=backward), check)


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
        "Kernels on a GPU, forward: 8 heads x 64",
        checked(kermit_forms, KERMIT_CHECKED, backward=False),
        LENGTHS,
        AS_FAST,
    ),
    "gpu-training": Section(
        "Kernels on a GPU, forward + backward: 8 heads x 64",
        checked(kermit_forms, KERMIT_CHECKED, backward=True),
        LENGTHS,
        (*AS_FAST, *AHEAD, *growing(1.1, *OWN_AND_PEER)),
    ),
    "gpu-nystrom-forward": Section(
        "Causal Nyström kernels on a GPU, forward: 8 heads x 64, segments of 64, near field 128",
        checked(nystrom_forms, NYSTROM_CHECKED, backward=False),
        LENGTHS,
        NYSTROM_TARGETS,
    ),
    "gpu-nystrom-training": Section(
        "Causal Nyström kernels on a GPU, forward + backward: 8 heads x 64, segments of 64, near field 128",
        checked(nystrom_forms, NYSTROM_CHECKED, backward=True),
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
