"""From the weights of one encoder to those of another that is built like BERT, tensor by tensor."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from conversion_scripts.checkpoint_files import (
    Checkpoint,
    ConversionError,
    Entry,
    ShardWriter,
    check_entry,
    check_names,
    check_space,
    in_one_line,
    listed,
)
from conversion_scripts.verification import random_tokens
from nystromformer_hf import NystromformerHFConfig
from nystromformer_hf.modeling_nystromformer_hf import AUTO_CLASSES, POSITION_OFFSET


POSITION_TABLE = "embeddings.position_embeddings.weight"
# The heads by the name of their option.
HEADS = {
    "none": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
}
# Stored by older versions of transformers, and no weights.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")


def head_of(config: PreTrainedConfig, head: str | None) -> str:
    """The Auto class of the head that `head`, a key of `HEADS`, or else the config's `architectures` names."""
    if head is not None:
        return HEADS[head]
    architecture = (config.architectures or ["Model"])[0]
    suffix = (re.findall(r"(?:For[A-Z]\w+|(?<!LMHead)Model)$", architecture) or [architecture])[0]
    auto_class = "AutoModel" + suffix.replace("ForPreTraining", "ForMaskedLM").removeprefix("Model")
    if auto_class not in AUTO_CLASSES:
        raise ConversionError(
            f"architectures={config.architectures} names a head that cannot be mapped; name the one that you want instead with "
            f"--head: {', '.join(HEADS)}"
        )
    return auto_class


class Naming(NamedTuple):
    """How the names of a source's weights become those of our encoder with one head.

    Args:
        prefix: of the body's weights where the source has a head.
        heads: for each Auto class, what the beginnings of its weights' names become.
        head: the Auto class that is converted.
        others_are_left_out: whether weights of other heads are left out; else they are refused.
        left_out: beginnings of names, without prefix, that have no place in our encoder and are missed by nobody.
    """

    prefix: str
    heads: Mapping[str, Mapping[str, str]]
    head: str
    others_are_left_out: bool
    left_out: tuple[str, ...] = BUFFERS

    def __call__(self, name: str) -> str | None:
        """Our name, None for what is left out; what has no place keeps its name."""
        bare = name.removeprefix(self.prefix).replace("LayerNorm.gamma", "LayerNorm.weight")
        bare = bare.replace("LayerNorm.beta", "LayerNorm.bias")
        if bare in BUFFERS:
            return None
        if bare.startswith(("embeddings.", "encoder.")):
            return bare if self.head == "AutoModel" else f"nystromformer.{bare}"
        for beginning, ours in self.heads[self.head].items():
            if bare.startswith(beginning):
                return ours + bare.removeprefix(beginning)
        others = {beginning for names in self.heads.values() for beginning in names}
        if bare.startswith(self.left_out) or (self.others_are_left_out and bare.startswith(tuple(others))):
            return None
        return name


class Plan(NamedTuple):
    """`names`: the source's names of what is mapped, to ours. `entries`: ours, to what is in the source. `zeros`: shapes of
    what starts as zero. `left_out`: names of the source. `change`: what is done to single tensors, by our name. `num_bytes`
    of the result."""

    names: dict[str, str]
    entries: dict[str, Entry]
    zeros: dict[str, torch.Size]
    left_out: list[str]
    change: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    dtype: torch.dtype
    num_bytes: int


def plan_weights(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    rename: Callable[[str], str | None],
    change: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    *,
    zeros: str = "",
    source_names: Iterable[str] = (),
) -> Plan:
    """Says where every weight of `model` (on the meta device) comes from, before anything is read.

    Args:
        rename: our name of a weight of the source, None for one that is left out.
        change: what is done to single tensors, by our name; has to work on the meta device.
        zeros: ending of the weights that the source lacks and that start as zero; empty for none.
        source_names: names that a whole source has, for the message that says what is missing.

    Raises `ConversionError`, which names what is missing, too much, misshapen, or tied and yet different.
    """
    wanted = dict(model.state_dict())
    ties = model._tied_weights_keys if model.config.tie_word_embeddings else None
    ties = {alias: name for alias, name in (ties or {}).items() if wanted.pop(alias, None) is not None}
    names, left_out, unknown, firsts = {}, [], [], {}
    for name in checkpoint.entries:
        ours = rename(name)
        ours = ties.get(ours, ours)
        if ours is None:
            left_out.append(name)
        elif ours not in wanted:
            unknown.append(name)
        elif ours not in firsts:
            names[name] = ours
            firsts[ours] = name
        elif not torch.equal(checkpoint.read(name), checkpoint.read(firsts[ours])):
            raise ConversionError(
                f"{name} differs from {firsts[ours]}, but the model has one weight for both (tie_word_embeddings=true); set that "
                "to false, or remove the tensor that is not used"
            )
    entries = {ours: checkpoint.entries[name] for name, ours in names.items()}
    missing = {name: tensor.shape for name, tensor in wanted.items() if name not in entries}
    starting = {name: shape for name, shape in missing.items() if zeros and name.endswith(zeros)}
    if lost := sorted(missing.keys() - starting.keys()):
        theirs = {rename(name): name for name in source_names}
        lost = [theirs.get(name, name) for name in lost]
    check_names(checkpoint.folder, lost, unknown, "choose another head with --head")
    for name, entry in entries.items():
        check_entry(firsts[name], entry, wanted[name].shape, model.config, change.get(name, torch.Tensor.contiguous))
    words = next(entry for name, entry in entries.items() if name.endswith("embeddings.word_embeddings.weight"))
    dtypes = {name: entries[name].dtype if name in entries else words.dtype for name in wanted}
    num_bytes = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in wanted.items())
    return Plan(names, entries, starting, left_out, change, words.dtype, num_bytes)


