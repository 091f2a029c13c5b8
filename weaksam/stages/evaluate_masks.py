"""Masks in `evaluate`: selects the rows that can be compared, and computes the figures of masks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from weaksam.core import schemas
from weaksam.core.step import Step
from weaksam.errors import DataError

log = logging.getLogger(__name__)

Pair = tuple[dict[str, Any], Mapping[str, Any]]  # the ground-truth row of an image, and its row of the evaluated step


def mask_figures(
    pairs: list[Pair], names: list[str], rules: Any, *, of_pgt: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns figures by name and a row per class: AP of detections, or the quality of pseudo ground truth masks."""
    from weaksam.ops import coco_metrics, mask_metrics

    if not of_pgt:
        return coco_metrics.voc_mask_metrics(pairs, names)
    records = mask_metrics.concat_records(mask_metrics.match_masks(*pair, len(names), rules) for pair in pairs)
    return mask_metrics.mask_metrics(records, rules), mask_metrics.mask_table(records, names, rules)


def pairs_with_masks(step: Step, key: str, pairs: list[Pair]) -> list[Pair]:
    """Returns the pairs without the objects that have no mask; pairs of pgt keep them, but there they do not count.

    Raises:
        DataError: images that nobody segmented, detections without a mask, masks of different sizes.
    """
    from weaksam.ops import mask_metrics as masks

    of_pgt = bool(step.config.pgt)
    where = f"steps.{step.name}: kind segm"
    what = f"step {step.inputs[key].name}"
    annotated = [truth for truth, _ in pairs if len(truth["boxes"])]
    if bare := [truth["image_id"] for truth in annotated if masks.is_unsegmented(truth)]:
        raise DataError(
            f"{where}: the dataset has no masks in {len(bare)} of {len(annotated)} images with objects, e.g. "
            f"{bare[0]}: name a split that is segmented (of VOC: Segmentation/val), or use kind bbox"
        )
    usable = [(truth, row) for truth, row in pairs if row["status"] == schemas.OK and len(row["boxes"])]
    if any(not masks.has_mask(row).all() for _, row in usable):
        makers = "a pseudo_masks step" if of_pgt else "a detector that makes some"
        raise DataError(f"{where}: {what} has no masks: judge {makers}, or use kind bbox")
    for truth, row in usable:
        hw = (row["height"], row["width"])
        if not masks.cover([*(truth["masks"] or []), *row["masks"]], hw):
            raise DataError(
                f"{where}: masks of image {truth['image_id']} do not all have the {hw[0]} x {hw[1]} pixels that {what} "
                "states: both must be of the same files"
            )
    if unseen := sum(int((~masks.has_mask(truth)).sum()) for truth in annotated):
        log.warning("%s: %d objects without a mask do not count", where, unseen)
    return pairs if of_pgt else [(masks.objects_with_masks(truth), row) for truth, row in pairs]
