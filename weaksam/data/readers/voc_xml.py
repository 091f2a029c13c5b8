"""Parses VOC XML files: the objects of an image, their boxes and outlines.

VOC's boxes are 1-based with inclusive corners: (xmin, ymin, xmax, ymax) becomes (xmin - 1, ymin - 1, xmax, ymax).
Axis legend: N objects of an image.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

import numpy as np

from weaksam.data.annotation_checks import fit_boxes, read_size
from weaksam.errors import DataError

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocAnnotation:
    """An annotation file with all its N objects, including those whose box has no area."""

    uri: str
    height: int | None  # None: not in the file
    width: int | None
    names: list[str]
    boxes: np.ndarray  # (N, 4) float32, 0-based xyxy, right and bottom exclusive, clipped to the image
    difficult: list[bool]
    has_area: np.ndarray  # (N,) bool
    is_outside: np.ndarray  # (N,) bool: the box extended more than a pixel beyond the image
    masks: list[bytes | None]  # COCO compressed counts
    places: list[int]  # index of the <object> in the file, from 1; shared by its boxes
    no_bndbox: np.ndarray  # (N,) bool: the object has no <bndbox>; without an outline or a mask it has no area
    has_more_masks: bool = False  # more masks than objects


def parse_voc_xml(data: bytes, uri: str) -> VocAnnotation:
    """Parses an annotation file in VOC format; `uri` is for messages. A pure function, so it can run in parallel.

    A missing or zero <size> gives no height and width; a missing or unspecified <difficult> is false; coordinates
    may have decimals. Other elements are ignored, including <part>, and <filename>, which is often wrong.

    Raises:
        DataError: not XML, or an object lacks a name or a number; names file and line or object.
    """
    try:
        root = ET.fromstring(data)
    except ET.ParseError as error:
        raise DataError(f"{uri}, line {error.position[0]}: not well-formed XML ({error})") from error
    except (ValueError, LookupError) as error:
        raise DataError(f"{uri}: not readable as XML ({error})") from error
    if root.tag != "annotation":
        raise DataError(f"{uri}: not an annotation in VOC's form: <annotation> was expected, got <{root.tag}>")
    size = read_size(*((root.findtext(f"size/{key}") or "").strip() for key in ("height", "width")), where=uri)
    names, corners, difficult, places, no_bndbox = [], [], [], [], []
    for index, element in enumerate(root.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        where = f"{uri}: object {index} ({name})"
        if not name:
            raise DataError(f"{uri}: object {index} has no <name>")
        bndboxes = [[number(box, key, where, "bndbox") for key in _CORNERS] for box in element.findall("bndbox")]
        no_bndbox += [not bndboxes] * max(len(bndboxes), 1)
        for box in bndboxes or [outline(element, where)]:
            names.append(name)
            corners.append(box)
            difficult.append(read_difficult(element, where))
            places.append(index)
    boxes = np.array(corners, np.float64).reshape(-1, 4) - [1, 1, 0, 0]
    fitted = fit_boxes(boxes, size)
    masks: list[bytes | None] = [None] * len(names)
    rest = masks, places, np.array(no_bndbox, bool)
    return VocAnnotation(uri, *(size or (None, None)), names, fitted[0], difficult, *fitted[1:], *rest)


def number(element: ET.Element, path: str, where: str, above: str = "", *, default: float | None = None) -> float:
    """Returns the number at a path below `element`; `above` is the path of `element` itself, for messages."""
    text = (element.findtext(path) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        path = f"{above}/{path}".strip("/.")
        raise DataError(f"{where}: <{path}> is {text!r}: a number was expected")
    return value


def read_difficult(element: ET.Element, where: str) -> bool:
    """Whether an object is flagged difficult; raises DataError if the flag is not 0, 1, true or false."""
    text = (element.findtext("difficult") or "").strip()
    if text.lower() in ("", "unspecified", "false", "true"):
        return text.lower() == "true"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if value not in (0, 1):
        raise DataError(f"{where}: <difficult> is {text!r}: 0 or 1 was expected")
    return value == 1


def outline(element: ET.Element, where: str) -> list[float]:
    """Returns VOC's corners around the <robndbox> or <polygon> of an object; a box without area if it has neither."""
    if (turned := element.find("robndbox")) is not None:
        numbers = [number(turned, key, where, "robndbox") for key in ("cx", "cy", "w", "h", "angle")]
        x, y, width, height, angle = numbers
        cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
        reach_x, reach_y = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
        return [x - reach_x + 1, y - reach_y + 1, x + reach_x, y + reach_y]
    if (polygon := element.find("polygon")) is not None:  # <x1>, <y1>, <x2>, ... or <pt><x>, <y></pt> ...
        points = [node for node in polygon.iter() if re.fullmatch(r"[xy]\d*", node.tag)]
        places = [
            [number(node, ".", where, f"polygon/{node.tag}") for node in points if node.tag[0] == a] for a in "xy"
        ]
        if len(places[0]) != len(places[1]):
            raise DataError(f"{where}: its <polygon> has {len(places[0])} x and {len(places[1])} y: one is missing")
        if all(places):
            return [*map(min, places), *map(max, places)]
    return [1.0, 1.0, 0.0, 0.0]
