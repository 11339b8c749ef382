"""Training with the standard Trainer, which can be cut off and continued."""

import argparse
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments


def fit(
    model: PreTrainedModel,
    name: str,
    args: argparse.Namespace,
    options: dict[str, Any] | None = None,
    evaluations: int = 10,
    **parts,
) -> Trainer:
    """Train with the standard Trainer; with --resume from the last complete checkpoint of this `name`, if any.

    options: `TrainingArguments` that differ from the defaults here. parts: what else the Trainer takes; an `eval_dataset` is
    evaluated so many times on the way, where checkpoints are written.
    """
    folder = args.output / "checkpoints" / name
    # The state is what a checkpoint gets last: without it, the run was cut off while writing.
    complete = [int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoint-*/trainer_state.json")]
    checkpoint = folder / f"checkpoint-{max(complete)}" if args.resume and complete else None
    if checkpoint:
        print(f"continuing from {checkpoint}")
    every = max(1, args.steps // evaluations)
    defaults = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": args.steps // 10,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, args.steps // 30),
        "eval_strategy": "steps" if "eval_dataset" in parts else "no",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "disable_tqdm": False,
        "report_to": "none",
        "seed": args.seed,
    }
    settings = TrainingArguments(output_dir=str(folder), **defaults | (options or {}))
    if checkpoint and max(complete) == args.steps:  # nothing left to do, but the Trainer would take one more step
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        best = folder / Path(state.best_model_checkpoint).name if settings.load_best_model_at_end else checkpoint
        trainer = Trainer(model=type(model).from_pretrained(best), args=settings, **parts)
        trainer.state = state
    else:
        trainer = Trainer(model=model, args=settings, **parts)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if hasattr(trainer.model.config, "use_cache"):
        trainer.model.config.use_cache = True  # the Trainer turns it off, and it would stay off in what is saved
    return trainer
