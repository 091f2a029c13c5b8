"""Checks SAM masks against their box prompts and replaces or drops the bad ones.

Axis legend: M boxes of an image, H W pixels.
Boxes are xyxy, absolute pixels, float32, right and bottom exclusive. Masks are COCO compressed counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le
from pycocotools import mask as coco_mask

from weaksam.ops.choices import check_rules
from weaksam.ops.rle import decode_rle, encode_rle

STATES = ("fits", "empty", "exploding")  # of a predicted mask; a value of `mask_state` is an index into them
FITS, EMPTY, EXPLODING = range(3)


@dataclass(frozen=True)
class MaskRules:
    """Rules for masks that do not fit their box.

    Attributes:
        max_outside: a mask with a larger share of its pixels outside its box is exploding.
        empty: replacement of a mask without pixels: the filled box, or the object is left out (`drop`).
        exploding: replacement of an exploding mask: as with `empty`, or the mask is kept and only counted (`keep`).
    """

    max_outside: Annotated[float, Ge(0), Le(1)] = 0.5
    empty: Literal["box", "drop"] = "box"
    exploding: Literal["keep", "box", "drop"] = "keep"

    def __post_init__(self) -> None:
        check_rules(self)


@dataclass(frozen=True)
class ChosenMasks:
    """Masks of the kept objects of an image.

    Attributes:
        kept: (K,) int, indices of the boxes.
        masks: K masks, none of them empty.
        states: (M,) int, index into STATES for every box.
    """

    kept: np.ndarray
    masks: list[bytes]
    states: np.ndarray


def choose_masks(masks: Sequence[bytes], boxes: np.ndarray, hw: tuple[int, int], rules: MaskRules) -> ChosenMasks:
    """Checks each mask and replaces or drops those that do not fit.

    Args:
        masks: M, one for each box.
        boxes: (M, 4) float, may extend beyond the image.
        hw: height and width of the image.
        rules: rules for masks that do not fit.
    """
    states = np.array(
        [_state(mask, box, hw, rules.max_outside) for mask, box in zip(masks, boxes, strict=True)], np.int64
    )
    fate = np.array(["keep", rules.empty, rules.exploding], object)[states] if len(states) else states
    kept = np.flatnonzero(fate != "drop")
    chosen = [masks[i] if fate[i] == "keep" else box_mask(boxes[i], hw) for i in kept.tolist()]
    return ChosenMasks(kept, chosen, states)


def _state(mask: bytes, box: np.ndarray, hw: tuple[int, int], max_outside: float) -> int:
    pixels = decode_rle(mask, *hw)
    area = pixels.sum()
    if not area:
        return EMPTY
    top, bottom, left, right = _span(box, hw)
    return EXPLODING if 1 - pixels[top:bottom, left:right].sum() / area > max_outside else FITS


def box_mask(box: np.ndarray, hw: tuple[int, int]) -> bytes:
    """Returns the mask of all pixels whose centres are in a box, at least one pixel."""
    top, bottom, left, right = _span(box, hw)
    mask = np.zeros(hw, bool)
    mask[top:bottom, left:right] = True
    return encode_rle(mask)


def _span(box: np.ndarray, hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns first row, end row, first column, end column of the pixels whose centres are in a box, at least one."""
    spans = []
    for low, high, side in ((box[1], box[3], hw[0]), (box[0], box[2], hw[1])):
        first = int(np.clip(np.ceil(low - 0.5), 0, side - 1))
        spans += [first, int(np.clip(np.ceil(high - 0.5), first + 1, side))]
    return spans[0], spans[1], spans[2], spans[3]


def tight_boxes(masks: Sequence[bytes], hw: tuple[int, int]) -> np.ndarray:
    """Returns the tight boxes around non-empty masks, (M, 4) float32."""
    rles: Any = [{"size": list(hw), "counts": mask} for mask in masks]
    xywh = coco_mask.toBbox(rles) if masks else np.zeros((0, 4))
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
