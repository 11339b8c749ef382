"""Turns a BERT, RoBERTa or sentence encoder into a Nyströmformer encoder with the same weights.

    python -m conversion_scripts.convert_bert_to_nystromformer SOURCE OUTPUT --num-landmarks 128

Texts of at most `--num-landmarks` tokens come out as before; longer ones, which cost linear instead of quadratic time,
approximately. The tensors pass through one at a time; the original and the result are then compared on a short text.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


if not __package__:
    # As a plain script: the folder above holds the packages.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from conversion_scripts.cards import ConversionCard, check_card_tools
from conversion_scripts.checkpoint_files import (
    Checkpoint,
    ConversionError,
    atomic_folder,
    check_output,
    find_folder,
    in_one_line,
    read_json,
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
    BUFFERS,
    HEADS,
    POSITION_TABLE,
    Naming,
    choose_length,
    extend_positions,
    head_of,
    plan_weights,
    prompt_for,
    write_weights,
)
from conversion_scripts.verification import VERIFIED_TOKENS, compare
from nystromformer_hf import NystromformerHFConfig
from nystromformer_hf.modeling_nystromformer_hf import AUTO_CLASSES, OWN_WEIGHTS


BERT_HEADS = {
    "AutoModel": {},
    "AutoModelForMaskedLM": {"cls.predictions.": "cls.predictions."},
    # BERT's pooler is a dense layer and tanh, read by its classifier: the two layers of our head.
    "AutoModelForSequenceClassification": {"pooler.dense.": "classifier.dense.", "classifier.": "classifier.out_proj."},
    "AutoModelForTokenClassification": {"classifier.": "classifier."},
    "AutoModelForQuestionAnswering": {"qa_outputs.": "qa_outputs."},
    "AutoModelForMultipleChoice": {"pooler.dense.": "pre_classifier.", "classifier.": "classifier."},
}
ROBERTA_HEADS = {
    **BERT_HEADS,
    "AutoModelForMaskedLM": {
        "lm_head.dense.": "cls.predictions.transform.dense.",
        "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
        "lm_head.decoder.": "cls.predictions.decoder.",
        "lm_head.bias": "cls.predictions.bias",
    },
    "AutoModelForSequenceClassification": {"classifier.": "classifier."},
}
CLASSIFIER_ACTIVATION = "tanh"
# The pooled output, which our encoder does not return, and the prediction of the next sentence.
LEFT_OUT = (*BUFFERS, "pooler.", "cls.seq_relationship.")


class Family(NamedTuple):
    """`positions_follow_padding`: the position table starts behind the row of the padding token."""

    prefix: str
    heads: dict[str, dict[str, str]]
    positions_follow_padding: bool


ROBERTA = Family("roberta.", ROBERTA_HEADS, positions_follow_padding=True)
FAMILIES = {
    "bert": Family("bert.", BERT_HEADS, positions_follow_padding=False),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
}
# Fields that mean the same in source and result.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "id2label",
    "label2id",
    "problem_type",
)
# Fields of our attention that are no settings of this script.
SOURCE_DECIDES = ("max_position_embeddings", "attention_probs_dropout_prob", "classifier_activation")
# What a model that was trained with ordinary attention wants otherwise than the published Nyströmformers.
DEFAULTS = {"conv_kernel_size": None, "landmark_refinement_steps": 1}


def convert(
    source: str,
    output: str | Path,
    settings: dict[str, Any] | None = None,
    *,
    head: str | None = None,
    max_position_embeddings: int | None = None,
    **options: Any,
) -> float | None:
    """Converts the checkpoint `source` (folder or Hub id) into the folder `output`.

    Args:
        settings: fields of `NystromformerHFConfig` that the source does not decide; `DEFAULTS` otherwise.
        head: key of `HEADS`; that of the config's `architectures` if None. Weights of other heads are refused in that case.
        max_position_embeddings: positions of the result, to which the source's are repeated.
        options: fields of `ConversionOptions`.

    Returns the largest difference of two outputs, None where none were compared. Raises `ConversionError`, and leaves no
    output, where the source is damaged, cannot be mapped, does not fit on the disk, or comes out different.
    """
    output, options = Path(output).expanduser().resolve(), ConversionOptions(**options)
    check_card_tools(NystromformerHFConfig.model_type)
    folder = find_folder(source, options.revision)
    check_output(output, options.overwrite, folder)
    source_config = read_config(folder)
    family, auto_class = FAMILIES[source_config.model_type], head_of(source_config, head)
    check_head(source_config, auto_class)
    first = source_config.pad_token_id + 1 if family.positions_follow_padding else 0
    num_positions = source_config.max_position_embeddings - first
    length = choose_length(num_positions, max_position_embeddings)
    config = target_config(source_config, length, settings or {})
    with torch.device("meta"):
        model = AUTO_CLASSES[auto_class](config)
        source_names = list(getattr(transformers, auto_class).from_config(source_config).state_dict())
    checkpoint = Checkpoint(folder)
    rename = Naming(family.prefix, family.heads, auto_class, head is not None, LEFT_OUT)
    body = "" if auto_class == "AutoModel" else "nystromformer."
    change = {
        body + POSITION_TABLE: functools.partial(
            extend_positions,
            num_rows=source_config.max_position_embeddings,
            first=first,
            max_position_embeddings=length,
        )
    }
    plan = plan_weights(checkpoint, model, rename, change, zeros=OWN_WEIGHTS[0], source_names=source_names)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(config, None if tokenizer is None else len(tokenizer))
    card = ConversionCard(NystromformerHFConfig.model_type, folder, options.card, options.say)
    with atomic_folder(output) as partial:
        write_weights(partial, checkpoint, plan, options.max_shard_bytes, options.say)
        write_companions(partial, folder, model, plan.dtype, tokenizer)
        check_tokenizer(partial, tokenizer)
        if length > num_positions:
            allow_length(partial, length)
        parity = None
        if options.verify is not None:
            tokens = min(config.num_landmarks, num_positions, VERIFIED_TOKENS)
            parity = compare(
                functools.partial(getattr(transformers, auto_class).from_pretrained, folder, trust_remote_code=False),
                functools.partial(type(model).from_pretrained, partial),
                prompt_for(auto_class, config, tokens, options.seed),
                options.verify,
                options.say,
            )
        remarks = remarks_on(length, num_positions, config)
        card.write(partial, output.name, config, attention_settings(), parity, remarks)
    return None if parity is None else parity.difference


def remarks_on(length: int, num_positions: int, config: NystromformerHFConfig) -> list[str]:
    """What the model card says of how the weights came about."""
    remarks = []
    if length > num_positions:
        remarks.append(f"The {num_positions:,} trained positions are repeated to {length:,}.")
    if config.conv_kernel_size is not None:
        remarks.append("The convolution of the values starts as zero.")
    return remarks


def read_config(folder: Path) -> PreTrainedConfig:
    """The source's config, of one of the `FAMILIES` and without what our encoder has not."""
    path, config = folder / "config.json", load_config(folder, FAMILIES)
    for name, allowed in (
        ("is_decoder", False),
        ("add_cross_attention", False),
        ("position_embedding_type", "absolute"),
    ):
        if getattr(config, name, allowed) != allowed:
            raise ConversionError(f"{name}={getattr(config, name)} in {path} cannot be mapped; allowed is {allowed}")
    if FAMILIES[config.model_type].positions_follow_padding and config.pad_token_id is None:
        raise ConversionError(
            f"pad_token_id=None in {path}: the positions of {config.model_type} start behind it; set it"
        )
    return config


