"""Parses numbers and outlines of an object in a VOC XML file.

Coordinates are VOC's: 1-based, with inclusive corners.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

from weaksam.errors import DataError


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
