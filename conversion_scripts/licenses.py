"""What a checkpoint says of its licence, as the Hub's identifiers. What it does not say is not guessed."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from conversion_scripts.checkpoint_files import ConversionError


# Those of https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses cards with others.
HUB_LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0
ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
LICENSES = frozenset(HUB_LICENSES.split())
# The form of those and of later ones.
IDENTIFIER = r"[a-z0-9][a-z0-9.+-]*"
FIELDS = ("license", "license_name", "license_link")

MIT = """
permission is hereby granted free of charge to any person obtaining a copy of this software and associated documentation
files the software to deal in the software without restriction including without limitation the rights to use copy modify
merge publish distribute sublicense and or sell copies of the software and to permit persons to whom the software is
furnished to do so subject to the following conditions the above copyright notice and this permission notice shall be
included in all copies or substantial portions of the software the software is provided as is without warranty of any kind
express or implied including but not limited to the warranties of merchantability fitness for a particular purpose and
noninfringement in no event shall the authors or copyright holders be liable for any claim damages or other liability
whether in an action of contract tort or otherwise arising from out of or in connection with the software or the use or
other dealings in the software
"""


def find_license(
    folder: Path, chosen: str | None = None, stated: str | None = None
) -> tuple[dict[str, Any], str | None]:
    """The licence of the checkpoint in `folder` as metadata (`FIELDS`), empty if it is not known, and who says so.

    `chosen` is the user's own word and goes before everything; `stated` is what the weights' own file says. Then come the
    card's metadata and the licence file, if it is recognised as a whole.
    """
    if chosen is not None:
        if chosen not in LICENSES:
            raise ConversionError(
                f"--license {chosen} is no licence that the Hub knows; allowed are {', '.join(sorted(LICENSES))}"
            )
        return {"license": chosen}, "whoever converted it"
    if stated is not None and stated.lower() in LICENSES - {"other", "unknown"}:
        return {"license": stated.lower()}, "the source's weight file"
    metadata = {name: value for name, value in read_metadata(folder).items() if name in FIELDS and value}
    identifiers = metadata.get("license", [])
    identifiers = identifiers if isinstance(identifiers, list) else [identifiers]
    if identifiers and all(re.fullmatch(IDENTIFIER, str(identifier)) for identifier in identifiers):
        return metadata, "the source's model card"
    for path in sorted(folder.glob("LICENSE*")):
        if path.is_file() and (identifier := recognised(path.read_text(encoding="utf-8", errors="replace"))):
            return {"license": identifier}, f"the source's {path.name} file"
    return {}, None


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of the model card in `folder`; empty where there is none that can be read."""
    try:
        return metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def recognised(text: str) -> str | None:
    """The identifier of a licence text, None unless it is Apache 2.0, MIT or a Llama community licence and nothing else."""
    words = " ".join(re.findall(r"[a-z0-9.]+", text.lower().replace("<br>", " ")))
    words = re.sub(r"\.(?= |$)", "", words)
    head, found, tail = words.partition("end of terms and conditions")
    if head.startswith("apache license version 2.0 january 2004") and found:
        return "apache-2.0" if not tail or tail.endswith(" limitations under the license") else None
    # Whose copyright it is, and no condition among the names.
    owners = r"(copyright (?:(?!\b(?:not|only|except|commercial)\b).){0,200}? )?"
    if re.fullmatch(rf"(the )?(mit license )?(mit )?{owners}{' '.join(MIT.split())}", words):
        return "mit"
    if match := re.match(r"(?:meta )?llama (2|3|3\.1|3\.2|3\.3|4) community license agreement", words):
        return f"llama{match[1]}"
    return None
