"""Which kernels run: PyTorch's unless others are chosen, then ours where they fit, and a clear refusal of what cannot be."""

import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from nystromformer_hf import NystromformerHFConfig, NystromformerHFModel, backends, kernel_backend
from tests.nystromformer_hf.decoder_models import tiny_model, tokens
from tests.triton_kernels import run_python


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    """Whatever NYSTROMFORMER_BACKEND says, these tests start from the automatic choice."""
    monkeypatch.setattr(backends.CHOICE, "chosen", "auto")


def chosen_on_a_gpu(
    monkeypatch,
    dtype: torch.dtype,
    head_dim: int = 64,
    value_dim: int | None = None,
    dropout: float = 0.0,
    batch: int = 1,
) -> list[str | None]:
    """Names of the kernels that tensors on a GPU would go to: for the text, and for its history."""
    monkeypatch.setattr(backends.CHOICE, "misfit", lambda name, device: None)
    query, value = (
        SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(batch, 2, 10, size))
        for size in (head_dim, value_dim or head_dim)
    )
    kernels = backends.find_landmark_attention(query, value, dropout), backends.find_history_attention(query, value)
    return [kernel and kernel.__name__ for kernel in kernels]


OURS, NONE = ["landmark_attention", "history_attention"], [None, None]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype, head_dim", [(BF16, 256), (FP32, 128), (torch.float16, 64)])
def test_our_own_kernels_serve_where_they_fit(backend, dtype, head_dim, monkeypatch):
    with kernel_backend(backend):
        assert chosen_on_a_gpu(monkeypatch, dtype, head_dim) == OURS


@pytest.mark.parametrize(
    "dtype, sizes",
    [
        (FP32, {"head_dim": 256}),
        (BF16, {"head_dim": 320}),
        (BF16, {"value_dim": 32}),
        (BF16, {"batch": 32_768}),  # times two heads is more than a CUDA grid takes
        (torch.float64, {}),
    ],
)
def test_the_rest_is_torch_s(dtype, sizes, monkeypatch):
    monkeypatch.setattr(backends.CHOICE, "missing", lambda name: None)
    assert chosen_on_a_gpu(monkeypatch, dtype, **sizes) == NONE


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_dropout_is_torch_s_and_the_history_has_none(monkeypatch):
    assert chosen_on_a_gpu(monkeypatch, BF16, dropout=0.1) == [None, "history_attention"]


def test_without_triton_everything_is_torch_s(monkeypatch):
    monkeypatch.setattr(backends.CHOICE, "missing", lambda name: "triton")
    assert chosen_on_a_gpu(monkeypatch, BF16) == NONE


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_torch_compile_gets_the_torch_forms(backend, monkeypatch):
    """Those of a backend that is named, too: it cannot look into `torch.cuda.device_of`, in which kernels are launched."""
    monkeypatch.setattr(backends.CHOICE, "missing", lambda name: None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with kernel_backend(backend):
        assert chosen_on_a_gpu(monkeypatch, BF16) == NONE


def test_the_torch_backend_ends_with_its_block(monkeypatch):
    with kernel_backend("torch"):
        assert chosen_on_a_gpu(monkeypatch, BF16) == NONE
    assert backends.CHOICE.chosen == "auto"


def test_an_unknown_backend_is_refused():
    with pytest.raises(
        ValueError, match="kernel backend 'fla' is unknown; allowed are 'compiled', 'torch', 'auto', 'cpp', 'triton'"
    ):
        kernel_backend("fla").__enter__()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(backends.CHOICE, "missing", lambda name: "triton")
    with pytest.raises(ValueError, match=r"'triton' needs the package triton.*pip install triton.*'torch'"):
        kernel_backend("triton").__enter__()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter runs on the CPU")
def test_a_backend_that_cannot_run_on_the_device_says_so():
    model = tiny_model()
    with (
        kernel_backend("triton"),
        pytest.raises(ValueError, match="'triton' cannot run: tensors are on 'cpu'; move the model to a CUDA device"),
    ):
        model(tokens(1, 12))


def test_the_torch_backend_is_what_a_cpu_runs_anyway():
    model, input_ids = tiny_model("regularized"), tokens(2, 20)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("torch"):
            assert torch.equal(model(input_ids).logits, expected)


LEFT_ALONE = """
import sys, torch
from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM, backends
sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = NystromformerHFDecoderForCausalLM(NystromformerHFDecoderConfig(**sizes, segment_size=2, near_segments=1))
print(backends.CHOICE.chosen)
before = set(sys.modules)
for backend in ("auto", "compiled"):
    with backends.kernel_backend(backend):
        model(torch.ones(1, 12, dtype=torch.long), labels=torch.ones(1, 12, dtype=torch.long)).loss.backward()
ours = {name for name in sys.modules if name.startswith("nystromformer_hf.") and "triton" in name}
print("triton" in set(sys.modules) - before, sorted(ours))
"""


def test_the_environment_chooses_and_a_cpu_loads_no_kernels_of_gpus():
    result = run_python(LEFT_ALONE, NYSTROMFORMER_BACKEND="auto")
    assert result.stdout.split("\n") == ["auto", "False []", ""], result.stderr


@pytest.mark.parametrize("backend", ["compiled", "auto", "cpp"])
def test_the_meta_device_is_left_to_torch(backend):
    """Where nothing is computed a backend that is named has nothing to refuse."""
    config = NystromformerHFConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, num_landmarks=4)
    with kernel_backend(backend), torch.device("meta"):
        assert NystromformerHFModel(config)(tokens(2, 20)).last_hidden_state.shape == (2, 20, 16)


def test_the_choice_is_no_part_of_a_model():
    """It belongs to the machine: checkpoints know nothing of it."""
    with kernel_backend("torch"):
        config = tiny_model().config.to_dict()
    assert not any("backend" in name for name in config)
