"""Turns a published Nyströmformer into our encoder with the same weights, or ours back into transformers' class.

    python -m conversion_scripts.convert_nystromformer SOURCE OUTPUT
    python -m conversion_scripts.convert_nystromformer OURS OUTPUT --to nystromformer

SOURCE is a checkpoint of transformers' own Nyströmformer or a file that the authors' code wrote (`cp-0099.model`). The
tensors pass through one at a time; the result and transformers' class are then compared at a length where that one works.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


if not __package__:
    # As a plain script: the folder above holds the packages.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import NystromformerConfig, PreTrainedModel

from conversion_scripts.card_facts import Parity
from conversion_scripts.cards import ConversionCard, check_card_tools
from conversion_scripts.checkpoint_files import (
    Checkpoint,
    ConversionError,
    atomic_folder,
    check_output,
    find_folder,
    in_one_line,
)
from conversion_scripts.command_line import (
    ConversionOptions,
    Setting,
    add_file_options,
    add_setting,
    config_settings,
    run,
)
from conversion_scripts.command_line import make_parser as make_shared_parser
from conversion_scripts.companions import (
    check_tokenizer,
    check_vocabulary,
    load_config,
    load_tokenizer,
    write_companions,
)
from conversion_scripts.encoder_weights import (
    HEADS,
    POSITION_TABLE,
    Naming,
    Plan,
    choose_length,
    extend_positions,
    head_of,
    plan_weights,
    prompt_for,
    with_fields,
    write_weights,
)
from conversion_scripts.original_nystromformer import open_original, rename_original
from conversion_scripts.verification import VERIFIED_TOKENS, compare
from nystromformer_hf import NystromformerHFConfig
from nystromformer_hf.configuration_nystromformer_hf import IN_TREE_MODEL_TYPE
from nystromformer_hf.modeling_nystromformer_hf import AUTO_CLASSES, OWN_WEIGHTS, POSITION_OFFSET


TARGETS = (NystromformerHFConfig.model_type, IN_TREE_MODEL_TYPE)
# Ours and transformers' have the same names.
OWN_HEADS = {
    "AutoModel": {},
    "AutoModelForMaskedLM": {"cls.": "cls."},
    "AutoModelForSequenceClassification": {"classifier.": "classifier."},
    "AutoModelForTokenClassification": {"classifier.": "classifier."},
    "AutoModelForQuestionAnswering": {"qa_outputs.": "qa_outputs."},
    "AutoModelForMultipleChoice": {"pre_classifier.": "pre_classifier.", "classifier.": "classifier."},
}
# Fields of our attention that are no settings of this script.
SOURCE_DECIDES = ("max_position_embeddings", "conv_kernel_size", "classifier_activation")
# What transformers' class does, where its attention is not softmax, and cannot do otherwise.
IN_TREE_ATTENTION = {
    "inverse_iterations": 6,
    "inverse_init": "original",
    "inverse_regularization": None,
    "landmark_refinement_steps": 0,
}


class Source(NamedTuple):
    """A checkpoint to convert. `folder`: of the files that go along. `config`: ours, for the same function. `auto_class`: of
    the head. `model_class`: what loads it, None for files of the authors' code."""

    checkpoint: Checkpoint
    folder: Path
    config: NystromformerHFConfig
    auto_class: str
    rename: Callable[[str], str | None]
    model_class: type[PreTrainedModel] | None = None


