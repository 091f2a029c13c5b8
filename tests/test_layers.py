"""Imports go one way, Ray stays in its layer, ground truth with evaluate and report, light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "weaksam"

# From left to right; a module may import from its own layer and from those before it.
LAYERS = [
    {"errors", "masking"},
    {
        *(
            "config",
            "schemas",
            "memory",
            "uris",
            "proxies",
            "fsspec_stores",
            "object_stores",
            "storage_faults",
            "cache",
            "storage",
        ),
        *("parquet_files", "tables"),
    },
    {"ops"},
    {"models", "sam", "data"},
    {
        "stage",
        "step_folders",
        "own_cluster",
        "lost_cluster",
        "connection",
        "pools",
        "nodes",
        "metrics",
        "progress",
        "rows",
        "isolation",
        "runtime",
        "turns",
        "training",
        "training_checkpoints",
        "training_failures",
        "training_log",
        "training_reading",
        "training_state",
        "training_watch",
        "training_settings",
        "times",
        "training_projection",
        "projection",
    },
    {"stages"},
    {"pipeline", "listings", "looking", "pilot", "planning"},
    {"cluster_settings", "doctor", "submit", "terminal", "job_commands", "cli", "report", "reference"},
]
WITH_RAY = {
    "metrics",
    "own_cluster",
    "lost_cluster",
    "connection",
    "nodes",
    "turns",
    "rows",
    "isolation",
    "runtime",
    "training",
    "training_failures",
    "stages",
    "pipeline",
    "doctor",
    "submit",
}
WITH_GROUND_TRUTH = {"stages/evaluate.py", "report", "tables.py"}


def layer_of(name: str) -> int:
    found = [index for index, names in enumerate(LAYERS) if name in names]
    assert found, f"weaksam.{name} has no layer: add it to LAYERS"
    return found[0]


def imports(path: Path) -> list[str]:
    """Every imported module of a file, `from weaksam import x` as `weaksam.x`, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_to_its_right(path: Path) -> None:
    if part(path) == "__init__":
        return
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "weaksam" and len(pieces) > 1 and pieces[1] != "__version__":
            assert layer_of(pieces[1]) <= layer_of(part(path)), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_is_imported_in_its_layers_only(path: Path) -> None:
    if part(path) not in WITH_RAY:
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ground_truth_is_read_by_evaluate_and_report_alone(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    if where in WITH_GROUND_TRUTH or where.split("/")[0] in WITH_GROUND_TRUTH:
        return
    text = path.read_text()
    assert "read_ground_truth" not in text
    assert "tables.GROUND_TRUTH" not in text


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import weaksam.cli.main, weaksam.pipeline, weaksam.stages", ["torch", "ray", "torchvision"]),
        ("import weaksam.sam.engine, weaksam.sam.checkpoints, weaksam.ops.metrics", ["ray", "pydantic"]),
        ("import weaksam.data.images, weaksam.demo.scenes", ["ray", "torch"]),
    ],
)
def test_what_starts_without_what(code: str, absent: list[str]) -> None:
    check = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
