"""What is wrong with a checkpoint that does not load, in terms of its keys."""

import json
from pathlib import Path


def listed(keys: list[str], most: int = 20) -> str:
    """`a, b, c, ... (30 keys)`"""
    return ", ".join(keys[:most]) + (f", ... ({len(keys)} keys)" if len(keys) > most else "" if keys else "no keys")


def incomplete_keys(path: str | Path) -> list[str]:
    """Names of the tensors that a safetensors file announces but, cut off, does not hold.

    The file begins with the length of its table of contents (8 bytes), then the table as JSON. An unreadable table gives
    one entry that says so.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        table_size = int.from_bytes(file.read(8), "little")
        if table_size > size - 8:
            return [f"every key: {path.name} ends within its table of contents"]
        try:
            table = json.loads(file.read(table_size))
        except ValueError:
            return [f"every key: {path.name} has no readable table of contents"]
    held = size - 8 - table_size
    return sorted(key for key, entry in table.items() if key != "__metadata__" and entry["data_offsets"][1] > held)
