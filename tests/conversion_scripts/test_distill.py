"""What is trained, towards what, and that a cut-off run loses nothing."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, TrainerCallback, TrainingArguments

from conversion_scripts import cards, distill, perplexity
from conversion_scripts.card_facts import THIS_MODEL, read_facts
from conversion_scripts.convert_llama import convert, is_own
from tests.two_processes import run_two_processes

from .llama_checkpoints import VOCABULARY, make_tokenizer, save_checkpoint


pytest.importorskip("accelerate")

KERMIT = {"window_size": 8, "num_sink_tokens": 2, "update_rule": "additive", "conv_kernel_size": 0}
NYSTROM = {"segment_size": 4, "near_segments": 2, "num_sink_tokens": 2, "conv_kernel_size": 3}


@pytest.fixture
def teacher(tmp_path) -> Path:
    save_checkpoint(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def student(tmp_path, teacher) -> Path:
    convert(str(teacher), tmp_path / "student", "kermit", KERMIT)
    return tmp_path / "student"


@pytest.fixture
def text(tmp_path) -> Path:
    words = [f"the state of the union in {year} is strong and its people are {year % 7}" for year in range(1900, 1960)]
    (tmp_path / "text.txt").write_text("\n".join(words), encoding="utf-8")
    return tmp_path / "text.txt"


def options(student: Path, teacher: Path, text: Path, *extra: str) -> list[str]:
    arguments = [student, teacher, student.parent / "healed", "--train", text, "--texts", text, "--min-characters", 0]
    arguments += ["--documents", 1, "--tokens", 64, "--sequence-length", 32, "--steps", 4, *extra]
    return [str(argument) for argument in arguments]


def run(*arguments) -> Path:
    distill.main(options(*arguments))
    return arguments[0].parent / "healed"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def trainer_of(trainer_class, model, teacher, tmp_path, learning_rate=0.1):
    settings = TrainingArguments(tmp_path / "work", report_to="none", use_cpu=True, weight_decay=0.1)
    return trainer_class(model=model, args=settings, own_learning_rate=learning_rate, teacher=teacher)


def load(folder: Path):
    return perplexity.load_model(str(folder))[0]


@torch.no_grad()
def call_of(model, attention) -> tuple[torch.Tensor, dict]:
    """Output and named inputs of one attention layer when `model` reads `IDS`."""
    calls = []
    hook = attention.register_forward_hook(lambda *call: calls.append((call[3][0], call[2])), with_kwargs=True)
    model(IDS, use_cache=False)
    hook.remove()
    return calls[0]


IDS = torch.randint(2, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0))


class TestTransfer:
    def test_layers_that_agree_have_no_error(self, teacher, tmp_path):
        convert(str(teacher), tmp_path / "wide", "kermit", {"window_size": 32, "conv_kernel_size": 0})
        trainer = trainer_of(distill.TransferTrainer, load(tmp_path / "wide"), load(teacher), tmp_path)
        assert trainer.compute_loss(trainer.model, {"input_ids": IDS}) < 1e-8

    def test_error_is_that_of_each_layer_on_the_teachers_stream(self, student, teacher, tmp_path):
        ours, theirs = load(student), load(teacher)
        expected = []
        for layer, original in zip(ours.model.layers, theirs.model.layers, strict=True):
            # Rotary positions count by other rules here than there; only the hidden states are the teacher's.
            _, own = call_of(ours, layer.self_attn)
            target, given = call_of(theirs, original.self_attn)
            output, _ = layer.self_attn(given["hidden_states"], own["position_embeddings"])
            # By text: what a batch is made of is no matter.
            missed, variance = (states.square().mean((1, 2)) for states in (output - target, target))
            expected.append((missed / variance).mean())
        trainer = trainer_of(distill.TransferTrainer, ours, theirs, tmp_path)
        loss = trainer.compute_loss(ours, {"input_ids": IDS})
        assert loss > 1e-3
        torch.testing.assert_close(loss, torch.stack(expected).mean())

    def test_only_what_the_attention_has_of_its_own_is_trained(self, student, teacher, text):
        before = weights(student)
        healed = run(student, teacher, text, "--steps", "0", "--transfer-steps", "4", "--far-bias", "0")
        after, model = weights(healed), load(student)
        assert before.keys() == after.keys()
        for name in before:
            changed = not torch.equal(before[name], after[name])
            assert changed == is_own(name, model), name

    def test_error_falls(self, student, teacher, text):
        healed = run(
            student,
            teacher,
            text,
            "--steps",
            "0",
            "--transfer-steps",
            "40",
            "--far-bias",
            "0",
            "--own-learning-rate",
            ".02",
        )

        def error(folder: Path) -> float:
            model = load(folder)
            distill.set_far_bias(model, 0.0) if folder == student else None
            trainer = trainer_of(distill.TransferTrainer, model, load(teacher), folder.parent)
            ids = torch.cat([block["input_ids"][None] for block in blocks])
            with torch.no_grad():
                return float(trainer.compute_loss(model, {"input_ids": ids}))

        blocks = distill.token_blocks(perplexity.load_tokenizer(str(student)), [text.read_text()], 32)[:8]
        assert error(healed) < 0.9 * error(student)


class TestTraining:
    @pytest.mark.parametrize("which", ["own", "lora", "all"])
    def test_trained_weights(self, which, student, teacher, text):
        if which == "lora":
            pytest.importorskip("peft")
        before = weights(student)
        healed = run(student, teacher, text, "--weights", which, "--far-bias", "0", "--bf16")
        after, model = weights(healed), load(student)
        assert before.keys() == after.keys()  # adapters are merged
        for name in before:
            changed = not torch.equal(before[name], after[name])
            projection = name.split(".")[-2] in distill.PROJECTIONS
            expected = {"own": False, "lora": projection, "all": True}[which] or is_own(name, model)
            assert changed == expected, name

    @pytest.mark.parametrize(("to", "settings"), [("kermit", KERMIT), ("nystromformer_hf_decoder", NYSTROM)])
    def test_perplexity_falls(self, to, settings, teacher, text, tmp_path):
        convert(str(teacher), tmp_path / "student", to, settings)
        healed = run(tmp_path / "student", teacher, text, "--steps", "30", "--learning-rate", "1e-2")
        facts = read_facts(healed)
        values = facts.perplexity.summary["perplexity"]
        assert values[THIS_MODEL] < 0.5 * values["window + sinks"]
        assert [stage.title for stage in facts.stages] == ["Conversion", "Distillation"]
        training = facts.stages[-1].training
        assert (training.steps, training.tokens) == (30, 30 * 32)
        assert training.trainable_parameters == training.parameters == load(healed).num_parameters()

    def test_a_teacher_that_agrees_leaves_nothing_to_learn(self, teacher, tmp_path):
        trainer = trainer_of(distill.DistillationTrainer, load(teacher), load(teacher), tmp_path)
        inputs = {"input_ids": IDS, "labels": IDS}
        assert trainer.compute_loss(trainer.model, inputs).abs() < 1e-5

    def test_distance_to_the_teacher_is_the_kl_divergence(self, student, teacher, tmp_path):
        ours, theirs = load(student), load(teacher)
        with torch.no_grad():
            p, q = (model(IDS).logits.double().softmax(-1) for model in (theirs, ours))
            loss = trainer_of(distill.DistillationTrainer, ours, theirs, tmp_path).compute_loss(
                ours, {"input_ids": IDS}
            )
        torch.testing.assert_close(loss.double(), (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=0)

    def test_learning_rates_and_weight_decay(self, student, tmp_path):
        model = load(student)
        optimizer = trainer_of(distill.DistillationTrainer, model, None, tmp_path, learning_rate=0.3).create_optimizer()
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert rates[id(parameter)] == (0.3 if is_own(name, model) else 5e-5), name
            assert decays[id(parameter)] == (0.0 if "norm" in name or "bias" in name else 0.1), name

    def test_a_run_that_was_cut_off_goes_on(self, student, teacher, text, tmp_path, monkeypatch):
        class CutOff(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 6:
                    raise KeyboardInterrupt

        whole = weights(run(student, teacher, text, "--steps", "10", "--far-bias", "0"))
        trainer_init = distill.DistillationTrainer.__init__
        with monkeypatch.context() as patch:
            patch.setattr(
                distill.DistillationTrainer,
                "__init__",
                lambda self, *args, **kwargs: trainer_init(self, *args, callbacks=[CutOff()], **kwargs),
            )
            with pytest.raises(SystemExit, match="stopped; the same command with --resume goes on"):
                run(student, teacher, text, "--steps", "10", "--far-bias", "0", "--overwrite")
        assert (tmp_path / "healed.training" / "training" / "checkpoint-6").is_dir()
        run(student, teacher, text, "--steps", "10", "--far-bias", "0", "--overwrite", "--resume")
        resumed = weights(tmp_path / "healed")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert not (tmp_path / "healed.training").exists()
        assert read_facts(tmp_path / "healed").stages[-1].training.seconds is None

    def test_a_run_that_was_cut_off_behind_its_last_step_trains_no_more(self, student, teacher, text, monkeypatch):
        whole = weights(run(student, teacher, text, "--far-bias", "0"))

        def cut_off(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(perplexity, "measure", cut_off)
            with pytest.raises(SystemExit, match="--resume"):
                run(student, teacher, text, "--far-bias", "0", "--overwrite")
        monkeypatch.setattr(distill.DistillationTrainer, "train", cut_off)
        resumed = run(student, teacher, text, "--far-bias", "0", "--overwrite", "--resume")
        assert all(torch.equal(whole[name], value) for name, value in weights(resumed).items())
        assert read_facts(resumed).stages[-1].training.steps == 4


@pytest.mark.parametrize("loss", ["transfer", "cross-entropy", "kl"])
def test_batches_of_a_step_count_as_one(loss, student, teacher, tmp_path):
    def gradients(batch_size: int, steps: int) -> dict[str, torch.Tensor]:
        model, recorded = load(student).float(), {}
        distill.set_far_bias(model, 0.0)
        settings = TrainingArguments(
            tmp_path / "work",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            report_to="none",
            use_cpu=True,
        )
        trainer = (distill.TransferTrainer if loss == "transfer" else distill.DistillationTrainer)(
            model=model,
            args=settings,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in IDS],
            own_learning_rate=0.1,
            teacher=None if loss == "cross-entropy" else load(teacher),
        )

        def record(*args):
            recorded.update((n, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None)

        hook = register_optimizer_step_pre_hook(record)
        trainer.train()
        hook.remove()
        return recorded

    together, apart = gradients(2, 1), gradients(1, 2)
    assert together.keys() == apart.keys()
    # The order of summation alone is another: float32 keeps 24 bits.
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


# Several runs, one after the other. What the second process must not do, it cannot do.
ONLY_THE_FIRST_WRITES = """
import json, os, sys
from conversion_scripts import distill, perplexity
if os.environ["RANK"] == "1":
    distill.atomic_folder = distill.write_card = distill.check_output = perplexity.measure = None
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if number and os.environ["RANK"] == "0":
        print("next run")
    distill.main(arguments)
