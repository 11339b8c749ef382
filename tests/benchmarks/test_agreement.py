"""Kernels that are wrong in output, gradients or numbers, or that fail, are found before they are timed; right ones are not."""

import pytest
import torch

from . import measure
from .agreement import Form, disagreeing
from .kermit import one_pass, random_inputs
from .measure import Contender, Failed, Limits, Result, Skipped, by_length


STATES, GATES = random_inputs(16)


def attend(query, key, value):
    return (query * key).tanh() + value


def gated(query, key, value, write_strength, log_forget):
    return attend(query, key, value) * (write_strength * log_forget.exp())[..., None]


class WrongGradient(torch.autograd.Function):
    """The identity, half of whose gradient is lost."""

    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def fail(query, key, value):
    raise ValueError("no kernel for this GPU\nsee the manual")


FORMS = {
    "torch": Form(attend),
    "right": Form(lambda query, key, value: value + (key * query).tanh(), reference="torch"),
    "output": Form(lambda *states: 1.05 * attend(*states), reference="torch"),
    "gradient": Form(lambda query, key, value: attend(query, WrongGradient.apply(key), value), reference="torch"),
    "not a number": Form(lambda *states: attend(*states) * torch.nan, reference="torch"),
    "peer": Form(lambda query, key, value: value, is_peer=True),
    "torch, gated": Form(gated, is_gated=True),
    "gated": Form(gated, is_gated=True, reference="torch, gated"),
    "gate": Form(
        lambda *states, write_strength, log_forget: gated(*states, write_strength, WrongGradient.apply(log_forget)),
        is_gated=True,
        reference="torch, gated",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_wrong_is_found_and_nothing_else(dtype):
    states, gates = [tensor.to(dtype) for tensor in STATES], {name: gate.to(dtype) for name, gate in GATES.items()}
    assert disagreeing(FORMS, states, gates) == [
        Failed("output", 16, "wrong: output is 5.0% off that of torch"),
        Failed("gradient", 16, "wrong: gradient of key is 50.0% off that of torch"),
        Failed("not a number", 16, "wrong: output is nan% off that of torch"),
        Failed("gate", 16, "wrong: gradient of log_forget is 50.0% off that of torch, gated"),
    ]


@pytest.mark.parametrize("dtype, agrees", [(torch.float32, False), (torch.bfloat16, True)])
def test_bfloat16_may_be_off_by_more(dtype, agrees):
    forms = {"torch": Form(attend), "rounded": Form(lambda *states: 1.01 * attend(*states), reference="torch")}
    assert (disagreeing(forms, [tensor.to(dtype) for tensor in STATES], {}) == []) is agrees


def test_a_kernel_that_fails_on_a_gpu_is_found_too(monkeypatch):
    monkeypatch.setattr(measure, "on_gpu", lambda: True)
    forms = {"torch": Form(attend), "fails": Form(fail, reference="torch"), "right": FORMS["right"]}
    assert disagreeing(forms, STATES, GATES) == [Failed("fails", 16, "ValueError: no kernel for this GPU")]


def test_what_is_wrong_is_not_timed(monkeypatch):
    """Nor does it run at any length."""
    monkeypatch.setitem(measure.MATRIX_SIZE, False, 64)

    def never():
        raise AssertionError("was run")

    def contenders(length: int) -> dict[str, Contender]:
        return {"torch": one_pass(STATES, False, attend), "output": Contender(never)}

    found, *batches = by_length(contenders, lambda: disagreeing(FORMS, STATES, GATES))((16, 32), Limits())
    assert [failed.contender for failed in found] == ["output", "gradient", "not a number", "gate"]
    for batch, length in zip(batches, (16, 32), strict=True):
        assert isinstance(batch[0], Result)
        assert batch[1] == Skipped("output", length, "as at 16")