def convert(
    source: str,
    output: str | Path,
    to: str = NystromformerHFConfig.model_type,
    settings: dict[str, Any] | None = None,
    *,
    head: str | None = None,
    max_position_embeddings: int | None = None,
    segment_means_seq_len: int | None = None,
    config_file: str | Path | None = None,
    num_attention_heads: int | None = None,
    **options: Any,
) -> float | None:
    """Converts `source` (folder, Hub id or one of the authors' files) into the folder `output`.

    Args:
        to: one of `TARGETS`.
        settings: fields of `NystromformerHFConfig` that the source does not decide, for our encoder as the result.
        head: key of `HEADS`; the source's own if None. Weights of other heads are refused in that case.
        max_position_embeddings: positions of the result, to which the source's are repeated.
        segment_means_seq_len: the one length at which transformers' class, as the result, will work.
        config_file: the authors' JSON or transformers' for one of the authors' files; by default `config.json` beside it, or in
            the folder above.
        num_attention_heads: of one of the authors' files whose config and convolution do not tell.
        options: fields of `ConversionOptions`; what the result is compared with is transformers' class.

    Returns the largest difference of two outputs, None where none were compared. Raises `ConversionError`, and leaves no
    output, where the source is damaged, cannot be mapped, does not fit on the disk, or comes out different.
    """
    output, settings, options = Path(output).expanduser().resolve(), settings or {}, ConversionOptions(**options)
    if unknown := sorted(settings.keys() - attention_settings().keys()):
        raise ConversionError(f"{', '.join(unknown)}: the source decides this; leave it out")
    opened = open_source(
        source, options.revision, head, config_file, num_attention_heads, settings.get("num_landmarks")
    )
    check_output(output, options.overwrite, opened.folder)
    check_direction(source, opened, to)
    if options.verify not in (None, "float32") and not is_softmax(opened.config):
        raise ConversionError(
            f"verify={options.verify}: transformers' class fails in that dtype; allowed are float32 and no"
        )
    length = choose_length(opened.config.max_position_embeddings, max_position_embeddings)
    if to == IN_TREE_MODEL_TYPE:
        config = in_tree_config(opened.config, opened.auto_class, length, segment_means_seq_len)
    else:
        config = with_fields(opened.config, max_position_embeddings=length, **settings)
    with torch.device("meta"):
        model = classes_of(to)[opened.auto_class](config)
    plan = plan_conversion(opened, model)
    tokenizer = load_tokenizer(opened.folder)
    check_vocabulary(config, None if tokenizer is None else len(tokenizer))
    card = None
    if to == NystromformerHFConfig.model_type:  # transformers' class has no card of ours
        check_card_tools(to)
        file = "" if opened.model_class else Path(source).name
        card = ConversionCard(to, opened.folder, options.card, options.say, file=file)
    with atomic_folder(output) as partial:
        write_weights(partial, opened.checkpoint, plan, options.max_shard_bytes, options.say)
        write_companions(partial, opened.folder, model, plan.dtype, tokenizer)
        check_tokenizer(partial, tokenizer)
        if options.verify is None:
            parity = None
        elif to == IN_TREE_MODEL_TYPE:
            parity = compare_back(opened, partial, config, options)
        else:
            parity = compare_with_in_tree(opened, partial, length, options)
        if card is not None:
            positions = opened.config.max_position_embeddings
            remarks = [f"The {positions:,} trained positions are repeated to {length:,}."] if length > positions else []
            card.write(partial, output.name, config, attention_settings(), parity, remarks)
    return None if parity is None else parity.difference


def classes_of(model_type: str) -> dict[str, type[PreTrainedModel]]:
    """The classes of one of `TARGETS` by their Auto class."""
    if model_type == NystromformerHFConfig.model_type:
        return AUTO_CLASSES
    names = {auto: head.__name__.replace("NystromformerHF", "Nystromformer") for auto, head in AUTO_CLASSES.items()}
    return {auto: getattr(transformers, name) for auto, name in names.items()}


