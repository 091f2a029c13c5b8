"""Pictures for people: proposals, heatmaps and peaks drawn on their images."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from weaksam.ops.masks import decode_rle

Colour = tuple[int, int, int]

# What prompted a box, by `schemas.SOURCES`: the grid steps back behind what a classifier pointed at.
SOURCE_COLOURS: dict[str, Colour] = {
    "grid": (150, 150, 150),
    "coarse": (255, 170, 0),
    "fine": (0, 220, 90),
    "cross": (60, 160, 255),
}
_HEAT = np.array([[0, 0, 60], [120, 20, 120], [240, 80, 40], [255, 220, 60]], np.float32)  # cold to hot


def colours(count: int) -> list[Colour]:
    """`count` strong colours, neighbours far apart in hue."""
    hues = [(index * 0.618034) % 1.0 for index in range(count)]  # golden ratio: never near the last few
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0)) for hue in hues]  # type: ignore[misc]


def draw_proposals(image: np.ndarray, boxes: np.ndarray, masks: Sequence[bytes] | None = None) -> Image.Image:
    """An image with masks tinted and boxes outlined, large ones below small ones.

    Args:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) xyxy pixels, right and bottom exclusive.
        masks: N COCO compressed counts of size (H, W), or None for boxes alone.
    """
    height, width = image.shape[:2]
    picture = image.astype(np.float32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-areas)
    palette = colours(len(boxes))
    if masks is not None:
        for index in order:
            inside = decode_rle(masks[index], height, width)
            picture[inside] = 0.5 * picture[inside] + 0.5 * np.array(palette[index])
    return draw_boxes(Image.fromarray(picture.astype(np.uint8)), boxes[order], [palette[index] for index in order])


def draw_boxes(picture: Image.Image, boxes: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """A copy with boxes (N, 4) xyxy outlined, each in its colour, later ones on top."""
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    for (left, top, right, bottom), colour in zip(boxes, colours, strict=True):
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=1)
    return drawn


def draw_heatmap(image: np.ndarray, heatmap: np.ndarray, points: np.ndarray) -> Image.Image:
    """A heatmap laid over its image, peaks ringed.

    Args:
        image: (H, W, 3) uint8 RGB.
        heatmap: (H, W) float in [0, 1].
        points: (P, 2) float, x then y, pixels.
    """
    place = heatmap.clip(0, 1) * (len(_HEAT) - 1)
    heat = np.stack([np.interp(place, range(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)], -1)
    grey = image.mean(2, keepdims=True)
    picture = Image.fromarray((0.45 * grey + 0.55 * heat).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y in points:
        for radius, colour in ((5, (0, 0, 0)), (4, (255, 255, 255))):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=2)
    return picture


def contact_sheet(pictures: Sequence[Image.Image], *, columns: int, cell: int = 320, gap: int = 8) -> Image.Image:
    """Pictures in rows, each fitted into a square cell on white."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), "white")
    for index, picture in enumerate(pictures):
        scale = cell / max(picture.size)
        fitted = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
        row, column = divmod(index, columns)
        left = gap + column * (cell + gap) + (cell - fitted.width) // 2
        sheet.paste(fitted, (left, gap + row * (cell + gap) + (cell - fitted.height) // 2))
    return sheet


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
