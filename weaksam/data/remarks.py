"""Counts the entries of a file that were changed or left out: one warning per kind, with the first ten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from weaksam.data.datasets import warn_of

NO_AREA = "boxes have no area inside their image and are left out"
OUTSIDE = "boxes reach beyond their image and are cut at its border (is its size right?)"
BELOW_A_PIXEL = "boxes are smaller than a pixel (are they shares of width and height? pixels are read)"
BOX_OF_SEGMENTATION = "objects have no box: the box around their segmentation is taken"
NO_BOX = "objects have no box and no segmentation: only their label counts"
FEW_CORNERS = "polygons have fewer than 3 corners and are left out"
EMPTY_MASK = "masks have no pixel inside their image and are left out"


@dataclass
class Remarks:
    """Entries of a file that were changed or left out.

    Attributes:
        where: the file.
        entries: kind of remark -> its entries.
    """

    where: str
    entries: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, entry: str) -> None:
        """Adds an entry, such as `annotation 7`."""
        self.entries.setdefault(kind, []).append(entry)

    def add_boxes(
        self, entries: Sequence[str], boxes: np.ndarray, has_area: np.ndarray, is_outside: np.ndarray
    ) -> None:
        """Adds the results of `fit_boxes` for the boxes of N entries."""
        sides = boxes[:, 2:] - boxes[:, :2]
        is_tiny = np.all((sides > 0) & (sides < 1), axis=1) & has_area
        kinds = ((NO_AREA, ~has_area), (OUTSIDE, is_outside & has_area), (BELOW_A_PIXEL, is_tiny))
        for kind, flags in kinds:
            for index in np.flatnonzero(flags).tolist():
                self.add(kind, entries[index])

    def log(self) -> None:
        """Logs one warning per kind: the number of entries, and the first ten."""
        for kind, entries in self.entries.items():
            warn_of(self.where, kind, entries)
