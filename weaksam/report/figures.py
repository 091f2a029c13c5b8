"""The charts and tables of a report, from what the steps of a run wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.core import tables
from weaksam.ops.proposal_metrics import RecallRules
from weaksam.pipeline.listings import figure
from weaksam.report import charts
from weaksam.report.run_files import RunStep
from weaksam.stages.evaluate import HEADLINES

_RECALLS = np.linspace(0, 1, 101)
_TASKS = {
    "proposals": "Proposals",
    "detection": "Boxes of detectors",
    "segmentation": "Masks of detectors",
    "pgt": "Pseudo ground truth",
}
Judged = tuple[RunStep, dict[str, Any]]  # an evaluate step and its metrics.json
_FEW = 8  # lines that can be told apart in one chart


@dataclass(frozen=True)
class Chart:
    """A drawing with what it says."""

    title: str
    alt: str
    svg: str


@dataclass(frozen=True)
class ClassTable:
    """Figures by class of one evaluate step; cells are text, numbers right."""

    title: str
    heads: list[str]
    rows: list[tuple[int, list[str]]]  # class index; name and figures


def result_charts(steps: Sequence[RunStep], names: Sequence[str]) -> list[Chart]:
    """Recall against budget, precision against recall, quality of pseudo ground truth, scores, losses."""
    judged = [(one, one.metrics) for one in steps if one.metrics]
    made = [*_recall_charts(judged), *_precision_charts(judged, names), *_pgt_charts(judged), *_score_charts(steps)]
    return [*made, *_loss_charts(steps)]


def _recall_charts(judged: Sequence[Judged]) -> list[Chart]:
    made = []
    for one, metrics in judged:
        figures = metrics["metrics"]
        if metrics["task"] != "proposals" or "boxes_per_image" not in figures:
            continue
        most = figures["boxes_per_image"]
        lines = {}
        for iou in ("0.5", "0.75", "0.9"):
            budgets = [k for k in RecallRules().top_k if k < most and f"recall@{iou}_top{k}" in figures]
            points = [(k, figures[f"recall@{iou}_top{k}"]) for k in budgets]
            points += [(most, figures[f"recall@{iou}"])] if f"recall@{iou}" in figures else []
            lines[f"IoU {iou}"] = tuple(zip(*points, strict=True)) if points else ((), ())
        chart = charts.curves(
            lines, chart=f"recall-{one.name}", x="best-rated boxes of an image", y="objects found, %", log_x=True
        )
        told = ", ".join(f"{100 * line[1][-1]:.1f} % at {name}" for name, line in lines.items() if line[1])
        made.append(
            Chart(f"Recall against budget: {one.name}", f"With all {most:.0f} boxes of an image {told}.", chart)
        )
    return made


def _precision_charts(judged: Sequence[Judged], names: Sequence[str]) -> list[Chart]:
    """A chart an evaluation: the mean over classes, over a thin line of each class."""
    made = []
    for one, metrics in judged:
        curve = {row["class"]: row["curve"] for row in one.per_class if row.get("curve") is not None}
        if not curve:
            continue
        faint = [(_RECALLS, curve[name]) if name in curve else None for name in names]
        mean = np.mean(list(curve.values()), axis=0)
        chart = charts.curves(
            {"mean of classes": (_RECALLS, mean)}, chart=f"pr-{one.name}", x="recall", y="precision, %", faint=faint
        )
        what = "masks" if metrics["task"] == "segmentation" else "boxes"
        told = ", ".join(
            f"{key} {100 * metrics['metrics'][key]:.1f} %" for key in ("AP50", "AP") if key in metrics["metrics"]
        )
        made.append(
            Chart(
                f"Precision and recall of {what}: {one.name}",
                f"At IoU 0.5, {metrics['split'] or 'all splits'}, {metrics['num_images']} images. {told}.",
                chart,
            )
        )
    return made


def _pgt_charts(judged: Sequence[Judged]) -> list[Chart]:
    kept = [(one.name, metrics["metrics"]) for one, metrics in judged if metrics["task"] == "pgt"]
    if not kept:
        return []
    keys = ("precision@0.5", "recall@0.5", "precision@0.75", "recall@0.75", "mask_iou")
    figures = [some for _, some in kept]
    keys = tuple(key for key in keys if any(key in one for one in figures))
    groups = {key.replace("_", " "): [one.get(key) for one in figures] for key in keys}
    svg = charts.bars(groups, [name for name, _ in kept], x="%", percent=True)
    told = "Precision: boxes that are right. Recall: objects that are found. Figures are in the table above."
    return [Chart("Quality of pseudo ground truth", told, svg)]


def _score_charts(steps: Sequence[RunStep]) -> list[Chart]:
    groups: dict[str, np.ndarray] = {}
    for one in steps:
        if one.writes in ("detections", "pgt") and one.manifest and one.manifest["parts"]:
            read = tables.read_table(one.step.folder, one.manifest, columns=["scores"])
            scores = read.column("scores").combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if len(scores) and scores.max() <= 1:
                groups[one.name] = scores
    made = []
    for start in range(0, len(groups), _FEW):
        some = dict(list(groups.items())[start : start + _FEW])
        svg = charts.histogram(some, x="score", y="boxes")
        told = "; ".join(
            f"{name}: {len(scores)} boxes, median {np.median(scores):.2f}" for name, scores in some.items()
        )
        made.append(Chart("Scores", f"{told}.", svg))
    return made


def _loss_charts(steps: Sequence[RunStep]) -> list[Chart]:
    made = []
    for one in steps:
        rows = [row for row in one.journal if row.get("loss") is not None]
        if len(rows) < 2:
            continue
        line = ([row["step"] for row in rows], [row["loss"] for row in rows])
        svg = charts.curves({"loss": line}, chart=f"loss-{one.name}", x="step", y="loss", percent=False)
        made.append(Chart(f"Training: {one.name}", f"The loss went from {line[1][0]:.3g} to {line[1][-1]:.3g}.", svg))
    return made


def class_tables(steps: Sequence[RunStep], names: Sequence[str]) -> list[ClassTable]:
    """Figures by class of every evaluate step."""
    where = {name: index for index, name in enumerate(names)}
    made = []
    for one in steps:
        if not one.per_class or one.metrics is None:
            continue
        keys = [key for key in one.per_class[0] if key not in ("class", "curve")]
        rows = [
            (where.get(row["class"], -1), [row["class"], *(figure(key, row) for key in keys)]) for row in one.per_class
        ]
        judged = ", ".join(step.name for step in one.judged())
        made.append(ClassTable(f"{one.name}: {judged}, {one.metrics['split'] or 'all splits'}", ["class", *keys], rows))
    return made


def headlines(steps: Sequence[RunStep]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table a task: title, heads and rows, a row an evaluate step; figures that no step has are left out."""
    made = []
    tasks = [one.metrics["task"] for one in steps if one.metrics]
    for task in sorted(set(tasks), key=list(_TASKS).index):
        of_task = [(one, one.metrics) for one in steps if one.metrics and one.metrics["task"] == task]
        keys = [key for key in HEADLINES[task] if any(key in told["metrics"] for _, told in of_task)]
        rows = []
        for one, told in of_task:
            judged = ", ".join(step.name for step in one.judged())
            figures = [figure(key, told["metrics"]) for key in keys]
            rows.append([one.name, judged, told["split"] or "all", str(told["num_images"]), *figures])
        made.append((_TASKS[task], ["step", "of", "split", "images", *keys], rows))
    return made


def dataset_facts(images: pa.Table, names: Sequence[str]) -> tuple[list[list[str]], Chart | None]:
    """Rows of split, images, images without labels; and how many images each class has."""
    rows = images.select(["split", "labels"]).to_pylist()
    splits = Counter(row["split"] for row in rows)
    bare = Counter(row["split"] for row in rows if not row["labels"])
    counts: dict[str, list[int]] = {split: [0] * len(names) for split in splits}
    for row in rows:
        for label in row["labels"] or ():
            counts[row["split"]][label] += 1
    facts = [[split, str(number), str(bare[split])] for split, number in sorted(splits.items())]
    if not names or not any(map(any, counts.values())):
        return facts, None
    most = max(range(len(names)), key=lambda label: sum(one[label] for one in counts.values()))
    svg = charts.bars({split: counts[split] for split in sorted(counts)}, names, x="images")
    return facts, Chart("Images by class", f"{len(names)} classes; most images have {names[most]}.", svg)


def failed_rows(steps: Sequence[RunStep]) -> list[list[str]]:
    """Step, image, status and message of rows that failed."""
    return [[one.name, row["image_id"], row["status"], row["message"]] for one in steps for row in one.failures]
