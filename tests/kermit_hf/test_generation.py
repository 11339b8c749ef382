"""Stock `generate()`, unmodified, in every way that people call it."""

import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CompileConfig,
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)

from kermit_hf import KermitForCausalLM, KermitForSequenceClassification

from .tiny_models import PAD, PURE_KERNEL, SETTINGS, place, shake, tiny_model, tokens


PROMPT, NEW = 11, 25


def generate(model, input_ids, **options):
    # Without a mask `generate` takes pad tokens that the model itself has written for padding.
    if input_ids is not None:
        options.setdefault("attention_mask", torch.ones_like(input_ids))
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options}
    return model.generate(input_ids, **options)


@torch.no_grad()
def recomputed_greedy(model, input_ids, count=NEW):
    """The greedy text, every token from a whole forward without a cache."""
    for _ in range(count):
        logits = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], 1)
    return input_ids


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer of 280 tokens, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<pad>", "<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["fellow citizens of the senate and of the house of representatives"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


@pytest.fixture(scope="module")
def text_model(tokenizer):
    return tiny_model("delta", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)


class TestDecoding:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_greedy_is_the_argmax_of_a_whole_forward(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        assert torch.equal(generate(model, prompt), recomputed_greedy(model, prompt))

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_scores_are_those_of_a_whole_forward(self, setting):
        model = tiny_model(setting)
        output = generate(model, tokens(2, PROMPT), output_logits=True, return_dict_in_generate=True)
        with torch.no_grad():
            logits = model(output.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_sampling_with_a_seed(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)

        def sample(seed, **options):
            torch.manual_seed(seed)
            return generate(model, prompt, do_sample=True, temperature=1.5, top_k=0, **options)

        assert torch.equal(sample(1), sample(1))
        assert torch.equal(sample(1), sample(1, use_cache=False))
        assert not torch.equal(sample(1), sample(2))

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_beams(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        options = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
        cached = generate(model, prompt, **options)
        whole = generate(model, prompt, use_cache=False, **options)
        assert torch.equal(cached.sequences, whole.sequences)
        torch.testing.assert_close(cached.sequences_scores, whole.sequences_scores, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("setting", ["delta", "additive"])
    def test_beams_over_a_padded_batch(self, setting):
        model = tiny_model(setting)
        rows = [tokens(14), tokens(3), tokens(9)]
        input_ids, mask = place(rows, "left")
        output = generate(model, input_ids, attention_mask=mask, num_beams=3)
        for index, row in enumerate(rows):
            assert torch.equal(output[index, 14:], generate(model, row[None], num_beams=3)[0, len(row) :])

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_num_return_sequences(self, setting):
        model = tiny_model(setting)
        options = {"do_sample": True, "num_return_sequences": 3, "output_logits": True, "return_dict_in_generate": True}
        output = generate(model, tokens(2, PROMPT), **options)
        assert output.sequences.shape == (6, PROMPT + NEW)
        assert len({tuple(row.tolist()) for row in output.sequences}) == 6
        with torch.no_grad():
            logits = model(output.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_rows_of_a_left_padded_batch_equal_single_rows(self, setting):
        model = tiny_model(setting)
        rows = [tokens(14), tokens(1), tokens(9), tokens(5)]
        input_ids, mask = place(rows, "left")
        expected = [generate(model, row[None])[0, len(row) :] for row in rows]
        for cache in (None, "static"):
            options = {"cache_implementation": cache, "disable_compile": True}
            output = generate(model, input_ids, attention_mask=mask, **options)
            for index, row in enumerate(expected):
                assert torch.equal(output[index, 14:], row), cache

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid"])
    def test_prompt_in_chunks(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, 37)
        assert torch.equal(generate(model, prompt, prefill_chunk_size=10), generate(model, prompt))

    @pytest.mark.parametrize("setting", ["delta", "hybrid"])
    def test_from_embeddings(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        embeddings = model.get_input_embeddings()(prompt)
        assert torch.equal(generate(model, None, inputs_embeds=embeddings), generate(model, prompt)[:, PROMPT:])

    def test_lengths_and_the_end_of_text(self):
        model = tiny_model("delta")
        prompt = tokens(2, PROMPT)
        text = generate(model, prompt)
        assert generate(model, prompt, max_new_tokens=None, max_length=PROMPT + 4).shape == (2, PROMPT + 4)
        end = int(text[0, PROMPT + 5])
        stopped = generate(model, prompt, eos_token_id=end)
        first = text[0, PROMPT:].tolist().index(end)
        assert torch.equal(stopped[0, : PROMPT + first + 1], text[0, : PROMPT + first + 1])
        assert (stopped[0, PROMPT + first + 1 :] == PAD).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("setting", ["delta", "additive", "hybrid"])
    def test_half_precision(self, setting, dtype):
        model = tiny_model(setting).to(dtype)
        output = generate(model, tokens(2, PROMPT), output_logits=True, return_dict_in_generate=True)
        assert all(torch.isfinite(logits).all() for logits in output.logits)

    @pytest.mark.parametrize("setting", ["delta", "additive"])
    def test_a_model_longer_than_its_trained_positions(self, setting):
        # Kernel layers never see a position beyond their window.
        model = tiny_model(setting, max_position_embeddings=16)
        prompt = tokens(1, 30)
        assert torch.equal(generate(model, prompt), recomputed_greedy(model, prompt))


class TestStreaming:
    def test_text_iterator_streamer(self, text_model, tokenizer):
        inputs = tokenizer("of the senate", return_tensors="pt", return_token_type_ids=False)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {**inputs, "max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=text_model.generate, kwargs=options)
        thread.start()
        pieces = list(streamer)
        thread.join()
        output = generate(text_model, **inputs)[0, inputs["input_ids"].shape[1] :]
        assert "".join(pieces) == tokenizer.decode(output)
        assert len(pieces) > 5

    def test_stop_strings(self, text_model, tokenizer):
        inputs = tokenizer("of the senate", return_tensors="pt", return_token_type_ids=False)
        new = generate(text_model, **inputs)[0, inputs["input_ids"].shape[1] :]
        stop = next(text for text in map(tokenizer.decode, new[4:]) if text.isascii() and text.strip())
        output = generate(text_model, **inputs, stop_strings=[stop], tokenizer=tokenizer)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        assert stop in text and output.shape[1] < inputs["input_ids"].shape[1] + NEW


class TestContinuedCache:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_two_turns(self, setting):
        model = tiny_model(setting)
        cache = DynamicCache(config=model.config)
        first = generate(model, tokens(1, PROMPT), past_key_values=cache)
        conversation = torch.cat([first, tokens(1, 6)], 1)
        second = generate(model, conversation, past_key_values=cache)
        assert torch.equal(second, recomputed_greedy(model, conversation))

    @pytest.mark.parametrize("setting", PURE_KERNEL)
    def test_a_batch_with_answers_of_different_lengths(self, setting):
        model = tiny_model(setting)
        rows = [tokens(PROMPT), tokens(4), tokens(7)]
        input_ids, mask = place(rows, "left")
        cache = DynamicCache(config=model.config)
        # Padding goes behind an answer that ended early, then in front of a short question.
        first = generate(model, input_ids, attention_mask=mask, past_key_values=cache)
        answers = torch.ones(3, NEW, dtype=torch.long)
        answers[1, 9:] = answers[2, 2:] = 0
        questions, question_mask = place([tokens(2), tokens(8), tokens(5)], "left")
        conversation = torch.cat([first, questions], 1)
        mask = torch.cat([mask, answers, question_mask], 1)
        # The cache holds all but the last answer token: what padding hides of the others has been read as real text.
        cache = DynamicCache(config=model.config)
        length = first.shape[1] - 1
        with torch.no_grad():
            model(first[:, :length], attention_mask=mask[:, :length], past_key_values=cache)
        second = generate(model, conversation, attention_mask=mask, past_key_values=cache)
        for index in range(3):
            alone = conversation[index, mask[index] == 1][None]
            assert torch.equal(second[index, -NEW:], recomputed_greedy(model, alone)[0, -NEW:])

    def test_a_prompt_shared_by_many(self):
        model = tiny_model("delta")
        prefix = tokens(1, 40)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        cache.batch_repeat_interleave(3)
        prompts = torch.cat([prefix.expand(3, -1), tokens(3, 5)], 1)
        assert torch.equal(generate(model, prompts, past_key_values=cache), recomputed_greedy(model, prompts))

    def test_the_cache_of_another_batch_size(self):
        model = tiny_model("delta")
        cache = DynamicCache(config=model.config)
        generate(model, tokens(2, PROMPT), past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values"):
            generate(model, tokens(3, PROMPT + NEW), past_key_values=cache)


class TestStaticCache:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_eager(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        output = generate(model, prompt, cache_implementation="static", disable_compile=True)
        assert torch.equal(output, recomputed_greedy(model, prompt))

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive"])
    def test_twice_in_one_cache(self, setting):
        model = tiny_model(setting)
        cache = StaticCache(config=model.config, max_cache_len=100)
        first = generate(model, tokens(1, PROMPT), past_key_values=cache, disable_compile=True)
        conversation = torch.cat([first, tokens(1, 6)], 1)
        second = generate(model, conversation, past_key_values=cache, disable_compile=True)
        assert torch.equal(second, recomputed_greedy(model, conversation))

    @pytest.mark.parametrize("setting", ["delta", "additive"])
    def test_beams(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        static = generate(model, prompt, cache_implementation="static", num_beams=3, disable_compile=True)
        assert torch.equal(static, generate(model, prompt, num_beams=3))

    def test_a_compiled_step_is_compiled_once(self):
        """`torch.compile(fullgraph=True)` as `generate` does on accelerators: one graph for all tokens."""
        model = tiny_model("delta")
        rows = [tokens(14), tokens(6)]
        input_ids, mask = place(rows, "left")
        expected = generate(model, input_ids, attention_mask=mask)

        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        cache = StaticCache(config=model.config, max_cache_len=14 + NEW)
        counts = []
        with torch.no_grad():
            logits = model(input_ids, attention_mask=mask, past_key_values=cache).logits[:, -1:]
            for index in range(NEW):
                token = logits.argmax(-1)
                assert torch.equal(token[:, 0], expected[:, 14 + index])
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                inputs = model.prepare_inputs_for_generation(
                    torch.cat([input_ids, token], 1),
                    next_sequence_length=1,
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                )
                assert isinstance(inputs["attention_mask"], dict)
                logits = step(**inputs).logits
                input_ids = torch.cat([input_ids, token], 1)
                counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert counts[-1] == counts[1], counts
        assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0

    @pytest.mark.parametrize("setting", ["additive", "hybrid"])
    def test_generate_compiles_by_itself(self, setting):
        """A step for all tokens of padded batches that fill caches of one size."""
        model = tiny_model(setting)
        compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
        compile_config._compile_all_devices = True  # on a CPU, for tests
        torch._dynamo.reset()
        counters, graphs = torch._dynamo.utils.counters, []
        counters.clear()
        for lengths in ((14, 6), (9, 14)):
            input_ids, mask = place([tokens(length) for length in lengths], "left")
            options = {"cache_implementation": "static", "compile_config": compile_config}
            output = generate(model, input_ids, attention_mask=mask, **options)
            assert torch.equal(output, generate(model, input_ids, attention_mask=mask))
            graphs.append(counters["stats"]["unique_graphs"])
        # A sliding layer's step is compiled again for its second token, and then no more.
        assert graphs == ([2, 2] if setting == "hybrid" else [1, 1])
        assert sum(counters["graph_break"].values()) == 0


class TestAssistedGeneration:
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_prompt_lookup_gives_the_greedy_text(self, setting):
        model = tiny_model(setting)
        prompt = tokens(1, 6).repeat(1, 4)
        expected = generate(model, prompt, max_new_tokens=40)
        assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=4, max_new_tokens=40), expected)
        model.set_attn_implementation("eager")
        assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=4, max_new_tokens=40), expected)

    @pytest.mark.parametrize(
        ("setting", "close"), [*((name, True) for name in SETTINGS), ("delta", False), ("hybrid", False)]
    )
    def test_an_assistant_gives_the_greedy_text(self, setting, close):
        model = tiny_model(setting)
        assistant = tiny_model(setting)
        if close:  # agrees now and then; the other one hardly ever
            with torch.no_grad():
                for parameter in assistant.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        else:
            shake(assistant)
        prompt = tokens(1, PROMPT)
        # transformers takes a pad token that the model itself wrote for padding of the assistant's, which is not taken back.
        options = {"max_new_tokens": 40, "suppress_tokens": [PAD]}
        expected = generate(model, prompt, **options)
        assert torch.equal(generate(model, prompt, assistant_model=assistant, **options), expected)

    @pytest.mark.parametrize("setting", ["delta", "delta_pure", "additive", "hybrid", "hybrid_softmax_first"])
    def test_early_exit_gives_the_greedy_text(self, setting):
        """The model's own first layers as assistant."""
        model, prompt = tiny_model(setting), tokens(1, PROMPT)
        options = {"max_new_tokens": 40, "suppress_tokens": [PAD]}
        expected = generate(model, prompt, **options)
        assert torch.equal(generate(model, prompt, assistant_early_exit=1, **options), expected)

    @pytest.mark.parametrize("setting", ["delta", "additive"])
    def test_assisted_sampling_runs(self, setting):
        model, assistant = tiny_model(setting), tiny_model(setting)
        output = generate(model, tokens(1, PROMPT), assistant_model=assistant, do_sample=True)
        assert output.shape == (1, PROMPT + NEW)


class TestPipelines:
    def test_text_generation(self, text_model, tokenizer):
        generator = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
        options = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
        prompts = ["fellow citizens", "of the house of representatives and"]
        # A text alone, and in a batch that pads it.
        single = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
        batch = [result[0]["generated_text"] for result in generator(prompts, batch_size=2, **options)]
        assert batch == single

    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_text_classification(self, tokenizer, side, is_causal):
        model = tiny_model(
            "delta",
            head=KermitForSequenceClassification,
            vocab_size=len(tokenizer),
            pad_token_id=0,
            is_causal=is_causal,
        )
        tokenizer.padding_side = side
        classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
        texts = ["fellow citizens", "of the house of representatives and of the senate"]
        single = [classifier(text)[0] for text in texts]
        batch = classifier(texts, batch_size=2)
        tokenizer.padding_side = "left"
        for one, other in zip(single, batch, strict=True):
            assert one["label"] == other["label"]
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)

    def test_saved_and_loaded(self, text_model, tokenizer, tmp_path):
        text_model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        generator = pipeline("text-generation", model=str(tmp_path))
        assert type(generator.model) is KermitForCausalLM
        options = {"max_new_tokens": 10, "do_sample": False}
        again = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
        assert generator("of the", **options) == again("of the", **options)
