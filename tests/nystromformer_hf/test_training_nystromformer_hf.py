"""The encoder under stock training and inference tools: Trainer, checkpointing, bf16, LoRA, resuming, pipelines."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nystromformer_hf import (
    NystromformerHFForMaskedLM,
    NystromformerHFForMultipleChoice,
    NystromformerHFForQuestionAnswering,
    NystromformerHFForSequenceClassification,
    NystromformerHFForTokenClassification,
    NystromformerHFModel,
)
from tests.nystromformer_hf.helpers import distributed_gradients, padding_masks, random_tokens, tiny_config


WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(55))]
TRAINED = {"initializer_range": 0.02, "num_landmarks": 8}


def build_tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    """Words w0 ... w54 between <s> and </s>."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {
        "bos": "<s>",
        "cls": "<s>",
        "pad": "<pad>",
        "eos": "</s>",
        "sep": "</s>",
        "unk": "<unk>",
        "mask": "<mask>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )


@pytest.fixture(scope="module", params=["right", "left"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return build_tokenizer(request.param)


def train(model, dataset, collator, tmp_path, steps: int = 40, **arguments) -> list[float]:
    """Losses of a short run."""
    args = TrainingArguments(
        output_dir=tmp_path,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        logging_steps=steps // 8,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sentences(number: int = 64) -> list[list[int]]:
    """Counting texts of different lengths, most of them longer than the landmarks: predictable from both sides."""
    return [[0, *(5 + (i + j) % 20 for j in range(6 + 7 * i % 40)), 2] for i in range(number)]


MLM_ROWS = [{"input_ids": text, "labels": text} for text in sentences()[:8]]
TOKEN_ROWS = [{"input_ids": text, "labels": [token % 3 for token in text]} for text in sentences()[:8]]


def labelled_sentences() -> list[dict]:
    return [{"input_ids": text, "labels": int(text[1] > 14)} for text in sentences()]


def test_masked_language_modelling(tokenizer, tmp_path):
    model = NystromformerHFForMaskedLM(tiny_config(**TRAINED))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.2)
    losses = train(model, [{"input_ids": text} for text in sentences()], collator, tmp_path)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("padding_side", "arguments"),
    [
        ("left", {}),
        ("right", {"bf16": True}),
        ("right", {"activation_checkpointing": True}),
        ("left", {"gradient_accumulation_steps": 2}),
    ],
)
def test_classification(tmp_path, padding_side, arguments):
    """Whether a text starts low or high."""
    model = NystromformerHFForSequenceClassification(tiny_config(**TRAINED))
    collator = DataCollatorWithPadding(build_tokenizer(padding_side))
    losses = train(model, labelled_sentences(), collator, tmp_path, **arguments)
    assert losses[-1] < 0.8 * losses[0]


def test_token_classification(tmp_path):
    model = NystromformerHFForTokenClassification(tiny_config(num_labels=3, **TRAINED))
    dataset = [{"input_ids": text, "labels": [token % 3 for token in text]} for text in sentences()]
    losses = train(model, dataset, DataCollatorForTokenClassification(build_tokenizer("right")), tmp_path)
    assert losses[-1] < 0.5


def test_question_answering(tokenizer, tmp_path):
    """The answer starts at the only w40 and ends with the token after it."""
    dataset = []
    for index, text in enumerate(sentences()):
        start = 1 + index % (len(text) - 3)
        text[start] = 45
        shift = max(map(len, sentences())) - len(text) if tokenizer.padding_side == "left" else 0
        dataset.append({"input_ids": text, "start_positions": start + shift, "end_positions": start + shift + 1})
    model = NystromformerHFForQuestionAnswering(tiny_config(**TRAINED))
    collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=max(map(len, sentences())))
    losses = train(model, dataset, collator, tmp_path, steps=64)
    assert losses[-1] < 0.7 * losses[0]


def test_multiple_choice(tmp_path):
    """The right choice holds w40."""
    dataset = []
    for index in range(64):
        choices = random_tokens(3, 20).clamp(max=44)
        choices[index % 3, 7] = 45
        dataset.append({"input_ids": choices, "labels": index % 3})
    losses = train(NystromformerHFForMultipleChoice(tiny_config(**TRAINED)), dataset, None, tmp_path, steps=64)
    assert losses[-1] < 0.8 * losses[0]


