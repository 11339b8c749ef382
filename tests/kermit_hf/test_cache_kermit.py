"""The cache: reading in pieces, taking back, transforming the batch, moving, refusing."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kermit_hf import KermitForCausalLM, KermitModel

from .tiny_models import (
    FULL,
    KERNEL,
    PURE_KERNEL,
    SETTINGS,
    SLIDING,
    place,
    positions_of,
    tiny_config,
    tiny_model,
    tokens,
)


# Whole and step by step round differently; logits are of order five.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

# Beyond every window, and beyond the borders of chunks of 64.
LENGTH = 150


def kernel_layers(cache) -> list:
    """The layers of a cache that are ours."""
    return [
        layer
        for layer in cache.layers
        if getattr(layer, "is_croppable", None) is not None and hasattr(layer, "tensors")
    ]


def cache_bytes(cache) -> int:
    return sum(tensor.untyped_storage().nbytes() for layer in kernel_layers(cache) for tensor in layer.tensors())


def new_cache(model, kind: str, capacity: int):
    """An empty cache, "static" or "dynamic"."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=capacity)
    return DynamicCache(config=model.config)


@torch.no_grad()
def feed(model, cache, input_ids, sizes, mask=None) -> torch.Tensor:
    """Logits of `input_ids` read in pieces of `sizes` into `cache`; `mask` covers them all."""
    logits, start = [], 0
    for piece, size in zip(input_ids.split(sizes, 1), sizes, strict=True):
        inputs = {}
        if mask is not None:
            inputs["attention_mask"] = mask[:, : start + size]
            inputs["position_ids"] = positions_of(mask)[:, start : start + size]
        logits.append(model(piece, past_key_values=cache, use_cache=True, **inputs).logits)
        start += size
    return torch.cat(logits, 1)


def random_sizes(total: int, largest: int) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, largest + 1, ())), total - sum(sizes)))
    return sizes


