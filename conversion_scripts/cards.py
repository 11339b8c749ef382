"""Model cards: one template per architecture in `model_cards/`, filled with what was measured and nothing else.

facts = source_facts("kermit", folder)                      # licence, language, base model
write_card(output, facts.with_stage(Stage("Conversion")))   # README.md, measurements.json, plots
"""

import argparse
import itertools
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from conversion_scripts.card_facts import (
    THIS_MODEL,
    Approximation,
    Cost,
    Facts,
    Parity,
    Perplexity,
    Stage,
    Training,
    write_facts,
)
from conversion_scripts.card_plots import bucket_name, plot_cost, plot_perplexity
from conversion_scripts.checkpoint_files import ConversionError, read_json
from conversion_scripts.licenses import IDENTIFIER, find_license, read_metadata


TEMPLATES = Path(__file__).resolve().parents[1] / "model_cards"
# What every card has in common, and the other templates take in as `measurements`.
SHARED_TEMPLATE = "measurements.md"
LICENSE_UNKNOWN = (
    "license: the source states none that could be read, so the model card has none; name it with --license"
)
LANGUAGE = r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual"


class Architecture(NamedTuple):
    """`head` is what a checkpoint without a config is taken for."""

    package: str
    tags: tuple[str, ...]
    head: str


ARCHITECTURES = {
    "kermit": Architecture("kermit_hf", ("kermit", "linear-attention", "long-context"), "ForCausalLM"),
    "nystromformer_hf": Architecture(
        "nystromformer_hf", ("nystromformer", "linear-attention", "long-context"), "ForMaskedLM"
    ),
    "nystromformer_hf_decoder": Architecture(
        "nystromformer_hf", ("nystromformer", "linear-attention", "long-context"), "ForCausalLM"
    ),
}


class Head(NamedTuple):
    pipeline_tag: str
    auto_class: str


