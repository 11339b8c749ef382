"""The standard `Trainer`, unmodified."""

import os
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from kermit_hf import KermitForCausalLM, KermitForSequenceClassification, KermitForTokenClassification
from tests.two_processes import run_two_processes

from .tiny_models import PAD, VOCABULARY, tiny_config, tiny_model, tokens


class Rows(Dataset):
    """A list of examples."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def copying_task(count: int, length: int = 12) -> Rows:
    """Language modelling: a random half, then the same half again, to be remembered beyond the window."""
    rows = []
    for _ in range(count):
        half = tokens(length)
        ids = torch.cat([half, half])
        labels = ids.clone()
        labels[:length] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return Rows(rows)


def uneven_rows(count: int) -> Rows:
    """Right-padded rows of different lengths: batches and their parts count different numbers of labels."""
    rows = []
    for index in range(count):
        ids, real = tokens(24), 6 + 5 * index % 18
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[real:], mask[real:], ids[real:] = -100, 0, PAD
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return Rows(rows)


def classification_task(count: int) -> Rows:
    """Does token 7 occur, here and there? Right-padded."""
    rows = []
    for index in range(count):
        real = int(torch.randint(10, 25, ()))
        ids = torch.randint(8, VOCABULARY, (24,))
        if index % 2:
            ids[torch.randint(0, real, (4,))] = 7
        mask = (torch.arange(24) < real).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": index % 2})
    return Rows(rows)


def trainer(model, data, folder, **options) -> Trainer:
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 10,
        "learning_rate": 3e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 5,
        "seed": 0,
        **options,
    }
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **options), train_dataset=data)


def fresh(head=KermitForCausalLM, setting="delta", **overrides):
    """A model as its constructor leaves it."""
    torch.manual_seed(0)
    return head(tiny_config(setting, **overrides))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def gradient_recorder(model) -> list[dict[str, torch.Tensor]]:
    """The gradients of every optimizer step, taken where the optimizer reads them."""
    recorded = []

    def record(optimizer, args, kwargs):
        recorded.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    model.gradient_hook = register_optimizer_step_pre_hook(record)
    return recorded


class TestLearning:
    # Eight halves of random tokens come back after more than the window: what is remembered must have been written.
    @pytest.mark.parametrize("setting", ["delta", "additive_pure"])
    def test_language_modelling_fits_a_few_texts(self, setting, tmp_path):
        model = fresh(setting=setting)
        run = trainer(model, copying_task(8), tmp_path, max_steps=80, learning_rate=1e-2, warmup_steps=5)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[0] > 3.0 and losses[-1] < 0.5, losses

    @pytest.mark.parametrize("is_causal", [True, False])
    def test_classification(self, is_causal, tmp_path):
        model = fresh(KermitForSequenceClassification, is_causal=is_causal)
        run = trainer(model, classification_task(128), tmp_path, max_steps=100, learning_rate=5e-3)
        run.train()
        test = classification_task(64)
        result = run.predict(test)
        assert (result.predictions.argmax(-1) == result.label_ids).mean() > 0.9


class TestGradientAccumulation:
    @pytest.mark.parametrize(
        ("head", "data"),
        [
            (KermitForCausalLM, uneven_rows),
            (KermitForTokenClassification, uneven_rows),
            (KermitForSequenceClassification, classification_task),
        ],
    )
    def test_equals_the_big_batch(self, head, data, tmp_path):
        torch.manual_seed(1)
        examples = data(8)

        def run(batch_size, steps):
            model = fresh(head, num_labels=VOCABULARY if head is KermitForTokenClassification else 2)
            if hasattr(model, "dropout"):
                model.dropout.p = 0.0
            recorded = gradient_recorder(model)
            training = trainer(
                model,
                examples,
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=steps,
                max_steps=1,
                logging_steps=1,
                max_grad_norm=0.0,
            )
            training.train()
            model.gradient_hook.remove()
            return training.state.log_history[0]["loss"], recorded[0]

        big_loss, big = run(8, 1)
        small_loss, small = run(2, 4)
        # The Trainer rounds the losses that it logs.
        assert small_loss == pytest.approx(big_loss, abs=2e-4)
        for name, gradient in big.items():
            torch.testing.assert_close(small[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


class TestSaveAndResume:
    @pytest.mark.parametrize(
        ("head", "data"), [(KermitForCausalLM, copying_task), (KermitForSequenceClassification, classification_task)]
    )
    def test_bit_equal_to_an_uninterrupted_run(self, head, data, tmp_path):
        torch.manual_seed(1)
        examples = data(32)
        # 32 texts in batches of 8: the break falls into the second epoch, behind a shuffle.
        options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "cosine"}
        whole = fresh(head, attention_dropout=0.1)
        trainer(whole, examples, tmp_path, **options).train()
        resumed = fresh(head, attention_dropout=0.1)
        trainer(resumed, examples, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        for name, tensor in weights(whole).items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name

    def test_the_checkpoint_loads_as_a_model(self, tmp_path):
        model = fresh()
        trainer(model, copying_task(8), tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
        again = KermitForCausalLM.from_pretrained(tmp_path / "checkpoint-2").eval()
        input_ids = tokens(1, 30)
        assert torch.equal(again(input_ids).logits, model.eval()(input_ids).logits)


class TestOptions:
    def test_bf16(self, tmp_path):
        model = fresh()
        run = trainer(model, copying_task(8), tmp_path, bf16=True, max_steps=40, learning_rate=1e-2)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert losses[-1] < 0.7 * losses[0]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    def test_gradient_checkpointing(self, tmp_path):
        def run(enabled):
            model = fresh(attention_dropout=0.1)
            trainer(model, copying_task(8), tmp_path, gradient_checkpointing=enabled, max_steps=5).train()
            return weights(model)

        torch.manual_seed(1)
        state = torch.get_rng_state()
        plain = run(False)
        torch.set_rng_state(state)
        checkpointed = run(True)
        for name, tensor in plain.items():
            torch.testing.assert_close(checkpointed[name], tensor, atol=1e-5, rtol=1e-4, msg=name)

    def test_evaluation_and_label_smoothing(self, tmp_path):
        run = trainer(fresh(), copying_task(8), tmp_path, max_steps=2, label_smoothing_factor=0.1)
        run.train()
        metrics = run.evaluate(uneven_rows(5))
        assert 0 < metrics["eval_loss"] < 10

    def test_the_parts_of_a_model_train_alone(self, tmp_path):
        model = fresh()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("far_" in name)
        before = weights(model)
        trainer(model, copying_task(8), tmp_path, max_steps=2).train()
        changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
        assert changed and all("far_" in name for name in changed)

    @pytest.mark.parametrize("setting", ["delta", pytest.param("additive", marks=pytest.mark.slow)])
    def test_torch_compile(self, setting, tmp_path):
        def run(compiled):
            torch.manual_seed(1)
            model = fresh(setting=setting, num_hidden_layers=1)
            options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
            training = trainer(model, uneven_rows(8), tmp_path, max_steps=3, logging_steps=1, **options)
            training.train()
            return [entry["loss"] for entry in training.state.log_history if "loss" in entry]

        assert run(True) == pytest.approx(run(False), abs=1e-3)


class TestLora:
    def test_trains_saves_reloads_merges(self, tmp_path):
        peft = pytest.importorskip("peft")
        base = fresh()
        original = weights(base)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        trainer(model, copying_task(8), tmp_path, max_steps=5, learning_rate=1e-2).train()
        model.eval()
        input_ids = tokens(1, 30)
        expected = model(input_ids).logits
        changed = (expected - fresh().eval()(input_ids).logits).abs().max()
        assert changed > 1e-3

        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids).logits, expected)
        generated = again.generate(input_ids, max_new_tokens=5, do_sample=False)

        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.generate(input_ids, max_new_tokens=5, do_sample=False), generated)
        merged.save_pretrained(tmp_path / "merged")
        loaded = KermitForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(loaded(input_ids).logits, merged(input_ids).logits)
        for name, tensor in loaded.state_dict().items():
            assert ("q_proj" in name or "v_proj" in name) != torch.equal(tensor, original[name]), name

    def test_a_classifier_keeps_its_head(self, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        model = peft.get_peft_model(fresh(KermitForSequenceClassification), config)
        trainer(model, classification_task(16), tmp_path, max_steps=3).train()
        model.save_pretrained(tmp_path / "adapter")
        body = fresh(KermitForSequenceClassification)
        again = peft.PeftModel.from_pretrained(body, tmp_path / "adapter").eval()
        inputs = {"input_ids": tokens(1, 20)}
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def distributed_examples() -> Rows:
    torch.manual_seed(2)
    return uneven_rows(8)


def train_one_step(folder: Path, batch_size: int, gradient_checkpointing: bool) -> None:
    """One step, its gradients saved by the first process. Run by every process of `TestTwoProcesses`."""
    model = fresh()
    recorded = gradient_recorder(model)
    training = trainer(
        model,
        distributed_examples(),
        folder,
        per_device_train_batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        max_steps=1,
        max_grad_norm=0.0,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    )
    training.train()
    assert training.args.world_size == int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(recorded[0], folder / "gradients.pt")


class TestTwoProcesses:
    @pytest.mark.parametrize("gradient_checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_gradients_equal_those_of_one_process(self, gradient_checkpointing, tmp_path):
        alone, together = tmp_path / "alone", tmp_path / "together"
        alone.mkdir()
        together.mkdir()
        train_one_step(alone, 8, gradient_checkpointing)
        code = (
            "import sys; from pathlib import Path; from tests.kermit_hf.test_training import train_one_step; "
            f"train_one_step(Path(sys.argv[1]), 4, {gradient_checkpointing})"
        )
        run_two_processes("-c", code, str(together))
        expected = torch.load(alone / "gradients.pt")
        result = torch.load(together / "gradients.pt")
        assert expected.keys() == result.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(result[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def test_a_gradient_step_lowers_the_loss_of_every_setting():
    # A cheap guard for all settings at once; the Trainer adds nothing here.
    from .tiny_models import SETTINGS

    for setting in SETTINGS:
        model = tiny_model(setting).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        input_ids = tokens(2, 40)
        before = model(input_ids, labels=input_ids).loss
        before.backward()
        optimizer.step()
        assert model(input_ids, labels=input_ids).loss < before, setting


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [5, 8, 9, 11])
@pytest.mark.parametrize("rule", ["delta", "additive"])
def test_texts_that_fit_into_window_and_sinks_give_every_parameter_a_gradient(rule, length, implementation):
    """Data parallel training waits for all of them; those of the far field, which such texts do not reach, are zero."""
    model = tiny_model(implementation=implementation, update_rule=rule, window_size=8, num_sink_tokens=3).train()
    tokens = torch.randint(1, model.config.vocab_size, (2, length))
    model(input_ids=tokens, labels=tokens).loss.backward()
    missing = [name for name, tensor in model.named_parameters() if tensor.grad is None]
    assert missing == []
    assert not model.model.layers[0].self_attn.far_bias.grad.any()
