"""Quality of pseudo masks, measured before an expensive training on them; and checks of rows with masks.

The metrics are those of pseudo ground truth (`pgt_metrics`) by the IoU of masks, and two means: the best IoU of each
mask with an object, and the best IoU of each object with a mask.
An object without a mask is ignored, like difficult objects and crowds; its box is used to match it. VOC paints
difficult objects void, so they have a box and no mask.
Boxes are xyxy, absolute pixels, right and bottom exclusive. Masks are COCO compressed counts (bytes), null: no mask.
Axis legend: G objects (ground truth), N pseudo masks, K objects that count, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from weaksam.core.schemas import OK
from weaksam.ops import detection_metrics
from weaksam.ops.box_areas import pairwise_iou
from weaksam.ops.checks import check_objects
from weaksam.ops.detection_metrics import IGNORED, DetectionRecords, DetectionRules, match_image
from weaksam.ops.pgt_metrics import pgt_metrics, pgt_table
from weaksam.ops.rle import rle_area, rle_to_runs


@dataclass(frozen=True)
class MaskRecords:
    """The data of one or more images that the metrics need."""

    matches: DetectionRecords  # by the IoU of masks
    best_of_masks: np.ndarray  # (N,) float64, best IoU with an object of its class that counts; order of `matches`
    best_of_objects: np.ndarray  # (K,) float64, best IoU with a mask of the class
    object_classes: np.ndarray  # (K,) int32


def pairwise_mask_iou(masks: Sequence[bytes], others: Sequence[bytes], hw: tuple[int, int]) -> np.ndarray:
    """Returns the intersection over union of every pair; 0 if both are empty.

    Args:
        masks: G masks of size `hw`.
        others: N masks of the same size.
        hw: height and width.

    Returns:
        (G, N) float64.

    Raises:
        ValueError: a mask has another size.
    """
    check_cover(masks, len(masks), hw, "masks")
    check_cover(others, len(others), hw, "others")
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    other_rles, mask_rles = ([{"size": list(hw), "counts": counts} for counts in group] for group in (others, masks))
    iou: Any = coco_mask.iou(other_rles, mask_rles, [False] * len(mask_rles))  # pyright: ignore[reportArgumentType]
    return iou.T


def match_masks(
    truth: Mapping[str, Any], pgt: Mapping[str, Any], num_classes: int, rules: DetectionRules
) -> MaskRecords:
    """Returns the record of an image from its rows in the tables `ground_truth` and `pgt`.

    Args:
        truth: `boxes`, `classes`, `difficult`, `crowd`, `masks`; an element of `masks` may be None.
        pgt: `status`, `height`, `width`, `boxes`, `classes`, `scores`, `masks`. A row that is not ok has no masks.
        num_classes: C.
        rules: rules of matching.
    """
    classes = np.asarray(truth["classes"], np.int32)
    ignorable = np.asarray(truth["difficult"], bool) | np.asarray(truth["crowd"], bool) | ~has_mask(truth)
    usable = pgt if pgt["status"] == OK else {"boxes": [], "classes": [], "scores": [], "masks": []}
    check_objects({key: truth[key] for key in ("boxes", "classes")}, "objects", num_classes)
    check_objects(usable, "masks", num_classes)
    same_class = classes[:, None] == np.asarray(usable["classes"], np.int32)
    iou = _iou_of_rows(truth, usable) * same_class
    matches = match_image({**truth, "difficult": ignorable}, pgt, num_classes, rules, iou=iou)
    order = np.argsort(-np.asarray(usable["scores"], np.float64), kind="stable")
    counting = iou[~ignorable]
    best_of_masks = counting.max(axis=0, initial=0.0)[order]
    return MaskRecords(matches, best_of_masks, counting.max(axis=1, initial=0.0), classes[~ignorable])


def _iou_of_rows(truth: Mapping[str, Any], pgt: Mapping[str, Any]) -> np.ndarray:
    """Returns (G, N) IoU of masks; of boxes for objects without a mask."""
    iou = pairwise_iou(truth["boxes"], pgt["boxes"])
    if iou.size:
        is_segmented = has_mask(truth)
        masks = [mask for mask in truth["masks"] if mask is not None]
        iou[is_segmented] = pairwise_mask_iou(masks, pgt["masks"], (pgt["height"], pgt["width"]))
    return iou


def concat_records(records: Iterable[MaskRecords]) -> MaskRecords:
    """Concatenates records; raises ValueError without any."""
    parts = list(records)
    matches = detection_metrics.concat_records(part.matches for part in parts)
    listed = ("best_of_masks", "best_of_objects", "object_classes")
    return MaskRecords(matches, *(np.concatenate([getattr(part, name) for part in parts]) for name in listed))


def mask_table(records: MaskRecords, class_names: Sequence[str], rules: DetectionRules) -> list[dict[str, Any]]:
    """Returns a row per class: that of `pgt_table`, `mask_iou` and `mask_iou_of_objects`; null: undefined."""
    rows = pgt_table(records.matches, class_names, rules)
    return [row | _mean_ious(records, label) for label, row in enumerate(rows)]


def mask_metrics(records: MaskRecords, rules: DetectionRules) -> dict[str, float]:
    """Returns `mask_iou` of all masks, `mask_iou_of_objects` of all objects, and the metrics of `pgt_metrics`.

    Undefined metrics are omitted. A mask that matches an ignored object at the lowest threshold of `rules` is not part
    of `mask_iou`.
    """
    means = {key: value for key, value in _mean_ious(records, None).items() if value is not None}
    return means | pgt_metrics(records.matches, rules)


def _mean_ious(records: MaskRecords, label: int | None) -> dict[str, float | None]:
    """Returns the means of one class, or of all; a mean without values is None."""
    # what is ignored at a threshold is ignored at lower ones
    judged = ~(records.matches.outcomes == IGNORED).any(axis=1)
    mask_ious, objects = records.best_of_masks, records.best_of_objects
    if label is not None:
        judged = judged & (records.matches.classes == label)
        objects = objects[records.object_classes == label]
    mask_ious = mask_ious[judged]
    return {
        "mask_iou": float(mask_ious.mean()) if len(mask_ious) else None,
        "mask_iou_of_objects": float(objects.mean()) if len(objects) else None,
    }


def has_mask(row: Mapping[str, Any]) -> np.ndarray:
    """Returns which boxes of a row have a mask, (N,) bool; `masks` may be None."""
    masks = row["masks"]
    return np.zeros(len(row["boxes"]), bool) if masks is None else np.array([m is not None for m in masks], bool)


def is_unsegmented(truth: Mapping[str, Any]) -> bool:
    """Whether an image has objects that need a mask, neither difficult nor crowds, but no masks at all."""
    plain = ~(np.asarray(truth["difficult"], bool) | np.asarray(truth["crowd"], bool))
    return bool(plain.any() and not has_mask(truth).any())


def check_cover(masks: Sequence[bytes | None] | None, count: int, hw: tuple[int, int], what: str) -> None:
    """Raises ValueError unless there are `count` masks of size `hw`.

    pycocotools does not check it, and never returns if masks cover different numbers of pixels.
    """
    listed = masks if masks is not None else []
    if len(listed) != count or any(mask is None for mask in listed):
        raise ValueError(f"{what} must have a mask each, got {sum(m is not None for m in listed)} of {count}")
    for position, mask in enumerate(listed):
        runs = rle_to_runs(mask or b"")
        if runs.sum() != hw[0] * hw[1] or runs.min(initial=0) < 0:
            raise ValueError(
                f"{what} must have masks of {hw[0]} x {hw[1]} (height x width) = {hw[0] * hw[1]} pixels, mask "
                f"{position} covers {runs.sum()}"
            )


def cover(masks: Iterable[bytes | None], hw: tuple[int, int]) -> bool:
    """Whether all masks have as many pixels as an image of size `hw`."""
    return all(mask is None or rle_to_runs(mask).sum() == hw[0] * hw[1] for mask in masks)


def objects_with_masks(truth: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of `ground_truth` without objects that lack a mask; adds areas of masks if it has no areas."""
    is_segmented = has_mask(truth)
    kept: dict[str, Any] = dict(truth)
    for key in ("boxes", "classes", "difficult", "crowd", "areas"):
        if key in truth:
            kept[key] = np.asarray(truth[key])[is_segmented]
    kept["masks"] = [mask for mask in truth["masks"] or [] if mask is not None]
    return {"areas": np.array([rle_area(mask) for mask in kept["masks"]], np.float64)} | kept
