"""Files of the Nyströmformer's authors (`cp-0099.model`): the names of their weights, and their configs.

Their code is at github.com/mlpen/Nystromformer; its pretraining saves `{"model_state_dict": ...}`.
"""

import re
from pathlib import Path
from typing import Any

from conversion_scripts.checkpoint_files import Checkpoint, ConversionError, TrainingCheckpoint, in_one_line, read_json
from conversion_scripts.encoder_weights import BUFFERS, HEADS, Naming, with_fields
from nystromformer_hf import NystromformerHFConfig
from nystromformer_hf.modeling_nystromformer_hf import POSITION_OFFSET


# The authors' names; "classifer" is their spelling.
ORIGINAL_HEADS = {
    "AutoModel": {},
    "AutoModelForMaskedLM": {
        "mlm.dense.": "cls.predictions.transform.dense.",
        "mlm.norm.": "cls.predictions.transform.LayerNorm.",
        "mlm.mlm_class.": "cls.predictions.decoder.",
    },
    "AutoModelForSequenceClassification": {
        "sen_classifer.dense.": "classifier.dense.",
        "sen_classifer.classifer.": "classifier.out_proj.",
    },
    "AutoModelForQuestionAnswering": {"qahead.": "qa_outputs."},
}
ORIGINAL_LAYER = {
    "mha.W_q": "attention.self.query",
    "mha.W_k": "attention.self.key",
    "mha.W_v": "attention.self.value",
    "mha.attn.conv": "attention.self.conv",
    "mha.ff": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "ff1": "intermediate.dense",
    "ff2": "output.dense",
    "norm2": "output.LayerNorm",
}
# Fields of transformers' config that one may hold that was written for one of the authors' files.
SHARED_FIELDS = (
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def open_original(
    path: Path,
    head: str | None,
    config_file: str | Path | None,
    num_attention_heads: int | None,
    num_landmarks: int | None,
) -> tuple[Checkpoint, NystromformerHFConfig, str]:
    """The weights in a file of the authors' code, our config for the same function and the Auto class of the head.

    What the config does not say is read off the shapes.

    Args:
        path: of the file.
        head: key of `HEADS`; the one that was trained last if None.
        config_file: JSON; by default `config.json` beside the file or in the folder above, if there is one.
        num_attention_heads, num_landmarks: where nothing else tells them.

    Raises `ConversionError`.
    """
    checkpoint = TrainingCheckpoint(path)
    fields = read_original_config(path, config_file)
    auto_class = original_head(checkpoint, head)
    config = original_config(checkpoint, fields, num_attention_heads, num_landmarks)
    if auto_class == "AutoModelForSequenceClassification":
        num_labels = checkpoint.entries["sen_classifer.classifer.weight"].shape[0]
        config = with_fields(config, num_labels=num_labels, classifier_activation="tanh")
    return checkpoint, config, auto_class


def rename_original(name: str, auto_class: str) -> str | None:
    """Our name of a weight, None for one that is left out; what has no place keeps its name."""
    naming = Naming("model.", ORIGINAL_HEADS, auto_class, True, (*BUFFERS, "pooler.", "sen_class."))
    if name.endswith("conv.bias"):
        return None
    match = re.fullmatch(r"model\.transformer_(\d+)\.(.+)\.(weight|bias)", name)
    if match and match[2] in ORIGINAL_LAYER:
        return naming(f"encoder.layer.{match[1]}.{ORIGINAL_LAYER[match[2]]}.{match[3]}")
    return naming(name.replace("model.embeddings.norm.", "model.embeddings.LayerNorm."))


def original_head(checkpoint: Checkpoint, head: str | None) -> str:
    """The Auto class of the head that `head` names, or else of the one that was trained last."""
    if head is not None:
        if HEADS[head] not in ORIGINAL_HEADS:
            raise ConversionError(
                f"head={head}: the authors' code has no such head; allowed are none, {_original_heads()}"
            )
        return HEADS[head]
    entries = checkpoint.entries
    if "qahead.weight" in entries and entries["qahead.weight"].shape[0] != 2:
        raise ConversionError(
            "qahead.weight has one output, for the choice of a candidate in WikiHop, which no head of ours has; choose another "
            f"with --head: none, {_original_heads()}"
        )
    for auto_class in ("AutoModelForSequenceClassification", "AutoModelForQuestionAnswering", "AutoModelForMaskedLM"):
        if any(name.startswith(tuple(ORIGINAL_HEADS[auto_class])) for name in entries):
            return auto_class
    return "AutoModel"


def _original_heads() -> str:
    return ", ".join(name for name, auto_class in HEADS.items() if ORIGINAL_HEADS.get(auto_class))


def read_original_config(path: Path, config_file: str | Path | None) -> dict[str, Any]:
    """The fields of the model in the JSON that belongs to one of the authors' files; none where there is no JSON."""
    if config_file is not None:
        candidates = [Path(config_file).expanduser()]
    else:
        candidates = [folder / "config.json" for folder in (path.parent, path.parent.parent)]
    for candidate in candidates:
        if candidate.is_file() or config_file is not None:
            content = read_json(candidate)
            return content["model"] if isinstance(content.get("model"), dict) else content
    return {}


def original_config(
    checkpoint: Checkpoint, fields: dict[str, Any], num_attention_heads: int | None, num_landmarks: int | None
) -> NystromformerHFConfig:
    """Our config for one of the authors' files. `ConversionError` where its JSON is of another model."""
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    try:
        vocab_size, hidden_size = shapes["model.embeddings.word_embeddings.weight"]
        layers = [re.match(r"model\.transformer_(\d+)\.", name) for name in shapes]
        read_off = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": len({match[1] for match in layers if match}),
            "intermediate_size": shapes["model.transformer_0.ff1.weight"][0],
            "max_position_embeddings": shapes["model.embeddings.position_embeddings.weight"][0] - POSITION_OFFSET,
            "type_vocab_size": shapes["model.embeddings.token_type_embeddings.weight"][0],
        }
    except (KeyError, ValueError) as error:
        raise ConversionError(
            f"{checkpoint.paths[0]} lacks {in_one_line(error)}: it is no Nyströmformer of the authors' code"
        ) from error
    conv = shapes.get("model.transformer_0.mha.attn.conv.weight")
    read_off["conv_kernel_size"] = None if conv is None else conv[2]
    heads = {"num_head": None if conv is None else conv[0], "option": num_attention_heads}
    heads["JSON"] = fields.get("num_head", fields.get("num_attention_heads"))
    heads = {value for value in heads.values() if value is not None}
    if len(heads) != 1:
        raise ConversionError(
            f"num_attention_heads: {'they contradict each other' if heads else 'nothing says how many'} (config, convolution and "
            f"--num-attention-heads say {sorted(heads) or 'nothing'}); name the file of the config with --config"
        )
    read_off["num_attention_heads"] = heads.pop()
    theirs = {
        "max_seq_len": "max_position_embeddings",
        "embedding_dim": "hidden_size",
        "transformer_dim": "hidden_size",
        "transformer_hidden_dim": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_sen_type": "type_vocab_size",
    }
    for name, value in fields.items():
        own = read_off.get(theirs.get(name, name), value)
        if name != "vocab_size" and own != value:  # the authors' code takes the tokenizer's
            raise ConversionError(
                f"{name}={value} in the config, but {own} in {checkpoint.paths[0].name}: they belong to different models; name the "
                "right file with --config"
            )
    attention = original_attention(fields, read_off["max_position_embeddings"], num_landmarks)
    shared = {name: fields[name] for name in SHARED_FIELDS if name in fields}
    return with_fields(NystromformerHFConfig(), **{**read_off, **attention, **shared})


