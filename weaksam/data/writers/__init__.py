"""Writers of formats of other programs.

An export format of the stage `export` is a file of this folder, and a line of `_FILES`.
"""

from __future__ import annotations

from weaksam.core.catalogues import member, members
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
EXPORT_FORMATS: tuple[ExportFormat, ...] = members(__name__, _FILES, "FORMAT")


def export_format(name: str) -> ExportFormat:
    """Returns the export format of a name.

    Raises:
        ValueError: no format has that name.
    """
    return member(EXPORT_FORMATS, name, setting="format")
