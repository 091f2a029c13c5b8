"""Pictures for people: proposals drawn on their images."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from weaksam.ops.masks import decode_rle


def colours(count: int) -> list[tuple[int, int, int]]:
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
    drawn = Image.fromarray(picture.astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    for index in order:
        left, top, right, bottom = boxes[index]
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=palette[index], width=1)
    return drawn


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
