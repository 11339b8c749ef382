"""Stock `generate()` and the pipelines, unmodified, with the decoder: pooled landmarks and a learned γ."""

import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CompileConfig,
    DynamicCache,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from nystromformer_hf import (
    NystromformerHFDecoderForCausalLM,
    NystromformerHFDecoderForSequenceClassification,
    NystromformerHFDecoderModel,
)

from .decoder_models import PAD, SETTINGS, place, shake, tiny_model, tokens


# Whole and step by step round differently; logits are of order five.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
BOTH = ["pooled", "regularized_conv"]
PROMPT, NEW = 11, 25


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
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


@pytest.fixture(params=BOTH)
def text_model(request, tokenizer) -> NystromformerHFDecoderForCausalLM:
    return tiny_model(request.param, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)


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


class TestGenerate:
    """Stock `generate()`, unmodified."""

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_greedy_with_either_cache_is_the_argmax_of_a_whole_forward(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        expected = recomputed_greedy(model, prompt)
        assert torch.equal(generate(model, prompt), expected)
        assert torch.equal(generate(model, prompt, cache_implementation="static", disable_compile=True), expected)
        assert torch.equal(generate(model, prompt, prefill_chunk_size=4), expected)
        assert torch.equal(generate(model, prompt, past_key_values=DynamicCache()), expected)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_beams(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        options = {"num_beams": 4, "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True}
        cached = generate(model, prompt, **options)
        whole = generate(model, prompt, use_cache=False, **options)
        assert torch.equal(cached.sequences, whole.sequences)
        torch.testing.assert_close(cached.sequences_scores, whole.sequences_scores, **CLOSE)

    @pytest.mark.parametrize("beams", [1, 3])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_rows_of_a_left_padded_batch_equal_single_rows(self, setting, beams):
        model = tiny_model(setting)
        rows = [tokens(14), tokens(1), tokens(9), tokens(5)]
        input_ids, mask = place(rows, "left")
        expected = [generate(model, row[None], num_beams=beams)[0, len(row) :] for row in rows]
        for cache in (None, "static"):
            options = {"cache_implementation": cache, "disable_compile": True, "num_beams": beams}
            output = generate(model, input_ids, attention_mask=mask, **options)
            for index, row in enumerate(expected):
                assert torch.equal(output[index, 14:], row), cache

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_prompt_lookup_gives_the_greedy_text(self, setting):
        model = tiny_model(setting)
        prompt = tokens(1, 6).repeat(1, 4)
        expected = generate(model, prompt, max_new_tokens=40)
        assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=4, max_new_tokens=40), expected)

    @pytest.mark.parametrize("close", [True, False])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_an_assistant_gives_the_greedy_text(self, setting, close):
        model, assistant = tiny_model(setting), tiny_model(setting)
        if close:  # agrees now and then; the other one hardly ever
            with torch.no_grad():
                for parameter in assistant.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        else:
            shake(assistant)
        prompt = tokens(1, PROMPT)
        expected = generate(model, prompt, max_new_tokens=40)
        assert torch.equal(generate(model, prompt, assistant_model=assistant, max_new_tokens=40), expected)

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_its_own_first_layer_as_the_assistant_gives_the_greedy_text(self, setting):
        model = tiny_model(setting)
        prompt = tokens(1, PROMPT)
        expected = generate(model, prompt, max_new_tokens=40)
        assert torch.equal(generate(model, prompt, assistant_early_exit=1, max_new_tokens=40), expected)
        assert torch.equal(generate(model, prompt, max_new_tokens=40), expected)

    @pytest.mark.parametrize("setting", BOTH)
    def test_sampling_with_a_seed(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)

        def sample(seed, **options):
            torch.manual_seed(seed)
            return generate(model, prompt, do_sample=True, temperature=1.5, top_k=0, **options)

        assert torch.equal(sample(1), sample(1, use_cache=False))
        assert not torch.equal(sample(1), sample(2))

    @pytest.mark.parametrize("setting", BOTH)
    def test_num_return_sequences(self, setting):
        """Each sample continues its own text: the logits are those of a whole forward over what was written."""
        model = tiny_model(setting)
        options = {"do_sample": True, "num_return_sequences": 3, "output_logits": True, "return_dict_in_generate": True}
        output = generate(model, tokens(2, PROMPT), **options)
        assert len({tuple(row.tolist()) for row in output.sequences}) == 6
        with torch.no_grad():
            logits = model(output.sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
        torch.testing.assert_close(torch.stack(output.logits, 1), logits, **CLOSE)

    @pytest.mark.parametrize("setting", BOTH)
    def test_from_embeddings(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        mask = torch.ones_like(prompt)
        output = generate(model, None, inputs_embeds=model.get_input_embeddings()(prompt), attention_mask=mask)
        assert torch.equal(output, generate(model, prompt)[:, PROMPT:])

    @pytest.mark.parametrize("setting", BOTH)
    def test_the_end_of_text(self, setting):
        model = tiny_model(setting)
        prompt = tokens(2, PROMPT)
        text = generate(model, prompt)
        end = int(text[0, PROMPT + 5])
        first = text[0, PROMPT:].tolist().index(end) + 1
        stopped = generate(model, prompt, eos_token_id=end)[0, PROMPT:]
        assert torch.equal(stopped[:first], text[0, PROMPT : PROMPT + first]) and (stopped[first:] == PAD).all()

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_two_turns(self, setting):
        model = tiny_model(setting)
        cache = DynamicCache(config=model.config)
        first = generate(model, tokens(1, PROMPT), past_key_values=cache)
        conversation = torch.cat([first, tokens(1, 6)], 1)
        second = generate(model, conversation, past_key_values=cache)
        assert torch.equal(second, recomputed_greedy(model, conversation))

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_answers_of_different_lengths(self, setting):
        """A second turn behind a batch whose answers ended at different steps: padding lies inside the conversation."""
        model = tiny_model(setting)
        input_ids, mask = place([tokens(PROMPT), tokens(4), tokens(7)], "left")
        first = generate(model, input_ids, attention_mask=mask)
        answers = torch.ones(3, NEW, dtype=torch.long)
        answers[1, 9:] = answers[2, 2:] = 0
        questions, question_mask = place([tokens(2), tokens(8), tokens(5)], "left")
        conversation = torch.cat([first, questions], 1)
        mask = torch.cat([mask, answers, question_mask], 1)
        cache = DynamicCache(config=model.config)
        length = first.shape[1] - 1
        with torch.no_grad():
            model(first[:, :length], attention_mask=mask[:, :length], past_key_values=cache)
        second = generate(model, conversation, attention_mask=mask, past_key_values=cache)
        for index in range(3):
            alone = conversation[index, mask[index] == 1][None]
            assert torch.equal(second[index, -NEW:], recomputed_greedy(model, alone)[0, -NEW:])

    @pytest.mark.parametrize("setting", BOTH)
    def test_the_offloaded_cache_of_transformers(self, setting, monkeypatch):
        """It is made for accelerators; with streams that do nothing it runs, and moves every layer, on a CPU."""

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
        input_ids, mask = place([tokens(PROMPT), tokens(4)], "left")
        expected = generate(model, input_ids, attention_mask=mask)
        for implementation in ("offloaded", "offloaded_static"):
            options = {"cache_implementation": implementation, "disable_compile": True}
            assert torch.equal(generate(model, input_ids, attention_mask=mask, **options), expected)
        cache = DynamicCache(offloading=True)
        assert torch.equal(generate(model, input_ids, attention_mask=mask, past_key_values=cache), expected)
        assert [layer.is_offloaded for layer in cache.layers].count(True) > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_half_precision(self, setting, dtype):
        model = tiny_model(setting).to(dtype)
        output = generate(model, tokens(2, PROMPT), output_logits=True, return_dict_in_generate=True)
        assert all(torch.isfinite(logits).all() for logits in output.logits)


class TestCompiled:
    """`torch.compile(fullgraph=True)` of a step into a static cache, as `generate` does on accelerators by itself."""

    @pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("setting", BOTH)
    def test_generate_compiles_a_step_once(self, setting, backend):
        """One graph for all tokens of all padded batches that fill caches of one size."""
        model = tiny_model(setting)
        compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
        compile_config._compile_all_devices = True  # on a CPU, for tests
        torch._dynamo.reset()
        counters, graphs = torch._dynamo.utils.counters, []
        counters.clear()
        for lengths in ((14, 6), (9, 14), (14, 14)):
            input_ids, mask = place([tokens(length) for length in lengths], "left")
            expected = generate(model, input_ids, attention_mask=mask)
            options = {"cache_implementation": "static", "compile_config": compile_config}
            assert torch.equal(generate(model, input_ids, attention_mask=mask, **options), expected)
            graphs.append(counters["stats"]["unique_graphs"])
        assert graphs == [1, 1, 1]
        assert sum(counters["graph_break"].values()) == 0

    @pytest.mark.parametrize("setting", BOTH)
    @torch.no_grad()
    def test_one_graph_of_dynamic_shapes(self, setting):
        """Of a text and of what follows it in a dynamic cache."""
        model = tiny_model(setting, num_hidden_layers=1)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
        input_ids = tokens(2, 31)
        expected = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, expected, **CLOSE)
        text = compiled(input_ids[:, :30], use_cache=True)
        torch.testing.assert_close(text.logits, expected[:, :30], **CLOSE)
        step = compiled(input_ids[:, 30:], past_key_values=text.past_key_values, use_cache=True)
        torch.testing.assert_close(step.logits, expected[:, 30:], **CLOSE)


class TestText:
    def test_text_iterator_streamer(self, text_model, tokenizer):
        inputs = tokenizer("of the senate", return_tensors="pt", return_token_type_ids=False)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        options = {**inputs, "max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=text_model.generate, kwargs=options)
        thread.start()
        pieces = list(streamer)
        thread.join(timeout=60)
        output = generate(text_model, **inputs)[0, inputs["input_ids"].shape[1] :]
        assert "".join(pieces) == tokenizer.decode(output)
        assert len(pieces) > 5

    def test_stop_strings(self, text_model, tokenizer):
        inputs = tokenizer("of the senate", return_tensors="pt", return_token_type_ids=False)
        length = inputs["input_ids"].shape[1]
        new = generate(text_model, **inputs)[0, length:]
        stop = next(text for text in map(tokenizer.decode, new[4:]) if text.isascii() and text.strip())
        output = generate(text_model, **inputs, stop_strings=[stop], tokenizer=tokenizer)[0, length:]
        assert stop in tokenizer.decode(output) and stop not in tokenizer.decode(output[:-1])
        assert torch.equal(output, new[: len(output)]) and len(output) < NEW


class TestPipelines:
    def test_text_generation(self, text_model, tokenizer, tmp_path):
        generator = pipeline("text-generation", model=text_model, tokenizer=tokenizer)
        options = {"max_new_tokens": 10, "do_sample": False, "return_full_text": False}
        prompts = ["fellow citizens", "of the house of representatives and"]
        # A text alone, and in a batch that pads it.
        single = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
        batch = [result[0]["generated_text"] for result in generator(prompts, batch_size=2, **options)]
        assert batch == single and all(single)

        text_model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded = pipeline("text-generation", model=str(tmp_path))
        assert type(loaded.model) is NystromformerHFDecoderForCausalLM
        assert [loaded(prompt, **options)[0]["generated_text"] for prompt in prompts] == single

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("setting", BOTH)
    def test_text_classification(self, tokenizer, setting, side):
        head = NystromformerHFDecoderForSequenceClassification
        model = tiny_model(setting, head=head, vocab_size=len(tokenizer), pad_token_id=0, num_labels=3)
        tokenizer.padding_side = side
        classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
        texts = ["fellow citizens", "of the house of representatives and of the senate"]
        batch = classifier(texts, batch_size=2, top_k=None)
        for one, other in zip([classifier(text, top_k=None) for text in texts], batch, strict=True):
            assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
            scores = [entry["score"] for entry in one]
            assert scores == pytest.approx([entry["score"] for entry in other], abs=1e-5)
            assert sum(scores) == pytest.approx(1)

    @pytest.mark.parametrize("setting", BOTH)
    def test_feature_extraction(self, tokenizer, setting):
        model = tiny_model(setting, head=NystromformerHFDecoderModel, vocab_size=len(tokenizer), pad_token_id=0)
        extractor = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
        text = "of the house of representatives"
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        torch.testing.assert_close(torch.tensor(extractor(text)), expected)