def check_head(config: PreTrainedConfig, auto_class: str) -> None:
    """RoBERTa's language model head has an activation of its own."""
    if auto_class == "AutoModelForMaskedLM" and config.model_type != "bert" and config.hidden_act != "gelu":
        raise ConversionError(
            f"hidden_act={config.hidden_act!r} cannot be mapped with the head for masked language modelling, which has 'gelu' in "
            f"{config.model_type} and hidden_act in ours; leave it out with --head none"
        )


def target_config(source: PreTrainedConfig, max_position_embeddings: int, settings: dict) -> NystromformerHFConfig:
    """Our config: the body from the source, attention from `settings`."""
    fields = {name: getattr(source, name) for name in SHARED_FIELDS}
    fields["max_position_embeddings"] = max_position_embeddings
    fields["classifier_activation"] = CLASSIFIER_ACTIVATION
    if taken := sorted(settings.keys() & fields.keys()):
        raise ConversionError(f"{', '.join(taken)}: the source decides this; leave it out")
    try:
        return NystromformerHFConfig(**fields, **{**DEFAULTS, **settings})
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(in_one_line(error)) from error


def allow_length(partial: Path, length: int) -> None:
    """Raises the number of tokens at which the tokenizer and a sentence encoder cut texts off."""
    fields = dict.fromkeys(partial.glob("sentence_*_config.json"), "max_seq_length")
    fields |= dict.fromkeys(partial.glob("tokenizer_config.json"), "model_max_length")
    for path, field in fields.items():
        text = json.dumps({**read_json(path), field: length}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def attention_settings() -> dict[str, Setting]:
    """The fields of our config that become options, with the defaults of this script."""
    settings = config_settings(NystromformerHFConfig, SOURCE_DECIDES)
    return {name: setting._replace(default=DEFAULTS.get(name, setting.default)) for name, setting in settings.items()}


EXAMPLES = """examples:
  a sentence encoder for texts of up to 2,048 tokens
    %(prog)s sentence-transformers/all-MiniLM-L6-v2 ./minilm-nystrom --num-landmarks 128 --max-position-embeddings 2048
  RoBERTa with a convolution that starts as zero, pushed
    %(prog)s FacebookAI/roberta-base ./roberta-nystrom --num-landmarks 256 --conv-kernel-size 65 --push-to-hub me/roberta-nystrom
  the body of a classifier
    %(prog)s ./my-classifier ./nystrom --head none
"""


def make_parser() -> argparse.ArgumentParser:
    parser = make_shared_parser(
        "convert_bert_to_nystromformer",
        f"Turns a BERT-shaped checkpoint ({', '.join(FAMILIES)}) into a Nyströmformer encoder, tensor by tensor, and compares "
        "the two on a text of at most as many tokens as landmarks. OUTPUT appears when it is whole, or not at all.",
        EXAMPLES,
        source="folder or Hub id",
    )
    parser.add_argument(
        "--head", choices=HEADS, help="head to convert, others are left out (default: that of the config)"
    )
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="positions of the result, to which the source's are repeated (default: as many as the source has)",
    )
    add_file_options(parser, seeded="the text that is compared")
    group = parser.add_argument_group("attention", argument_default=argparse.SUPPRESS)
    for name, setting in attention_settings().items():
        text = f"{setting.help} (default: {setting.default})"
        if name == "conv_kernel_size":
            text += ". Here it starts as zero, which changes nothing until training"
        add_setting(group, name, [setting], text)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = vars(make_parser().parse_args(arguments))
    run(
        "convert_bert_to_nystromformer",
        convert,
        arguments,
        options,
        {name: options[name] for name in attention_settings() if name in options},
        head=options["head"],
        max_position_embeddings=options["max_position_embeddings"],
        hint="load it with AutoModel.from_pretrained(..., trust_remote_code=True), or the Auto class of another head",
    )


if __name__ == "__main__":
    main()
