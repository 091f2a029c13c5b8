"""Which images of a run are shown, and why: what `choose` says of the run's tables.

Ground truth is read here, to tell the best and the worst images.
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

SHOWN = ("proposals", "detections", "pgt")  # what the tables that are shown hold


@dataclass(frozen=True)
class Dataset:
    """The index step of a run: its images, class names, what people drew (None where nobody did) and its folders."""

    images: pa.Table  # image_id, uri, split, labels
    names: list[str]
    truth: pa.Table | None
    folders: tuple[str, ...] = ()  # nothing outside of these is fetched: tables of a foreign run could name anything


@dataclass
class Chosen:
    """Images to show.

    Attributes:
        groups: by image id, in the order they are shown, the groups it is in.
        notes: by image id, a remark, often none.
        least_score: from which detections are shown at first.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    least_score: float = 0.0

    def add(self, group: str, image_ids: Sequence[str], remarks: Mapping[str, str]) -> None:
        """Images of one more group."""
        for image_id in image_ids:
            self.groups.setdefault(image_id, []).append(group)
            self.notes[image_id] = ", ".join(filter(None, [self.notes.get(image_id), remarks.get(image_id)]))


def choose_images(steps: Sequence[RunStep], shown: Sequence[RunStep], dataset: Dataset, count: int) -> Chosen:
    """`count` images of each group.

    Args:
        steps: of the run, in order.
        shown: those with a table that is shown.
        dataset: whose images they are.
        count: of each group, at most.
    """
    chosen = Chosen()
    among = [set(_read(one, "status").column("image_id").to_pylist()) for one in shown]
    chosen.add(choose.EXAMPLES, choose.examples(dataset.images, count, among), {})
    detected = [one for one in shown if one.writes == "detections"]
    folders = {step.folder for one in steps if one.metrics for step in one.judged()}
    judged = [one for one in detected if one.step.folder in folders]
    if judged and dataset.truth is not None:
        _add_by_truth(chosen, judged[-1], dataset, dataset.truth, count)
    elif detected:
        table = _read(detected[-1], "scores")
        scores = table.column("scores").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        chosen.least_score = choose.usual_threshold(scores, table.num_rows)
    if unsure := [one for one in shown if one.writes == "pgt"] or detected:
        _add_uncertain(chosen, unsure[0], dataset, count)
    return chosen


def _read(one: RunStep, *columns: str) -> pa.Table:
    return tables.read_table(one.step.folder, one.manifest or {}, columns=columns).combine_chunks()


def _add_by_truth(chosen: Chosen, judged: RunStep, dataset: Dataset, truth: pa.Table, count: int) -> None:
    """The images in which detections are best and worst, of those that have ground truth."""
    found = _read(judged, "status", "boxes", "classes", "scores")
    truth = truth.select(["image_id", "boxes", "classes", "difficult", "crowd"])
    truth = tables.with_ids(truth, found.column("image_id").to_pylist()).combine_chunks()
    ids = truth.column("image_id").to_pylist()
    found = tables.rows_for(found, ids).combine_chunks()
    pairs = {image_id: (tables.row_at(truth, row), tables.row_at(found, row)) for row, image_id in enumerate(ids)}
    rated, chosen.least_score = choose.rate_images(pairs, len(dataset.names))
    best, worst = choose.best_and_worst(rated, count)
    told = {key: f"F1 of {judged.name} {f1:.2f} from score {chosen.least_score:.2f}" for key, f1 in rated.items()}
    chosen.add(choose.BEST, best, told)
    chosen.add(choose.WORST, worst, told)


def _add_uncertain(chosen: Chosen, one: RunStep, dataset: Dataset, count: int) -> None:
    """The images a person should look at first, but those that failed or were reviewed."""
    table = _read(one, "status", "classes", "scores", "trusted")
    ids, labels = (dataset.images.column(name).to_pylist() for name in ("image_id", "labels"))
    known = dict(zip(ids, labels, strict=True))
    rows: list[dict[str, Any]] = [tables.row_at(table, index) for index in range(table.num_rows)]
    rows = [row for row in rows if row["status"] == schemas.OK and not row.get("trusted")]
    given = [known[row["image_id"]] for row in rows]
    best = [best_scores(row["classes"], row["scores"], present) for row, present in zip(rows, given, strict=True)]
    ranked = [row["image_id"] for row in rows]
    unsure = image_uncertainty(best, given)
    most = {ranked[index]: unsure[index] for index in most_uncertain(ranked, unsure, count)}
    remarks = {image_id: f"uncertainty in {one.name} {value:.2f}" for image_id, value in most.items()}
    chosen.add(choose.UNCERTAIN, list(most), remarks)


def read_dataset(steps: Sequence[RunStep]) -> Dataset | None:
    """Of the first finished index step; None where none is finished."""
    index = next((one for one in steps if one.writes == "images" and one.manifest is not None), None)
    if index is None or index.manifest is None:
        return None
    images = tables.read_table(index.step.folder, index.manifest, columns=["uri", "split", "labels"])
    truth = tables.read_ground_truth(index.step.folder)
    return Dataset(
        images, tables.read_class_names(index.step.folder, index.manifest), truth, _folders(index.told["settings"])
    )


def _folders(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the images of an index step lie, by its settings."""
    root = settings.get("root")
    if not isinstance(root, str):
        return ()
    root = storage.absolute(root)
    beside = [one for one in (settings.get("image_folders") or {}).values() if isinstance(one, str)]
    return (root, *(one for one in beside if one.startswith("/") or not storage.is_local(one)))
