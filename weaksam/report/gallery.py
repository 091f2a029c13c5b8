"""The cards of a report: chosen images with the results of every step, next to the ground truth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from weaksam.core import schemas, storage, tables
from weaksam.data.images import decode_image
from weaksam.errors import ImageError, StorageError
from weaksam.masking import masked_url
from weaksam.report import heatmaps
from weaksam.report.panels import Card, Panel, data_uri, objects_panel, proposals_panel, truth_panel
from weaksam.report.run_files import RunStep
from weaksam.report.selection import SHOWN, Chosen, Dataset, choose_images

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gallery:
    """Cards, and the initial score threshold: that of the best F1, or of three detections per image."""

    cards: list[Card]
    least_score: float = 0.0


def make_gallery(steps: Sequence[RunStep], dataset: Dataset, count: int) -> Gallery:
    """Returns a card for each chosen image that can still be read.

    Args:
        steps: steps of the run, in order.
        dataset: the dataset whose images are shown.
        count: number of images of each group.
    """
    shown = [
        run_step
        for run_step in steps
        if run_step.writes in SHOWN and run_step.manifest is not None and run_step.manifest["parts"]
    ]
    chosen = choose_images(steps, shown, dataset, count)
    rows = {
        run_step.name: tables.read_rows(run_step.step.folder, run_step.manifest or {}, chosen.groups)
        for run_step in shown
    }
    truth = {} if dataset.truth is None else _rows_of(dataset.truth, chosen)
    renderer = next(
        (candidate for run_step in shown if (candidate := heatmaps.make_renderer(run_step, dataset.names))), None
    )
    cards = []
    index_rows = _rows_of(dataset.images, chosen)
    for image_id, groups in chosen.groups.items():
        if not is_below(index_rows[image_id]["uri"], dataset.folders):
            log.warning(
                "image %s is not shown: %s is outside of the dataset", image_id, masked_url(index_rows[image_id]["uri"])
            )
            continue
        try:
            image = decode_image(storage.read_bytes(index_rows[image_id]["uri"]))
        except (ImageError, StorageError, FileNotFoundError) as error:
            log.warning("image %s is not shown: %s", image_id, error)
            continue
        size, split = (image.shape[0], image.shape[1]), index_rows[image_id]["split"]
        panels = [truth_panel(truth[image_id], size, dataset.names)] if image_id in truth else []
        image_rows = [(run_step, row) for run_step in shown if (row := rows[run_step.name].get(image_id))]
        for run_step, row in image_rows:
            if renderer is not None and run_step.name == renderer.step and row["status"] == schemas.OK:
                panels += renderer.draw(image, row["labels"])
            panels.append(_panel(run_step, row, size, dataset.names))
        details = (index_rows[image_id]["labels"] or [], panels, groups, chosen.notes[image_id])
        cards.append(Card(image_id, split, *size, data_uri(image), *details))
    return Gallery(cards, chosen.least_score)


def is_below(uri: str, folders: Sequence[str]) -> bool:
    """Returns whether `uri` lies in one of `folders`, after resolving relative paths; False if it contains `..`."""
    if ".." in uri.split("/"):
        return False
    return any(storage.absolute(uri).startswith(storage.absolute(folder).rstrip("/") + "/") for folder in folders)


def _rows_of(table: pa.Table, chosen: Chosen) -> dict[str, dict[str, Any]]:
    """Returns the rows of chosen images, by image id."""
    return {row["image_id"]: row for row in tables.with_ids(table, chosen.groups).to_pylist()}


def _panel(run_step: RunStep, row: Mapping[str, Any], size: tuple[int, int], names: Sequence[str]) -> Panel:
    if run_step.writes == "proposals":
        return proposals_panel(run_step.name, row)
    return objects_panel(run_step.name, row, size, names, is_chosen=run_step.writes == "pgt")
