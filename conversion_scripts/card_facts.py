"""What is known of a model that a conversion or a training made: the content of its card, kept as JSON beside it.

A later stage reads the facts of the earlier one with `read_facts`, extends them with `Facts.with_stage`, and writes them
again with its card. Whatever was not measured is None or empty, and the card does not mention it.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from conversion_scripts.checkpoint_files import ConversionError, read_json


FACTS_FILE = "measurements.json"
# The column of the model that the card is about; the others are baselines.
THIS_MODEL = "this model"


@dataclass
class Parity:
    """Largest difference of two outputs (`quantity`) between source and result, over a random prompt of `tokens`."""

    difference: float
    tokens: int
    dtype: str
    tolerance: float
    quantity: str = "logits"


@dataclass
class Training:
    """`tokens` counts those trained on, `settings` is what else a repetition needs (learning rate, seed, …)."""

    method: str
    data: str
    steps: int
    tokens: int
    trainable_parameters: int | None = None
    parameters: int | None = None
    seconds: float | None = None
    machine: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stage:
    """One step of the way from the source to this model. `source` is a Hub id or a name, never a path."""

    title: str
    source: str | None = None
    revision: str | None = None
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    parity: Parity | None = None
    training: Training | None = None


@dataclass
class Perplexity:
    """exp of the mean loss in each bucket of positions [start, end), by model, over the first `tokens` of each document.

    `summary` is `{"from_position": int, "perplexity": {model: float}}`: over all positions from there on.
    """

    tokens: int
    documents: int
    data: str
    buckets: list[list[int]]
    perplexity: dict[str, list[float]]
    summary: dict[str, Any] | None = None

    def __post_init__(self):
        _check_series("perplexity", self.perplexity, len(self.buckets), "buckets")
        if self.summary is not None:
            for name, value in self.summary["perplexity"].items():
                _check_finite(f"summary of {name!r}", value)


@dataclass
class Cost:
    """Entries `{"length": int, "seconds_per_token": float, "cache_bytes": int}` by model; an encoder has no cache."""

    machine: str
    costs: dict[str, list[dict[str, float]]]

    def __post_init__(self):
        for name, entries in self.costs.items():
            for entry in entries:
                if (
                    not {"length", "seconds_per_token"}
                    <= entry.keys()
                    <= {"length", "seconds_per_token", "cache_bytes"}
                ):
                    raise ConversionError(
                        f"costs of {name!r} hold {sorted(entry)}; allowed are length, seconds_per_token and cache_bytes"
                    )


@dataclass
class Approximation:
    """Cosine between this model's outputs and the original's: `cosine[i][j]` with `landmarks[i]` at `lengths[j]`.

    `agreement[i]` is the share of queries whose nearest passage is the same as the original's.
    """

    data: str
    landmarks: list[int]
    lengths: list[int]
    cosine: list[list[float]]
    agreement: list[float] | None = None

    def __post_init__(self):
        if len(self.cosine) != len(self.landmarks):
            raise ConversionError(f"cosine has {len(self.cosine)} rows; allowed is one for each of {self.landmarks}")
        rows = dict(zip(map(str, self.landmarks), self.cosine, strict=True))
        _check_series("cosine", rows, len(self.lengths), "lengths")
        if self.agreement is not None:
            _check_series("agreement", {"all": self.agreement}, len(self.landmarks), "landmarks")


@dataclass
class Facts:
    """Everything a card says. `architecture` is the model type; `license*`, `language`, `base_model`, `datasets` (Hub ids
    of what it was trained on here) are the Hub's metadata; `settings` are those of the attention."""

    architecture: str
    base_model: str | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_origin: str | None = None
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    perplexity: Perplexity | None = None
    cost: Cost | None = None
    approximation: Approximation | None = None

    @property
    def trained(self) -> bool:
        return any(stage.training is not None for stage in self.stages)

    def with_stage(self, stage: Stage, **changes) -> Self:
        """These facts after another stage. What was measured on the earlier weights goes, unless `changes` has it anew; the
        cost stays as long as the settings do."""
        changes = {"perplexity": None, "approximation": None} | changes
        if changes.get("settings", self.settings) != self.settings:
            changes = {"cost": None} | changes
        return dataclasses.replace(self, stages=[*self.stages, stage], **changes)


NESTED = {
    "stages": Stage,
    "parity": Parity,
    "training": Training,
    "perplexity": Perplexity,
    "cost": Cost,
    "approximation": Approximation,
}


def read_facts(folder: str | Path) -> Facts:
    """What `write_facts` left in `folder`; of a model without, the architecture alone. Raises `ConversionError`."""
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        return Facts(read_json(Path(folder) / "config.json")["model_type"])
    return _read(Facts, read_json(path), path)


def write_facts(folder: str | Path, facts: Facts) -> None:
    text = json.dumps(dataclasses.asdict(facts), indent=2, ensure_ascii=False, allow_nan=False)
    (Path(folder) / FACTS_FILE).write_text(text + "\n", encoding="utf-8")


def _read(cls: type, values: dict[str, Any], path: Path) -> Any:
    fields = {item.name for item in dataclasses.fields(cls)}
    if unknown := sorted(values.keys() - fields):
        raise ConversionError(
            f"{path} has {', '.join(unknown)} in {cls.__name__}; allowed are {', '.join(sorted(fields))}"
        )

    def nested(name: str, value: Any) -> Any:
        # `perplexity` is also the name of the numbers inside.
        if name not in NESTED or NESTED[name] is cls or value is None:
            return value
        if isinstance(value, list):
            return [_read(NESTED[name], part, path) for part in value]
        return _read(NESTED[name], value, path)

    try:
        return cls(**{name: nested(name, value) for name, value in values.items()})
    except TypeError as error:
        raise ConversionError(f"{path} is not whole ({error}); write it again, or remove it") from error


def _check_series(what: str, series: dict[str, list[float]], length: int, of: str) -> None:
    for name, values in series.items():
        if len(values) != length:
            raise ConversionError(
                f"{what} of {name!r} has {len(values)} values; allowed is one for each of {length} {of}"
            )
        for value in values:
            _check_finite(f"{what} of {name!r}", value)


def _check_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConversionError(f"{what} is {value}, which is no measurement; leave it out")
