"""The weakly supervised detector: features of proposals, WSDDN's two streams and the refinement heads on top.

Names of the linear layers are those of the published MIST code (`cls_score`, `det_score`, `ref1`, `bbox_pred1`, ...).

Axis legend: B images, N proposals of an image, R of all of them, C classes, K refinement heads.
Boxes are xyxy, absolute pixels of the image, right and bottom exclusive.
In (C + 1) outputs, index 0 is the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from weaksam.models.backbones.roi_net import RoiNet
from weaksam.models.noise import SampleNoise
from weaksam.models.wsod.dropblock import ConcreteDropBlock
from weaksam.ops import mil
from weaksam.ops.box_coding import decode_boxes
from weaksam.ops.boxes import box_iou, to_inclusive
from weaksam.ops.choices import check_choices

Mining = Literal["top", "near_top", "mist"]
_INIT_STD = 0.001
_SHARED_BOX_WEIGHT = 30.0  # of the class-agnostic box layer's loss, as published


@dataclass(frozen=True)
class WsodRules:
    """Rules that distinguish OICR and MIST.

    Attributes:
        mining: how the pseudo boxes for the next head are mined from a head's scores.
        regress: whether heads regress boxes.
        background: whether WSDDN's streams have a background column.
        image_reduction: reduction of the image-level loss over classes.
        head_weights: (K,) loss weights of the refinement heads.
        mist_share, mist_overlap: parameters of MIST's mining.
        loss_eps: see `mil.refinement_loss`.
        shared_boxes: whether a class-agnostic layer, too, regresses boxes, trained with the last head's pseudo boxes:
            the box branch of OICR in WSOD2.
    """

    mining: Mining = "mist"
    regress: bool = True
    background: bool = True
    image_reduction: Literal["mean", "sum"] = "mean"
    head_weights: tuple[float, ...] = (3.0, 1.0, 1.0)
    mist_share: float = 0.15
    mist_overlap: float = 0.2
    loss_eps: float = 0.0
    shared_boxes: bool = False

    def __post_init__(self) -> None:
        check_choices(self)


# OICR as WeakSAM ran it (its baselines/WSOD2), and MIST.
METHODS = {
    "oicr": WsodRules("near_top", False, False, "sum", (1.0, 1.0, 1.0), loss_eps=1e-6),
    "mist": WsodRules(),
}


@dataclass(frozen=True)
class WsodOutput:
    """Outputs of the heads for the proposals of one image.

    Attributes:
        cls, det: (N, C) or (N, C + 1) logits of WSDDN's streams.
        refine: K tensors (N, C + 1) of logits.
        offsets: K tensors (N, C + 1, 4), or an empty list.
        shared: (N, 4) class-agnostic offsets, or None.
    """

    cls: Tensor
    det: Tensor
    refine: list[Tensor]
    offsets: list[Tensor]
    shared: Tensor | None = None


class WsodNet(nn.Module):
    """A backbone with WSDDN and K refinement heads."""

    def __init__(self, roi_net: RoiNet, num_classes: int, rules: WsodRules, *, dropblock: bool = False) -> None:
        super().__init__()
        self.roi_net, self.num_classes, self.rules = roi_net, num_classes, rules
        streams = num_classes + int(rules.background)
        if streams < 2:
            raise ValueError(
                f"num_classes is {num_classes}: the softmax over a single column is 1 whatever is learnt: take "
                "rules with background (MIST), or more classes"
            )
        self.cls_score, self.det_score = nn.Linear(roi_net.dim, streams), nn.Linear(roi_net.dim, streams)
        for k in range(1, len(rules.head_weights) + 1):
            setattr(self, f"ref{k}", nn.Linear(roi_net.dim, num_classes + 1))
            if rules.regress:
                setattr(self, f"bbox_pred{k}", nn.Linear(roi_net.dim, 4 * (num_classes + 1)))
        if rules.shared_boxes:
            self.bbox_pred = nn.Linear(roi_net.dim, 4)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=_INIT_STD)
                nn.init.zeros_(layer.bias)
        self.dropblock = ConcreteDropBlock(roi_net.pooled_channels) if dropblock else None

    def pool(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pools the proposals of B images (3, H, W) uint8, each at its own size, to (R, D, S, S)."""
        return torch.cat([self.roi_net.pool(image, rois) for image, rois in zip(images, boxes, strict=True)])

    def heads(
        self, pooled: Tensor, sizes: Sequence[int], noise: SampleNoise | None = None, *, against: bool = False
    ) -> list[WsodOutput]:
        """Returns the outputs of each of the B images; `noise` is required while training.

        `against`: whether the dropblock is trained to raise the loss.
        """
        if self.dropblock is not None and noise is not None:
            pooled = self.dropblock(pooled, noise, learns=against)
        x = self.roi_net.neck(pooled, noise)
        heads = range(1, len(self.rules.head_weights) + 1)
        refine = [getattr(self, f"ref{k}")(x) for k in heads]
        offsets = [getattr(self, f"bbox_pred{k}")(x).unflatten(1, (-1, 4)) for k in heads if self.rules.regress]
        shared = [self.bbox_pred(x)] if self.rules.shared_boxes else []
        parts = (self.cls_score(x), self.det_score(x), *refine, *offsets, *shared)
        columns = [part.split(list(sizes)) for part in parts]
        num, last = 2 + len(refine), 2 + len(refine) + len(offsets)
        return [
            WsodOutput(row[0], row[1], list(row[2:num]), list(row[num:last]), row[last] if shared else None)
            for row in zip(*columns, strict=True)
        ]

    @torch.no_grad()
    def detect(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns scores (N, C) and boxes (N, C, 4) of all proposals (N, 4) on one view (3, H, W).

        The mean of the refinement heads' softmaxes, and of their offsets before they are decoded, as published.
        """
        (output,) = self.heads(self.pool([image], [boxes]), [len(boxes)])
        scores = torch.stack([logits.float().softmax(1) for logits in output.refine]).mean(0)[:, 1:]
        height, width = image.shape[1:]
        if not output.offsets:
            if output.shared is not None:
                boxes = clip_boxes_to_image(decode_boxes(output.shared.float(), boxes), (height, width))
            return scores, boxes[:, None].expand(-1, self.num_classes, 4)
        offsets = torch.stack(output.offsets).float().mean(0)[:, 1:]
        moved = decode_boxes(offsets, boxes[:, None])
        return scores, clip_boxes_to_image(moved, (height, width))


def wsod_losses(
    output: WsodOutput, boxes: Tensor, present: Tensor, rules: WsodRules, prior: Tensor | None = None
) -> dict[str, Tensor]:
    """Returns the losses of one image, by name; mining is without gradient.

    Args:
        output: outputs of the network.
        boxes: (N, 4) float, xyxy.
        present: (P,) int64, classes of the image, rising.
        rules: OICR's or MIST's.
        prior: (N,) float prior of the proposals, added to the logits of the detection stream (as the box scores of
            WSDDN, arXiv 1511.02853, section 3).
    """
    scores = mil.wsddn_scores(output.cls, output.det if prior is None else output.det + prior[:, None])
    reduction = rules.image_reduction
    losses = {"image_loss": mil.image_loss(scores, present, background=rules.background, reduction=reduction)}
    iou = _overlaps(boxes, rules)
    source = scores.detach()[:, int(rules.background) :]
    zero, targets = scores.new_zeros(()), None
    losses |= {"refine_loss": zero} | ({"box_loss": zero} if output.offsets else {})
    for k, (weight, logits) in enumerate(zip(rules.head_weights, output.refine, strict=True)):
        targets = mil.assign(iou, _mine(boxes, iou, source, present, rules), above=rules.mining == "top")
        loss = mil.refinement_loss(logits, targets, eps=rules.loss_eps)
        losses["refine_loss"] = losses["refine_loss"] + weight * loss
        if output.offsets:
            loss = mil.regression_loss(output.offsets[k], boxes, targets)
            losses["box_loss"] = losses["box_loss"] + weight * loss
        source = logits.detach().float().softmax(1)[:, 1:]
    if output.shared is not None and targets is not None:
        losses["box_loss"] = _SHARED_BOX_WEIGHT * mil.shared_regression_loss(output.shared, boxes, targets)
    return losses


def forward_losses(
    net: WsodNet,
    images: Sequence[Tensor],
    boxes: Sequence[Tensor],
    present: Sequence[Tensor],
    noise: SampleNoise,
    priors: Sequence[Tensor] | None = None,
    *,
    second_pass: bool = False,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Returns the losses of B images, and a further loss of the dropblock.

    A dropblock is trained in the same pass as the detector, with the opposite sign. With `second_pass` it is trained,
    as published, in its own pass with new noise, here from the pooled maps of the first pass: the backbone is not run
    again. (In the published code the detector takes its step in between.)

    Returns:
        a dict per image, and a scalar to add to their sum before backward; its value has no meaning.
    """
    sizes = [len(image_boxes) for image_boxes in boxes]
    pooled = net.pool(images, boxes)
    outputs = net.heads(pooled, sizes, noise, against=not second_pass)
    known = list(zip(boxes, present, [net.rules] * len(boxes), priors or [None] * len(boxes), strict=True))
    losses = [wsod_losses(output, *row) for output, row in zip(outputs, known, strict=True)]
    if net.dropblock is None or not second_pass:
        return losses, pooled.new_zeros(())
    still = {f"net.{key}": p.detach() for key, p in net.named_parameters() if not key.startswith("dropblock.")}
    second_outputs = torch.func.functional_call(_Heads(net), still, (pooled.detach(), sizes, noise))
    adverse = [sum(wsod_losses(output, *row).values()) for output, row in zip(second_outputs, known, strict=True)]
    return losses, torch.stack(adverse).sum()  # pyright: ignore[reportArgumentType]


class _Heads(nn.Module):
    """`WsodNet.heads` as a forward, with a trained dropblock."""

    def __init__(self, net: WsodNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, pooled: Tensor, sizes: Sequence[int], noise: SampleNoise) -> list[WsodOutput]:
        return self.net.heads(pooled, sizes, noise, against=True)


def _overlaps(boxes: Tensor, rules: WsodRules) -> Tensor:
    """Returns (N, N) IoU as in the published code of each kind of mining: that of `near_top` has no "+1"."""
    ends = to_inclusive(boxes) if rules.mining == "near_top" else boxes
    return box_iou(ends, ends)


def _mine(boxes: Tensor, iou: Tensor, scores: Tensor, present: Tensor, rules: WsodRules) -> mil.PseudoBoxes:
    if rules.mining == "top":
        return mil.mine_top(scores, present)
    if rules.mining == "near_top":
        return mil.mine_near_top(boxes, scores, present)
    return mil.mine_mist(iou, scores, present, share=rules.mist_share, max_overlap=rules.mist_overlap)
