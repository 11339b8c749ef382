"""The encoder's kernel in C++ against PyTorch's forms in float64, alone and in whole models, and what is left to PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from nystromformer_hf import NystromformerHFForMaskedLM, backends, encoder_cpu, kernel_backend
from nystromformer_hf.cpu_kernels import cpu_misfit
from nystromformer_hf.nystrom_attention import nystrom_attention, value_convolution
from tests.nystromformer_hf.helpers import random_tokens, tiny_config
from tests.threads import assert_equal_on_any_number_of_threads


MISFIT = cpu_misfit(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISFIT is not None, reason=f"the kernels in C++ cannot run here: {MISFIT}")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Lengths of the texts that the kernel has served."""
    served = []
    fused = encoder_cpu.nystrom_attention_fused

    def record(query, *arguments, **options):
        served.append(query.shape[2])
        return fused(query, *arguments, **options)

    monkeypatch.setattr(encoder_cpu, "nystrom_attention_fused", record)
    return served


def expected(query, key, value, num_landmarks, lengths, kernels, init):
    output, _ = nystrom_attention(query, key, value, num_landmarks, lengths, inverse_init=init)
    return output if kernels is None else value_convolution(value, kernels[:, None, :, None], lengths, output)


@pytest.mark.parametrize("init", ["original", "exact"])
@pytest.mark.parametrize(
    "batch, heads, length, head_dim, landmarks, taps, lengths",
    [
        (1, 2, 65, 64, 64, None, None),  # one token more than landmarks
        (2, 3, 1000, 32, 24, 33, [700, 1000]),
        (1, 2, 333, 16, 7, 4, [50]),  # blocks and vectors that are not full, an even kernel
        (2, 2, 2500, 48, 5, 65, [11, 2400]),  # several spans, one of them without a real token
        (1, 1, 1056, 16, 16, 1, None),
    ],
)
def test_outputs_and_gradients_are_those_of_float64(batch, heads, length, head_dim, landmarks, taps, lengths, init):
    lengths = None if lengths is None else torch.tensor(lengths)
    inputs = [torch.randn(batch, length, heads, head_dim).transpose(1, 2).requires_grad_() for _ in range(3)]
    inputs += [] if taps is None else [torch.randn(heads, taps).mul_(0.1).requires_grad_()]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    kernels = [None] if taps is None else []
    output = encoder_cpu.nystrom_attention_fused(
        *inputs[:3], landmarks, lengths, *inputs[3:], *kernels, inverse_init=init
    )
    exact = expected(*exact_inputs[:3], landmarks, lengths, *exact_inputs[3:], *kernels, init)

    read = torch.ones(batch, length) if lengths is None else torch.arange(length) < lengths[:, None]
    wanted = torch.randn_like(output) * read[:, None, :, None]
    close(output * read[:, None, :, None], exact * read[:, None, :, None])
    grads = torch.autograd.grad((output * wanted).sum(), inputs)
    for grad, exact_grad in zip(grads, torch.autograd.grad((exact * wanted).sum(), exact_inputs), strict=True):
        close(grad, exact_grad)
        assert lengths is None or grad.dim() == 2 or not grad[~read[:, None].expand(grad.shape[:3])].any()


def close(result: torch.Tensor, exact: torch.Tensor) -> None:
    """To rounding in float32: through the inverse, gradients of peaked scores lose a digit."""
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item())


def test_second_derivatives_are_refused():
    tensors = [torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3)]
    output = encoder_cpu.nystrom_attention_fused(*(2 * tensor for tensor in tensors), 8)
    for tensor in tensors:
        with pytest.raises(RuntimeError, match=r"second derivatives.*attn_implementation='eager'"):
            torch.autograd.grad(output.sum(), tensor, create_graph=True)


def test_states_in_any_layout():
    packed = torch.randn(2, 3, 100, 3, 16)
    query, key, value = packed.unbind(3)
    transposed = query.mT.contiguous().mT  # last axis not contiguous
    output = encoder_cpu.nystrom_attention_fused(transposed, key, value, 8)
    close(output, expected(query.double(), key.double(), value.double(), 8, None, None, "original"))