def open_source(
    source: str,
    revision: str | None,
    head: str | None,
    config_file: str | Path | None,
    num_attention_heads: int | None,
    num_landmarks: int | None,
) -> Source:
    """What `source` names; the last three arguments are for one of the authors' files."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        checkpoint, config, auto_class = open_original(
            path.resolve(), head, config_file, num_attention_heads, num_landmarks
        )
        rename = functools.partial(rename_original, auto_class=auto_class)
        return Source(checkpoint, checkpoint.folder, config, auto_class, rename)
    return open_folder(find_folder(source, revision, "a folder, a Hub id, and a file of the authors'"), head)


def open_folder(folder: Path, head: str | None) -> Source:
    """A checkpoint of transformers' class or of ours."""
    config = ours = load_config(folder, TARGETS)
    if config.model_type == IN_TREE_MODEL_TYPE:
        try:
            ours = NystromformerHFConfig.from_nystromformer(config)
        except Exception as error:  # fields may hold anything
            raise ConversionError(
                f"{folder / 'config.json'} cannot be read ({in_one_line(error)}); repair it"
            ) from error
    auto_class = head_of(config, head)
    rename = Naming("nystromformer.", OWN_HEADS, auto_class, head is not None)
    return Source(Checkpoint(folder), folder, ours, auto_class, rename, classes_of(config.model_type)[auto_class])


def check_direction(source: str, opened: Source, to: str) -> None:
    is_ours = opened.model_class is AUTO_CLASSES[opened.auto_class]
    if to == IN_TREE_MODEL_TYPE and not is_ours:
        raise ConversionError(
            f"{source} is no {TARGETS[0]}, from which --to {to} is the way back; convert it to that first"
        )
    if to != IN_TREE_MODEL_TYPE and is_ours:
        raise ConversionError(f"{source} is a {to} already; allowed is --to {IN_TREE_MODEL_TYPE}, the way back")


def plan_conversion(opened: Source, model: PreTrainedModel) -> Plan:
    """Says where every weight of `model` comes from, which is of our class or of transformers'."""
    body = "" if opened.auto_class == "AutoModel" else "nystromformer."
    extend = functools.partial(
        extend_positions,
        num_rows=opened.config.max_position_embeddings + POSITION_OFFSET,
        first=POSITION_OFFSET,
        max_position_embeddings=model.config.max_position_embeddings,
    )
    change = {body + POSITION_TABLE: extend}
    kernel_size = opened.config.conv_kernel_size
    if kernel_size is not None and model.config.conv_kernel_size > kernel_size:
        change |= {name: add_tap for name in model.state_dict() if name.endswith(OWN_WEIGHTS)}
    return plan_weights(
        opened.checkpoint,
        model,
        opened.rename,
        change,
        zeros=OWN_WEIGHTS[0] if kernel_size is None else "",
        source_names=[] if opened.model_class is None else model.state_dict(),
    )


def is_softmax(config: NystromformerHFConfig) -> bool:
    """Whether there are as many landmarks as positions: all texts that transformers' class reads are attended exactly."""
    return config.num_landmarks >= config.max_position_embeddings


def in_tree_config(
    config: NystromformerHFConfig, auto_class: str, max_position_embeddings: int, seq_len: int | None
) -> NystromformerConfig:
    """Transformers' config for the same function. `ConversionError` names the field that it has no counterpart for."""
    if not is_softmax(config):
        for name, allowed in IN_TREE_ATTENTION.items():
            if getattr(config, name) != allowed:
                raise ConversionError(
                    f"{name}={getattr(config, name)} has no counterpart in transformers' class; allowed is {allowed}"
                )
    used = {"AutoModelForSequenceClassification": config.hidden_act, "AutoModelForMultipleChoice": "relu"}
    if config.classifier_activation not in (None, used.get(auto_class, config.classifier_activation)):
        raise ConversionError(
            f"classifier_activation={config.classifier_activation!r} has no counterpart in transformers' class, whose head has "
            f"{used[auto_class]!r}; leave the head out with --head none"
        )
    common = NystromformerConfig.__annotations__.keys() | {"id2label", "label2id", "problem_type", "dtype"}
    fields = {name: value for name, value in config.to_dict().items() if name in common}
    kernel_size = config.conv_kernel_size
    # Transformers' class knows odd sizes only, and no model without convolution.
    fields["conv_kernel_size"] = 1 if kernel_size is None else kernel_size + 1 - kernel_size % 2
    fields["max_position_embeddings"] = max_position_embeddings
    fields["segment_means_seq_len"] = in_tree_length(config, max_position_embeddings, seq_len)
    return NystromformerConfig.from_dict(fields)