def test_resuming_continues_the_same_run(tmp_path):
    dataset = [{"input_ids": random_tokens(30), "labels": i % 2} for i in range(32)]
    arguments = {"report_to": [], "save_steps": 3, "max_steps": 6, "disable_tqdm": True, "use_cpu": True, "seed": 1}
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        torch.manual_seed(0)
        model = NystromformerHFForSequenceClassification(tiny_config())
        args = TrainingArguments(output_dir=tmp_path, per_device_train_batch_size=4, **arguments)
        Trainer(model=model, args=args, train_dataset=dataset).train(resume_from_checkpoint=checkpoint)
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name


# Of one length, since a question's softmax runs over the padding too, of which a smaller batch has less.
QA_ROWS = [{"input_ids": list(range(5 + i, 30 + i)), "start_positions": i, "end_positions": 3 + i} for i in range(8)]
CHOICE_ROWS = [
    {"input_ids": [text[:8], text[-8:], text[1:9]], "labels": i % 3} for i, text in enumerate(sentences()[:8])
]
NUMBER_ROWS = [{"input_ids": text, "labels": len(text) / 40} for text in sentences()[:8]]
SEVERAL_ROWS = [{"input_ids": text, "labels": [1.0, 0.0, float(text[1] % 2)]} for text in sentences()[:8]]


