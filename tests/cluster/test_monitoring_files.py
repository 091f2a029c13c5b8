"""The dashboard asks for metrics that exist, and Prometheus finds the nodes; broken copies of both are refused."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import pytest

from tests.cluster.test_cluster_files import CLUSTER, changed, load, ray_package
from weaksam.execution.telemetry import SERIES


@cache
def metrics_of_ray() -> frozenset[str]:
    """Names that Ray's own dashboards ask for: those it exports under these very names."""
    folder = ray_package() / "dashboard" / "modules" / "metrics" / "dashboards"
    return frozenset(name for path in folder.glob("*.py") for name in re.findall(r"\bray_[a-z0-9_]+", path.read_text()))


def metrics_in(expr: str) -> set[str]:
    """The metrics of a PromQL expression: its names, less functions, labels, ranges and what is in quotes."""
    bare = re.sub(r"\"[^\"]*\"", "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring) *\([^)]*\)", "", bare)
    return {name for name, call in re.findall(r"([a-zA-Z_:][\w:]*)\b *(\()?", bare) if not call} - {"and", "or"}


def dashboard_faults(content: dict[str, Any]) -> list[str]:
    faults = []
    for panel in content["panels"]:
        if panel["type"] == "row":
            continue
        exprs = [target["expr"] for target in panel["targets"]]
        if not exprs:
            faults.append(f"{panel['title']}: asks for nothing")
        for expr in exprs:
            if not (names := metrics_in(expr)) or expr.count("(") != expr.count(")"):
                faults.append(f"{panel['title']}: {expr} is no question")
            faults += [f"{panel['title']}: {name} does not exist" for name in names - set(SERIES) - metrics_of_ray()]
    ids = [panel["id"] for panel in content["panels"]]
    return faults + (["an id is used twice"] if len(set(ids)) < len(ids) else [])


def test_every_panel_asks_for_metrics_that_exist() -> None:
    content = json.loads((CLUSTER / "grafana.json").read_text())
    assert not dashboard_faults(content)
    asked = {
        name
        for panel in content["panels"]
        for target in panel.get("targets", [])
        for name in metrics_in(target["expr"])
    }
    assert asked >= set(SERIES), "a metric of ours is shown nowhere"
    assert any(name.startswith("ray_data_") for name in asked)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((CLUSTER / "grafana.json").read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    "expr",
    [
        "rate(ray_weaksam_images_total[1m])",
        "rate(weaksam_images_done_total[1m])",
        "rate(ray_weaksam_encoder_seconds[1m])",
        "ray_data_no_such_thing",
        "sum(ray_weaksam_images_done_total",
        'sum by (step) ("text")',
    ],
)
def test_a_broken_panel_is_refused(expr: str) -> None:
    content = json.loads((CLUSTER / "grafana.json").read_text())
    (first, *_) = [index for index, panel in enumerate(content["panels"]) if panel["type"] != "row"]
    assert dashboard_faults(changed(content, f"panels.{first}.targets.0.expr", expr))


def prometheus_faults(content: dict[str, Any]) -> list[str]:
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["global", "scrape_configs"],
        "properties": {
            "global": {
                "type": "object",
                "additionalProperties": False,
                "patternProperties": {"^(scrape|evaluation)_interval$": {"type": "string", "pattern": r"^\d+s$"}},
            },
            "scrape_configs": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["job_name", "file_sd_configs"],
                    "properties": {
                        "job_name": {"type": "string"},
                        "file_sd_configs": {
                            "type": "array",
                            "minItems": 1,
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["files"],
                                "properties": {
                                    "files": {
                                        "type": "array",
                                        "minItems": 1,
                                        "items": {"pattern": r"/prom_metrics_service_discovery\.json$"},
                                    },
                                    "refresh_interval": {"type": "string", "pattern": r"^\d+[sm]$"},
                                },
                            },
                        },
                    },
                },
            },
        },
    }
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(content)]


def test_prometheus_finds_the_nodes_in_the_file_that_ray_writes() -> None:
    assert not prometheus_faults(load("prometheus.yaml"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("scrape_config", []),
        ("scrape_configs", []),
        ("scrape_configs.0.file_sd_configs.0.files", ["/tmp/ray/nodes.json"]),
        ("global.scrape_interval", 15),
    ],
)
def test_a_broken_scrape_config_is_refused(path: str, value: Any) -> None:
    assert prometheus_faults(changed(load("prometheus.yaml"), path, value))
