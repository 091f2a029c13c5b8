"""What `evaluate` does about masks: which rows can be compared, and the figures of masks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from weaksam.core import schemas
from weaksam.core.step import Step
from weaksam.errors import DataError

log = logging.getLogger(__name__)

Pair = tuple[dict[str, Any], Mapping[str, Any]]  # an annotated image's row, and the row of what was found there


def mask_figures(
    pairs: list[Pair], names: list[str], rules: Any, *, of_pgt: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """By name, and a row per class: AP of detections, or how good the masks of pseudo ground truth are."""
    from weaksam.ops import coco_metrics, mask_metrics

    if not of_pgt:
        return coco_metrics.voc_mask_metrics(pairs, names)
    records = mask_metrics.concat_records(mask_metrics.match_masks(*pair, len(names), rules) for pair in pairs)
    return mask_metrics.mask_metrics(records, rules), mask_metrics.mask_table(records, names, rules)


def pairs_with_masks(step: Step, key: str, pairs: list[Pair]) -> list[Pair]:
    """Pairs whose masks can be compared; objects without one are left out, but of pgt's, where they count neither way.

    Raises:
        DataError: images that nobody segmented, something found without a mask, masks of different sizes.
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
    usable = [(truth, found) for truth, found in pairs if found["status"] == schemas.OK and len(found["boxes"])]
    if any(not masks.has_mask(found).all() for _, found in usable):
        makers = "a pseudo_masks step" if of_pgt else "a detector that makes some"
        raise DataError(f"{where}: {what} has no masks: judge {makers}, or use kind bbox")
    for truth, found in usable:
        hw = (found["height"], found["width"])
        if not masks.cover([*(truth["masks"] or []), *found["masks"]], hw):
            raise DataError(
                f"{where}: masks of image {truth['image_id']} do not all have the {hw[0]} x {hw[1]} pixels that {what} "
                "states: both must be of the same files"
            )
    if unseen := sum(int((~masks.has_mask(truth)).sum()) for truth in annotated):
        log.warning("%s: %d objects without a mask do not count", where, unseen)
    return pairs if of_pgt else [(masks.objects_with_masks(truth), found) for truth, found in pairs]
