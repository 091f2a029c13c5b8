"""The cards of a report: chosen images with what every step found on them, next to what people drew.

Ground truth is read here, to choose the best and the worst images and to show it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from weaksam import schemas, storage, tables
from weaksam.data.images import decode_image
from weaksam.errors import ImageError, StorageError
from weaksam.ops.uncertainty import best_scores, image_uncertainty
from weaksam.report import choose, heatmaps
from weaksam.report.panels import Card, Panel, data_uri, objects_panel, proposals_panel, truth_panel
from weaksam.report.run_files import RunStep

log = logging.getLogger(__name__)

_SHOWN = ("proposals", "detections", "pgt")


@dataclass(frozen=True)
class Dataset:
    """The index step of a run: its images, class names and what people drew, None where nobody did."""

    images: pa.Table  # image_id, uri, split, labels
    names: list[str]
    truth: pa.Table | None


def read_dataset(steps: Sequence[RunStep]) -> Dataset | None:
    """Of the first finished index step; None where none is finished."""
    index = next((one for one in steps if one.writes == "images" and one.manifest is not None), None)
    if index is None or index.manifest is None:
        return None
    images = tables.read_table(index.step.folder, index.manifest, columns=["uri", "split", "labels"])
    return Dataset(images, schemas.class_names_of(images.schema), tables.read_ground_truth(index.step.folder))


@dataclass(frozen=True)
class Gallery:
    """Cards, and the score from which detections are shown at first: that of the best F1, or of three an image."""

    cards: list[Card]
    least_score: float = 0.0


def make_gallery(steps: Sequence[RunStep], dataset: Dataset, count: int) -> Gallery:
    """A card for each chosen image that can still be read.

    Args:
        steps: of the run, in order.
        dataset: whose images are shown.
        count: images of each group.
    """
    shown = [one for one in steps if one.writes in _SHOWN and one.manifest is not None and one.manifest["parts"]]
    groups, notes, least_score = _choose(shown, steps, dataset, count)
    rows = {one.name: tables.read_rows(one.step.folder, one.manifest or {}, groups) for one in shown}
    truth = _truth_rows(dataset, groups)
    look = next((found for one in shown if (found := heatmaps.make_look(one, dataset.names))), None)
    first = next((one.name for one in shown if one.writes == "proposals"), None)
    cards = []
    chosen = pa.array([image_id in groups for image_id in dataset.images.column("image_id").to_pylist()], pa.bool_())
    by_id = {row["image_id"]: row for row in dataset.images.filter(chosen).to_pylist()}
    for image_id in groups:
        given = by_id[image_id]
        try:
            image = decode_image(storage.read_bytes(given["uri"]))
        except (ImageError, StorageError, FileNotFoundError) as error:
            log.warning("image %s is not shown: %s", image_id, error)
            continue
        size = (image.shape[0], image.shape[1])
        panels = [truth_panel(truth[image_id], size, dataset.names)] if image_id in truth else []
        if look is not None and first and (row := rows[first].get(image_id)) and row["status"] == schemas.OK:
            panels += look(image, row["labels"])
        for one in shown:
            if row := rows[one.name].get(image_id):
                panels.append(_panel(one, row, size, dataset.names))
        told = (given["labels"] or [], panels, groups[image_id], notes.get(image_id, ""))
        cards.append(Card(image_id, given["split"], *size, data_uri(image), *told))
    return Gallery(cards, least_score)


def _panel(one: RunStep, row: Mapping[str, Any], size: tuple[int, int], names: Sequence[str]) -> Panel:
    if one.writes == "proposals":
        return proposals_panel(one.name, row)
    return objects_panel(one.name, row, size, names, is_chosen=one.writes == "pgt")


def _choose(
    shown: Sequence[RunStep], steps: Sequence[RunStep], dataset: Dataset, count: int
) -> tuple[dict[str, list[str]], dict[str, str], float]:
    """Image ids with the groups each is in, in the order of the groups; a remark on some; `Gallery.least_score`."""
    among = []
    for one in shown:
        table = tables.read_table(one.step.folder, one.manifest or {}, columns=["status"])
        among.append(set(table.column("image_id").to_pylist()))
    groups: dict[str, list[str]] = {}
    notes: dict[str, str] = {}
    threshold = 0.0

    def add(group: str, ids: Sequence[str], told: Mapping[str, str]) -> None:
        for image_id in ids:
            groups.setdefault(image_id, []).append(group)
            notes[image_id] = ", ".join(filter(None, [notes.get(image_id), told.get(image_id)]))

    add(choose.EXAMPLES, choose.examples(dataset.images, count, among), {})
    if (judged := _last_judged(steps)) is not None and dataset.truth is not None:
        pairs = _pairs(dataset, judged)
        rated, threshold = choose.rate_images(pairs, len(dataset.names))
        best, worst = choose.best_and_worst(rated, count)
        told = {key: f"F1 of {judged.name} {f1:.2f} from score {threshold:.2f}" for key, f1 in rated.items()}
        add(choose.BEST, best, told)
        add(choose.WORST, worst, told)
    elif (found := _last_detections(shown)) is not None:
        table = tables.read_table(found.step.folder, found.manifest or {}, columns=["scores"])
        scores = table.column("scores").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        threshold = choose.usual_threshold(scores, table.num_rows)
    unsure = [one for one in shown if one.writes == "pgt"] or [one for one in shown if one.writes == "detections"]
    if unsure:
        rated = _uncertainty(unsure[0], dataset)
        most = sorted(rated, key=lambda image_id: (-rated[image_id], image_id))[:count]
        add(
            choose.UNCERTAIN,
            most,
            {key: f"uncertainty in {unsure[0].name} {value:.2f}" for key, value in rated.items()},
        )
    return groups, notes, threshold


def _last_detections(shown: Sequence[RunStep]) -> RunStep | None:
    return next((one for one in reversed(shown) if one.writes == "detections"), None)


def _last_judged(steps: Sequence[RunStep]) -> RunStep | None:
    """The last detections that were compared with the ground truth."""
    folders = {step.folder for one in steps if one.metrics for step in one.judged()}
    found = [one for one in steps if one.writes == "detections" and one.step.folder in folders and one.manifest]
    return found[-1] if found else None


def _pairs(dataset: Dataset, judged: RunStep) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of ground truth and detections of the images that have both."""
    assert dataset.truth is not None
    found = tables.read_table(
        judged.step.folder, judged.manifest or {}, columns=["status", "boxes", "classes", "scores"]
    ).combine_chunks()
    truth = dataset.truth.select(["image_id", "boxes", "classes", "difficult", "crowd"]).combine_chunks()
    where = {image_id: row for row, image_id in enumerate(found.column("image_id").to_pylist())}
    return {
        image_id: (tables.row_at(truth, row), tables.row_at(found, where[image_id]))
        for row, image_id in enumerate(truth.column("image_id").to_pylist())
        if image_id in where
    }


def _truth_rows(dataset: Dataset, groups: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if dataset.truth is None:
        return {}
    here = [image_id in groups for image_id in dataset.truth.column("image_id").to_pylist()]
    return {row["image_id"]: row for row in dataset.truth.filter(pa.array(here, pa.bool_())).to_pylist()}


def _uncertainty(one: RunStep, dataset: Dataset) -> dict[str, float]:
    """By image id, of images that neither failed nor were reviewed."""
    columns = ["status", "classes", "scores", "trusted"]
    table = tables.read_table(one.step.folder, one.manifest or {}, columns=columns).combine_chunks()
    ids, labels = (dataset.images.column(name).to_pylist() for name in ("image_id", "labels"))
    known = dict(zip(ids, labels, strict=True))
    rows = [tables.row_at(table, index) for index in range(table.num_rows)]
    rows = [row for row in rows if row["status"] == schemas.OK and not row.get("trusted")]
    given = [known[row["image_id"]] for row in rows]
    best = [best_scores(row["classes"], row["scores"], present) for row, present in zip(rows, given, strict=True)]
    return dict(zip([row["image_id"] for row in rows], image_uncertainty(best, given).tolist(), strict=True))