@pytest.mark.parametrize(
    ("head", "num_labels", "dataset", "collator"),
    [
        (NystromformerHFForMaskedLM, 3, MLM_ROWS, DataCollatorForTokenClassification),
        (NystromformerHFForTokenClassification, 3, TOKEN_ROWS, DataCollatorForTokenClassification),
        (NystromformerHFForSequenceClassification, 3, labelled_sentences()[:8], DataCollatorWithPadding),
        (NystromformerHFForSequenceClassification, 1, NUMBER_ROWS, DataCollatorWithPadding),
        (NystromformerHFForSequenceClassification, 3, SEVERAL_ROWS, DataCollatorWithPadding),
        (NystromformerHFForQuestionAnswering, 3, QA_ROWS, DataCollatorWithPadding),
        (NystromformerHFForMultipleChoice, 3, CHOICE_ROWS, DataCollatorForMultipleChoice),
    ],
)
def test_accumulated_gradients_are_those_of_the_big_batch(head, num_labels, dataset, collator, tmp_path):
    """Texts, and so parts of a batch, count different numbers of labels; no dropout, which would differ."""
    config = tiny_config(num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain, weights = head(config).state_dict(), []
    for batch_size, steps in ((8, 1), (2, 4)):
        model = head(config)
        model.load_state_dict(plain)
        args = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=batch_size,
            max_steps=1,
            learning_rate=1.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            optim="sgd",
        )
        Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator(build_tokenizer("right"))).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        # One step of plain descent at rate 1: the difference to the start is the gradient.
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert any((weights[0][name] - tensor).abs().max() > 1e-3 for name, tensor in plain.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    """Dropout included: the recomputed forward drops the same keys."""
    plain = NystromformerHFForMaskedLM(tiny_config()).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    masks = torch.stack([mask.long() for mask in padding_masks(60).values()])
    tokens = random_tokens(*masks.shape)
    for model in (plain, saving):
        torch.manual_seed(2)
        model(tokens, attention_mask=masks, labels=tokens.masked_fill(masks == 0, -100)).loss.backward()
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_every_parameter_learns():
    model = NystromformerHFForMaskedLM(tiny_config()).train()
    tokens = random_tokens(2, 70)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_the_whole_batch(tmp_path):
    """Two gloo processes, each with rows of its own lengths and padding sides."""
    config = tiny_config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = NystromformerHFForMaskedLM(config).train()
    masks = torch.stack([padding_masks(40)[kind].long() for kind in ("right", "left", "left", "right")])
    masks[:2, 10:15] = masks[2:, 20:25] = 1
    tokens = random_tokens(*masks.shape)
    labels = torch.full_like(tokens, -100)
    labels[:, 15:20] = tokens[:, 15:20]  # as many in each half, whose mean losses are averaged
    inputs = {"input_ids": tokens, "attention_mask": masks, "labels": labels}
    torch.save((config, model.state_dict(), inputs), tmp_path / "inputs.pt")
    torch.multiprocessing.spawn(distributed_gradients, (tmp_path, 2), nprocs=2)
    model(**inputs).loss.backward()
    gradients = torch.load(tmp_path / "gradients.pt")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_torch_compile_changes_no_loss(tmp_path):
    losses = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.manual_seed(0)
        config = tiny_config(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = NystromformerHFForSequenceClassification(config)
        collator = DataCollatorWithPadding(build_tokenizer("left"))
        losses.append(train(model, labelled_sentences(), collator, tmp_path, steps=8, **arguments))
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_lora(tmp_path):
    model = NystromformerHFForSequenceClassification(tiny_config(**TRAINED))
    before = model.nystromformer.encoder.layer[0].attention.self.query.weight.clone()
    adapted = get_peft_model(model, LoraConfig("SEQ_CLS", target_modules=["query", "value"], r=4))
    train(adapted, labelled_sentences(), DataCollatorWithPadding(build_tokenizer("right")), tmp_path, steps=16)
    tokens = random_tokens(2, 40)
    adapted.eval()
    expected = adapted(tokens).logits
    merged = adapted.merge_and_unload()
    assert not torch.equal(merged.nystromformer.encoder.layer[0].attention.self.query.weight, before)
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=1e-4)


# Texts of different length, so that pipelines with a batch size pad them; longer and shorter than the landmarks.
TEXTS = [" ".join(f"w{i % 50}" for i in range(length)) for length in (3, 16, 40)]


def run_pipeline(task: str, head: type, tokenizer, texts: list[str], **options) -> list:
    """Results of a stock pipeline over all texts at once, after checking that they equal those one by one."""
    model = head(tiny_config(num_labels=3)).eval()
    pipe = pipeline(task, model=model, tokenizer=tokenizer, **options)
    batched = pipe(texts, batch_size=len(texts))
    for one, many in zip([pipe(text) for text in texts], batched, strict=True):
        assert flat_numbers(one) == pytest.approx(flat_numbers(many), abs=1e-5)
    return batched


def flat_numbers(results) -> list[float]:
    if isinstance(results, dict):
        # The index of a token counts the padding before it, the rest must not.
        results = [results[key] for key in sorted(results) if key != "index"]
    if isinstance(results, list | tuple):
        return list(itertools.chain.from_iterable(map(flat_numbers, results)))
    return [] if isinstance(results, str) or results is None else [float(results)]


def test_fill_mask_pipeline(tokenizer):
    texts = [text.replace("w1 ", "<mask> ", 1) for text in TEXTS]
    results = run_pipeline("fill-mask", NystromformerHFForMaskedLM, tokenizer, texts)
    assert all(len(result) == 5 and {"score", "token", "token_str"} <= result[0].keys() for result in results)


def test_text_classification_pipeline(tokenizer):
    results = run_pipeline(
        "text-classification", NystromformerHFForSequenceClassification, tokenizer, TEXTS, top_k=None
    )
    for result in results:
        assert sum(label["score"] for label in result) == pytest.approx(1)


def test_token_classification_pipeline(tokenizer):
    results = run_pipeline("token-classification", NystromformerHFForTokenClassification, tokenizer, TEXTS)
    assert [len(result) for result in results] == [3, 16, 40]


def test_feature_extraction_pipeline(tokenizer):
    model = NystromformerHFModel(tiny_config()).eval()
    features = pipeline("feature-extraction", model=model, tokenizer=tokenizer)(TEXTS)
    assert [len(feature[0]) for feature in features] == [5, 18, 42]


def test_answers_are_found_where_the_question_pipeline_was(tokenizer):
    """transformers 5 has no question-answering pipeline; the best span of a padded row is that of the row alone."""
    model = NystromformerHFForQuestionAnswering(tiny_config()).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    outputs = model(**batch)
    for row, text in enumerate(TEXTS):
        real = batch["attention_mask"][row].bool()
        alone = model(**tokenizer(text, return_tensors="pt"))
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(outputs[name][row, real], alone[name][0], atol=1e-5, rtol=0)
