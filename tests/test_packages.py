"""What holds between the two packages: the Hub loads each of them alone, so they share by copy and never import each other."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import kermit_hf
import nystromformer_hf
from kermit_hf import KermitConfig, KermitForCausalLM
from nystromformer_hf import NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM


KERMIT = Path(kermit_hf.__file__).parent
NYSTROMFORMER = Path(nystromformer_hf.__file__).parent
SHARED = [
    "checkpoints.py",
    "compile.py",
    "cpu_kernels.py",
    "functions.py",
    "kernel_choice.py",
    "triton_tiles.py",
    "validation.py",
    "tasks.h",
    "vector_tiles.h",
]
SHARED_BY_DEMOS = ["classification.py", "generation.py", "record.py", "sources.py", "training.py"]


@pytest.mark.parametrize("name", [*SHARED, *(f"demo/{name}" for name in SHARED_BY_DEMOS)])
def test_shared_files_are_equal(name):
    assert (KERMIT / name).read_text() == (NYSTROMFORMER / name).read_text()


@pytest.mark.parametrize("package", [KERMIT, NYSTROMFORMER])
def test_model_files_import_siblings_one_by_one(package):
    """The Hub client follows `from .sibling import name` alone, and takes along all that it finds."""
    files = sorted(set(package.glob("*.py")) - {package / "__init__.py", package / "quickstart.py"})
    siblings = {file.stem for file in files}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in siblings, f"{file.name}: {ast.unparse(node)}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any(name.split(".")[0] == package.name for name in names), (
                    f"{file.name}: {ast.unparse(node)}"
                )


@pytest.mark.parametrize(("package", "other"), [(KERMIT, "nystromformer_hf"), (NYSTROMFORMER, "kermit_hf")])
def test_neither_package_imports_the_other(package, other):
    files = sorted(package.rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not any(name.split(".")[0] in {other, "tests", "conversion_scripts"} for name in names), file.name


@pytest.mark.parametrize(
    "config, head",
    [(KermitConfig, KermitForCausalLM), (NystromformerHFDecoderConfig, NystromformerHFDecoderForCausalLM)],
)
def test_the_trainer_shifts_labels_that_it_smooths(config, head, tmp_path):
    """Else it trains a model to copy the token that it reads."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model, tokens = head(config(**sizes, num_attention_heads=2)).eval(), torch.randint(3, 20, (2, 9))
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True))
    expected = LabelSmoother(0.1)(model(tokens), tokens, shift_labels=True)
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
    torch.testing.assert_close(loss, expected)
