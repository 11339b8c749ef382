"""Turns a Llama-shaped checkpoint into a KERMIT or a causal Nyströmformer with the same weights.

    python -m conversion_scripts.convert_llama SOURCE OUTPUT --to kermit

The tensors pass through one at a time; the original and the result are then compared where attention is exact.
"""

import argparse
import functools
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple


if not __package__:
    # As a plain script: the folder above holds the packages.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_gguf_available

import kermit_hf.modeling_kermit as kermit
import nystromformer_hf.modeling_nystromformer_hf_decoder as nystromformer
from conversion_scripts.card_facts import Parity
from conversion_scripts.cards import ConversionCard, check_card_tools
from conversion_scripts.checkpoint_files import (
    Checkpoint,
    ConversionError,
    Entry,
    GGUFCheckpoint,
    ShardWriter,
    atomic_folder,
    check_entry,
    check_names,
    check_output,
    check_space,
    find_source,
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
from conversion_scripts.verification import VERIFIED_TOKENS, compare, random_tokens


class Family(NamedTuple):
    """What a source's attention has that its config does not say: whether queries, keys and values have biases, the output
    projection has one, and heads are normed. None: the config's `attention_bias`."""

    attention_bias: bool | None = None
    attention_output_bias: bool | None = None
    use_qk_norm: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(attention_bias=False, attention_output_bias=False),
    "qwen2": Family(attention_bias=True, attention_output_bias=False),
    "qwen3": Family(use_qk_norm=True),
}
# Fields that mean the same in source and target.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
# Fields of a target's attention that the source decides; a language model is causal.
SOURCE_DECIDES = ("use_qk_norm", "attention_output_bias", "is_causal")


class Target(NamedTuple):
    """One of our architectures. `exact_tokens(config)` is the length up to which its attention is the source's."""

    modeling: types.ModuleType
    model_class: type[PreTrainedModel]
    exact_tokens: Callable[[PreTrainedConfig], int]

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return self.model_class.config_class


def _exact_tokens_of_kermit(config: PreTrainedConfig) -> int:
    lengths = {
        "kernel_attention": config.window_size,
        "sliding_attention": config.sliding_window,
        "full_attention": config.max_position_embeddings,
    }
    return min(lengths[layer_type] for layer_type in config.layer_types)


def _exact_tokens_of_nystromformer(config: PreTrainedConfig) -> int:
    if config.segment_size == 1:
        return config.max_position_embeddings
    return config.num_sink_tokens + (config.near_segments + 1) * config.segment_size


TARGETS = {
    "kermit": Target(kermit, kermit.KermitForCausalLM, _exact_tokens_of_kermit),
    "nystromformer_hf_decoder": Target(
        nystromformer, nystromformer.NystromformerHFDecoderForCausalLM, _exact_tokens_of_nystromformer
    ),
}

FAR_BIAS = -10.0


def convert(
    source: str,
    output: str | Path,
    to: str,
    settings: dict[str, Any] | None = None,
    *,
    far_bias: float = FAR_BIAS,
    **options: Any,
) -> float | None:
    """Converts the checkpoint `source` (folder, Hub id or GGUF file) into the folder `output`, model card included.

    Args:
        to: key of `TARGETS`.
        settings: fields of the target's config that the source does not decide.
        far_bias: start of KERMIT's far-field logit; strongly negative leaves window and sinks alone.
        options: fields of `ConversionOptions`; the seed is also that of the weights that the source lacks.

    Returns the largest difference of two logits, None where none were compared. Raises `ConversionError`, and leaves no
    output, where the source is damaged, cannot be mapped, does not fit on the disk, or comes out different.
    """
    target, output, options = TARGETS[to], Path(output).expanduser().resolve(), ConversionOptions(**options)
    check_card_tools(to)
    folder, gguf_file = find_source(source, options.revision)
    check_output(output, options.overwrite, folder)
    source_config = read_config(folder, gguf_file)
    config = target_config(source_config, target, settings or {})
    checkpoint = open_checkpoint(folder, gguf_file, source_config)
    with torch.device("meta"):
        model = target.model_class(config)
    plan = plan_weights(checkpoint, model, config)
    tokenizer = load_tokenizer(folder, gguf_file)
    check_vocabulary(config, checkpoint.num_tokens if gguf_file else None if tokenizer is None else len(tokenizer))
    card = ConversionCard(
        to, folder, options.card, options.say, file=gguf_file or "", stated_license=checkpoint.license
    )

    dtype = plan.mapped["model.embed_tokens.weight"].dtype
    own_bytes = sum(tensor.numel() * dtype.itemsize for tensor in plan.own.values())
    total_bytes = sum(entry.num_bytes for entry in plan.mapped.values()) + own_bytes
    with atomic_folder(output) as partial:
        check_space(partial, total_bytes)
        options.say(
            f"{len(plan.mapped)} tensors from {source}, {len(plan.own)} new ones, {total_bytes / 2**20:,.0f} MiB"
        )
        writer = ShardWriter(partial, options.max_shard_bytes)
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="converting", disable=None) as progress:
            for name, tensor in checkpoint.tensors():
                if (name := plan.names.get(name)) is not None:
                    writer.add(name, tensor)
                    progress.update(tensor.nbytes)
            for name, tensor in own_weights(model, plan.own, options.seed, far_bias):
                writer.add(name, tensor.to(dtype))
                progress.update(tensor.numel() * dtype.itemsize)
        writer.finish()
        write_companions(partial, folder, model, dtype, tokenizer, gguf_file)
        check_tokenizer(partial, tokenizer)
        parity = verify_logits(folder, gguf_file, partial, target, options) if options.verify else None
        remarks = remarks_on(plan, gguf_file, options.seed, far_bias)
        card.write(partial, output.name, config, attention_settings(target.config_class), parity, remarks)
    return None if parity is None else parity.difference