class TestPieces:
    """Whole = in chunks of any sizes = token by token."""

    SIZES = {
        "steps": [1] * LENGTH,
        "whole": [LENGTH],
        "whole_and_steps": [LENGTH - 5] + [1] * 5,
        "chunk_borders": [63, 1, 1, 63, 22],
        "around_the_window": [7, 1, 1, 9, 8, 16, 108],
        "small": [3] * 50,
    }

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_text(self, setting, sizes):
        model = tiny_model(setting)
        input_ids = tokens(2, LENGTH)
        with torch.no_grad():
            expected = model(input_ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        torch.testing.assert_close(feed(model, cache, input_ids, self.SIZES[sizes]), expected, **CLOSE)
        assert cache.get_seq_length() == LENGTH

    @pytest.mark.parametrize("largest", [1, 20])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_left_padded_batch(self, setting, largest):
        model = tiny_model(setting)
        rows = [tokens(length) for length in (70, 3, 41, 12, 1)]
        input_ids, mask = place(rows, "left")
        logits = feed(model, DynamicCache(config=model.config), input_ids, random_sizes(70, largest), mask)
        with torch.no_grad():
            for index, row in enumerate(rows):
                torch.testing.assert_close(logits[index, -len(row) :], model(row[None]).logits[0], **CLOSE)

    @pytest.mark.parametrize("largest", [1, 7, 100])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_batch_with_holes(self, setting, largest):
        """Padding anywhere, as where a chat goes on with answers of different lengths."""
        if SLIDING in tiny_config(setting).layer_types:
            pytest.skip("sliding attention counts padding inside the text as tokens, in transformers' own models too")
        model = tiny_model(setting)
        mask = torch.rand(4, 90).lt(torch.tensor([[0.9], [0.5], [0.2], [1.0]])).long()
        mask[:2, 30:50] = torch.tensor([[0], [1]])  # a long run of padding, late, in one row only
        input_ids = tokens(4, 90)
        logits = feed(model, DynamicCache(config=model.config), input_ids, random_sizes(90, largest), mask)
        assert torch.isfinite(logits).all()
        with torch.no_grad():
            for index in range(4):
                real = mask[index] == 1
                alone = model(input_ids[index, real][None]).logits[0]
                torch.testing.assert_close(logits[index, real], alone, **CLOSE)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_a_mask_of_the_new_tokens_alone(self, setting):
        if FULL in tiny_config(setting).layer_types:
            pytest.skip("softmax layers need the mask of all tokens")
        model = tiny_model(setting)
        input_ids = tokens(2, 30)
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[0, :12] = mask[1, 14:17] = 0
        expected = feed(model, DynamicCache(config=model.config), input_ids, [10, 10, 10], mask)
        cache = DynamicCache(config=model.config)
        for start in (0, 10, 20):
            piece = slice(start, start + 10)
            logits = model(input_ids[:, piece], attention_mask=mask[:, piece], past_key_values=cache).logits
            real = mask[:, piece] == 1
            torch.testing.assert_close(logits[real], expected[:, piece][real])

    @pytest.mark.parametrize("setting", PURE_KERNEL)
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_static_equals_dynamic(self, setting, implementation):
        model = tiny_model(setting, implementation=implementation)
        rows = [tokens(length) for length in (40, 17, 2)]
        input_ids, mask = place(rows, "left")
        for capacity in (41, 200):
            static = StaticCache(config=model.config, max_cache_len=capacity)
            dynamic = DynamicCache(config=model.config)
            sizes = [25, 1, 1, 3, 10]
            torch.testing.assert_close(
                feed(model, static, input_ids, sizes, mask)[mask == 1],
                feed(model, dynamic, input_ids, sizes, mask)[mask == 1],
                **CLOSE,
            )
            assert int(static.get_seq_length()) == dynamic.get_seq_length() == 40

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_a_static_cache_has_no_end(self, setting, implementation):
        """Its buffers hold the window, whatever length it was made for."""
        model, input_ids = tiny_model(setting, implementation=implementation), tokens(2, 40)
        static = StaticCache(config=model.config, max_cache_len=3)
        expected = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(feed(model, static, input_ids, [2, 1, 20, 1, 16]), expected, **CLOSE)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "hybrid"])
    def test_a_cache_made_without_config(self, setting):
        model, input_ids = tiny_model(setting), tokens(2, 30)
        cache = DynamicCache()
        expected = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(feed(model, cache, input_ids, [10, 1, 19]), expected, **CLOSE)
        assert cache.get_seq_length() == 30

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_pure"])
    def test_static_with_holes(self, setting):
        model = tiny_model(setting)
        input_ids, mask = tokens(3, 60), torch.rand(3, 60).lt(0.5).long()
        logits = feed(model, StaticCache(config=model.config, max_cache_len=60), input_ids, [20, 1, 19, 20], mask)
        with torch.no_grad():
            for index in range(3):
                real = mask[index] == 1
                alone = model(input_ids[index, real][None]).logits[0]
                torch.testing.assert_close(logits[index, real], alone, **CLOSE)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_favor"])
    def test_eager_reads_its_cache_too(self, setting):
        model = tiny_model(setting, implementation="eager")
        input_ids = tokens(2, 60)
        with torch.no_grad():
            whole = model(input_ids, output_attentions=True, use_cache=False)
            cache = DynamicCache(config=model.config)
            start = 0
            for size in (20, 1, 1, 38):
                piece = model(input_ids[:, start : start + size], past_key_values=cache, output_attentions=True)
                torch.testing.assert_close(piece.logits, whole.logits[:, start : start + size], **CLOSE)
                for ours, theirs in zip(piece.attentions, whole.attentions, strict=True):
                    assert ours.shape[-2:] == (size, start + size)
                    # Tokens inside the window keep their weight; older ones have become the memory.
                    window = max(model.config.window_size, 1) if model.config.window_size else 0
                    if window and size == 1:
                        recent = slice(start + 1 - window, start + 1)
                        torch.testing.assert_close(
                            ours[..., recent], theirs[:, :, start : start + 1, recent], atol=1e-4, rtol=1e-3
                        )
                start += size

    def test_gradients_flow_through_a_cache(self):
        model = tiny_model("delta")
        input_ids = tokens(1, 40)

        def gradient(sizes):
            model.zero_grad()
            cache = DynamicCache(config=model.config)
            logits = [model(piece, past_key_values=cache).logits for piece in input_ids.split(sizes, 1)]
            torch.cat(logits, 1).square().mean().backward()
            return [parameter.grad.clone() for parameter in model.parameters()]

        for pieces, whole in zip(gradient([13, 1, 26]), gradient([40]), strict=True):
            torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-3)


