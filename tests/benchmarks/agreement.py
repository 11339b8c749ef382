"""Whether kernels compute what PyTorch does: checked before they are timed, for how fast a wrong result comes says nothing."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .measure import Failed, Skipped, generator, unless_it_fails


# Of the norm of what is expected. Two forms in bfloat16, which keeps 8 bits, round their operands and results differently; in float32
# they sum in different orders.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}


class Form(NamedTuple):
    """An attention to be timed: `attend` is a function of query, key and value and, where `is_gated`, of the gates by name. needed:
    multiplications of one head, forward. reference: name of the form in PyTorch that a kernel has to agree with. is_peer: other
    people's, which need not compute the same."""

    attend: Callable[..., torch.Tensor]
    needed: int | None = None
    is_gated: bool = False
    reference: str | None = None
    is_peer: bool = False


def disagreeing(forms: dict[str, Form], states: list[torch.Tensor], gates: dict[str, torch.Tensor]) -> list[Skipped]:
    """Those of `forms` that fail, or whose output or gradients are not those of their reference.

    states: query, key and value, (batch, heads, seq, head_dim); gates: (batch, heads, seq).
    """
    length, tolerance = states[0].shape[2], TOLERANCE[states[0].dtype]
    skipped: dict[str, Skipped] = {}
    references: dict[str, dict[str, torch.Tensor]] = {}
    for name, form in forms.items():
        if form.reference is None:
            continue
        with unless_it_fails(skipped, name, length):
            if form.reference not in references:
                references[form.reference] = results_of(forms[form.reference], states, gates)
            expected = references[form.reference]
            for part, result in results_of(form, states, gates).items():
                error = relative_error(result, expected[part])
                if not error <= tolerance:  # nor is what is not a number
                    skipped[name] = Failed(name, length, f"wrong: {part} is {error:.1%} off that of {form.reference}")
                    break
    return list(skipped.values())


def results_of(form: Form, states: list[torch.Tensor], gates: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The output and the gradient of each input, for a random gradient of the output."""
    inputs = dict(zip(("query", "key", "value"), states, strict=True)) | (gates if form.is_gated else {})
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    leaves = list(inputs.values())
    output = form.attend(*leaves[:3], **dict(list(inputs.items())[3:]))
    grad = torch.randn(output.shape, generator=generator(0)).to(output.dtype)
    grads = torch.autograd.grad(output, leaves, grad)
    return {"output": output} | {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
