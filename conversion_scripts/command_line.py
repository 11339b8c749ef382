"""What the scripts' command lines have in common: options for a config's fields, for files and for the Hub."""

import argparse
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from conversion_scripts.cards import NOTHING_SAID, CardOptions, add_card_arguments, command_line
from conversion_scripts.checkpoint_files import ConversionError, check_login, push_folder
from conversion_scripts.verification import TOLERANCES


class ConversionOptions(NamedTuple):
    """What every conversion takes besides the architectures' own: keyword arguments of each script's `convert`.

    Args:
        seed: of the text that is compared.
        revision: branch, tag or commit of a Hub id.
        overwrite: whether a checkpoint at the output is replaced.
        max_shard_bytes: largest weight file.
        verify: dtype of the comparison with the original, a key of `TOLERANCES`, or None for no comparison.
        card: for the model card.
        say: takes the lines that report progress.
    """

    seed: int = 0
    revision: str | None = None
    overwrite: bool = False
    max_shard_bytes: int = 5 * 10**9
    verify: str | None = "float32"
    card: CardOptions = NOTHING_SAID
    say: Callable[[str], None] = lambda message: None


class Setting(NamedTuple):
    """One field of a target's config: its type, default and description."""

    type: Any
    default: Any
    help: str


def config_settings(config_class: type[PreTrainedConfig], source_decides: Sequence[str]) -> dict[str, Setting]:
    """The fields that a config's docstring describes, by name, without those that the source decides."""
    arguments = inspect.cleandoc(config_class.__doc__).split("Args:\n", 1)[1].split("\n```", 1)[0]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    entries = re.findall(r"^    (\w+) \(.*\):\n((?:        .*\n?)+)", arguments, re.MULTILINE)
    return {
        name: Setting(fields[name].type, fields[name].default, " ".join(text.replace("`", "").split()))
        for name, text in entries
        if name in fields and name not in source_decides
    }


def parse_layer_types(text: str) -> list[str]:
    """`NAME` or `NAME*COUNT`"""
    name, _, count = text.partition("*")
    if count and not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are NAME and NAME*COUNT")
    return [name] * int(count or 1)


def option_of(settings: Sequence[Setting]) -> dict[str, Any]:
    """How `argparse` reads a setting that one target has, or several under one name. The config says what is allowed."""
    kinds = {kind for setting in settings for kind in typing.get_args(setting.type | None)}
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if list[str] in kinds:
        return {"nargs": "+", "type": parse_layer_types, "metavar": "NAME[*COUNT]"}
    if str in kinds:
        return {"metavar": "NAME"}
    optional = any(types.NoneType in typing.get_args(setting.type) for setting in settings)

    def number(text: str) -> int | float | None:
        if optional and text.lower() == "none":
            return None
        return float(text) if float in kinds and not text.lstrip("+-").isdigit() else int(text)

    return {"type": number, "metavar": "N"}


def add_setting(group: Any, name: str, settings: Sequence[Setting], text: str) -> None:
    """One option for the field `name`, absent from the parsed arguments unless given."""
    group.add_argument(f"--{name.replace('_', '-')}", dest=name, help=text.replace("%", "%%"), **option_of(settings))


def parse_size(text: str) -> int:
    """Bytes in `5GB`, `200MB`, `100KB`, `12345`."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; allowed are such as 5GB, 200MB")
    return int(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")


def make_parser(name: str, description: str, epilog: str, source: str) -> argparse.ArgumentParser:
    """A parser of SOURCE and OUTPUT; `source` says what the first may be."""
    parser = argparse.ArgumentParser(
        prog=f"python -m conversion_scripts.{name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help=source)
    parser.add_argument("output", metavar="OUTPUT", help="folder for the result")
    return parser


def add_file_options(parser: argparse.ArgumentParser, seeded: str) -> None:
    """Everything that does not depend on architectures; `seeded` says what the seed is of."""
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUTPUT")
    parser.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="5GB",
        metavar="SIZE",
        help="largest weight file, and about the memory needed to write it (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help=f"of {seeded} (default: %(default)s)")
    parser.add_argument(
        "--verify",
        default="float32",
        choices=(*TOLERANCES, "no"),
        help="dtype in which the original and the result are compared; both are loaded, one after the other. Tolerance 1e-3 in "
        "float32; in bfloat16 0.05 and in float16 0.01 of the largest output (default: %(default)s)",
    )
    add_card_arguments(parser)
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload OUTPUT to this repository")
    parser.add_argument("--private", action="store_true", help="make that repository a private one, if it is new")


def run(
    name: str, convert: Callable, typed: Sequence[str] | None, options: dict[str, Any], *arguments, hint: str, **kwargs
) -> None:
    """Calls `convert(source, output, *arguments, **kwargs)` with the options of `add_file_options`, says how to load the
    result (`hint`) and pushes it. Ends the program with one line where something is refused or fails.

    `typed` are the arguments that `options` were parsed from, None for those of the program.
    """
    repo_id = options["push_to_hub"]
    # Transformers' own bar for each loading, and its report of weights that are left out knowingly.
    disable_progress_bar()
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        if repo_id:
            check_login(repo_id)
        convert(
            options["source"],
            options["output"],
            *arguments,
            seed=options["seed"],
            revision=options["revision"],
            overwrite=options["overwrite"],
            max_shard_bytes=options["max_shard_size"],
            verify=None if options["verify"] == "no" else options["verify"],
            card=CardOptions(
                options["license"],
                options["base_model"],
                repo_id,
                command_line(f"conversion_scripts.{name}", sys.argv[1:] if typed is None else typed),
            ),
            say=print,
            **kwargs,
        )
        print(f"{options['output']}: {hint}")
        if repo_id:
            message = f"Converted from {options['source']}"
            print(push_folder(Path(options["output"]).expanduser(), repo_id, options["private"], message))
    except ConversionError as error:
        raise SystemExit(f"{name}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        set_verbosity(verbosity)
