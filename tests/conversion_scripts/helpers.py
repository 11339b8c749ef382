"""Damaging a checkpoint, and running a script as its user would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


REPOSITORY = Path(__file__).resolve().parents[2]


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """`change` gets the dict of tensors of a checkpoint in one file."""
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def run_script(name: str, *arguments: str, module: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Runs `conversion_scripts/NAME.py` as a module or as a plain script; `kwargs` go to `subprocess.run`."""
    script = ["-m", f"conversion_scripts.{name}"] if module else [f"{REPOSITORY}/conversion_scripts/{name}.py"]
    environment = {**kwargs.pop("env", os.environ), "OMP_NUM_THREADS": "1"}
    if module:
        kwargs["cwd"] = REPOSITORY
    command = [sys.executable, *script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **kwargs)
