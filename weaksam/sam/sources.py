"""Proposals from several sources of prompts on one encoded image, made one list.

Axis legend: P points, N proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from weaksam.ops.checks import check_whole
from weaksam.ops.suppression import suppress_in_order
from weaksam.sam.engine import EncodedImage, Proposals, SamEngine
from weaksam.sam.prompts import Prompts


@dataclass(frozen=True)
class SourceRule:
    """How a source prompts, and which of its masks stay; as in `SamEngine.propose`.

    Attributes:
        joint: all points of a class are also one prompt together.
    """

    pred_iou_threshold: float
    stability_threshold: float
    nms_threshold: float | None
    keep_masks: tuple[int, ...] = (0, 1, 2)
    joint: bool = False


def propose_from_points(
    engine: SamEngine,
    image: EncodedImage,
    points: np.ndarray,
    labels: np.ndarray,
    rule: SourceRule,
    *,
    source: int,
    return_masks: bool = False,
) -> Proposals:
    """Proposals of single points and, when the rule says so, of the points of each class together.

    Args:
        engine: the segmenter.
        image: from `engine.encode`.
        points: (P, 2) float, x then y, pixels.
        labels: (P,) int class of each; -1 has none and joins no other.
        rule: of this source.
        source: number to mark the proposals with.
        return_masks: also give masks.
    """
    joint = joint_points(points, labels) if rule.joint else []
    prompts = Prompts(points=points, joint=joint, source=np.full(len(points) + len(joint), source))
    (found,) = engine.propose(
        [image],
        [prompts],
        pred_iou_threshold=rule.pred_iou_threshold,
        stability_threshold=rule.stability_threshold,
        nms_threshold=rule.nms_threshold,
        keep_masks=rule.keep_masks,
        return_masks=return_masks,
    )
    return found


def joint_points(points: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Points of each class that has several. One alone would repeat its single prompt, as the published code does."""
    groups = [points[labels == label] for label in np.unique(labels) if label >= 0]
    return [group for group in groups if len(group) > 1]


def join_sources(
    found: Sequence[Proposals], *, duplicate_threshold: float | None, max_proposals: int | None = None
) -> Proposals:
    """Proposals of all sources, best predicted IoU first, ties in the order of the sources.

    Between sources the earlier one wins whatever the ratings, so the proposals of the first sources are exactly those
    that a run without the later ones would give.

    Args:
        found: at least one, all with masks or all without.
        duplicate_threshold: a box that overlaps one of an earlier source by more than this IoU goes; None keeps all.
        max_proposals: keep at most so many, the best rated.

    Raises:
        ValueError: nothing to join, or `max_proposals` is negative.
    """
    if not found:
        raise ValueError("found must hold the proposals of one source at least, got none")
    check_whole("max_proposals", max_proposals, least=0)
    boxes, source = (np.concatenate([getattr(one, name) for one in found]) for name in ("boxes", "source"))
    keep = np.arange(len(boxes))
    if duplicate_threshold is not None and len(found) > 1:
        keep = suppress_in_order(torch.from_numpy(boxes), threshold=duplicate_threshold).numpy()
    rating = np.concatenate([one.predicted_iou for one in found])
    keep = keep[np.argsort(-rating[keep], kind="stable")][:max_proposals]
    masks = None
    if all(one.masks is not None for one in found):
        every = [mask for one in found for mask in one.masks or []]
        masks = [every[i] for i in keep]
    stability = np.concatenate([one.stability for one in found])
    return Proposals(boxes[keep], rating[keep], stability[keep], source[keep], masks)
