"""The GPU benchmark where there is no GPU: it says so, and what it would run gives the right answers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kermit_hf import backends

from . import gpu, peers
from .measure import Contender
from .targets import Faster


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_line_says_that_there_is_nothing_to_measure():
    result = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu", "--only", "gpu-training"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "no CUDA device here: there is nothing to measure\n"


@pytest.mark.parametrize("backward", [False, True])
def test_every_contender_of_ours_runs(backward, monkeypatch):
    monkeypatch.setattr(gpu, "has", lambda backend, is_gated=False: False)
    timed = gpu.contenders(gpu.kermit_forms, 192, backward)
    rules = [f"{rule}{near}, torch" for rule in gpu.RULES for near in ("", " + window 128")]
    assert {"softmax (SDPA)", *rules} == timed.keys()
    nystrom = gpu.contenders(gpu.nystrom_forms, 384, backward)
    assert {"softmax (SDPA)", "causal Nyström, torch", "causal Nyström, learned γ, torch"} == nystrom.keys()
    for contender in (*timed.values(), *nystrom.values()):
        assert isinstance(contender, Contender)
        contender.run()


def test_targets_name_contenders_that_a_gpu_would_have(monkeypatch):
    monkeypatch.setattr(gpu, "has", lambda backend, is_gated=False: True)
    monkeypatch.setattr(peers, "has", lambda package: True)
    timed = gpu.kermit_forms(64)
    nystrom = gpu.nystrom_forms(64)
    for name, section in gpu.SECTIONS.items():
        named = {target.contender for target in section.targets}
        named |= {target.rival for target in section.targets if isinstance(target, Faster)}
        if name != "gpu-decoding":
            assert named < (nystrom if "nystrom" in name else timed).keys()


def test_near_and_far_field_are_timed_on_each_backend(monkeypatch):
    """Not on whichever the process has chosen."""
    monkeypatch.setattr(gpu, "has", lambda backend, is_gated=False: True)
    ran_on = []
    monkeypatch.setattr(gpu, "attention", lambda *_: lambda *states, **gates: ran_on.append(backends.CHOICE.chosen))
    monkeypatch.setattr(backends.CHOICE, "check", lambda name: None)
    for name, form in gpu.kermit_forms(64).items():
        rule, _, backend = name.rpartition(", ")
        if rule.removesuffix(" + window 128") in gpu.RULES:
            form.attend()
            assert ran_on.pop() == backend
            assert form.reference == (None if backend == "torch" else f"{rule}, torch")
    for rule in gpu.RULES:
        for backend in ("torch", "triton", "auto"):
            assert f"{rule} + window 128, {backend}" in gpu.kermit_forms(64)


@pytest.fixture
def installed(monkeypatch) -> Iterator[None]:
    """All packages are there, and a device that their kernels run on; the default dtype is bfloat16."""
    monkeypatch.setattr(backends.CHOICE, "missing", lambda name: None)
    monkeypatch.setattr(backends.CHOICE, "misfit", lambda name, device: None)
    monkeypatch.setattr(backends, "gates_misfit", lambda device: None)
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


KERNELS = {"Taylor, triton", "Taylor, fla", "elu, fla", "gated delta, fla"}


def test_kernels_that_serve_are_timed(installed):
    assert gpu.kermit_forms(64).keys() > KERNELS


@pytest.mark.parametrize("backend", ["triton", "fla"])
def test_a_backend_that_cannot_run_on_this_gpu_is_not_timed(backend, installed, monkeypatch):
    monkeypatch.setattr(backends.CHOICE, "misfit", lambda name, device: "too old" if name == backend else None)
    left = {name for name in KERNELS if not name.endswith(backend)}
    assert gpu.kermit_forms(64).keys() & KERNELS == left


def test_gated_rules_are_not_timed_where_they_are_wrong(installed, monkeypatch):
    monkeypatch.setattr(backends, "gates_misfit", lambda device: "triton is too old")
    assert gpu.kermit_forms(64).keys() & KERNELS == KERNELS - {"gated delta, fla"}


def test_in_other_dtypes_than_bfloat16_the_package_has_no_kernels(installed):
    torch.set_default_dtype(torch.float32)
    assert gpu.kermit_forms(64).keys() & KERNELS == {"Taylor, triton"}


def test_the_peer_s_taylor_map_is_ours(monkeypatch):
    """Its kernel replaced by its own definition in PyTorch, on (batch, seq, heads, dim)."""
    based = pytest.importorskip("fla.ops.based", reason="fla-core is not installed")
    from fla.ops.based.naive import naive_parallel_based

    def definition(*states):
        return naive_parallel_based(*(tensor.transpose(1, 2) for tensor in states)).transpose(1, 2)

    monkeypatch.setattr(based, "fused_chunk_based", definition)
    query, key, value = torch.randn(3, 1, 2, 20, 32)
    output = peers.flash_based(8)(query, key, value).transpose(1, 2)
    weights = (query[..., :8] @ key[..., :8].mT).double() / 8**0.5
    weights = (1 + weights + weights.square() / 2).tril()
    torch.testing.assert_close(
        output.double(), weights @ value.double() / weights.sum(-1, keepdim=True), atol=1e-4, rtol=1e-4
    )