def in_tree_length(config: NystromformerHFConfig, max_position_embeddings: int, seq_len: int | None) -> int:
    """`segment_means_seq_len` of transformers' config: `num_landmarks` where its attention is softmax."""
    if is_softmax(config):
        if seq_len not in (None, config.num_landmarks):
            raise ConversionError(
                f"segment_means_seq_len={seq_len}: with num_landmarks={config.num_landmarks} attention is exact at any length; "
                "leave it out"
            )
        if max_position_embeddings > config.num_landmarks:
            raise ConversionError(
                f"max_position_embeddings={max_position_embeddings} exceeds num_landmarks={config.num_landmarks}, up to which "
                "attention is exact; leave it out"
            )
        return config.num_landmarks
    longest = max_position_embeddings // config.num_landmarks * config.num_landmarks
    seq_len = longest if seq_len is None else seq_len
    if seq_len % config.num_landmarks or not config.num_landmarks < seq_len <= longest:
        raise ConversionError(
            f"segment_means_seq_len={seq_len} is no length at which transformers' class works; allowed are multiples of "
            f"num_landmarks={config.num_landmarks}, from two of them to {longest}"
        )
    return seq_len


def add_tap(weight: torch.Tensor) -> torch.Tensor:
    """A kernel (heads, 1, taps, 1) with a zero behind."""
    return F.pad(weight, (0, 0, 0, 1))


def compare_with_in_tree(
    source: Source, partial: Path, max_position_embeddings: int, options: ConversionOptions
) -> Parity | None:
    """Our encoder, with the source's attention, against transformers' class with the source's weights; for one of the authors'
    files, which that cannot load, with the same weights."""
    # Transformers' class fails with any other start of the iteration.
    config, seq_len = with_fields(source.config, inverse_init="original"), None
    tokens = min(VERIFIED_TOKENS, config.max_position_embeddings)
    if not is_softmax(config):
        at_most = min(config.max_position_embeddings, max(VERIFIED_TOKENS, 2 * config.num_landmarks))
        seq_len = tokens = at_most // config.num_landmarks * config.num_landmarks
        if tokens < 2 * config.num_landmarks:
            options.say(
                "not verified: transformers' class needs twice as many tokens as landmarks, but there are "
                f"max_position_embeddings={config.max_position_embeddings}"
            )
            return None
    is_original = source.model_class is None
    auto_class = "AutoModel" if is_original and config.classifier_activation else source.auto_class
    reference = with_fields(config, classifier_activation=None)
    reference = in_tree_config(reference, auto_class, config.max_position_embeddings, seq_len)
    if is_original:
        reference.max_position_embeddings = max_position_embeddings
    weights = partial if is_original else source.folder
    without_convolution = source.config.conv_kernel_size is None

    def load_reference(**kwargs) -> PreTrainedModel:
        model_class = classes_of(IN_TREE_MODEL_TYPE)[auto_class]
        model = model_class.from_pretrained(weights, config=reference, trust_remote_code=False, **kwargs)
        for name, parameter in model.named_parameters():
            if without_convolution and name.endswith(OWN_WEIGHTS):
                nn.init.zeros_(parameter)
        return model

    config = with_fields(config, max_position_embeddings=max_position_embeddings)
    load_converted = functools.partial(AUTO_CLASSES[auto_class].from_pretrained, partial, config=config)
    prompt = prompt_for(auto_class, config, tokens, options.seed)
    return compare(load_reference, load_converted, prompt, options.verify, options.say)