# By how the name of a model's class ends.
HEADS = {
    "ForCausalLM": Head("text-generation", "AutoModelForCausalLM"),
    "ForMaskedLM": Head("fill-mask", "AutoModelForMaskedLM"),
    "ForSequenceClassification": Head("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": Head("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": Head("question-answering", "AutoModelForQuestionAnswering"),
    "ForMultipleChoice": Head("multiple-choice", "AutoModelForMultipleChoice"),
    "Model": Head("feature-extraction", "AutoModel"),
}


def add_card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the result in the Hub's identifiers (default: that of the source, where its card, its weight file "
        "or its licence file says so)",
    )
    parser.add_argument(
        "--base-model",
        metavar="USER/NAME",
        help="what SOURCE is called on the Hub (default: SOURCE, if it is a Hub id)",
    )


class CardOptions(NamedTuple):
    """What only the user knows. `license` and `base_model`: where the source does not say them itself. `model_id`: what the
    model is loaded by, by default the name of its folder. `command`: what a repetition needs to type."""

    license: str | None = None
    base_model: str | None = None
    model_id: str | None = None
    command: str | None = None


NOTHING_SAID = CardOptions()


def check_card_tools(architecture: str) -> None:
    """`ConversionError` where a card of this architecture cannot be written: better known before a conversion than after."""
    if architecture not in ARCHITECTURES:
        raise ConversionError(f"no model card for {architecture!r}; allowed are {', '.join(ARCHITECTURES)}")
    if find_spec("jinja2") is None:
        raise ConversionError("model cards need the package `jinja2`; install it: pip install jinja2")
    for name in (f"{architecture}.md", SHARED_TEMPLATE):
        if not (TEMPLATES / name).is_file():
            raise ConversionError(
                f"the template {TEMPLATES / name} does not exist; copy the folder model_cards of the repository there"
            )


def source_facts(
    architecture: str, folder: Path, options: CardOptions = NOTHING_SAID, stated_license: str | None = None
) -> Facts:
    """What the checkpoint in `folder` says of itself: licence, language, and its name where it came from the Hub.

    `options` are the user's word and go before that; `stated_license` is what a weight file says.
    """
    license, base_model = options.license, options.base_model
    snapshot = hub_snapshot(folder)
    root = folder if snapshot is None else snapshot.folder
    if base_model is None and snapshot is not None:
        base_model = snapshot.repo_id
    if base_model is not None:
        try:
            validate_repo_id(base_model)
        except HFValidationError as error:
            raise ConversionError(f"--base-model {base_model} is no Hub id; allowed are such as user/name") from error
    fields, origin = find_license(root, license, stated_license)
    language = read_metadata(root).get("language") or []
    language = [language] if isinstance(language, str) else language
    language = [code for code in language if re.fullmatch(LANGUAGE, str(code))]
    return Facts(architecture, base_model=base_model, **fields, license_origin=origin, language=language)


class Snapshot(NamedTuple):
    folder: Path
    repo_id: str
    revision: str


def hub_snapshot(folder: Path) -> Snapshot | None:
    """What a folder in the Hub's cache, `models--USER--NAME/snapshots/COMMIT`, is a copy of."""
    for path in (folder, *folder.parents):
        name = path.parent.parent.name
        if path.parent.name == "snapshots" and name.startswith("models--"):
            return Snapshot(path, name.removeprefix("models--").replace("--", "/"), path.name)
    return None


def conversion_stage(
    folder: Path, command: str | None, parity: Parity | None, remarks: list[str], file: str = ""
) -> Stage:
    """A conversion of the checkpoint in `folder`, or of one `file` in it."""
    snapshot = hub_snapshot(folder)
    parts = [snapshot.repo_id, file] if snapshot else [file or folder.name]
    source = "/".join(part for part in parts if part)
    return Stage(
        "Conversion",
        source=source,
        revision=None if snapshot is None else snapshot.revision,
        command=command,
        versions=versions(),
        remarks=remarks,
        parity=parity,
    )


class ConversionCard:
    """The card of a conversion: first what the source says of itself, then what came of it.

    Args:
        folder: the source's; `file` where it is one of several in there.
        stated_license: what a weight file says.
        say: is told where no licence could be read.
    """

    def __init__(
        self,
        architecture: str,
        folder: Path,
        options: CardOptions,
        say: Callable[[str], None],
        *,
        file: str = "",
        stated_license: str | None = None,
    ):
        self.folder, self.file, self.options = folder, file, options
        self.facts = source_facts(architecture, folder, options, stated_license)
        if self.facts.license is None:
            say(LICENSE_UNKNOWN)

    def write(
        self,
        partial: Path,
        name: str,
        config: PreTrainedConfig,
        settings: Iterable[str],
        parity: Parity | None,
        remarks: list[str],
    ) -> None:
        """Into `partial`, with the values of these `settings` in `config`; `name` is what the model is loaded by unless the
        user knows better."""
        stage = conversion_stage(self.folder, self.options.command, parity, remarks, self.file)
        values = {name: getattr(config, name) for name in settings}
        write_card(partial, self.facts.with_stage(stage, settings=values), self.options.model_id or name)


def command_line(module: str, arguments: Sequence[str]) -> str:
    """`python -m module ARGUMENTS` for the card."""

    def shown(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return option + equals + without_folders(value)

    return shlex.join(["python", "-m", module, *map(shown, arguments)])


def without_folders(text: str) -> str:
    """The last name of a local path, since the rest is nobody's business; anything else, a Hub id for one, as it is."""
    path = Path(text).expanduser()
    is_local = path.is_absolute() or text.startswith(("./", "../")) or text in (".", "..") or os.path.exists(path)
    return Path(os.path.abspath(path)).name if text and is_local else text


def versions(*packages: str) -> dict[str, str]:
    return {package: version(package) for package in ("torch", "transformers", *packages)}


def write_card(folder: str | Path, facts: Facts, name: str | None = None) -> None:
    """Writes README.md, what it is made of as JSON, and its plots, where matplotlib is installed, into `folder`.

    name: what to load the model by; the folder's own name by default. Raises `ConversionError` where the card would not
    come out as the Hub wants it.
    """
    folder = Path(folder)
    check_card_tools(facts.architecture)
    name = name or folder.resolve().name
    head = find_head(folder, facts.architecture)
    data = card_data(facts, name, head.pipeline_tag)
    package = ARCHITECTURES[facts.architecture].package
    measurements = render(
        SHARED_TEMPLATE, name=name, package=package, head=head, facts=facts, plots=draw(folder, facts), **TABLES
    )
    template = str(TEMPLATES / f"{facts.architecture}.md")
    card = ModelCard.from_template(data, template_path=template, name=name, facts=facts, measurements=measurements)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)
    card.save(folder / "README.md")
    write_facts(folder, facts)
    if check_card(folder).data.to_dict() != data.to_dict():
        raise ConversionError(f"the metadata of {folder / 'README.md'} is not what it was made of; is a value no text?")


def find_head(folder: Path, architecture: str) -> Head:
    path = folder / "config.json"
    names = read_json(path).get("architectures") if path.is_file() else None
    ending = names[0] if names else ARCHITECTURES[architecture].head
    return next(head for suffix, head in HEADS.items() if ending.endswith(suffix))


def card_data(facts: Facts, name: str, pipeline_tag: str) -> ModelCardData:
    """The metadata: what is not known is left out."""
    results = eval_results(facts, pipeline_tag)
    relation = {"base_model_relation": "finetune"} if facts.base_model and facts.trained else {}
    return ModelCardData(
        language=facts.language or None,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        tags=list(ARCHITECTURES[facts.architecture].tags),
        # Only a model index has a name in it.
        **({"model_name": name.split("/")[-1], "eval_results": results} if results else {}),
        **relation,
    )


def eval_results(facts: Facts, pipeline_tag: str) -> list[EvalResult]:
    """This model's own figures; those of its baselines are in the text."""
    results = []
    summary = facts.perplexity and facts.perplexity.summary
    if summary and THIS_MODEL in summary["perplexity"]:
        start, tokens = summary["from_position"], facts.perplexity.tokens
        results.append(
            EvalResult(
                task_type=pipeline_tag,
                dataset_type="text",
                dataset_name=facts.perplexity.data,
                metric_type="perplexity",
                metric_value=round(summary["perplexity"][THIS_MODEL], 4),
                metric_name=f"Perplexity of positions {start:,} to {tokens:,}",
            )
        )
    approximation, own = facts.approximation, facts.settings.get("num_landmarks")
    if approximation and own in approximation.landmarks:
        row = approximation.cosine[approximation.landmarks.index(own)]
        results += [
            EvalResult(
                task_type=pipeline_tag,
                dataset_type="text",
                dataset_name=approximation.data,
                metric_type="cosine_similarity",
                metric_value=round(cosine, 4),
                metric_name=f"Cosine to the original's output at {length:,} tokens",
            )
            for length, cosine in zip(approximation.lengths, row, strict=True)
        ]
    return results


def render(template: str, **fields) -> str:
    from jinja2 import StrictUndefined, Template

    return Template((TEMPLATES / template).read_text(encoding="utf-8"), undefined=StrictUndefined).render(**fields)


def draw(folder: Path, facts: Facts) -> dict[str, str]:
    """The plots' file names by what they show, of what was measured."""
    plots = {}
    if find_spec("matplotlib") is None:
        return plots
    if facts.perplexity:
        plots["perplexity"] = "perplexity.png"
        plot_perplexity(facts.perplexity.buckets, facts.perplexity.perplexity, folder / plots["perplexity"])
    if facts.cost:
        plots["cost"] = "cost.png"
        plot_cost(facts.cost.costs, folder / plots["cost"])
    return plots


def settings_table(settings: dict[str, Any]) -> str:
    return markdown_table(["setting", "value"], [[f"`{name}`", shown(value)] for name, value in settings.items()])


def shown(value: Any) -> str:
    """A value of a setting; lists as `NAME*COUNT`, as on the command line."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        runs = ((key, len(list(group))) for key, group in itertools.groupby(value))
        return ", ".join(f"{key}*{count}" if count > 1 else str(key) for key, count in runs)
    return str(value)


def perplexity_table(measured: Perplexity) -> str:
    rows = [
        [bucket_name(bucket), *(f"{values[index]:.2f}" for values in measured.perplexity.values())]
        for index, bucket in enumerate(measured.buckets)
    ]
    if measured.summary:
        totals = [measured.summary["perplexity"].get(name) for name in measured.perplexity]
        cells = ["" if total is None else f"**{total:.2f}**" for total in totals]
        rows.append([f"**from {measured.summary['from_position']:,} on**", *cells])
    return markdown_table(["positions", *measured.perplexity], rows)


def cost_table(cost: Cost) -> str:
    columns, header = [], ["tokens"]
    for name, entries in cost.costs.items():
        by_length = {entry["length"]: entry for entry in entries}
        columns.append({length: milliseconds(entry["seconds_per_token"]) for length, entry in by_length.items()})
        header.append(f"{name}: ms per token")
        if any("cache_bytes" in entry for entry in entries):
            columns.append(
                {
                    length: f"{entry['cache_bytes'] / 1e6:,.2f}"
                    for length, entry in by_length.items()
                    if "cache_bytes" in entry
                }
            )
            header.append(f"{name}: cache, MB")
    lengths = sorted({length for column in columns for length in column})
    return markdown_table(
        header, [[f"{length:,}", *(column.get(length, "") for column in columns)] for length in lengths]
    )


def training_table(training: Training) -> str:
    """What was done, by which means; what is not known has no row."""
    count = "{:,}".format
    facts = {
        "method": training.method,
        "data": training.data,
        "steps": count(training.steps),
        "tokens": count(training.tokens),
        "trainable parameters": training.trainable_parameters and count(training.trainable_parameters),
        "parameters": training.parameters and count(training.parameters),
        "time": training.seconds and duration(training.seconds),
        "machine": training.machine,
        **{name: shown(value) for name, value in training.settings.items()},
    }
    return markdown_table(["", ""], [[name, value] for name, value in facts.items() if value is not None])


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def approximation_table(measured: Approximation) -> str:
    header = ["landmarks", *(f"{length:,} tokens" for length in measured.lengths)]
    rows = [
        [str(landmarks), *(f"{value:.4f}" for value in row)]
        for landmarks, row in zip(measured.landmarks, measured.cosine, strict=True)
    ]
    if measured.agreement is not None:
        header.append("same nearest passage")
        rows = [[*row, f"{share:.3f}"] for row, share in zip(rows, measured.agreement, strict=True)]
    return markdown_table(header, rows)


TABLES = {
    table.__name__: table
    for table in (settings_table, training_table, perplexity_table, cost_table, approximation_table)
}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(cell.replace("|", r"\|").split()) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def check_card(folder: Path) -> ModelCard:
    """The card in `folder`, read again; `ConversionError` where the Hub would refuse it or a picture is missing.

    Stands for `ModelCard.validate`, which asks the Hub.
    """
    path = folder / "README.md"
    try:
        card = ModelCard.load(path)
    except ValueError as error:
        raise ConversionError(f"the metadata of {path} cannot be read ({error})") from error
    data = card.data
    _allow("pipeline_tag", [data.pipeline_tag], "|".join(head.pipeline_tag for head in HEADS.values()), "a task")
    _allow("language", data.language, LANGUAGE, "ISO 639 codes such as en")
    _allow("license", data.license, IDENTIFIER, "the Hub's identifiers such as apache-2.0")
    for name in ("base_model", "datasets"):
        _allow(name, data.get(name), r"(?:[\w.-]+/)?[\w.-]+", "Hub ids such as user/name")
    for result in data.eval_results or []:
        if not isinstance(result.metric_value, int | float) or not math.isfinite(result.metric_value):
            raise ConversionError(
                f"{result.metric_type}={result.metric_value} is no result; allowed are finite numbers"
            )
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text):
        if not (folder / picture).is_file():
            raise ConversionError(f"{path} shows {picture}, which is not in its folder")
    return card


def _allow(name: str, values: str | list[str] | None, pattern: str, what: str) -> None:
    for value in [values] if isinstance(values, str) else values or []:
        if not re.fullmatch(pattern, str(value)):
            raise ConversionError(f"{name}={value!r} is not valid in a model card; allowed are {what}")