class TestTakingBack:
    """After `crop(-n)` everything continues as if the n tokens had never been."""

    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("before", [0, 3, 70])
    def test_repeatedly(self, setting, before):
        model = tiny_model(setting)
        text = tokens(1, before + 120)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        if before:
            feed(model, cache, text[:, :before], [before])
        cache.activate_past_recording()
        done = before
        # (tokens read, of which taken back): drafts of assisted generation, kept in part, wholly, or not at all.
        for read, back in [(5, 2), (1, 0), (6, 6), (9, 0), (12, 11), (1, 1), (20, 4), (3, 3), (40, 30), (2, 1)]:
            draft = text[:, done : done + read].clone()
            kept = read - back
            draft[:, kept:] = tokens(1, back)
            logits = feed(model, cache, draft, [read])
            torch.testing.assert_close(logits[:, :kept], expected[:, done : done + kept], **CLOSE)
            cache.crop(-back)
            done += kept
            assert cache.get_seq_length() == done
        rest = text[:, done : done + 30]
        torch.testing.assert_close(feed(model, cache, rest, [30]), expected[:, done : done + 30], **CLOSE)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_leaves_no_trace(self, setting):
        """Twins: one reads a draft and takes it back, the other never sees it; then bit by bit the same."""
        model = tiny_model(setting)
        cache = DynamicCache(config=model.config)
        feed(model, cache, tokens(2, 40), [40])
        cache.activate_past_recording()
        twin = copy.deepcopy(cache)
        for _ in range(3):
            feed(model, cache, tokens(2, 9), [4, 1, 4])
            cache.crop(-9)
            more = tokens(2, 4)
            torch.testing.assert_close(
                feed(model, cache, more, [4]), feed(model, twin, more, [4]), atol=1e-5, rtol=1e-5
            )
            cache.crop(0)
            twin.crop(0)

    @pytest.mark.parametrize("setting", ["delta", "additive"])
    def test_several_steps_between_two_crops(self, setting):
        model = tiny_model(setting)
        text = tokens(2, 80)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        feed(model, cache, text[:, :20], [20])
        cache.crop(0)
        feed(model, cache, torch.cat([text[:, 20:25], tokens(2, 25)], 1), [1] * 12 + [18])
        cache.crop(-25)
        torch.testing.assert_close(feed(model, cache, text[:, 25:], [55]), expected[:, 25:], **CLOSE)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_pure"])
    def test_in_a_padded_batch(self, setting):
        model = tiny_model(setting)
        rows = [tokens(50), tokens(21)]
        input_ids, mask = place(rows, "left")
        cache = DynamicCache(config=model.config)
        feed(model, cache, input_ids[:, :35], [35], mask[:, :35])
        cache.activate_past_recording()
        ones = torch.ones(2, 7, dtype=torch.long)
        for _ in range(2):
            model(tokens(2, 7), attention_mask=torch.cat([mask[:, :35], ones], 1), past_key_values=cache)
            cache.crop(-7)
        with torch.no_grad():
            logits = model(input_ids[:, 35:], attention_mask=mask, past_key_values=cache).logits
            for index, row in enumerate(rows):
                torch.testing.assert_close(logits[index], model(row[None]).logits[0, -15:], **CLOSE)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_pure"])
    def test_holes_while_recording(self, setting):
        model = tiny_model(setting)
        mask = torch.rand(3, 100).lt(0.6).long()
        mask[:, 70:] = 1
        input_ids = tokens(3, 100)
        cache = DynamicCache(config=model.config)
        feed(model, cache, input_ids[:, :40], [40], mask[:, :40])
        cache.activate_past_recording()
        start = 40
        for size in (10, 3, 17, 10, 20):
            piece = slice(start, start + size)
            position_ids = positions_of(mask)[:, piece]
            with torch.no_grad():
                logits = model(
                    input_ids[:, piece],
                    attention_mask=mask[:, : start + size],
                    position_ids=position_ids,
                    past_key_values=cache,
                ).logits
            if start >= 70:
                junk = torch.cat([mask[:, : start + size], torch.ones(3, 5, dtype=torch.long)], 1)
                model(tokens(3, 5), attention_mask=junk, past_key_values=cache)
                cache.crop(-5)
            for index in range(3):
                real = mask[index, : start + size] == 1
                alone = model(input_ids[index, : start + size][real][None]).logits[0]
                new = int(mask[index, piece].sum())
                torch.testing.assert_close(logits[index, mask[index, piece] == 1], alone[len(alone) - new :], **CLOSE)
            start += size

    def test_without_recording_while_everything_is_still_there(self):
        model = tiny_model("delta", conv_kernel_size=0)
        text = tokens(1, 20)
        cache = DynamicCache(config=model.config)
        feed(model, cache, text[:, :6], [6])
        cache.crop(-4)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits[:, 2:]
        torch.testing.assert_close(feed(model, cache, text[:, 2:], [18]), expected, **CLOSE)

    def test_what_cannot_be_taken_back(self):
        model = tiny_model("delta")
        cache = DynamicCache(config=model.config)
        cache.crop(0)
        cache.crop(-3)  # an empty cache has nothing to remove
        feed(model, cache, tokens(1, 30), [30])
        with pytest.raises(RuntimeError, match=r"crop\(-3\).*activate_past_recording"):
            cache.crop(-3)
        with pytest.raises(ValueError, match=r"crop\(5\).*negative"):
            cache.crop(5)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 5), [5])
        with pytest.raises(RuntimeError, match=r"crop\(-6\).*last 5 tokens"):
            cache.crop(-6)
        cache.crop(-2)
        with pytest.raises(RuntimeError, match=r"crop\(-1\).*last 0 tokens"):
            cache.crop(-1)  # the first crop has confirmed the others

    def test_padding_cannot_be_taken_back(self):
        model = tiny_model("delta")
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
        feed(model, cache, tokens(2, 5), [5], mask)
        with pytest.raises(RuntimeError, match=r"crop\(-3\).*last 2 tokens.*padding"):
            cache.crop(-3)
        cache.crop(-2)

    def test_a_static_cache_refuses(self):
        model = tiny_model("delta")
        cache = StaticCache(config=model.config, max_cache_len=30)
        with pytest.raises(ValueError, match="static"):
            cache.layers[0].activate_past_recording()
        model(tokens(1, 5), past_key_values=cache)
        with pytest.raises(RuntimeError, match="static"):
            cache.layers[0].crop(-1)
        cache.layers[0].crop(0)

    @pytest.mark.parametrize("setting", ["delta", "additive"])
    def test_recorded_tokens_are_dropped_once_confirmed(self, setting):
        model = tiny_model(setting)
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        feed(model, cache, tokens(1, 40), [40])
        sizes = []
        for _ in range(12):
            feed(model, cache, tokens(1, 5), [5])
            cache.crop(-2)
            sizes.append(cache_bytes(cache))
        assert len(set(sizes[2:])) == 1


