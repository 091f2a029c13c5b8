"""Writes and reads JSON arrays element by element, and converts boxes and scores for them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

_SPACE = re.compile(r"\s*")


def to_xywh(boxes: np.ndarray) -> list[list[float]]:
    """Converts (N, 4) xyxy to COCO's xywh, rounded to four decimals."""
    boxes = boxes.astype(np.float64)
    return np.round(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1), 4).tolist()


def to_numbers(scores: np.ndarray) -> list[float]:
    """Converts float32 scores to the shortest decimals that restore them; not fixed decimals: some are tiny."""
    return [float(str(score)) for score in scores.astype(np.float32)]


def append_json(stream: io.BytesIO, value: Any) -> None:
    """Appends an element to the content of a JSON array."""
    if stream.tell():
        stream.write(b",\n")
    stream.write(json.dumps(value, allow_nan=False).encode())


def elements(text: str, key: str | None = None) -> Iterator[Any]:
    """Yields the elements of a JSON array, decoded one at a time.

    Args:
        text: an array, or an object that contains it.
        key: key of the array in the object.
    """
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]  (matches an empty string too)

    at = skip(0)
    while key is not None:
        name, at = decoder.raw_decode(text, skip(at + 1))  # after { or ,
        at = skip(skip(at) + 1)  # after :
        if name == key:
            break
        at = skip(decoder.raw_decode(text, at)[1])
    if text[at] != "[":
        raise ValueError(f"an array was expected, got {text[at : at + 20]!r}")
    at = skip(at + 1)
    while text[at] != "]":
        value, at = decoder.raw_decode(text, at)
        yield value
        at = skip(at)
        if text[at] == ",":
            at = skip(at + 1)


def expect_end(rest: Iterator[Any], where: str) -> None:
    """Raises ValueError if there is another element."""
    if (more := next(rest, None)) is not None:
        raise ValueError(f"{where} holds more than was written: {str(more)[:120]}")
