"""Merges proposals from several sources of prompts on one encoded image.

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
class PromptSet:
    """Prompts of one source, and the rules for its masks: the arguments of `SamEngine.propose`.

    Attributes:
        prompts: None uses the grid of the engine's settings, source 0.
        pred_iou_threshold: minimum predicted IoU of a mask, exclusive.
        stability_threshold: minimum stability of a mask.
        nms_threshold: box IoU within the source above which the worse mask is dropped; None keeps all.
        keep_masks: which of SAM's three masks per prompt to use.
    """

    prompts: Prompts | None
    pred_iou_threshold: float
    stability_threshold: float
    nms_threshold: float | None
    keep_masks: tuple[int, ...] = (0, 1, 2)


def propose_from_sources(
    engine: SamEngine,
    image: EncodedImage,
    sets: Sequence[PromptSet],
    *,
    duplicate_threshold: float | None,
    max_proposals: int | None = None,
    return_masks: bool = False,
) -> Proposals:
    """Returns proposals of all sources on one image: suppressed per source, then joined by `join_sources`.

    Args:
        engine: the segmenter.
        image: from `engine.encode`.
        sets: at least one; the order of the sources.
        duplicate_threshold: IoU with a box of an earlier source above which a box is dropped; None keeps all.
        max_proposals: maximum number of proposals, the best rated are kept.
        return_masks: also return masks.
    """
    proposals = [
        engine.propose(
            [image],
            None if prompted.prompts is None else [prompted.prompts],
            pred_iou_threshold=prompted.pred_iou_threshold,
            stability_threshold=prompted.stability_threshold,
            nms_threshold=prompted.nms_threshold,
            keep_masks=prompted.keep_masks,
            return_masks=return_masks,
        )[0]
        for prompted in sets
    ]
    return join_sources(proposals, duplicate_threshold=duplicate_threshold, max_proposals=max_proposals)


def point_prompts(points: np.ndarray, labels: np.ndarray, *, joint: bool, source: int) -> Prompts:
    """Returns single points as prompts and, with `joint`, also one prompt of all points of each class.

    Args:
        points: (P, 2) float, x then y, pixels.
        labels: (P,) int class of each; -1 = no class, never joined.
        joint: whether to add one joint prompt per class.
        source: number that marks the proposals, from 0 to 255.
    """
    groups = joint_points(points, labels) if joint else []
    return Prompts(points=points, joint=groups, source=np.full(len(points) + len(groups), source))


def joint_points(points: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Returns the points of each class with several points.

    A single point would repeat its own prompt, as it does in the published code.
    """
    groups = [points[labels == label] for label in np.unique(labels) if label >= 0]
    return [group for group in groups if len(group) > 1]


def join_sources(
    proposals: Sequence[Proposals], *, duplicate_threshold: float | None, max_proposals: int | None = None
) -> Proposals:
    """Joins proposals of all sources, best predicted IoU first, ties in the order of the sources.

    Between sources the earlier one wins whatever the ratings, so the proposals of the first sources are exactly those
    that a run without the later ones would give.

    Args:
        proposals: proposals of each source, at least one source; all with masks or all without.
        duplicate_threshold: IoU with a box of an earlier source above which a box is dropped; None keeps all.
        max_proposals: maximum number of proposals, the best rated are kept.

    Raises:
        ValueError: `proposals` is empty, or `max_proposals` is negative.
    """
    if not proposals:
        raise ValueError("proposals must hold those of one source at least, got none")
    check_whole("max_proposals", max_proposals, least=0)
    boxes, source = (np.concatenate([getattr(part, name) for part in proposals]) for name in ("boxes", "source"))
    keep = np.arange(len(boxes))
    if duplicate_threshold is not None and len(proposals) > 1:
        keep = suppress_in_order(torch.from_numpy(boxes), threshold=duplicate_threshold).numpy()
    rating = np.concatenate([part.predicted_iou for part in proposals])
    keep = keep[np.argsort(-rating[keep], kind="stable")][:max_proposals]
    masks = None
    if all(part.masks is not None for part in proposals):
        every = [mask for part in proposals for mask in part.masks or []]
        masks = [every[i] for i in keep]
    stability = np.concatenate([part.stability for part in proposals])
    return Proposals(boxes[keep], rating[keep], stability[keep], source[keep], masks)