class TestTransforms:
    """What beam search and its like do to a batch must reach every tensor."""

    TRANSFORMS = {
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 1])), [1, 2, 1]),
    }

    @pytest.mark.parametrize("recording", [False, True])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("transform", TRANSFORMS)
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_continues_with_the_chosen_rows(self, setting, transform, padded, recording):
        model = tiny_model(setting)
        rows = [tokens(length) for length in ((40, 15, 3) if padded else (40, 40, 40))]
        input_ids, mask = place(rows, "left")
        cache = DynamicCache(config=model.config)
        if recording:
            cache.activate_past_recording()
        feed(model, cache, input_ids, [30, 10], mask)
        apply, chosen = self.TRANSFORMS[transform]
        apply(cache)
        more = tokens(len(chosen), 12)
        full_mask = torch.cat([mask[chosen], torch.ones_like(more)], 1)
        position_ids = positions_of(full_mask)[:, 40:]
        with torch.no_grad():
            logits = model(more, attention_mask=full_mask, position_ids=position_ids, past_key_values=cache).logits
            for index, source in enumerate(chosen):
                whole = torch.cat([rows[source], more[index]])
                torch.testing.assert_close(logits[index], model(whole[None]).logits[0, -12:], **CLOSE)

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_every_tensor_is_transformed(self, setting, static):
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (20, 15, 3)], "left")
        cache = new_cache(model, "static" if static else "dynamic", 40)
        feed(model, cache, input_ids, [20], mask)
        for apply, chosen in self.TRANSFORMS.values():
            for layer in copy.deepcopy(cache).layers:
                before = [tensor.clone() for tensor in layer.tensors()]
                assert all(len(tensor) == 3 for tensor in before)
                apply_to = DynamicCache()
                apply_to.layers = [layer]
                apply(apply_to)
                for old, new in zip(before, layer.tensors(), strict=True):
                    assert torch.equal(new, old[chosen])

    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_no_tensor_is_forgotten(self, setting):
        """`tensors()` really names every tensor that hangs on a layer."""
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (20, 15, 3)], "left")
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        feed(model, cache, input_ids, [20], mask)

        def found(value):
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, dict):
                yield from found(list(value.values()))
            elif isinstance(value, (list, tuple)):
                for entry in value:
                    yield from found(entry)

        for layer in cache.layers:
            named = {id(tensor) for tensor in layer.tensors()}
            assert {id(tensor) for tensor in found(vars(layer))} == named
            assert layer.past is None

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_pure"])
    def test_reset(self, setting, kind):
        model = tiny_model(setting)
        cache = new_cache(model, kind, 60)
        input_ids, mask = place([tokens(length) for length in (40, 7)], "left")
        feed(model, cache, input_ids, [30, 10], mask)
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        text = tokens(2, 30)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits
        torch.testing.assert_close(feed(model, cache, text, [20, 1, 9]), expected, **CLOSE)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_favor"])
    def test_a_deep_copy_goes_its_own_way(self, setting):
        model = tiny_model(setting)
        text = tokens(1, 60)
        cache = DynamicCache(config=model.config)
        feed(model, cache, text[:, :30], [30])
        twin = copy.deepcopy(cache)
        feed(model, cache, tokens(1, 10), [1] * 10)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits[:, 30:]
        torch.testing.assert_close(feed(model, twin, text[:, 30:], [30]), expected, **CLOSE)