def read_config(folder: Path, gguf_file: str | None) -> PreTrainedConfig:
    """The source's config, of one of the `FAMILIES`."""
    if gguf_file and not is_gguf_available():
        raise ConversionError(
            "reading GGUF needs the package `gguf`; install it: pip install 'linear-time-transformers[gguf]'"
        )
    return load_config(folder, FAMILIES, gguf_file)


def target_config(source: PreTrainedConfig, target: Target, settings: dict[str, Any]) -> PreTrainedConfig:
    """The target's config: the body from the source, attention from `settings`."""
    family = FAMILIES[source.model_type]
    fields = {name: getattr(source, name) for name in SHARED_FIELDS}
    fields["head_dim"] = getattr(source, "head_dim", None)
    fields["mlp_bias"] = getattr(source, "mlp_bias", False)
    bias = source.attention_bias if family.attention_bias is None else family.attention_bias
    fields["attention_bias"] = bias
    fields["attention_output_bias"] = bias if family.attention_output_bias is None else family.attention_output_bias
    fields["use_qk_norm"] = family.use_qk_norm
    settings = map_sliding_windows(source, target, settings)
    if taken := sorted(settings.keys() & fields.keys()):
        raise ConversionError(f"{', '.join(taken)}: the source decides this; leave it out")
    try:
        return target.config_class(**fields, **settings)
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(in_one_line(error)) from error


