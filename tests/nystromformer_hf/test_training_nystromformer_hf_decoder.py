"""The decoder under the standard `Trainer`, unmodified, with pooled landmarks and with a learned γ."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments

from nystromformer_hf import NystromformerHFDecoderForCausalLM, NystromformerHFDecoderForSequenceClassification

from .decoder_models import PAD, SETTINGS, VOCABULARY, tiny_config, tiny_model, tokens


BOTH = ["pooled", "regularized_conv"]


def texts(lengths: list[int], labels: bool = True) -> list[dict]:
    """Counting texts of these lengths, padded on the right to the longest: predictable, and each with its own step."""
    rows, longest = [], max(lengths)
    for index, length in enumerate(lengths):
        ids = (torch.arange(longest) * (1 + index % 3) + index) % (VOCABULARY - 1) + 1
        mask = (torch.arange(longest) < length).long()
        row = {"input_ids": torch.where(mask == 1, ids, PAD), "attention_mask": mask}
        rows.append({**row, "labels": row["input_ids"].masked_fill(mask == 0, -100) if labels else index % 2})
    return rows


def classification_task(count: int) -> list[dict]:
    """Does token 7 occur, here and there?"""
    rows = texts([10 + 5 * index % 15 for index in range(count)], labels=False)
    for row in rows:
        real = row["attention_mask"] == 1
        ids = torch.randint(8, VOCABULARY, real.shape)
        if row["labels"]:
            ids[torch.randint(0, int(real.sum()), (4,))] = 7
        row["input_ids"] = torch.where(real, ids, PAD)
    return rows


UNEVEN = [6, 24, 11, 16, 3, 21, 8, 13]


def trainer(model, data, folder, **options) -> Trainer:
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "seed": 0,
        **options,
    }
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **options), train_dataset=data)


def losses_of(run: Trainer) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def fresh(setting: str, head: type = NystromformerHFDecoderForCausalLM, **overrides) -> torch.nn.Module:
    """A model as its constructor leaves it."""
    torch.manual_seed(0)
    return head(tiny_config(setting, **overrides))


def gradient_recorder(model) -> list[dict[str, torch.Tensor]]:
    """The gradients of every optimizer step, taken where the optimizer reads them."""
    recorded = []

    def record(optimizer, args, kwargs):
        recorded.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    model.gradient_hook = register_optimizer_step_pre_hook(record)
    return recorded


class TestLearning:
    @pytest.mark.parametrize(
        "options", [{}, {"activation_checkpointing": True, "bf16": True}, {"label_smoothing_factor": 0.1}]
    )
    @pytest.mark.parametrize("setting", BOTH)
    def test_language_modelling(self, setting, options, tmp_path):
        model = fresh(setting)
        run = trainer(model, texts([50] * 8), tmp_path, max_steps=12, learning_rate=1e-2, **options)
        losses = losses_of(run)
        assert losses[-1] < 0.7 * losses[0]
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())

    @pytest.mark.parametrize("setting", BOTH)
    def test_classification(self, setting, tmp_path):
        model = fresh(setting, NystromformerHFDecoderForSequenceClassification)
        run = trainer(
            model, classification_task(128), tmp_path, max_steps=80, learning_rate=5e-3, per_device_train_batch_size=8
        )
        run.train()
        result = run.predict(classification_task(64))
        assert (result.predictions.argmax(-1) == result.label_ids).mean() > 0.9

    def test_gamma_is_learned(self, tmp_path):
        model = fresh("regularized_conv")
        before = model.model.layers[0].self_attn.regularization().clone()
        trainer(model, texts([50] * 8), tmp_path, learning_rate=1e-2).train()
        after = model.model.layers[0].self_attn.regularization()
        assert (after != before).all() and (after > 1).all()


class TestOptionsChangeNothing:
    @pytest.mark.parametrize("setting", BOTH)
    @pytest.mark.parametrize(
        ("head", "data"),
        [
            (NystromformerHFDecoderForCausalLM, lambda: texts(UNEVEN)),
            (NystromformerHFDecoderForSequenceClassification, lambda: classification_task(8)),
        ],
    )
    def test_accumulation_equals_the_big_batch(self, head, data, setting, tmp_path):
        """With rows, and so parts of a batch, that count different numbers of labels."""
        examples, results = data(), []
        for batch_size, steps in ((8, 1), (2, 4)):
            model = fresh(setting, head)
            recorded = gradient_recorder(model)
            options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
            (loss,) = losses_of(trainer(model, examples, tmp_path, max_steps=1, max_grad_norm=0.0, **options))
            model.gradient_hook.remove()
            results.append((loss, recorded[0]))
        (big_loss, big), (small_loss, small) = results
        # The Trainer rounds the losses that it logs.
        assert small_loss == pytest.approx(big_loss, abs=2e-4)
        for name, gradient in big.items():
            torch.testing.assert_close(small[name], gradient, atol=1e-6, rtol=1e-3, msg=name)

    @pytest.mark.parametrize("setting", BOTH)
    def test_resuming_is_bit_equal_to_an_uninterrupted_run(self, setting, tmp_path):
        # 16 texts in batches of 4: the break falls into the second epoch, behind a shuffle.
        options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine"}
        states = []
        for checkpoint in (None, str(tmp_path / "checkpoint-5")):
            model = fresh(setting, attention_dropout=0.1)
            trainer(model, texts(UNEVEN * 2), tmp_path, **options).train(resume_from_checkpoint=checkpoint)
            states.append(model.state_dict())
        for name, tensor in states[0].items():
            assert torch.equal(states[1][name], tensor), name
        loaded = NystromformerHFDecoderForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in loaded.state_dict().items())

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("setting", BOTH)
    def test_gradient_checkpointing(self, setting, use_reentrant):
        """Dropout included: the recomputed forward drops the same weights."""
        gradients = []
        for checkpointed in (False, True):
            model = fresh(setting, attention_dropout=0.2).train()
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            input_ids = torch.arange(1, 31).repeat(2, 1)
            torch.manual_seed(2)
            model(input_ids, labels=input_ids, use_cache=False).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for plain, recomputed in zip(*gradients, strict=True):
            torch.testing.assert_close(recomputed, plain)

    @pytest.mark.slow
    @pytest.mark.parametrize("setting", BOTH)
    def test_torch_compile(self, setting, tmp_path):
        results = []
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
            model = fresh(setting, num_hidden_layers=1)
            results.append(losses_of(trainer(model, texts(UNEVEN), tmp_path, max_steps=2, **options)))
        assert results[1] == pytest.approx(results[0], abs=1e-3)


class TestLora:
    @pytest.mark.parametrize("setting", BOTH)
    def test_trains_saves_reloads_merges(self, setting, tmp_path):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(fresh(setting), config)
        trainer(model, texts(UNEVEN), tmp_path, max_steps=4, learning_rate=1e-2).train()
        model.eval()
        input_ids = tokens(1, 30)
        with torch.no_grad():
            expected = model(input_ids).logits
        assert (expected - fresh(setting).eval()(input_ids).logits).abs().max() > 1e-3

        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(fresh(setting), tmp_path / "adapter").eval()
        with torch.no_grad():
            # Loaded weights lie elsewhere in memory, and sums are grouped by alignment.
            torch.testing.assert_close(again(input_ids).logits, expected, atol=1e-6, rtol=1e-5)
        generated = again.generate(input_ids, max_new_tokens=5, do_sample=False)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.generate(input_ids, max_new_tokens=5, do_sample=False), generated)


def shortest_segment(setting: str) -> int:
    """The longest text without a whole segment behind the sinks."""
    return SETTINGS[setting]["segment_size"] + SETTINGS[setting]["num_sink_tokens"] - 1


class TestShortTexts:
    """They form no landmark, so nothing reads γ; data parallel training waits for a gradient of it all the same."""

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("use_cache", [False, True])
    @pytest.mark.parametrize("setting", ["regularized", "regularized_conv"])
    def test_every_parameter_has_a_gradient(self, setting, use_cache, implementation):
        model = tiny_model(setting, implementation=implementation).train()
        longest = shortest_segment(setting)
        for length in range(1, longest + 4):
            model.zero_grad()
            input_ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
            mask[1, : length // 2] = 0  # a padded row beside the whole one
            model(input_ids, attention_mask=mask, use_cache=use_cache).logits.square().sum().backward()
            missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
            assert missing == []
            gamma = model.model.layers[0].self_attn.inverse_regularization.grad
            assert torch.isfinite(gamma).all() and (length > longest or not gamma.any())

    @pytest.mark.parametrize("setting", ["regularized", "regularized_conv"])
    def test_output_is_that_of_evaluation(self, setting):
        model = tiny_model(setting)
        input_ids = tokens(2, shortest_segment(setting))
        with torch.no_grad():
            assert torch.equal(model.train()(input_ids).logits, model.eval()(input_ids).logits)


def distributed_texts(kind: str) -> list[dict]:
    # Whichever process gets which half, "short" leaves γ unread in both, "uneven" in some.
    return texts({"short": [3, 2, 3, 1, 2, 3, 3, 2], "uneven": [2, 3, 24, 3, 1, 3, 16, 2]}[kind])


def train_two_steps(folder: Path, batch_size: int, kind: str) -> None:
    """Two steps, their gradients saved by the first process. Run by every process of `TestTwoProcesses`."""
    model = fresh("regularized")
    recorded = gradient_recorder(model)
    training = trainer(
        model,
        distributed_texts(kind),
        folder,
        per_device_train_batch_size=batch_size,
        max_steps=2,  # a parameter that one step left out fails the next
        max_grad_norm=0.0,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        ddp_timeout=120,
        ddp_find_unused_parameters=False,
    )
    training.train()
    assert training.args.world_size == int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(recorded, folder / "gradients.pt")


class TestTwoProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["short", "uneven"])
    def test_gradients_equal_those_of_one_process(self, kind, tmp_path):
        alone, together = tmp_path / "alone", tmp_path / "together"
        alone.mkdir()
        together.mkdir()
        train_two_steps(alone, 8, kind)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = (
            "import sys; from pathlib import Path; "
            "from tests.nystromformer_hf.test_training_nystromformer_hf_decoder import train_two_steps; "
            f"train_two_steps(Path(sys.argv[1]), 4, {kind!r})"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(together)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
        expected, result = torch.load(alone / "gradients.pt"), torch.load(together / "gradients.pt")
        for one, two in zip(expected, result, strict=True):
            assert one.keys() == two.keys()
            for name, gradient in one.items():
                torch.testing.assert_close(two[name], gradient, atol=1e-6, rtol=1e-3, msg=name)