class TestOffloading:
    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_offload_and_prefetch_around_every_step(self, setting):
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (40, 17)], "left")
        expected = feed(model, DynamicCache(config=model.config), input_ids, [30] + [1] * 10, mask)
        cache = DynamicCache(config=model.config)
        start = 0
        for size in [30] + [1] * 10:
            for layer in cache.layers:
                layer.prefetch()
            with torch.no_grad():
                logits = model(
                    input_ids[:, start : start + size], attention_mask=mask[:, : start + size], past_key_values=cache
                ).logits
            real = mask[:, start : start + size] == 1
            torch.testing.assert_close(logits[real], expected[:, start : start + size][real])
            for layer in cache.layers:
                layer.offload()
            start += size

    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_every_tensor_is_moved(self, setting):
        """On the meta device, which a CPU-only machine has as a second one."""
        model = tiny_model(setting)
        input_ids, mask = place([tokens(length) for length in (20, 9)], "left")
        cache = DynamicCache(config=model.config)
        feed(model, cache, input_ids, [20], mask)
        for layer in cache.layers:
            layer.offload()
            assert {tensor.device.type for tensor in layer.tensors()} == {"cpu"}
            layer.device = torch.device("meta")
            layer.prefetch()
            assert {tensor.device.type for tensor in layer.tensors()} == {"meta"}

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive"])
    def test_the_offloaded_cache_of_transformers(self, setting, monkeypatch):
        class Stream:
            def wait_stream(self, other):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
        model = tiny_model(setting)
        prompt = tokens(1, 20)
        offloaded = DynamicCache(config=model.config, offloading=True)
        assert torch.equal(
            model.generate(prompt, past_key_values=offloaded, max_new_tokens=15, do_sample=False),
            model.generate(prompt, max_new_tokens=15, do_sample=False),
        )


