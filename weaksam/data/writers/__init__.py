"""Writers of formats of other programs.

An export format of the stage `export` is a file of this folder, and a line of `_FILES`.
"""

from __future__ import annotations

from importlib import import_module

from weaksam.data.writers.format import ExportFormat

# The files of this folder that hold an export format, each with its `FORMAT`.
_FILES = (
    "coco",
    "coco_results",
    "voc",
    "yolo",
    "yolo_segment",
    "label_studio",
)
EXPORT_FORMATS: tuple[ExportFormat, ...] = tuple(import_module(f"{__name__}.{name}").FORMAT for name in _FILES)


def export_format(name: str) -> ExportFormat:
    """Returns the export format of a name.

    Raises:
        ValueError: no format has that name.
    """
    for kind in EXPORT_FORMATS:
        if kind.name == name:
            return kind
    raise ValueError(f"format must be one of {', '.join(repr(kind.name) for kind in EXPORT_FORMATS)}, got {name!r}")
