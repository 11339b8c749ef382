"""Very long generation: constant memory, no NaN, no drift."""

import copy

import pytest
import torch
from transformers import DynamicCache

from .tiny_models import tiny_model, tokens


# Both rules, with and without forgetting: without it the additive sums grow with the text.
SETTINGS = {
    "delta": {"window_size": 16, "num_sink_tokens": 2},
    "delta_never_forgets": {"window_size": 16, "feature_map": "elu", "forget_gate": False},
    "additive": {"window_size": 16, "num_sink_tokens": 2, "update_rule": "additive"},
    "additive_never_forgets": {"window_size": 16, "update_rule": "additive", "forget_gate": False},
}

# How many tokens at the end of the text are compared.
TAIL = 50

CASES = [
    ("delta", torch.bfloat16, 5_000),
    ("additive_never_forgets", torch.float32, 5_000),
    *(
        pytest.param(setting, dtype, 100_000, marks=pytest.mark.slow)
        for setting in SETTINGS
        for dtype in (torch.float32, torch.bfloat16)
    ),
]


def cache_bytes(cache) -> int:
    """Storage, not only what is visible of it: a slice of something long would show."""
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in layer.tensors())


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()


class Watch:
    """A stopping criterion that stops nothing, but looks at the cache while `generate` runs."""

    def __init__(self, cache: DynamicCache, length: int):
        self.cache, self.length = cache, length
        self.sizes, self.before_tail = set(), None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        read = self.cache.get_seq_length()
        if read > 40 and read % 97 == 0:
            self.sizes.add(cache_bytes(self.cache))
        if read == self.length - TAIL:
            self.before_tail = copy.deepcopy(self.cache)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(("setting", "dtype", "length"), CASES)
def test_generation_neither_grows_nor_drifts(setting, dtype, length):
    body = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model(SETTINGS[setting], **body)
    # Both sides of every comparison see the same rounded weights: only the arithmetic differs.
    model.to(dtype)
    cache = DynamicCache(config=model.config)
    watch = Watch(cache, length)
    prompt = tokens(1, 4)
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_length=length,
        do_sample=True,
        top_k=0,
        stopping_criteria=[watch],
    )
    assert text.shape == (1, length) and cache.get_seq_length() == length - 1
    assert len(watch.sizes) == 1
    assert all(torch.isfinite(tensor).all() for layer in cache.layers for tensor in layer.tensors())

    tail = text[:, length - TAIL :]
    with torch.no_grad():
        # Token by token, from the window and the memory at the end ...
        stepped_cache = copy.deepcopy(watch.before_tail)
        stepped = torch.cat([model(token, past_key_values=stepped_cache).logits for token in tail.split(1, 1)], 1)
        # ... all at once from there, and from the very first token.
        chunked = model(tail, past_key_values=watch.before_tail).logits
        whole = model(text, use_cache=False, logits_to_keep=TAIL).logits
        exact = model.float()(text, use_cache=False, logits_to_keep=TAIL).logits
    assert torch.isfinite(stepped).all()
    # A rounding error of the memory is forgotten, or overwritten, or small beside the sums: it does not pile up.
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    assert relative_error(chunked, stepped) < tolerance
    assert relative_error(stepped, whole) < tolerance
    assert relative_error(stepped, exact) < tolerance