def filled_by_another_model() -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), layer)
    return cache


class TestRefusals:
    """The cache of another model or batch size: `ValueError`, and the cache of this model still works after it."""

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "additive_pure"])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_another_batch_size(self, setting, batch, kind):
        model = tiny_model(setting)
        cache = new_cache(model, kind, 30)
        feed(model, cache, tokens(2, 10), [10])
        with pytest.raises(ValueError, match=r"past_key_values.*2, .*pass the cache of this model"):
            feed(model, cache, tokens(batch, 1), [1])

    @pytest.mark.parametrize("recorded", [3, 30])
    @pytest.mark.parametrize(
        ("setting", "other"),
        [
            ("delta", {"window_size": 16}),
            ("delta", {"num_sink_tokens": 3}),
            ("delta", {"num_key_value_heads": 4}),
            ("delta", {"head_dim": 16}),
            ("delta", {"forget_gate": False}),
            ("delta", {"conv_kernel_size": 3}),
            ("delta", {"conv_kernel_size": 0}),
            ("delta", {"window_size": 0, "num_sink_tokens": 0}),
            ("delta", {"update_rule": "additive", "feature_map": None}),
            ("delta", {"num_hidden_layers": 3}),
            ("delta", {"num_hidden_layers": 1}),
            ("additive_pure", {"conv_kernel_size": 4}),
            ("additive_pure", {"num_hidden_layers": 3}),
            ("additive_favor", {"update_rule": "delta"}),
            ("hybrid", {"layer_types": [FULL, KERNEL, SLIDING]}),
        ],
    )
    def test_another_model(self, setting, other, recorded):
        cache = DynamicCache(config=tiny_config(setting, **other))
        feed(tiny_model(setting, **other), cache, tokens(1, recorded), [recorded])
        with pytest.raises(ValueError, match="past_key_values"):
            feed(tiny_model(setting), cache, tokens(1, 2), [2])

    @pytest.mark.parametrize("feature_dim", [8, 24])
    def test_another_feature_size(self, feature_dim):
        cache = DynamicCache(config=tiny_config("additive_favor"))
        feed(tiny_model("additive_favor"), cache, tokens(1, 30), [30])
        with pytest.raises(ValueError, match=r"past_key_values.*feature_dim=None"):
            feed(tiny_model("additive_favor", feature_dim=feature_dim), cache, tokens(1, 2), [2])

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "hybrid"])
    def test_a_cache_that_is_not_ours(self, setting):
        model = tiny_model(setting)
        foreign = [
            filled_by_another_model(),
            DynamicCache(config=tiny_config(setting, layer_types=[FULL] * model.config.num_hidden_layers)),
        ]
        for cache in foreign:
            with pytest.raises(ValueError, match=r"past_key_values.*DynamicCache\(config=model.config\)"):
                model(tokens(1, 5), past_key_values=cache)

    def test_a_refused_batch_leaves_the_cache_as_it_was(self):
        model = tiny_model("delta")
        text = tokens(2, 30)
        cache = DynamicCache(config=model.config)
        feed(model, cache, text[:, :20], [20])
        with pytest.raises(ValueError):
            feed(model, cache, tokens(3, 1), [1])
        with torch.no_grad():
            expected = model(text, use_cache=False).logits[:, 20:]
        torch.testing.assert_close(feed(model, cache, text[:, 20:], [10]), expected, **CLOSE)


