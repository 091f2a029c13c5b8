"""The charts and tables of a report, from the files of a run's steps."""

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
_FEW = 8  # lines that a reader can distinguish in one chart


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and alt text."""

    title: str
    alt: str
    svg: str


@dataclass(frozen=True)
class ClassTable:
    """Figures by class of one evaluate step; cells are text, numbers aligned right."""

    title: str
    heads: list[str]
    rows: list[tuple[int, list[str]]]  # class index; name and figures


def result_charts(steps: Sequence[RunStep], names: Sequence[str]) -> list[Chart]:
    """Returns the charts: recall by budget, precision by recall, quality of pseudo ground truth, scores, losses."""
    judged = [(run_step, run_step.metrics) for run_step in steps if run_step.metrics]
    made = [*_recall_charts(judged), *_precision_charts(judged, names), *_pgt_charts(judged), *_score_charts(steps)]
    return [*made, *_loss_charts(steps)]


def _recall_charts(judged: Sequence[Judged]) -> list[Chart]:
    made = []
    for run_step, metrics in judged:
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
            lines, chart=f"recall-{run_step.name}", x="best-rated boxes of an image", y="objects found, %", log_x=True
        )
        recalls = ", ".join(f"{100 * line[1][-1]:.1f} % at {name}" for name, line in lines.items() if line[1])
        made.append(
            Chart(f"Recall against budget: {run_step.name}", f"With all {most:.0f} boxes of an image {recalls}.", chart)
        )
    return made


def _precision_charts(judged: Sequence[Judged], names: Sequence[str]) -> list[Chart]:
    """Returns a chart per evaluation: the mean over classes, above a thin line for each class."""
    made = []
    for run_step, metrics in judged:
        curve = {row["class"]: row["curve"] for row in run_step.per_class if row.get("curve") is not None}
        if not curve:
            continue
        faint = [(_RECALLS, curve[name]) if name in curve else None for name in names]
        mean = np.mean(list(curve.values()), axis=0)
        chart = charts.curves(
            {"mean of classes": (_RECALLS, mean)},
            chart=f"pr-{run_step.name}",
            x="recall",
            y="precision, %",
            faint=faint,
        )
        what = "masks" if metrics["task"] == "segmentation" else "boxes"
        summary = ", ".join(
            f"{key} {100 * metrics['metrics'][key]:.1f} %" for key in ("AP50", "AP") if key in metrics["metrics"]
        )
        made.append(
            Chart(
                f"Precision and recall of {what}: {run_step.name}",
                f"At IoU 0.5, {metrics['split'] or 'all splits'}, {metrics['num_images']} images. {summary}.",
                chart,
            )
        )
    return made


def _pgt_charts(judged: Sequence[Judged]) -> list[Chart]:
    kept = [(run_step.name, metrics["metrics"]) for run_step, metrics in judged if metrics["task"] == "pgt"]
    if not kept:
        return []
    keys = ("precision@0.5", "recall@0.5", "precision@0.75", "recall@0.75", "mask_iou")
    figures = [values for _, values in kept]
    keys = tuple(key for key in keys if any(key in values for values in figures))
    groups = {key.replace("_", " "): [values.get(key) for values in figures] for key in keys}
    svg = charts.bars(groups, [name for name, _ in kept], x="%", percent=True)
    alt = "Precision: boxes that are right. Recall: objects that are found. Figures are in the table above."
    return [Chart("Quality of pseudo ground truth", alt, svg)]


def _score_charts(steps: Sequence[RunStep]) -> list[Chart]:
    groups: dict[str, np.ndarray] = {}
    for run_step in steps:
        if run_step.writes in ("detections", "pgt") and run_step.manifest and run_step.manifest["parts"]:
            read = tables.read_table(run_step.step.folder, run_step.manifest, columns=["scores"])
            scores = read.column("scores").combine_chunks().flatten().to_numpy(zero_copy_only=False)
            if len(scores) and scores.max() <= 1:
                groups[run_step.name] = scores
    made = []
    for start in range(0, len(groups), _FEW):
        shown = dict(list(groups.items())[start : start + _FEW])
        svg = charts.histogram(shown, x="score", y="boxes")
        summary = "; ".join(
            f"{name}: {len(scores)} boxes, median {np.median(scores):.2f}" for name, scores in shown.items()
        )
        made.append(Chart("Scores", f"{summary}.", svg))
    return made


def _loss_charts(steps: Sequence[RunStep]) -> list[Chart]:
    made = []
    for run_step in steps:
        rows = [row for row in run_step.training_log if row.get("loss") is not None]
        if len(rows) < 2:
            continue
        line = ([row["step"] for row in rows], [row["loss"] for row in rows])
        svg = charts.curves({"loss": line}, chart=f"loss-{run_step.name}", x="step", y="loss", percent=False)
        made.append(
            Chart(f"Training: {run_step.name}", f"The loss went from {line[1][0]:.3g} to {line[1][-1]:.3g}.", svg)
        )
    return made


def class_tables(steps: Sequence[RunStep], names: Sequence[str]) -> list[ClassTable]:
    """Returns the figures by class of every evaluate step."""
    where = {name: index for index, name in enumerate(names)}
    made = []
    for run_step in steps:
        if not run_step.per_class or run_step.metrics is None:
            continue
        keys = [key for key in run_step.per_class[0] if key not in ("class", "curve")]
        rows = [
            (where.get(row["class"], -1), [row["class"], *(figure(key, row) for key in keys)])
            for row in run_step.per_class
        ]
        judged = ", ".join(step.name for step in run_step.judged())
        made.append(
            ClassTable(
                f"{run_step.name}: {judged}, {run_step.metrics['split'] or 'all splits'}", ["class", *keys], rows
            )
        )
    return made


def headlines(steps: Sequence[RunStep]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns a table per task: title, heads and rows, one row per evaluate step; figures of no step are left out."""
    made = []
    tasks = [run_step.metrics["task"] for run_step in steps if run_step.metrics]
    for task in sorted(set(tasks), key=list(_TASKS).index):
        of_task = [
            (run_step, run_step.metrics) for run_step in steps if run_step.metrics and run_step.metrics["task"] == task
        ]
        keys = [key for key in HEADLINES[task] if any(key in metrics["metrics"] for _, metrics in of_task)]
        rows = []
        for run_step, metrics in of_task:
            judged = ", ".join(step.name for step in run_step.judged())
            figures = [figure(key, metrics["metrics"]) for key in keys]
            rows.append([run_step.name, judged, metrics["split"] or "all", str(metrics["num_images"]), *figures])
        made.append((_TASKS[task], ["step", "of", "split", "images", *keys], rows))
    return made


def dataset_facts(images: pa.Table, names: Sequence[str]) -> tuple[list[list[str]], Chart | None]:
    """Returns rows of split, images, images without labels; and a chart of the number of images of each class."""
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
    most = max(range(len(names)), key=lambda label: sum(split_counts[label] for split_counts in counts.values()))
    svg = charts.bars({split: counts[split] for split in sorted(counts)}, names, x="images")
    return facts, Chart("Images by class", f"{len(names)} classes; most images have {names[most]}.", svg)


def failed_rows(steps: Sequence[RunStep]) -> list[list[str]]:
    """Returns step, image, status and message of the rows that failed."""
    return [
        [run_step.name, row["image_id"], row["status"], row["message"]]
        for run_step in steps
        for row in run_step.failures
    ]