def map_sliding_windows(source: PreTrainedConfig, target: Target, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the source's own sliding window taken into account, or `ConversionError` where they contradict it.

    No token may be attended exactly that the source's layer never saw.
    """
    windows = source_windows(source)
    if all(window is None for window in windows):
        return settings
    if target.modeling is nystromformer:
        raise ConversionError(
            f"sliding_window={source.sliding_window} cannot be mapped to {target.config_class.model_type}, whose landmarks "
            "cover what the source never attended to; convert --to kermit"
        )
    settings = dict(settings)
    layer_types = settings.get("layer_types") or ["kernel_attention"] * len(windows)
    window_size = settings.get("window_size", target.config_class.window_size)
    if "sliding_attention" in layer_types:
        settings.setdefault("sliding_window", source.sliding_window)
    for index, (window, layer_type) in enumerate(zip(windows, layer_types, strict=False)):
        reach = {"kernel_attention": window_size, "sliding_attention": settings.get("sliding_window")}.get(layer_type)
        if window is not None and (reach is None or reach > window):
            name = {"kernel_attention": "window_size", "sliding_attention": "sliding_window"}.get(layer_type)
            what = f"layer_types names {layer_type!r}" if name is None else f"{name}={reach}"
            raise ConversionError(
                f"{what} for layer {index}, which in the source has sliding_window={window}; allowed are "
                f"'kernel_attention' with window_size up to {window} and 'sliding_attention' with sliding_window up to {window}"
            )
    return settings


def source_windows(source: PreTrainedConfig) -> list[int | None]:
    """Each layer's sliding window; None where it attends to everything within `max_position_embeddings`."""
    sliding, layers = getattr(source, "sliding_window", None), source.num_hidden_layers
    layer_types = getattr(source, "layer_types", None)
    if source.model_type == "llama":
        sliding, layer_types = None, None  # neither is a field of it
    if source.model_type == "mistral" and layer_types and len(set(layer_types)) > 1:
        raise ConversionError("layer_types of a mistral checkpoint has no meaning in its architecture; remove it")
    if source.model_type == "mistral" or layer_types is None:
        layer_types = ["full_attention" if sliding is None else "sliding_attention"] * layers
    unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if unknown or len(layer_types) != layers:
        raise ConversionError(
            f"layer_types={layer_types} cannot be mapped; allowed are 'full_attention' and 'sliding_attention' for each of "
            f"num_hidden_layers={layers} layers"
        )
    if sliding is not None and sliding >= source.max_position_embeddings:
        sliding = None  # longer than any text: no window at all
    return [sliding if layer_type == "sliding_attention" else None for layer_type in layer_types]


def open_checkpoint(folder: Path, gguf_file: str | None, source_config: PreTrainedConfig) -> Checkpoint:
    if gguf_file is None:
        return Checkpoint(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source_config)
    return GGUFCheckpoint(folder / gguf_file, model)


class Plan(NamedTuple):
    """`names`: the source's names of what is mapped, to ours. `mapped`: ours, to what is in the source. `own`: the weights
    that the source lacks and that get a start of their own (on the meta device)."""

    names: dict[str, str]
    mapped: dict[str, Entry]
    own: dict[str, torch.Tensor]


def plan_weights(checkpoint: Checkpoint, model: PreTrainedModel, config: PreTrainedConfig) -> Plan:
    """Says where every weight of `model` comes from. `ConversionError` names what is missing, too much or misshapen."""
    wanted = dict(model.state_dict())
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    # A checkpoint of the body alone, as `LlamaModel.save_pretrained` writes it.
    prefix = "" if any(name.startswith("model.") for name in checkpoint.entries) else "model."
    names, unknown = {}, []
    for name in checkpoint.entries:
        mapped = name if name == "lm_head.weight" else prefix + name
        if mapped in wanted:
            names[name] = mapped
        elif mapped == "lm_head.weight":
            # Tied, but stored as well.
            embedding = f"{'' if prefix else 'model.'}embed_tokens.weight"
            if embedding in checkpoint.entries and not torch.equal(checkpoint.read(name), checkpoint.read(embedding)):
                raise ConversionError(
                    "lm_head.weight differs from model.embed_tokens.weight, but the config has tie_word_embeddings=true; set "
                    "that to false, or remove the tensor"
                )
        elif not name.endswith("rotary_emb.inv_freq"):  # old checkpoints store what the config says
            unknown.append(name)
    mapped = {ours: checkpoint.entries[name] for name, ours in names.items()}
    missing = {name: tensor for name, tensor in wanted.items() if name not in mapped}
    own = {name: tensor for name, tensor in missing.items() if is_own(name, model)}
    lost = sorted(missing.keys() - own.keys())
    check_names(checkpoint.folder, lost, unknown, "convert the merged model")
    for name, entry in mapped.items():
        check_entry(name, entry, wanted[name].shape, config)
    return Plan(names, mapped, own)


def is_own(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight belongs to our attention alone: a Llama-shaped one has projections, their biases, and norms."""
    rest = name.partition(".self_attn.")[2]
    return bool(rest) and rest.split(".")[0] not in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def own_weights(model: PreTrainedModel, own: dict[str, torch.Tensor], seed: int, far_bias: float):
    """Yields name and value of the weights in `own`, layer by layer, as `model` (on the meta device) starts with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, layer in enumerate(model.model.layers):
            attention, prefix = layer.self_attn, f"model.layers.{index}.self_attn."
            for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
                if hasattr(attention, name):
                    setattr(attention, name, nn.Identity())
            attention.to_empty(device="cpu")
            attention.apply(model._init_weights)
            state = attention.state_dict()
            for name in (name for name in own if name.startswith(prefix)):
                tensor = state[name.removeprefix(prefix)]
                if name.endswith(".far_bias"):
                    tensor = torch.full_like(tensor, far_bias)
                yield name, tensor
            attention.to("meta")


def remarks_on(plan: Plan, gguf_file: str | None, seed: int, far_bias: float) -> list[str]:
    """What the model card says of how the weights came about."""
    remarks = []
    if gguf_file:
        remarks.append("The weights of the GGUF file were dequantised to float32.")
    if plan.own:
        remarks.append(f"{len(plan.own)} tensors that the source lacks start as in a new model, seed {seed}.")
    if any(name.endswith(".far_bias") for name in plan.own):
        remarks.append(
            f"The logit of the far field starts with a bias of {far_bias:g}: strongly negative, the model is window and "
            "sinks until training opens the far field."
        )
    return remarks


def verify_logits(
    folder: Path, gguf_file: str | None, partial: Path, target: Target, options: ConversionOptions
) -> Parity | None:
    """How far the logits of a random prompt are apart, as long as attention is exact."""
    config = target.config_class.from_pretrained(partial)
    length = min(target.exact_tokens(config), config.max_position_embeddings, VERIFIED_TOKENS)
    if length < 1:
        options.say("not verified: with window_size=0 nothing is attended exactly, so logits differ until training")
        return None
    load_original = functools.partial(
        AutoModelForCausalLM.from_pretrained, folder, gguf_file=gguf_file, trust_remote_code=False
    )
    load_converted = functools.partial(target.model_class.from_pretrained, partial)
    inputs = {"input_ids": random_tokens(config.vocab_size, length, options.seed), "use_cache": False}
    return compare(load_original, load_converted, inputs, options.verify, options.say)


def attention_settings(config_class: type[PreTrainedConfig]) -> dict[str, Setting]:
    """The fields of a target's config that become options."""
    return config_settings(config_class, SOURCE_DECIDES)


EXAMPLES = """examples:
  a folder to KERMIT with a window of 512 tokens
    %(prog)s ./SmolLM2-135M ./smollm2-kermit --to kermit --window-size 512
  from the Hub to a causal Nyströmformer, pushed
    %(prog)s Qwen/Qwen3-0.6B ./qwen3-nystrom --to nystromformer_hf_decoder --segment-size 16 --near-segments 8 --push-to-hub me/qwen3-nystrom
  a GGUF file, two layers of thirty left as they are
    %(prog)s ./model.gguf ./hybrid --to kermit --layer-types full_attention*2 kernel_attention*28
"""


def make_parser() -> argparse.ArgumentParser:
    parser = make_shared_parser(
        "convert_llama",
        "Turns a Llama-shaped checkpoint (llama, mistral, qwen2, qwen3) into one of our architectures, tensor by tensor, and "
        "compares the two. OUTPUT appears when it is whole, or not at all.",
        EXAMPLES,
        source="folder, .gguf file, Hub id, or Hub id and .gguf file (user/name/file.gguf)",
    )
    parser.add_argument("--to", required=True, choices=TARGETS, help="architecture of the result")
    add_file_options(parser, seeded="the new weights and of the prompt")

    by_target = {to: attention_settings(target.config_class) for to, target in TARGETS.items()}
    names = dict.fromkeys(name for settings in by_target.values() for name in settings)
    groups = {
        (to,): parser.add_argument_group(f"attention of {to}", argument_default=argparse.SUPPRESS) for to in TARGETS
    }
    groups[tuple(TARGETS)] = parser.add_argument_group("attention of both", argument_default=argparse.SUPPRESS)
    for name in names:
        owners = tuple(to for to in TARGETS if name in by_target[to])
        parts = [f"{by_target[to][name].help} (default: {by_target[to][name].default})" for to in owners]
        if len(parts) > 1:
            parts = [f"{to}: {part}" for to, part in zip(owners, parts, strict=True)]
        add_setting(groups[owners], name, [by_target[to][name] for to in owners], " ".join(parts))
    groups[("kermit",)].add_argument(
        "--far-bias",
        type=float,
        help=f"start of the far field's logit; strongly negative, the model behaves as window and sinks until training opens the "
        f"far field (default: {FAR_BIAS})",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    to = options.pop("to")
    own = {
        **dict.fromkeys(attention_settings(TARGETS[to].config_class)),
        **({"far_bias": None} if to == "kermit" else {}),
    }
    others = {name for target in TARGETS.values() for name in attention_settings(target.config_class)} | {"far_bias"}
    if foreign := sorted((others & options.keys()) - own.keys()):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        parser.error(f"{names}: not an option of --to {to}")
    settings = {name: options[name] for name in own if name in options and name != "far_bias"}
    if "layer_types" in settings:
        settings["layer_types"] = [name for part in settings["layer_types"] for name in part]

    hint = "load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)"
    run(
        "convert_llama",
        convert,
        arguments,
        options,
        to,
        settings,
        far_bias=options.get("far_bias", FAR_BIAS),
        hint=hint,
    )


if __name__ == "__main__":
    main()