class TestSize:
    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_bytes_stay_constant(self, setting):
        if setting == "delta_longer_than_text":
            pytest.skip("its window is never full here")
        model = tiny_model(setting, head=KermitModel)
        cache = DynamicCache(config=model.config)
        sizes = []
        with torch.no_grad():
            for size in (20, 1, 1, 64, 1, 100, 7, 1):
                model(tokens(2, size), past_key_values=cache, use_cache=True)
                sizes.append(cache_bytes(cache))
        assert len(set(sizes)) == 1

    def test_no_more_than_the_config_says(self):
        model = tiny_model("delta")
        cache = DynamicCache(config=model.config)
        feed(model, cache, tokens(1, 500), [500])
        config = model.config
        tokens_kept = 2 * (config.window_size + config.num_sink_tokens) * config.head_dim
        memory = config.head_dim * config.head_dim
        gates = 2 * config.window_size
        conv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim * 3
        per_layer = config.num_key_value_heads * (tokens_kept + memory + gates) + conv
        assert cache_bytes(cache) == 4 * per_layer * config.num_hidden_layers

    def test_bfloat16_keeps_its_sums_in_float32(self):
        model = tiny_model("additive").to(torch.bfloat16)
        cache = DynamicCache(config=model.config)
        feed(model, cache, tokens(1, 50), [50])
        layer = cache.layers[0]
        assert layer.keys.dtype == layer.sink_keys.dtype == layer.conv_tail.dtype == torch.bfloat16
        assert layer.memory.matrix.dtype == layer.memory.normalizer.dtype == torch.float32

    def test_a_model_in_training_keeps_no_graph_it_was_not_asked_for(self):
        model = tiny_model("delta", head=KermitForCausalLM).train()
        output = model(tokens(1, 30), use_cache=False, labels=tokens(1, 30))
        assert output.past_key_values is None


def test_autocast_may_begin_and_end_while_a_cache_is_in_use():
    """The cache keeps its precision, and texts inside the window, tokens one by one and longer chunks all go on."""
    model = tiny_model("delta", window_size=64)
    input_ids = tokens(1, 40)
    expected = model(input_ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    outputs = [model(input_ids[:, :10], past_key_values=cache).logits]
    dtype = cache.layers[0].keys.dtype
    with torch.autocast("cpu", torch.bfloat16):
        outputs += [model(piece, past_key_values=cache).logits for piece in input_ids[:, 10:].split([1, 9, 1, 19], 1)]
    assert cache.layers[0].keys.dtype == dtype
    error = (torch.cat([output.float() for output in outputs], 1) - expected).norm() / expected.norm()
    assert error < 5e-2  # bfloat16 has eight bits


def test_a_cache_that_records_but_is_never_cropped_stays_bounded(monkeypatch):
    """Assisted generation leaves a cache recording; plain generation that goes on with it must not fill the memory."""
    monkeypatch.setattr("kermit_hf.cache_kermit.MAX_ROLLBACK", 20)
    model = tiny_model("delta")
    input_ids = tokens(1, 150)
    expected = model(input_ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        output = feed(model, cache, input_ids, [30] + [1] * 120)
    torch.testing.assert_close(output, expected, **CLOSE)
    layer = cache.layers[0]
    assert layer.keys.shape[2] <= model.config.window_size + 20 + 1
    assert layer.conv_tail.shape[2] <= model.config.conv_kernel_size - 1 + 20
    cache.crop(-20)
    with pytest.raises(RuntimeError, match="taken back"):
        cache.crop(-1)
