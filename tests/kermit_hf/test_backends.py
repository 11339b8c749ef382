"""Which kernels run: PyTorch's unless others are chosen, then the best one that fits, and a clear refusal of what cannot be."""

import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from kermit_hf import FEATURE_MAPS, KermitForCausalLM, backends, kernel_backend
from tests.kermit_hf.tiny_models import VOCABULARY, tiny_config, tiny_model, tokens
from tests.triton_kernels import run_python


TAYLOR = {"update_rule": "additive", "feature_map": "taylor", "feature_dim": 4, "window_size": 4}


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    """Whatever KERMIT_BACKEND says, these tests start from the automatic choice."""
    monkeypatch.setattr(backends.CHOICE, "chosen", "auto")


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    """Packages of backends that are found, for a test to fill."""
    packages = set()
    monkeypatch.setattr(
        backends.CHOICE,
        "missing",
        lambda name: next((package for package in backends.PACKAGES.get(name, ()) if package not in packages), None),
    )
    return packages


def chosen_on_a_gpu(
    monkeypatch,
    update_rule: str,
    name: str,
    dtype: torch.dtype,
    head_dim: int = 64,
    feature_dim: int | None = None,
    batch: int = 1,
    is_gated: bool = False,
) -> str | None:
    """Name of the form that tensors on a GPU would go to."""
    monkeypatch.setattr(backends.CHOICE, "misfit", lambda name, device: None)
    feature_map = FEATURE_MAPS[name](head_dim, feature_dim, 2, 2)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(batch, 2, 10, head_dim))
    maps = feature_map.map_queries, feature_map.map_keys
    kernel = backends.find_kernel(update_rule, *maps, tensor, tensor, is_gated)
    return kernel and kernel.chunked.__name__


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_taylor_map_is_our_own_kernels(dtype, installed, monkeypatch):
    installed |= {"triton", "fla-core"}
    assert chosen_on_a_gpu(monkeypatch, "additive", "taylor", dtype) == "taylor_chunked"


@pytest.mark.parametrize(
    "update_rule, name, dtype, sizes, packages, expected",
    [
        ("additive", "hedgehog", BF16, {}, {"triton", "fla-core"}, "fla_additive_chunked"),
        ("additive", "hedgehog", FP32, {}, {"triton", "fla-core"}, None),
        ("additive", "hedgehog", BF16, {}, {"triton"}, None),
        ("additive", "hedgehog", BF16, {}, {"fla-core"}, None),
        ("delta", "silu_l2", BF16, {}, {"triton", "fla-core"}, "fla_delta_chunked"),
        ("delta", "taylor", BF16, {}, {"triton", "fla-core"}, "fla_delta_chunked"),
        (
            "additive",
            "taylor",
            BF16,
            {"head_dim": 128, "feature_dim": 65},
            {"triton", "fla-core"},
            "fla_additive_chunked",
        ),
        ("additive", "taylor", BF16, {"head_dim": 320}, {"triton"}, None),
        (
            "additive",
            "taylor",
            BF16,
            {"batch": 32_768},
            {"triton"},
            None,
        ),  # times two heads is more than a CUDA grid takes
        ("additive", "taylor", torch.float64, {}, {"triton", "fla-core"}, None),
        ("additive", "taylor", BF16, {}, set(), None),
    ],
)
def test_the_rest_is_the_package_s_or_torch_s(
    update_rule, name, dtype, sizes, packages, expected, installed, monkeypatch
):
    installed |= packages
    assert chosen_on_a_gpu(monkeypatch, update_rule, name, dtype, **sizes) == expected


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "backend, dtype, head_dim, num_sinks, expected",
    [
        ("auto", BF16, 256, 64, "window_merged"),
        ("auto", BF16, 256, 65, "window_blocked"),  # together they need more shared memory than most GPUs have
        ("auto", BF16, 144, 128, "window_blocked"),
        ("auto", FP32, 128, 128, "window_merged"),
        ("triton", BF16, 64, 0, "window_merged"),
        ("auto", FP32, 256, 4, "window_blocked"),
        ("auto", torch.float64, 64, 4, "window_blocked"),
        ("auto", BF16, 64, 129, "window_blocked"),
        ("fla", BF16, 64, 4, "window_blocked"),
        ("torch", BF16, 64, 4, "window_blocked"),
    ],
)
def test_the_near_field_is_our_own_kernel_where_it_fits(
    backend, dtype, head_dim, num_sinks, expected, installed, monkeypatch
):
    installed |= {"triton", "fla-core"}
    monkeypatch.setattr(backends.CHOICE, "misfit", lambda name, device: None)
    query = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(1, 2, 10, head_dim))
    with kernel_backend(backend):
        assert backends.find_window(query, num_sinks).__name__ == expected


