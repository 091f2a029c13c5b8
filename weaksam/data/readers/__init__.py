"""Readers of datasets, results and reviews of other programs.

A dataset format of the stage `index` is a file of this folder, and a line of `_FILES`.
"""

from __future__ import annotations

from weaksam.core.catalogues import member, members
from weaksam.data.readers.format import DatasetFormat

# The files of this folder that hold a dataset format, each with its `FORMAT`.
_FILES = (
    "voc",
    "coco",
    "folder",
    "voc_folder",
)
DATASET_FORMATS: tuple[DatasetFormat, ...] = members(__name__, _FILES, "FORMAT")


def dataset_format(name: str) -> DatasetFormat:
    """Returns the dataset format of a name.

    Raises:
        ValueError: no format has that name.
    """
    return member(DATASET_FORMATS, name, setting="format")