def test_large_scores_are_as_exact_as_in_torch():
    """Scores in the hundreds, whose own rounding shows: neither overflow nor loss beyond PyTorch's in float32."""
    query, key, value = (scale * torch.randn(1, 2, 200, 16) for scale in (30, 30, 1))
    exact = expected(query.double(), key.double(), value.double(), 8, None, None, "original")
    errors = [
        (form(query, key, value, 8) - exact).abs().max().item()
        for form in (encoder_cpu.nystrom_attention_fused, lambda *inputs: nystrom_attention(*inputs)[0])
    ]
    assert errors[0] <= 4 * errors[1] + 1e-6


def test_results_do_not_depend_on_the_number_of_threads():
    """The tasks of a short row are done soon, and their thread goes on with the others'."""
    query, key, value = (torch.randn(2, 2, 2300, 16).requires_grad_() for _ in range(3))
    lengths = torch.tensor([2300, 40])
    kernels = torch.randn(2, 5).requires_grad_()

    def output_and_gradients():
        output = encoder_cpu.nystrom_attention_fused(query, key, value, 8, lengths, kernels)
        return [output, *torch.autograd.grad(output.square().sum(), [query, key, value, kernels])]

    assert_equal_on_any_number_of_threads(output_and_gradients)


@pytest.mark.parametrize("conv_kernel_size", [5, None])
def test_models_give_the_same_logits_and_gradients(conv_kernel_size, calls):
    config = tiny_config(conv_kernel_size=conv_kernel_size, hidden_size=32, num_attention_heads=2)
    model = NystromformerHFForMaskedLM(config).eval()
    tokens = random_tokens(2, 40)
    mask = (torch.arange(40) >= torch.tensor([[0], [9]])).long()
    results = []
    for backend in ("torch", "cpp"):
        model.zero_grad()
        with kernel_backend(backend):
            logits = model(input_ids=tokens, attention_mask=mask).logits
            F.cross_entropy(logits[mask == 1], tokens[mask == 1]).backward()
        results.append((logits[mask == 1], {name: weight.grad for name, weight in model.named_parameters()}))
    assert calls == [40] * config.num_hidden_layers
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, calls):
    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    config = tiny_config(hidden_size=32, num_attention_heads=2, **no_dropout)
    model = NystromformerHFForMaskedLM(config).train()
    tokens = random_tokens(2, 40)

    def gradients():
        model.zero_grad()
        with kernel_backend("cpp"):
            model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    result = gradients()
    assert len(calls) == 3 * config.num_hidden_layers  # once, and twice with checkpoints
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"landmark_refinement_steps": 1},
        {"inverse_regularization": 0.1},
        {"num_landmarks": 40},
        {"hidden_size": 16},  # heads of 8
        {"attn_implementation": "eager"},
    ],
)
def test_what_the_kernel_cannot_do_is_torch_s(change, calls):
    model = NystromformerHFForMaskedLM(tiny_config(**{"hidden_size": 32, "num_attention_heads": 2} | change)).eval()
    tokens = random_tokens(1, 40)
    with kernel_backend("cpp"):
        chosen = model(input_ids=tokens).logits
    assert torch.equal(chosen, model(input_ids=tokens).logits) and not calls


def test_other_dtypes_short_rows_and_dropout_are_torch_s(calls):
    config = tiny_config(hidden_size=32, num_attention_heads=2, attention_probs_dropout_prob=0.5)
    model = NystromformerHFForMaskedLM(config)
    tokens = random_tokens(1, 40)
    with kernel_backend("cpp"):
        model.train()(input_ids=tokens)
        model.eval().bfloat16()(input_ids=tokens)
        short_row = torch.ones_like(tokens)
        short_row[:, config.num_landmarks :] = 0
        model.float()(input_ids=tokens, attention_mask=short_row)
    assert not calls


@pytest.mark.parametrize("backend, served", [("auto", True), ("cpp", True), ("torch", False)])
def test_who_serves(backend, served, calls):
    model = NystromformerHFForMaskedLM(tiny_config(hidden_size=32, num_attention_heads=2)).eval()
    with kernel_backend(backend):
        model(input_ids=random_tokens(1, 40))
    assert bool(calls) == served


def test_torch_compile_gets_the_torch_form(monkeypatch, calls):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with kernel_backend("cpp"):
        query = torch.randn(1, 1, 40, 16)
        found = backends.find_fused_attention(
            query, query, query, 8, None, None, dropout=0.0, refinement_steps=0, inverse_regularization=None
        )
    assert found is None
