"""The cards of a report: chosen images with what every step found on them, next to what people drew."""

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
    shown = [one for one in steps if one.writes in SHOWN and one.manifest is not None and one.manifest["parts"]]
    chosen = choose_images(steps, shown, dataset, count)
    rows = {one.name: tables.read_rows(one.step.folder, one.manifest or {}, chosen.groups) for one in shown}
    truth = {} if dataset.truth is None else _rows_of(dataset.truth, chosen)
    look = next((found for one in shown if (found := heatmaps.make_look(one, dataset.names))), None)
    cards = []
    given = _rows_of(dataset.images, chosen)
    for image_id, groups in chosen.groups.items():
        if not is_below(given[image_id]["uri"], dataset.folders):
            log.warning(
                "image %s is not shown: %s is outside of the dataset", image_id, masked_url(given[image_id]["uri"])
            )
            continue
        try:
            image = decode_image(storage.read_bytes(given[image_id]["uri"]))
        except (ImageError, StorageError, FileNotFoundError) as error:
            log.warning("image %s is not shown: %s", image_id, error)
            continue
        size, split = (image.shape[0], image.shape[1]), given[image_id]["split"]
        panels = [truth_panel(truth[image_id], size, dataset.names)] if image_id in truth else []
        found = [(one, row) for one in shown if (row := rows[one.name].get(image_id))]
        for one, row in found:
            if look is not None and one.name == look.step and row["status"] == schemas.OK:
                panels += look.draw(image, row["labels"])
            panels.append(_panel(one, row, size, dataset.names))
        told = (given[image_id]["labels"] or [], panels, groups, chosen.notes[image_id])
        cards.append(Card(image_id, split, *size, data_uri(image), *told))
    return Gallery(cards, chosen.least_score)


def is_below(uri: str, folders: Sequence[str]) -> bool:
    """Whether `uri` lies in one of `folders`, however it is written."""
    if ".." in uri.split("/"):
        return False
    return any(storage.absolute(uri).startswith(storage.absolute(folder).rstrip("/") + "/") for folder in folders)


def _rows_of(table: pa.Table, chosen: Chosen) -> dict[str, dict[str, Any]]:
    """The rows of chosen images, by image id."""
    return {row["image_id"]: row for row in tables.with_ids(table, chosen.groups).to_pylist()}


def _panel(one: RunStep, row: Mapping[str, Any], size: tuple[int, int], names: Sequence[str]) -> Panel:
    if one.writes == "proposals":
        return proposals_panel(one.name, row)
    return objects_panel(one.name, row, size, names, is_chosen=one.writes == "pgt")
