"""Writes YOLO labels of polygons, for segmentation: those of `YoloLabels` with masks."""

from __future__ import annotations

from weaksam.data.writers.format import ExportFormat, ExportRequest
from weaksam.data.writers.yolo import YoloLabels


def _make(request: ExportRequest) -> YoloLabels:
    return YoloLabels(request.to, request.class_names, polygons=request.options.polygon_tolerance or 0.0)


FORMAT = ExportFormat(
    "yolo_segment",
    "text files of polygons",
    _make,
    settings=("polygon_tolerance",),
    needs_masks=True,
    box_format="yolo",
    keeps_file_names=False,
)