@pytest.mark.parametrize("backend", ["auto", "triton", "fla", "cpp"])
def test_torch_compile_gets_the_torch_forms(backend, installed, monkeypatch):
    """Those of a backend that is named, too: it cannot look into `torch.cuda.device_of`, in which kernels are launched."""
    installed |= {"triton", "fla-core"}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with kernel_backend(backend):
        assert chosen_on_a_gpu(monkeypatch, "additive", "taylor", BF16) is None
        assert chosen_on_a_gpu(monkeypatch, "delta", "silu_l2", BF16) is None


@pytest.mark.parametrize("backend", ["compiled", "torch"])
def test_kernels_of_gpus_serve_only_where_they_are_chosen(backend, installed, monkeypatch):
    installed |= {"triton", "fla-core"}
    monkeypatch.setattr(backends.CHOICE, "are_compiled", lambda: True)
    with kernel_backend(backend):
        assert chosen_on_a_gpu(monkeypatch, "additive", "taylor", BF16) is None
        assert chosen_on_a_gpu(monkeypatch, "delta", "silu_l2", BF16) is None


def test_a_chosen_backend_is_the_only_one(installed, monkeypatch):
    installed |= {"triton", "fla-core"}
    with kernel_backend("fla"):
        assert chosen_on_a_gpu(monkeypatch, "additive", "taylor", BF16) == "fla_additive_chunked"
    with kernel_backend("triton"):
        assert chosen_on_a_gpu(monkeypatch, "delta", "silu_l2", BF16) is None
    with kernel_backend("torch"):
        assert chosen_on_a_gpu(monkeypatch, "additive", "taylor", BF16) is None
        with kernel_backend("auto"):
            assert chosen_on_a_gpu(monkeypatch, "delta", "silu_l2", BF16) == "fla_delta_chunked"
        assert backends.CHOICE.chosen == "torch"
    assert backends.CHOICE.chosen == "auto"


