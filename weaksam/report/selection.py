"""Applies the rules of `choose` to the tables of a run: the images that a report shows, and the reasons.

The module reads ground truth, to find the best and the worst images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from weaksam.core import schemas, storage, tables
from weaksam.ops.uncertainty import best_scores, image_uncertainty, most_uncertain
from weaksam.report import choose
from weaksam.report.run_files import RunStep

SHOWN = ("proposals", "detections", "pgt")  # kinds of tables that a report shows


@dataclass(frozen=True)
class Dataset:
    """The index step of a run: its images, class names, ground truth (None without annotations) and folders."""

    images: pa.Table  # image_id, uri, split, labels
    names: list[str]
    truth: pa.Table | None
    folders: tuple[str, ...] = ()  # only files in these are fetched: tables of a foreign run could name any URI


@dataclass
class Chosen:
    """Images to show.

    Attributes:
        groups: the groups of each image, by image id, in the order of the report.
        notes: a remark on each image, by image id; often empty.
        least_score: the initial score threshold of detections.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    least_score: float = 0.0

    def add(self, group: str, image_ids: Sequence[str], remarks: Mapping[str, str]) -> None:
        """Adds the images of another group."""
        for image_id in image_ids:
            self.groups.setdefault(image_id, []).append(group)
            self.notes[image_id] = ", ".join(filter(None, [self.notes.get(image_id), remarks.get(image_id)]))


def choose_images(steps: Sequence[RunStep], shown: Sequence[RunStep], dataset: Dataset, count: int) -> Chosen:
    """Chooses up to `count` images of each group.

    Args:
        steps: steps of the run, in order.
        shown: the steps with a table that is shown.
        dataset: the dataset of the images.
        count: largest number of images of each group.
    """
    chosen = Chosen()
    among = [set(_read(run_step, "status").column("image_id").to_pylist()) for run_step in shown]
    chosen.add(choose.EXAMPLES, choose.examples(dataset.images, count, among), {})
    detected = [run_step for run_step in shown if run_step.writes == "detections"]
    folders = {step.folder for run_step in steps if run_step.metrics for step in run_step.judged()}
    judged = [run_step for run_step in detected if run_step.step.folder in folders]
    if judged and dataset.truth is not None:
        _add_by_truth(chosen, judged[-1], dataset, dataset.truth, count)
    elif detected:
        table = _read(detected[-1], "scores")
        scores = table.column("scores").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        chosen.least_score = choose.usual_threshold(scores, table.num_rows)
    if unsure := [run_step for run_step in shown if run_step.writes == "pgt"] or detected:
        _add_uncertain(chosen, unsure[0], dataset, count)
    return chosen


def _read(run_step: RunStep, *columns: str) -> pa.Table:
    return tables.read_table(run_step.step.folder, run_step.manifest or {}, columns=columns).combine_chunks()


def _add_by_truth(chosen: Chosen, judged: RunStep, dataset: Dataset, truth: pa.Table, count: int) -> None:
    """Adds the images with the best and the worst detections, among those with ground truth."""
    detections = _read(judged, "status", "boxes", "classes", "scores")
    truth = truth.select(["image_id", "boxes", "classes", "difficult", "crowd"])
    truth = tables.with_ids(truth, detections.column("image_id").to_pylist()).combine_chunks()
    ids = truth.column("image_id").to_pylist()
    detections = tables.rows_for(detections, ids).combine_chunks()
    pairs = {image_id: (tables.row_at(truth, row), tables.row_at(detections, row)) for row, image_id in enumerate(ids)}
    rated, chosen.least_score = choose.rate_images(pairs, len(dataset.names))
    best, worst = choose.best_and_worst(rated, count)
    notes = {key: f"F1 of {judged.name} {f1:.2f} from score {chosen.least_score:.2f}" for key, f1 in rated.items()}
    chosen.add(choose.BEST, best, notes)
    chosen.add(choose.WORST, worst, notes)


def _add_uncertain(chosen: Chosen, run_step: RunStep, dataset: Dataset, count: int) -> None:
    """Adds the images that a person should review first; excludes images that failed or were reviewed."""
    table = _read(run_step, "status", "classes", "scores", "trusted")
    ids, labels = (dataset.images.column(name).to_pylist() for name in ("image_id", "labels"))
    known = dict(zip(ids, labels, strict=True))
    rows: list[dict[str, Any]] = [tables.row_at(table, index) for index in range(table.num_rows)]
    rows = [row for row in rows if row["status"] == schemas.OK and not row.get("trusted")]
    image_labels = [known[row["image_id"]] for row in rows]
    best = [
        best_scores(row["classes"], row["scores"], present) for row, present in zip(rows, image_labels, strict=True)
    ]
    ranked = [row["image_id"] for row in rows]
    unsure = image_uncertainty(best, image_labels)
    most = {ranked[index]: unsure[index] for index in most_uncertain(ranked, unsure, count)}
    remarks = {image_id: f"uncertainty in {run_step.name} {value:.2f}" for image_id, value in most.items()}
    chosen.add(choose.UNCERTAIN, list(most), remarks)


def read_dataset(steps: Sequence[RunStep]) -> Dataset | None:
    """Returns the dataset of the first finished index step; None if none is finished."""
    index = next(
        (run_step for run_step in steps if run_step.writes == "images" and run_step.manifest is not None), None
    )
    if index is None or index.manifest is None:
        return None
    images = tables.read_table(index.step.folder, index.manifest, columns=["uri", "split", "labels"])
    truth = tables.read_ground_truth(index.step.folder)
    return Dataset(
        images,
        tables.read_class_names(index.step.folder, index.manifest),
        truth,
        _folders(index.config_json["settings"]),
    )


def _folders(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the folders that hold the images of an index step, from its settings."""
    root = settings.get("root")
    if not isinstance(root, str):
        return ()
    root = storage.absolute(root)
    beside = [folder for folder in (settings.get("image_folders") or {}).values() if isinstance(folder, str)]
    return (root, *(folder for folder in beside if folder.startswith("/") or not storage.is_local(folder)))