"""


class TestTwoProcesses:
    # First the one that no Trainer has set up processes for.
    EXTRAS = (
        ("--variant", "softmax", "--steps", "0"),
        ("--transfer-steps", "4", "--far-bias", "0", "--loss", "kl"),
        ("--weights", "own", "--far-bias", "0", "--gradient-accumulation-steps", "2"),
    )

    def test_results_are_those_of_one_process(self, student, teacher, text, tmp_path, capsys):
        together, alone, printed = [], [], []
        for number, extra in enumerate(self.EXTRAS):
            alone.append(tmp_path / f"alone-{number}")
            run(student, teacher, text, *extra, "--batch-size", "2").rename(alone[-1])
            printed.append(capsys.readouterr().out)
            arguments = options(student, teacher, text, *extra, "--batch-size", "1")
            together.append([f"{path}-{number}" if Path(path).name == "healed" else path for path in arguments])
        names = {path.name for path in tmp_path.iterdir()}
        main, other = run_two_processes("-c", ONLY_THE_FIRST_WRITES, json.dumps(together))

        assert {path.name for path in tmp_path.iterdir()} == names | {f"healed-{n}" for n in range(len(self.EXTRAS))}
        assert other.stdout == ""
        texts = main.stdout.split("next run\n")
        assert len(texts) == len(self.EXTRAS)
        for number in range(len(self.EXTRAS)):
            self.check(
                tmp_path / "student", alone[number], tmp_path / f"healed-{number}", printed[number], texts[number]
            )

    def check(self, student: Path, folder_alone: Path, folder: Path, printed_alone: str, printed: str) -> None:
        def losses(printed: str) -> list[float]:
            return [float(loss) for loss in re.findall(r"'loss': '([^']+)'", printed)]

        assert printed.count("trained parameters") == printed_alone.count("trained parameters")
        assert printed.count("load it with") == 1
        alone, together = read_facts(folder_alone), read_facts(folder)
        for ours, theirs in zip(together.stages[1:], alone.stages[1:], strict=True):
            assert ours.training.settings.pop("processes") == 2
            assert ours.training.settings == theirs.training.settings
            assert (ours.training.steps, ours.training.tokens) == (theirs.training.steps, theirs.training.tokens)
        assert losses(printed) == pytest.approx(losses(printed_alone), rel=1e-3)  # they are printed with four digits
        for name, values in alone.perplexity.perplexity.items():
            assert together.perplexity.perplexity[name] == pytest.approx(values, rel=1e-4), name
        before, expected, after = weights(student), weights(folder_alone), weights(folder)
        for name in expected:
            # Adam divides each gradient by its size, and so magnifies the rounding of the smallest ones.
            start = torch.zeros_like(before[name]) if name.endswith("far_bias") else before[name]
            atol = 1e-3 * float((expected[name] - start).abs().max())
            torch.testing.assert_close(after[name], expected[name], rtol=0, atol=atol, msg=name)


class TestVariants:
    @pytest.mark.parametrize("facts", ["measurements.json", None])
    def test_softmax_is_the_teacher(self, facts, student, teacher, text):
        if facts is None:
            (student / "measurements.json").unlink()
        healed = run(student, teacher, text, "--variant", "softmax", "--steps", "0")
        with torch.no_grad():
            torch.testing.assert_close(load(healed)(IDS).logits, load(teacher)(IDS).logits, rtol=0, atol=1e-4)
        assert read_facts(healed).settings["layer_types"] == ["full_attention"] * 2
        assert "full_attention*2" in (healed / "README.md").read_text()

    @pytest.mark.parametrize("extra", [(), ("--bf16",)])
    def test_near_field_has_no_memory_and_trains_nothing_of_it(self, extra, student, teacher, text):
        healed = run(student, teacher, text, "--variant", "near-field", "--weights", "all", "--far-bias", "0", *extra)
        model, before = load(healed), weights(student)
        with torch.no_grad(), perplexity.shut_far_field(model):
            shut = model(IDS).logits
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, shut)
        own = [name for name in before if is_own(name, model) and not name.endswith("far_bias")]
        assert own
        assert all(torch.equal(before[name], weights(healed)[name]) for name in own)
        training = read_facts(healed).stages[-1].training
        memory = sum(tensor.numel() for name, tensor in before.items() if is_own(name, model))
        assert training.trainable_parameters == training.parameters - memory

    def test_far_field_is_worth_something_where_the_card_says_so(self, student, teacher, text):
        facts = read_facts(run(student, teacher, text, "--far-bias", "0"))
        values = facts.perplexity.summary["perplexity"]
        model = load(student.parent / "healed")
        documents = distill.long_documents(perplexity.load_tokenizer(str(student)), [text.read_text()], 64, 1)
        losses = perplexity.token_losses(model, documents[0])[31:]
        assert values[THIS_MODEL] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
        with perplexity.shut_far_field(model):
            losses = perplexity.token_losses(model, documents[0])[31:]
        assert values[f"{THIS_MODEL}, far field off"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)


def test_the_result_is_a_checkpoint_with_tokenizer_and_card(student, teacher, text, capsys):
    healed = run(student, teacher, text, "--dtype", "bfloat16")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md", "modeling_kermit.py"):
        assert (healed / name).is_file(), name
    assert {tensor.dtype for tensor in weights(healed).values()} == {torch.bfloat16}
    config = json.loads((healed / "config.json").read_text())
    assert config["use_cache"] is True
    assert json.loads((healed / "generation_config.json").read_text())["top_k"] == 7
    card = (healed / "README.md").read_text()
    assert "python -m conversion_scripts.distill student teacher healed --train text.txt" in card
    assert str(student.parent) not in card
    model = AutoModelForCausalLM.from_pretrained(healed)
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape == (1, 35)
    assert "far field off" in capsys.readouterr().out


class TestRefusals:
    def refused(self, match, *arguments):
        with pytest.raises(SystemExit, match=match):
            distill.main(options(*arguments))
        assert not (arguments[0].parent / "healed").exists()

    def test_another_teacher(self, student, text, tmp_path):
        save_checkpoint(tmp_path / "other", hidden_size=48)
        self.refused(
            "distill: hidden_size=32 of the student differs from 48 of the teacher", student, tmp_path / "other", text
        )

    def test_a_teacher_of_another_family(self, student, text, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "bert")
        match = "^distill: model_type='bert' of the teacher .* allowed are llama, mistral, qwen2, qwen3$"
        self.refused(match, student, tmp_path / "bert", text)

    def test_a_student_that_is_not_ours(self, teacher, text, tmp_path):
        self.refused("model_type='llama' has no near field; allowed are kermit", teacher, teacher, text)

    @pytest.mark.parametrize(
        ("extra", "match"),
        [
            (("--far-bias", "0"), "--far-bias is for KERMIT"),
            (("--variant", "softmax"), "--variant softmax is there for KERMIT only"),
        ],
    )
    def test_options_of_kermit(self, extra, match, teacher, text, tmp_path):
        convert(str(teacher), tmp_path / "nystrom", "nystromformer_hf_decoder", NYSTROM)
        self.refused(match, tmp_path / "nystrom", teacher, text, *extra)

    def test_nothing_to_train(self, teacher, text, tmp_path):
        convert(str(teacher), tmp_path / "nystrom", "nystromformer_hf_decoder", NYSTROM | {"conv_kernel_size": None})
        self.refused("--weights own leaves nothing to train", tmp_path / "nystrom", teacher, text, "--weights", "own")

    def test_texts(self, student, teacher, text, tmp_path):
        self.refused("absent.txt does not exist", student, teacher, tmp_path / "absent.txt")
        self.refused("fewer than one block of 100,000", student, teacher, text, "--sequence-length", "100000")
        self.refused("50,000 tokens, 1 are needed", student, teacher, text, "--tokens", "50000")

    def test_vocabulary_of_another_model(self, student, teacher, text):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"<{index}>" for index in range(VOCABULARY + 1 - len(tokenizer))])
        tokenizer.save_pretrained(student)
        self.refused(f"the tokenizer has {VOCABULARY + 1} tokens", student, teacher, text)

    def test_numbers(self, student, teacher, text, capsys):
        with pytest.raises(SystemExit):
            distill.main(options(student, teacher, text, "--batch-size", "0"))
        assert "'0': allowed are whole numbers from 1" in capsys.readouterr().err

    @pytest.mark.parametrize("package", ["accelerate", "peft"])
    def test_packages_that_are_missing(self, package, student, teacher, text, monkeypatch):
        monkeypatch.setitem(sys.modules, package, None)
        match = rf"^distill: .*`{package}`; install it: pip install 'linear-time-transformers\[train\]'$"
        self.refused(match, student, teacher, text, "--weights", "lora")

    def test_no_model_is_loaded_for_what_its_config_refuses(self, student, teacher, text, monkeypatch):
        monkeypatch.setattr(perplexity, "load_model", None)
        self.refused("has no near field", teacher, teacher, text)
        monkeypatch.setattr(cards, "TEMPLATES", student)
        self.refused("the template .*kermit.md does not exist", student, teacher, text)
        monkeypatch.undo()
        monkeypatch.setattr(perplexity, "load_model", None)
        (student.parent / "healed").write_text("")
        with pytest.raises(SystemExit, match="healed is a file; choose a folder"):
            run(student, teacher, text)

    def test_an_output_that_is_there(self, student, teacher, text):
        healed = run(student, teacher, text, "--steps", "1")
        before = weights(healed)
        with pytest.raises(SystemExit, match="exists; choose another folder, or replace it with --overwrite"):
            run(student, teacher, text, "--steps", "1", "--seed", "1")
        assert all(torch.equal(before[name], value) for name, value in weights(healed).items())
