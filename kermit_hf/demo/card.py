"""The model card of a demonstration."""

import argparse

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel


CARD = """
# {title}

{summary} It is a demonstration of `kermit_hf`, made by `{command}`: too small to be relied on for anything.

KERMIT here means the architecture of the package `kermit_hf`: {attention}. Other, unrelated models bear the name.

```python
import kermit_hf  # registers the architecture; without the package, pass trust_remote_code=True
{usage}
```

## Results

{results}

## Training

Data: {corpus}. Split: {split}.

{parameters:,} parameters, trained with the Transformers `Trainer`: {steps} steps of {batch} sequences of up to
{length} tokens, AdamW, learning rate {rate} after a warm-up of {warmup} steps and then down a cosine, weight decay
0.1, gradients clipped to norm 1, seed {seed}.
"""


def write_card(
    args: argparse.Namespace, model: PreTrainedModel, length: int, metric: tuple[str, float], **fields: str
) -> None:
    """The model card, README.md: `metric` (Hub name and value) goes into its metadata, `fields` into its text."""
    task = "text-classification" if args.task == "classify" else "text-generation"
    source = {"dataset_type": "text", "dataset_name": fields["corpus"], "dataset_split": "test"}
    data = ModelCardData(
        language="en" if args.data is None else None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["kermit", "linear-attention", "long-context"],
        model_name=args.output.name,
        eval_results=[EvalResult(task, **source, metric_type=metric[0], metric_value=round(metric[1], 4))],
    )
    content = CARD.format(
        title=args.output.name,
        command="python -m kermit_hf.quickstart" + (" classify" if args.task == "classify" else ""),
        parameters=model.num_parameters(),
        steps=args.steps,
        batch=args.batch_size,
        length=f"{length:,}",
        rate=args.learning_rate,
        warmup=args.steps // 10,
        seed=args.seed,
        **fields,
    )
    ModelCard(f"---\n{data}\n---\n{content}").save(args.output / "README.md")
