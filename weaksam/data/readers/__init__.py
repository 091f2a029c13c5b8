"""Readers of datasets, results and reviews of other programs.

A dataset format of the stage `index` is a file of this folder, and a line of `_FILES`.
"""

from __future__ import annotations

from importlib import import_module

from weaksam.data.readers.format import DatasetFormat

# The files of this folder that hold a dataset format, each with its `FORMAT`.
_FILES = (
    "voc",
    "coco",
    "folder",
    "voc_folder",
)
DATASET_FORMATS: tuple[DatasetFormat, ...] = tuple(import_module(f"{__name__}.{name}").FORMAT for name in _FILES)


def dataset_format(name: str) -> DatasetFormat:
    """Returns the dataset format of a name.

    Raises:
        ValueError: no format has that name.
    """
    for kind in DATASET_FORMATS:
        if kind.name == name:
            return kind
    raise ValueError(f"format must be one of {', '.join(repr(kind.name) for kind in DATASET_FORMATS)}, got {name!r}")
