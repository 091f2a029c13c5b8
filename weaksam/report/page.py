"""`write_report`: writes the contents of a run folder as one HTML file.

The file needs no server and no network: pictures, styles and scripts are embedded, and its content security policy
forbids it to load anything else. It opens from a disk, a bucket or an attachment.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from weaksam import __version__
from weaksam.core import storage
from weaksam.execution.progress import duration
from weaksam.models.backbones.catalogue import BACKBONES, backbone_kind
from weaksam.report import choose, figures
from weaksam.report.gallery import Gallery, make_gallery
from weaksam.report.panels import SOURCE_COLOURS
from weaksam.report.run_files import RunStep, read_hygiene, read_run
from weaksam.report.selection import read_dataset

log = logging.getLogger(__name__)

NAME = "report.html"
# Networks that ship with weaksam by the names of settings, with their training data.
_FEATURES = {kind.name: kind.title for kind in BACKBONES if kind.shipped()} | {
    "vit_xs": backbone_kind("frozen_sam").title
}
IMAGES = 6


def write_report(run: str, *, to: str | None = None, images: int = IMAGES, gpu_price: float | None = None) -> str:
    """Writes the report of a run folder and returns its URI.

    Args:
        run: URI of the folder.
        to: URI of the file; `report.html` in the folder when None.
        images: number of images shown of each group: examples, best, worst and most uncertain.
        gpu_price: price of a GPU for an hour, in any currency; adds the cost of each step to the report.

    Raises:
        ConfigError: no step of the folder has been started.
    """
    to = storage.absolute(to) if to is not None else storage.join(storage.absolute(run), NAME)
    storage.write_bytes(to, render(run, images=images, gpu_price=gpu_price).encode())
    return to


def render(run: str, *, images: int = IMAGES, gpu_price: float | None = None) -> str:
    """Returns the text of the page; see `write_report`."""
    steps = read_run(run)
    log.info("report: %d steps", len(steps))
    dataset = read_dataset(steps)
    names = dataset.names if dataset else []
    charts = figures.result_charts(steps, names)
    log.info("report: %d charts, choosing images", len(charts))
    gallery = make_gallery(steps, dataset, images) if dataset else Gallery([])
    cards = gallery.cards
    log.info("report: %d images", len(cards))
    facts, by_class = figures.dataset_facts(dataset.images, names) if dataset else ([], None)
    rows = [step_row(run_step, gpu_price) for run_step in steps]
    return _template().render(
        run=storage.absolute(run),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        rows=rows,
        total=total_row(rows),
        has_cost=gpu_price is not None,
        headlines=figures.headlines(steps),
        charts=charts,
        tables=figures.class_tables(steps, names),
        facts=facts,
        by_class=by_class,
        hygiene=read_hygiene(steps),
        names=names,
        cards=cards,
        least_score=gallery.least_score,
        panel_steps=list(dict.fromkeys(panel.step for card in cards for panel in card.panels)),
        groups=[group for group in choose.GROUPS if any(group in card.groups for card in cards)],
        sources=SOURCE_COLOURS,
        failed=figures.failed_rows(steps),
        settings=[
            (run_step.step.folder.rsplit("/", 1)[-1], json.dumps(dict(run_step.config_json), indent=2))
            for run_step in steps
        ],
        versions=_versions(steps),
    )


def _template() -> Template:
    loader = PackageLoader("weaksam.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def step_row(run_step: RunStep, gpu_price: float | None) -> dict[str, Any]:
    """Returns a row of the table of steps. `cost` is None if it is unknown, 0 if the cluster had no GPU."""
    manifest, state = run_step.manifest or {}, run_step.state
    seconds, cluster = manifest.get("seconds"), manifest.get("cluster")
    gpu_hours = None if seconds is None or cluster is None else cluster["GPU"] * seconds / 3600
    progress = state["progress"]
    return {
        "name": run_step.name,
        "stage": run_step.step.stage.name,
        "features": features_of(run_step.config_json.get("settings", {})),
        "reads": ", ".join(step.name for step in run_step.step.inputs.values()),
        "state": state["state"] + (f" {progress['done']}/{progress['total']} {progress['unit']}" if progress else ""),
        "is_finished": state["state"] == "finished",
        "look": {"finished": "good", "running": ""}.get(state["state"], "bad"),
        "rows": state["rows"],
        "failed": state["failed"],
        "seconds": seconds,
        "time": "" if seconds is None else duration(seconds),
        "rate": manifest.get("rows_per_second"),
        "cluster": ""
        if cluster is None
        else f"{cluster['nodes']:g} nodes, {cluster['CPU']:g} CPU, {cluster['GPU']:g} GPU",
        "gpu_hours": gpu_hours,
        "cost": None if gpu_hours is None or gpu_price is None else gpu_hours * gpu_price,
    }


def features_of(settings: Mapping[str, Any]) -> str:
    """Returns the networks of a step, with their training data if they ship with weaksam; empty if there is none."""
    sam = settings.get("sam") or {}
    names = (settings.get("backbone") or "").split("+")
    names += [f"{sam['model']} of {sam['checkpoint']}" if sam.get("checkpoint") else sam.get("model", "")]
    return ", ".join(_FEATURES.get(name, name) for name in names if name)


def total_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the sums of the table of steps, and the longest step, by which bars are scaled."""
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    return {
        "time": duration(math.fsum(seconds)),
        "longest": max(seconds, default=0.0) or 1.0,
        "failed": sum(row["failed"] or 0 for row in rows),
        "finished": sum(row["is_finished"] for row in rows),
        "gpu_hours": math.fsum(row["gpu_hours"] or 0.0 for row in rows),
        "cost": math.fsum(row["cost"] or 0.0 for row in rows),
    }


def _versions(steps: Sequence[RunStep]) -> list[tuple[str, str]]:
    """Returns programs and the versions that steps were made with, all of them where they differ."""
    by_program: dict[str, dict[str, None]] = {}
    for run_step in steps:
        manifest = run_step.manifest or {}
        commit = {"git commit": manifest["git_commit"]} if manifest.get("git_commit") else {}
        for name, version in {**manifest.get("versions", {}), **commit}.items():
            by_program.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in by_program.items()]