@pytest.fixture
def hopper(monkeypatch) -> Iterator[None]:
    """A GPU on which this triton computes the package's gated rules wrongly."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "import_module", lambda name: SimpleNamespace(__version__="3.5.0"))
    backends.gates_misfit.cache_clear()
    yield
    backends.gates_misfit.cache_clear()


WRONG = "'fla' cannot run: triton 3.5.0 computes its gated rules wrongly on this GPU; install triton 3.7.1 or later"


@pytest.mark.parametrize("rule", ["additive", "delta"])
def test_where_gated_rules_are_wrong_the_others_still_are_the_package_s(rule, installed, hopper, monkeypatch):
    installed |= {"triton", "fla-core"}
    chosen = partial(chosen_on_a_gpu, monkeypatch, rule, "silu_l2" if rule == "delta" else "elu", BF16)
    assert chosen() == f"fla_{rule}_chunked"
    assert chosen(is_gated=True) is None
    with kernel_backend("fla"):
        assert chosen() == f"fla_{rule}_chunked"
        with pytest.raises(ValueError, match=WRONG):
            chosen(is_gated=True)


def test_the_forget_gate_of_a_model_is_seen(installed, hopper, monkeypatch):
    installed |= {"triton", "fla-core"}
    monkeypatch.setattr(backends.CHOICE, "misfit", lambda name, device: None)
    model = tiny_model({"window_size": 4, "forget_gate": True}).bfloat16()
    with kernel_backend("fla"), pytest.raises(ValueError, match=WRONG):
        model(tokens(1, 12))


def test_the_choice_ends_with_an_error():
    with pytest.raises(RuntimeError), kernel_backend("torch"):
        raise RuntimeError
    assert backends.CHOICE.chosen == "auto"


def test_an_unknown_backend_is_refused():
    with pytest.raises(
        ValueError,
        match="kernel backend 'cuda' is unknown; allowed are 'compiled', 'torch', 'auto', 'cpp', 'triton', 'fla'",
    ):
        kernel_backend("cuda").__enter__()


@pytest.mark.parametrize("name, package", [("triton", "triton"), ("fla", "fla-core")])
def test_a_package_that_is_missing_is_named(name, package, installed):
    installed |= {"fla-core" if name == "triton" else "triton"}
    with pytest.raises(ValueError, match=f"'{name}' needs the package {package}.*pip install {package}.*'torch'"):
        kernel_backend(name).__enter__()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter runs on the CPU")
@pytest.mark.parametrize("name", ["triton", "fla"])
def test_a_backend_that_cannot_run_on_the_device_says_so(name, installed):
    installed |= {"triton", "fla-core"}
    model = tiny_model(TAYLOR)
    with (
        kernel_backend(name),
        pytest.raises(ValueError, match=f"'{name}' cannot run: tensors are on 'cpu'; move the model to a CUDA device"),
    ):
        model(tokens(1, 12))


def test_the_torch_backend_is_what_a_cpu_runs_that_cannot_compile(monkeypatch):
    monkeypatch.setattr(backends.CHOICE, "misfit", lambda name, device: "there is no compiler")
    model, input_ids = tiny_model(TAYLOR), tokens(2, 20)
    with torch.no_grad():
        expected = model(input_ids).logits
        with kernel_backend("torch"):
            assert torch.equal(model(input_ids).logits, expected)
        with (
            kernel_backend("cpp"),
            pytest.raises(ValueError, match="'cpp' cannot run: there is no compiler, or choose"),
        ):
            model(input_ids)


LEFT_ALONE = """
import sys, torch
from kermit_hf import KermitConfig, KermitForCausalLM, backends
sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = KermitForCausalLM(KermitConfig(**sizes, update_rule="additive", feature_map="taylor", window_size=4))
print(backends.CHOICE.chosen)
before = set(sys.modules)
for backend in ("auto", "compiled"):
    with backends.kernel_backend(backend):
        model(torch.ones(1, 12, dtype=torch.long), labels=torch.ones(1, 12, dtype=torch.long)).loss.backward()
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
ours = {name for name in sys.modules if name.startswith("kermit_hf.") and name.endswith(("_triton", "fla_kernels"))}
print(sorted(loaded & {"triton", "fla"}), sorted(ours))
"""


def test_the_environment_chooses_and_a_cpu_loads_no_kernels_of_gpus():
    result = run_python(LEFT_ALONE, KERMIT_BACKEND="auto")
    assert result.stdout.split("\n") == ["auto", "[] []", ""], result.stderr


@pytest.mark.parametrize("backend", ["compiled", "auto", "cpp"])
def test_the_meta_device_is_left_to_torch(backend):
    """Where nothing is computed a backend that is named has nothing to refuse."""
    with kernel_backend(backend), torch.device("meta"):
        assert KermitForCausalLM(tiny_config())(tokens(2, 20)).logits.shape == (2, 20, VOCABULARY)


def test_the_choice_is_no_part_of_a_model():
    """It belongs to the machine: checkpoints know nothing of it."""
    with kernel_backend("torch"):
        config = tiny_model(TAYLOR, KermitForCausalLM).config.to_dict()
    assert not any("backend" in name for name in config)
