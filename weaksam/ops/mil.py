"""Multiple-instance learning over the proposals of one image: scores, pseudo boxes, losses.

WSDDN (arXiv 1511.02853) computes a score for every (proposal, class); image labels supervise only the sum over
proposals. OICR (arXiv 1704.00138) and MIST (arXiv 2004.04725) mine pseudo boxes from such scores to train further
classifiers. All functions are for one image: a softmax over proposals never crosses images.

Axis legend: N proposals, C classes, P classes present in the image, M pseudo boxes.
Boxes are xyxy, absolute pixels, right and bottom exclusive: their `box_iou` equals the published "+1" IoU of inclusive
boxes, as in MIST and classic OICR. The OICR that WeakSAM trained has no "+1": its IoU is that of `to_inclusive`.
In (C + 1) outputs, index 0 is the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from weaksam.ops.box_coding import encode_boxes
from weaksam.ops.boxes import to_inclusive
from weaksam.ops.suppression import nms

_EPS = 1e-6  # avoids log(0); the published 1e-8 is rounded away near 1 in float32


@dataclass(frozen=True)
class PseudoBoxes:
    """Proposals selected as pseudo boxes.

    Attributes:
        rois: (M,) int64, indices of the proposals.
        classes: (M,) int64, 0-based.
        scores: (M,) float, scores of these proposals for these classes.
    """

    rois: Tensor
    classes: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Targets:
    """Training targets of the proposals of an image.

    Attributes:
        labels: (N,) int64, 0 = background, else class + 1.
        weights: (N,) float, weights of the losses.
        rois: (N,) int64, the proposal that is the regression target; its own index without pseudo boxes.
    """

    labels: Tensor
    weights: Tensor
    rois: Tensor


def wsddn_scores(cls_logits: Tensor, det_logits: Tensor) -> Tensor:
    """Returns (N, K): softmax over classes times softmax over proposals, in float32."""
    return cls_logits.float().softmax(1) * det_logits.float().softmax(0)


def image_loss(scores: Tensor, present: Tensor, *, background: bool, reduction: str = "mean") -> Tensor:
    """Returns the binary cross-entropy of the image labels and the scores summed over proposals; 0 without proposals.

    Args:
        scores: (N, C) or, with `background`, (N, C + 1), from `wsddn_scores`.
        present: (P,) int64, classes of the image.
        background: whether column 0 is the background, whose target is always 0.
        reduction: `mean` (MIST) or `sum` (OICR as in WeakSAM) over columns.
    """
    totals = scores.sum(0).clamp(_EPS, 1 - _EPS)
    target = torch.zeros_like(totals).index_fill(0, present + int(background), 1.0)
    return F.binary_cross_entropy(totals, target, reduction=reduction) if len(scores) else scores.sum()


def mine_top(scores: Tensor, present: Tensor) -> PseudoBoxes:
    """Selects the best proposal of each class that is not yet selected for an earlier class (OICR).

    Args:
        scores: (N, C) float.
        present: (P,) int64, classes of the image, ascending.
    """
    left, rois = scores[:, present].clone(), []
    for column in range(min(len(present), len(scores))):
        rois.append(left[:, column].argmax())
        left[rois[-1]] = -1.0
    chosen = torch.stack(rois) if rois else present[:0]
    classes = present[: len(rois)]
    return PseudoBoxes(chosen, classes, scores[chosen, classes])


def mine_near_top(
    boxes: Tensor, scores: Tensor, present: Tensor, *, share: float = 0.9, max_overlap: float = 0.5
) -> PseudoBoxes:
    """Selects proposals that score at least `share` of the best of their class, after NMS.

    The rule of the OICR that WeakSAM trained. NMS ignores classes, and uses inclusive boxes, from the first to the last
    pixel.

    Args:
        boxes: (N, 4) float, xyxy.
        scores: (N, C) float.
        present: (P,) int64, classes of the image, ascending.
    """
    candidates = scores[:, present]
    if not candidates.numel():
        return _nothing(scores)
    columns, rois = (candidates >= share * candidates.amax(0)).T.nonzero(as_tuple=True)
    classes = present[columns]
    chosen = scores[rois, classes]
    keep = nms(to_inclusive(boxes[rois]), chosen, threshold=max_overlap)
    return PseudoBoxes(rois[keep], classes[keep], chosen[keep])


def mine_mist(
    iou: Tensor, scores: Tensor, present: Tensor, *, share: float = 0.15, max_overlap: float = 0.2
) -> PseudoBoxes:
    """Selects, among the best proposals of each class, those that overlap no better one (MIST, algorithm 1).

    A better proposal suppresses others even if it is suppressed itself, which is stricter than NMS. At least one
    proposal per class is a candidate; the published code fails for N < 7.

    Args:
        iou: (N, N) float, IoU of the proposals.
        scores: (N, C) float.
        present: (P,) int64, classes of the image, ascending.
        share: share of the proposals that are candidates.
        max_overlap: a selected proposal has a lower IoU than this with all better ones.
    """
    if not (len(scores) and len(present)):
        return _nothing(scores)
    ordered, order = scores[:, present].T.sort(dim=1, descending=True, stable=True)
    count = max(1, int(share * len(scores)))
    ordered, order = ordered[:, :count], order[:, :count]  # (P, count)
    overlaps = iou[order[:, :, None], order[:, None, :]].tril(-1)  # with higher-scored proposals
    rows, columns = (overlaps.amax(2) < max_overlap).nonzero(as_tuple=True)
    return PseudoBoxes(order[rows, columns], present[rows], ordered[rows, columns])


def _nothing(scores: Tensor) -> PseudoBoxes:
    none = torch.zeros(0, dtype=torch.int64, device=scores.device)
    return PseudoBoxes(none, none, scores.new_zeros(0))


def assign(iou: Tensor, pseudo: PseudoBoxes, *, min_overlap: float = 0.5, above: bool = False) -> Targets:
    """Assigns each proposal the class of the pseudo box it overlaps most, or background, and the box's score as weight.

    A proposal that overlaps no pseudo box is background with the weight of the best-scored one. (In the published
    MIST it has the weight of the first pseudo box.) Without pseudo boxes all weights are 0.

    Args:
        iou: (N, N) float, IoU of the proposals.
        pseudo: the pseudo boxes.
        min_overlap: minimum IoU of an object with its pseudo box.
        above: whether the IoU must exceed `min_overlap`, as in the OICR that mines only the best proposal of a class.
    """
    rois = torch.arange(len(iou), device=iou.device)
    if not len(pseudo.rois):
        return Targets(torch.zeros_like(rois), iou.new_zeros(len(iou)), rois)
    overlap, which = iou[:, pseudo.rois].max(1)
    is_object = overlap > min_overlap if above else overlap >= min_overlap
    labels = torch.where(is_object, pseudo.classes[which] + 1, 0)
    weights = torch.where(overlap > 0, pseudo.scores[which], pseudo.scores.max())
    return Targets(labels, weights, pseudo.rois[which])


def refinement_loss(logits: Tensor, targets: Targets, *, eps: float = 0.0) -> Tensor:
    """Returns the weighted cross-entropy, the mean over all proposals; 0 without proposals (OICR, equation 4).

    Args:
        logits: (N, C + 1) float.
        targets: labels and weights of the proposals.
        eps: added to probabilities before the logarithm: the OICR that WeakSAM trained adds 1e-6, which limits the
            loss of a proposal to 13.8.
    """
    if eps:
        own = logits.float().softmax(1).gather(1, targets.labels[:, None])[:, 0]
        losses = -(own + eps).log()
    else:
        losses = F.cross_entropy(logits.float(), targets.labels, reduction="none")
    return (losses * targets.weights).sum() / max(len(logits), 1)


def regression_loss(offsets: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """Returns the weighted smooth L1 of the offsets of each object's own class, the mean over all proposals (MIST,
    equation 6).

    Args:
        offsets: (N, C + 1, 4) float, coded as `encode_boxes` does.
        boxes: (N, 4) float, xyxy.
        targets: which proposals are objects, and where their pseudo boxes are.
    """
    expected = encode_boxes(boxes[targets.rois], boxes)
    own = offsets.float().gather(1, targets.labels[:, None, None].expand(-1, 1, 4))[:, 0]
    losses = F.smooth_l1_loss(own, expected, reduction="none").sum(1)
    weights = targets.weights * (targets.labels > 0)
    return (losses * weights).sum() / max(len(boxes), 1)


def shared_regression_loss(offsets: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """Returns the weighted smooth L1 of class-agnostic offsets, the mean over objects and coordinates.

    It is 0 without objects. The loss of the box branch of OICR in WSOD2 (arXiv 1909.04972).

    Args:
        offsets: (N, 4) float, coded as `encode_boxes` does.
        boxes: (N, 4) float, xyxy.
        targets: which proposals are objects, and where their pseudo boxes are.
    """
    losses = F.smooth_l1_loss(offsets.float(), encode_boxes(boxes[targets.rois], boxes), reduction="none").sum(1)
    is_object = targets.labels > 0
    return (losses * targets.weights * is_object).sum() / (4 * is_object.sum().clamp(min=1))