def compare_back(source: Source, partial: Path, config: NystromformerConfig, options: ConversionOptions) -> Parity:
    """Transformers' class, at its one length, against our encoder."""
    tokens = config.segment_means_seq_len
    if tokens == config.num_landmarks:
        tokens = min(VERIFIED_TOKENS, config.max_position_embeddings)
    return compare(
        functools.partial(source.model_class.from_pretrained, source.folder),
        functools.partial(classes_of(IN_TREE_MODEL_TYPE)[source.auto_class].from_pretrained, partial),
        prompt_for(source.auto_class, config, tokens, options.seed),
        options.verify,
        options.say,
    )


def attention_settings() -> dict[str, Setting]:
    """The fields of our config that become options."""
    return config_settings(NystromformerHFConfig, SOURCE_DECIDES)


EXAMPLES = """examples:
  from the Hub, with fewer landmarks
    %(prog)s uw-madison/nystromformer-512 ./nystromformer --num-landmarks 32
  a file that the authors' code wrote, with its config, for eight times as long texts
    %(prog)s ./nystrom-512/model/cp-0099.model ./nystromformer --config ./nystrom-512/config.json --max-position-embeddings 4096
  back to transformers' own class, which works at one length
    %(prog)s ./nystromformer ./in-tree --to nystromformer --segment-means-seq-len 512
"""


def make_parser() -> argparse.ArgumentParser:
    parser = make_shared_parser(
        "convert_nystromformer",
        "Turns a checkpoint of transformers' own Nyströmformer, or of its authors' code, into our encoder, or ours back into "
        "transformers' class, tensor by tensor, and compares the result with transformers' class. OUTPUT appears when it is "
        "whole, or not at all.",
        EXAMPLES,
        source="folder, Hub id, or a file of the authors' code (cp-0099.model)",
    )
    parser.add_argument(
        "--to", default=TARGETS[0], choices=TARGETS, help="architecture of the result (default: %(default)s)"
    )
    parser.add_argument(
        "--head", choices=HEADS, help="head to convert, others are left out (default: the source's own)"
    )
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="positions of the result, to which the source's are repeated (default: as many as the source has)",
    )
    parser.add_argument(
        "--segment-means-seq-len",
        type=int,
        metavar="N",
        help="the one length at which transformers' class will work (default: the longest)",
    )
    add_file_options(parser, seeded="the text that is compared")
    group = parser.add_argument_group("files of the authors' code")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="JSON of the authors' or of transformers' config (default: config.json beside SOURCE or in the folder above)",
    )
    group.add_argument(
        "--num-attention-heads", type=int, metavar="N", help="where neither config nor convolution tells them"
    )
    group = parser.add_argument_group("attention of nystromformer_hf", argument_default=argparse.SUPPRESS)
    for name, setting in attention_settings().items():
        add_setting(group, name, [setting], f"{setting.help} (default: the source's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    settings = {name: options[name] for name in attention_settings() if name in options}
    if settings and options["to"] == IN_TREE_MODEL_TYPE:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in settings)
        parser.error(f"{names}: not an option of --to {IN_TREE_MODEL_TYPE}")
    if options["segment_means_seq_len"] is not None and options["to"] != IN_TREE_MODEL_TYPE:
        parser.error(f"--segment-means-seq-len: an option of --to {IN_TREE_MODEL_TYPE} only")
    trust = ", trust_remote_code=True" if options["to"] == TARGETS[0] else ""
    run(
        "convert_nystromformer",
        convert,
        arguments,
        options,
        options["to"],
        settings,
        head=options["head"],
        max_position_embeddings=options["max_position_embeddings"],
        segment_means_seq_len=options["segment_means_seq_len"],
        config_file=options["config"],
        num_attention_heads=options["num_attention_heads"],
        hint=f"load it with AutoModel.from_pretrained(...{trust}), or the Auto class of its head",
    )


if __name__ == "__main__":
    main()
