"""An image and the results of a step, as a picture that a page can filter: an image with shapes over it.

The image is embedded once; every panel shows it again below its own boxes, outlines and points. Shapes are in pixels
of the original image, not of the embedded copy.
"""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from weaksam.core import schemas
from weaksam.data.writers.polygons import outlines, simplify
from weaksam.ops.rle import decode_rle

# Colours of the prompt sources in `schemas.SOURCES`: grey for the grid, strong colours for a classifier's peaks.
SOURCE_COLOURS = {"grid": "#969696", "coarse": "#ffaa00", "fine": "#00dc5a", "cross": "#3ca0ff"}

_SIDE = 480  # of an embedded image, pixels
_MOST_PROPOSALS, _MOST_OBJECTS = 60, 30


def class_colours(count: int) -> list[str]:
    """Returns `count` strong CSS colours, neighbours far apart in hue."""
    hues = [(index * 0.618034) % 1.0 for index in range(count)]  # golden ratio: never near the last few
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0)) for hue in hues]


@dataclass(frozen=True)
class Shape:
    """A shape drawn over an image.

    Attributes:
        kind: box, mask or point.
        colour: CSS colour.
        label: text of its tooltip.
        box: x, y, width, height of a box.
        path: SVG path data of a mask.
        at: x, y of a point.
        label_index: 0-based class; None: no class.
        score: score of a detection, by which the page filters; None: it always shows.
    """

    kind: str
    colour: str
    label: str
    box: tuple[float, float, float, float] | None = None
    path: str = ""
    at: tuple[float, float] | None = None
    label_index: int | None = None
    score: float | None = None
    has_text: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture of a card: an image, or a heatmap of it, with shapes over it."""

    step: str  # by which panels are switched on and off
    title: str
    alt: str
    shapes: list[Shape] = field(default_factory=list)
    picture: str = ""  # data URI that stands in for the image itself


@dataclass(frozen=True)
class Card:
    """An image and its panels."""

    image_id: str
    split: str
    height: int
    width: int
    picture: str  # data URI
    labels: list[int]
    panels: list[Panel]
    groups: list[str]
    note: str = ""

    @property
    def classes(self) -> list[int]:
        """The image's labels and the classes of all shapes."""
        drawn = {shape.label_index for panel in self.panels for shape in panel.shapes}
        return sorted({*self.labels, *(label for label in drawn if label is not None)})


def data_uri(picture: np.ndarray | Image.Image) -> str:
    """Returns a picture as a data URI: a JPEG of at most `_SIDE` pixels a side."""
    shown = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    shown.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def truth_panel(row: Mapping[str, Any], size: tuple[int, int], names: Sequence[str]) -> Panel:
    """Returns a panel with the ground truth."""
    shapes = _objects({**row, "scores": None}, size, names)
    return Panel("ground truth", "Ground truth", _alt("ground truth", shapes), shapes)


def objects_panel(
    step: str, row: Mapping[str, Any], size: tuple[int, int], names: Sequence[str], *, is_chosen: bool = False
) -> Panel:
    """Returns a panel with the best-scored boxes of a row, and their masks if there are any.

    Args:
        step: name of the step that wrote the row.
        row: a row of `detections` or `pgt`.
        size: height and width of the image.
        names: class names.
        is_chosen: whether the page shows the boxes at any score, as it does for pseudo ground truth.
    """
    if row["status"] != schemas.OK:
        return Panel(step, step, f"{step}: {row['status']}: {row['message']}")
    shapes = _objects(row, size, names)
    if is_chosen:
        shapes = [replace(shape, score=None) for shape in shapes]
    return Panel(step, step, _alt(step, shapes), shapes)


def proposals_panel(step: str, row: Mapping[str, Any]) -> Panel:
    """Returns a panel with the proposals that SAM rates best, coloured by the source of their prompt."""
    if row["status"] != schemas.OK:
        return Panel(step, step, f"{step}: {row['status']}: {row['message']}")
    scores, sources = np.array(row["predicted_iou"], np.float64), row["source"]
    shapes = []
    for index in np.argsort(-scores, kind="stable")[:_MOST_PROPOSALS][::-1]:
        source, score = schemas.SOURCES[sources[index]], float(scores[index])
        label = f"{source} proposal, predicted IoU {score:.2f}"
        shapes.append(Shape("box", SOURCE_COLOURS[source], label, box=_xywh(row["boxes"][index])))
    summary = ", ".join(f"{sources.count(i)} {name}" for i, name in enumerate(schemas.SOURCES) if sources.count(i))
    return Panel(
        step, f"{step}: {summary or 'none'}", f"{step}: the best {len(shapes)} of {summary or 'no'} proposals", shapes
    )


def heatmap_panel(step: str, kind: str, heatmap: Image.Image, points: np.ndarray, label: str) -> Panel:
    """Returns a panel with the heatmap of a class and its peaks (P, 2)."""
    shapes = [
        Shape("point", SOURCE_COLOURS[kind], f"{kind} peak of {label}", at=(float(x), float(y))) for x, y in points
    ]
    title = f"{kind} heatmap: {label}"
    return Panel(step, title, f"{title}, {len(shapes)} peaks", shapes, data_uri(heatmap))


def _objects(row: Mapping[str, Any], size: tuple[int, int], names: Sequence[str]) -> list[Shape]:
    palette = class_colours(len(names))
    scores = row["scores"]
    order = range(len(row["boxes"])) if scores is None else np.argsort(-np.array(scores), kind="stable")[:_MOST_OBJECTS]
    masks = row.get("masks") or [None] * len(row["boxes"])
    outlined, boxed = [], []
    for index in list(order)[::-1]:
        label = int(row["classes"][index])
        score = None if scores is None else float(scores[index])
        properties = {"colour": palette[label], "label_index": label, "score": score}
        properties["label"] = names[label] if score is None else f"{names[label]} {score:.2f}"
        if (mask := masks[index]) is not None:
            outlined.append(Shape("mask", path=_path(mask, size), **properties))
        boxed.append(Shape("box", box=_xywh(row["boxes"][index]), has_text=True, **properties))
    return [*outlined, *boxed]


def _path(mask: bytes, size: tuple[int, int]) -> str:
    """Returns SVG path data of a mask's outlines and holes, simplified to the resolution of the embedded image."""
    tolerance = max(0.5, max(size) / _SIDE)
    rings = [simplify(ring, tolerance) for ring in outlines(decode_rle(mask, *size))]
    return "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in ring.tolist()) + "Z" for ring in rings)


def _xywh(box: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (round(float(value), 1) for value in box)
    return left, top, max(round(right - left, 1), 0.0), max(round(bottom - top, 1), 0.0)


def _alt(step: str, shapes: Sequence[Shape]) -> str:
    """Returns the alt text of a picture."""
    labels = ", ".join(shape.label for shape in shapes[::-1] if shape.kind == "box")
    return f"{step}: {labels or 'nothing'}"
