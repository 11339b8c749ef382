"""The GPU benchmark where there is no GPU: it says so, and what it would run gives the right answers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import gpu, peers
from .measure import Contender


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
    monkeypatch.setattr(gpu, "has", lambda backend: False)
    timed = gpu.contenders(192, backward)
    assert {"softmax (SDPA)", "Taylor, torch", "elu, torch", "gated delta, torch"} < timed.keys()
    nystrom = gpu.nystrom_contenders(384, backward)
    assert {"softmax (SDPA)", "causal Nyström, torch", "causal Nyström, learned γ, torch"} == nystrom.keys()
    for contender in (*timed.values(), *nystrom.values()):
        assert isinstance(contender, Contender)
        contender.run()


def test_targets_name_contenders_that_a_gpu_would_have(monkeypatch):
    monkeypatch.setattr(gpu, "has", lambda backend: True)
    monkeypatch.setattr(peers, "has", lambda package: True)
    timed = gpu.contenders(64, False)
    assert {"Taylor + window 128", "gated delta + window 128"} < timed.keys()
    for own, peer in gpu.OWN_AND_PEER.items():
        assert {own, peer} < timed.keys()
    timed = gpu.nystrom_contenders(64, False)
    for target in gpu.NYSTROM_TARGETS:
        assert {target.contender, getattr(target, "rival", target.contender)} < timed.keys()


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