def original_attention(fields: dict[str, Any], num_positions: int, num_landmarks: int | None) -> dict[str, Any]:
    """Fields of our config that only the JSON of one of the authors' files can tell."""
    attn_type = fields.get("attn_type", "nystrom")
    if attn_type not in ("nystrom", "softmax"):
        raise ConversionError(f"attn_type={attn_type!r} cannot be mapped; allowed are nystrom, softmax")
    dropout = fields.get("dropout_prob", NystromformerHFConfig.hidden_dropout_prob)
    result = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if fields.get("inv_coeff_init_option", False) not in (False, "original"):
        result["inverse_init"] = "exact"
    landmarks, seq_len = fields.get("num_landmarks"), fields.get("seq_len", fields.get("segment_means_seq_len"))
    if attn_type == "softmax" or (landmarks is not None and landmarks == seq_len):
        return {**result, "num_landmarks": num_positions}
    # Released with the two swapped: 512 landmarks for 64 tokens.
    landmarks = min((value for value in (landmarks, seq_len) if value is not None), default=None)
    if landmarks is None and num_landmarks is None:
        raise ConversionError(
            "nothing says with how many landmarks the file was trained; name its config with --config, or give --num-landmarks"
        )
    return {**result, "num_landmarks": num_landmarks if landmarks is None else landmarks}