def write_weights(
    partial: Path, checkpoint: Checkpoint, plan: Plan, max_shard_bytes: int, say: Callable[[str], None]
) -> None:
    """Reads, changes and writes one tensor after the other."""
    check_space(partial, plan.num_bytes)
    say(f"{len(plan.entries)} tensors, {len(plan.zeros)} new ones of zeros, {plan.num_bytes / 2**20:,.0f} MiB")
    if names := [name for name in plan.left_out if not name.endswith(BUFFERS)]:
        say(f"left out, for they have no place in the result: {listed(names)}")
    writer = ShardWriter(partial, max_shard_bytes)
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc="converting", disable=None) as progress:
        for name, tensor in checkpoint.tensors():
            if (ours := plan.names.get(name)) is not None:
                tensor = plan.change.get(ours, torch.Tensor.contiguous)(tensor)
                writer.add(ours, tensor)
                progress.update(tensor.nbytes)
        for ours, shape in plan.zeros.items():
            writer.add(ours, torch.zeros(shape, dtype=plan.dtype))
            progress.update(shape.numel() * plan.dtype.itemsize)
    writer.finish()


def extend_positions(table: torch.Tensor, num_rows: int, first: int, max_position_embeddings: int) -> torch.Tensor:
    """Our position table (max_position_embeddings + 2, hidden): that of a source, repeated as often as it takes.

    Args:
        table: (num_rows, hidden).
        first: its row for the first token of a text; ours is 2, and nothing reads the rows before.

    Raises `ConversionError` where it does not have `num_rows`.
    """
    if table.shape[0] != num_rows:
        raise ConversionError(
            f"{POSITION_TABLE} has {table.shape[0]} rows, but the config makes it {num_rows}; repair max_position_embeddings in "
            "config.json, or copy the checkpoint again"
        )
    unused = table[max(first - POSITION_OFFSET, 0) : first]
    positions = table[first:]
    repeats = -(-max_position_embeddings // len(positions))
    return torch.cat(
        [
            F.pad(unused, (0, 0, POSITION_OFFSET - len(unused), 0)),
            positions.repeat(repeats, 1)[:max_position_embeddings],
        ]
    )


def choose_length(num_positions: int, max_position_embeddings: int | None) -> int:
    """The result's `max_position_embeddings`; the source's number of positions where none is asked for."""
    if max_position_embeddings is None:
        return num_positions
    if max_position_embeddings < num_positions:
        raise ConversionError(
            f"max_position_embeddings={max_position_embeddings} is less than the source has; allowed are {num_positions} and more"
        )
    return max_position_embeddings


def with_fields(config: NystromformerHFConfig, **fields) -> NystromformerHFConfig:
    """A copy with other fields, checked."""
    own = config.to_dict()
    own.pop("auto_map", None)
    if "num_labels" in fields:
        del own["id2label"], own["label2id"]
    try:
        return NystromformerHFConfig.from_dict({**own, **fields})
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(in_one_line(error)) from error


def prompt_for(head: str, config: PreTrainedConfig, length: int, seed: int) -> dict[str, torch.Tensor]:
    """`input_ids` of one text without padding, for a model with `head`."""
    tokens = random_tokens(config.vocab_size, length, seed)
    if config.pad_token_id is not None:
        tokens = tokens.where(tokens != config.pad_token_id, (config.pad_token_id + 1) % config.vocab_size)
    return {"input_ids": tokens[None] if head == "AutoModelForMultipleChoice" else tokens}
