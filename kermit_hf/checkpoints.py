"""Loading a checkpoint, with errors that say which file is damaged and which keys are missing."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file


# Arguments of `from_pretrained` that say where a checkpoint is looked up.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def load_whole(
    load: Callable, source, *args, own_weights: tuple[str, ...] = (), output_loading_info: bool = False, **kwargs
):
    """`load`, a `from_pretrained` of transformers, but where that only warns that weights of the body are missing, raises
    `ValueError`: the checkpoint is of another architecture. A missing head is what fine-tuning starts from, and so are
    keys that end with one of `own_weights`, parts that can be switched on for a model trained without. With
    `output_loading_info` the missing keys are returned instead. Raises `ValueError` too for a damaged file, naming it.
    """
    try:
        model, info = load(source, *args, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(
            f"{source} holds a damaged checkpoint ({error}): {damage(source, **kwargs)}; copy or download it again"
        ) from error
    if output_loading_info:
        return model, info
    missing = missing_keys(model, info, own_weights)
    if missing and source is not None:
        unused = sorted(info["unexpected_keys"])
        raise ValueError(
            f"{source} is not a whole checkpoint of {type(model).__name__} with this config: it lacks {listed(missing)}"
            + (f"; unused here are its {listed(unused)}" if unused else "")
            + ". A checkpoint of another model is converted first, by one of the conversion_scripts"
        )
    return model


def missing_keys(model: PreTrainedModel, info: dict, own_weights: tuple[str, ...]) -> list[str]:
    """Weights of the body that were not in a checkpoint and that nothing but training could replace."""
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    missing = {key for key in info["missing_keys"] if key.startswith(body)}
    for ending in own_weights:
        # A model trained without this part lacks it in every layer; one layer alone is damage.
        if (own := {key for key in model.state_dict() if key.endswith(ending)}) <= missing:
            missing -= own
    return sorted(missing)


def damage(source, **kwargs) -> str:
    """What the safetensors files of a folder or Hub id lack; kwargs are those of `from_pretrained`."""
    where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    folder = Path(source, where.get("subfolder") or "")
    if not folder.is_dir():
        # The weights are in the cache already, beside the config.
        folder = Path(cached_file(source, "config.json", **{**where, "force_download": False})).parent
    cut = {path: keys for path in sorted(folder.glob("*.safetensors")) if (keys := incomplete_keys(path))}
    return (
        "; ".join(f"{path.name} lacks {listed(keys)}" for path, keys in cut.items()) or f"one of the files in {folder}"
    )


def listed(keys: list[str], most: int = 20) -> str:
    """`a, b, c, ... (30 keys)`"""
    return ", ".join(keys[:most]) + (f", ... ({len(keys)} keys)" if len(keys) > most else "" if keys else "no keys")


def incomplete_keys(path: Path) -> list[str]:
    """Names of the tensors that a safetensors file announces but, cut off, does not hold.

    The file begins with the length of its table of contents (8 bytes), then the table as JSON. An unreadable table gives
    one entry that says so.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        table_size = int.from_bytes(file.read(8), "little")
        if table_size > size - 8:
            return ["every key (it ends within its table of contents)"]
        try:
            table = json.loads(file.read(table_size))
        except ValueError:
            return ["every key (its table of contents is unreadable)"]
    held = size - 8 - table_size
    return sorted(key for key, entry in table.items() if key != "__metadata__" and entry["data_offsets"][1] > held)
