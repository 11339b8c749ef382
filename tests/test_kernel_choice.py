"""What the environment says of whose kernels run, for both packages."""

from types import ModuleType

import pytest

import kermit_hf.backends
import nystromformer_hf.backends
from tests.kermit_hf import tiny_models
from tests.nystromformer_hf import decoder_models


@pytest.fixture(params=["kermit_hf", "nystromformer_hf"])
def backends(request) -> ModuleType:
    return {"kermit_hf": kermit_hf.backends, "nystromformer_hf": nystromformer_hf.backends}[request.param]


@pytest.fixture
def choose(backends, monkeypatch):
    """Reads the environment anew, as the package does when it is imported."""

    def choose(value: str):
        variable = {kermit_hf.backends: "KERMIT_BACKEND", nystromformer_hf.backends: "NYSTROMFORMER_BACKEND"}[backends]
        monkeypatch.setenv(variable, value)
        old = backends.CHOICE
        monkeypatch.setattr(backends, "CHOICE", type(old)(variable, old.packages, old.misfit, old.are_compiled))
        return backends.CHOICE

    return choose


def test_without_the_environment_compiled_kernels_serve(choose):
    assert choose("").chosen == "compiled"


def test_an_unknown_name_in_the_environment_is_refused(backends, choose):
    choose("cuda")
    names = ["compiled", "torch", "auto", "cpp", "triton"] + ["fla"] * (backends is kermit_hf.backends)
    models = tiny_models if backends is kermit_hf.backends else decoder_models
    allowed = ", ".join(map(repr, names))
    with pytest.raises(ValueError, match=f"^kernel backend 'cuda' is unknown; allowed are {allowed}"):
        models.tiny_model()(models.tokens(1, 12))
