"""Imports go one way, Ray stays in its layers, ground truth with evaluate and report, light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from testing.places import ROOT

PACKAGE = ROOT / "weaksam"

# A module may import from folders to the left of its own; those between two signs do not know each other. Modules
# outside folders are the leftmost.
ORDER = "core < ops < data < sam, execution < models < training < stages, demo < pipeline < report, plan, cluster < cli"
RANK = {name.strip(): rank for rank, names in enumerate(ORDER.split("<")) for name in names.split(",")}
WITH_RAY = {"execution", "training", "stages", "pipeline", "plan", "cluster"}
WITH_GROUND_TRUTH = {"weaksam.stages.evaluate", "weaksam.report", "weaksam.core.tables"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
AROUND = {
    module_of(path): path for name in ("testing", "benchmarks", "jobs", "tests") for path in (ROOT / name).rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Every imported name of a file, `from a import b` as `a.b`, also inside functions and for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of this project among them."""
    found = set()
    for name in imports(path):
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def folder_of(module: str) -> str | None:
    folder = module.split(".")[1] if "." in module else ""
    return folder if (PACKAGE / folder).is_dir() and folder else None


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_to_its_right_or_beside_it(module: str) -> None:
    own = folder_of(module)
    for name in imported_modules(MODULES[module], MODULES):
        other = folder_of(name)
        if other is not None and other != own:
            assert own is not None, f"{module} imports {name}"
            assert RANK[other] < RANK[own], f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = MODULES | AROUND
    with_packages = {module: imported_modules(path, known) - {module} for module, path in known.items()}
    try:
        TopologicalSorter(with_packages).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_is_shared_by_tests_and_benchmarks_knows_neither() -> None:
    for module, path in AROUND.items():
        top = module.split(".")[0]
        barred = {"testing": {"tests", "benchmarks", "jobs"}, "benchmarks": {"tests"}, "jobs": {"tests", "testing"}}
        seen = {name.split(".")[0] for name in imported_modules(path, AROUND)}
        assert not seen & barred.get(top, set()), module


@pytest.mark.parametrize("module", MODULES)
def test_ray_is_imported_in_its_layers_only(module: str) -> None:
    if folder_of(module) not in WITH_RAY:
        assert not [name for name in imports(MODULES[module]) if name.split(".")[0] == "ray"]


@pytest.mark.parametrize("module", MODULES)
def test_ground_truth_is_read_by_evaluate_and_report_alone(module: str) -> None:
    if module in WITH_GROUND_TRUTH or module.rpartition(".")[0] in WITH_GROUND_TRUTH:
        return
    text = MODULES[module].read_text()
    assert "read_ground_truth" not in text
    assert "tables.GROUND_TRUTH" not in text


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import weaksam.cli.main, weaksam.pipeline, weaksam.stages", ["torch", "ray", "torchvision"]),
        ("import weaksam.sam.engine, weaksam.sam.checkpoints, weaksam.ops.proposal_metrics", ["ray", "pydantic"]),
        ("import weaksam.sam, weaksam.sam.shipped", ["torch", "ray"]),
        ("import weaksam.models.detectors.build, weaksam.models.wsod.build", ["timm", "ray"]),
        (
            "from weaksam.core.config import parse_settings; from weaksam.stages import STAGES; "
            "stage, raw = STAGES['train_classifier'], {'images': 'i', 'split': 's', 'gated': True}; "
            "stage.outside(parse_settings(stage.config, raw, where='s')[0])",
            ["torch", "timm"],
        ),
        ("import weaksam.data.images, weaksam.demo.scenes", ["ray", "torch"]),
    ],
)
def test_what_starts_without_what(code: str, absent: list[str]) -> None:
    check = f"{code}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
