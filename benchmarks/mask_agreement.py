"""Compares the masks of two runs of SAM."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from pycocotools import mask as coco_mask

from weaksam.ops.rle import decode_rle
from weaksam.sam.engine import Proposals

FEW_PIXELS = 1e-5  # share of mask pixels that may differ in fp32: logits within rounding of 0
TIE = 1e-4  # of predicted IoU
MATCH = 0.9  # IoU from which two masks match


def compare(proposals: Proposals, expected: list[dict], image_hw: tuple[int, int]) -> dict[str, Any]:
    """Compares two results. Masks with tied predicted IoU may be in another order."""
    if len(proposals.boxes) != len(expected):
        return {"same": False, "masks": [len(proposals.boxes), len(expected)]}
    assert proposals.masks is not None
    theirs = [decode_rle(record["segmentation"]["counts"].encode(), *image_hw) for record in expected]
    scores = np.array([record["predicted_iou"] for record in expected])
    used: set[int] = set()
    different = 0
    for index, (rle, score) in enumerate(zip(proposals.masks, proposals.predicted_iou, strict=True)):
        mask = decode_rle(rle, *image_hw)
        tied = [i for i in np.flatnonzero(np.abs(scores - score) <= TIE).tolist() if i not in used]
        if not tied:
            return {"same": False, "masks": len(expected), "without_counterpart": index}
        best = min(tied, key=lambda i, mask=mask: int((mask != theirs[i]).sum()))
        used.add(best)
        different += int((mask != theirs[best]).sum())
    same = different <= FEW_PIXELS * max(1, len(expected)) * image_hw[0] * image_hw[1]
    return {"same": same, "masks": len(expected), "pixels": different}


def matched(proposals: list[Proposals], expected: list[Proposals], sizes: list[tuple[int, int]]) -> float:
    """Returns the share of the expected masks that a proposed mask matches at IoU `MATCH`."""
    hits = total = 0
    for result, reference, hw in zip(proposals, expected, sizes, strict=True):
        mine, theirs = (cast(Any, [{"size": hw, "counts": rle} for rle in p.masks or []]) for p in (result, reference))
        total += len(theirs)
        if mine and theirs:
            overlaps: Any = coco_mask.iou(mine, theirs, [0] * len(theirs))
            hits += int((overlaps.max(0) >= MATCH).sum())
    return hits / max(1, total)
