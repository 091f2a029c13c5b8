"""Faster R-CNN for few small images and no GPU: a frozen SAM refines its proposals and supplies RoI features.

Localisation: the boxes of the first stage prompt the SAM, and the boxes of its masks are the regions, so the first
stage need not be accurate to the pixel. Classification: each region is cut out at one small size and encoded by the
SAM, because an object's appearance does not depend on its size (as in `CropNet`).
The stages are trained one after the other, as in the original Faster R-CNN (Ren et al. 2015, arXiv 1506.01497, section
3.2): after the first, the regions of a view are fixed, so their features are computed once and cached, and the second
stage trains in a fraction of the time.
Axis legend: B images, R RoIs of all of them, N regions and G objects of an image, E channels of the SAM, s patches of a
side of a crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from weaksam.models.backbones.frozen_sam import FrozenSam, cut_out
from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.backbones.view_cache import ViewCache, view_digest
from weaksam.models.detectors.base import Detections, Targets
from weaksam.models.detectors.catalogue.kind import BoxLoss
from weaksam.models.detectors.faster_rcnn import (
    PUBLISHED,
    FasterRcnn,
    FasterRcnnSize,
    RoiLosses,
    roi_losses,
)
from weaksam.models.detectors.rules import DetectionFilter
from weaksam.models.noise import SampleNoise, dropout
from weaksam.ops.boxes import mirror_boxes
from weaksam.ops.roi_drop import NO_DROP, RoiDropRules
from weaksam.sam.checkpoints import load_sam
from weaksam.sam.engine import SamEngine
from weaksam.sam.variants import VARIANTS

_AT_ONCE = 64  # crops per batch of the SAM: more are no faster and take memory
_ALL = 10**6  # more than the number of regions ever proposed


@dataclass(frozen=True)
class SmallRcnnSize(FasterRcnnSize):
    """Sizes of the network; every proposed region is a sample, and there is no RoIAlign.

    Attributes:
        first_steps: steps of the first stage, before those of the second.
        patches: s.
        margin: enlargement of a region on each side, as a share of its size.
        depth: number of the SAM's blocks for the crops: features of middle blocks separate classes better than those
            of the last blocks, which serve the masks.
        dropout: dropout rate after each of the two layers of the box head.
        variant: variant of the SAM.
    """

    dim: int = 64
    hidden: int = 256
    anchors: tuple[int, ...] = (32, 72, 144)
    roi_samples: int = _ALL
    proposals: int = 60
    pre_nms: tuple[int, int] = (300, 300)
    nms: float = 0.5  # boxes of a higher IoU lead to the same mask
    first_steps: int = 300
    patches: int = 4
    margin: float = 0.15
    depth: int | None = 4
    dropout: float = 0.2
    variant: str = "vit_xs"


class _Samples(NamedTuple):
    """Samples of each image: all regions and all target boxes.

    Boxes (N + G, 4), index of the matched object (N + G,), its class, 0 = background, (N + G,), and its regression
    targets (N + G, 4).
    """

    boxes: list[Tensor]
    places: list[Tensor]
    labels: list[Tensor]
    regression_targets: list[Tensor]


class SmallRcnn(FasterRcnn):
    """Detects boxes with classes.

    Args:
        pyramid, num_classes, size, box_loss, drop, detection_filter: see `FasterRcnn`.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        size: SmallRcnnSize = SmallRcnnSize(),
        *,
        box_loss: BoxLoss = "l1",
        drop: RoiDropRules = NO_DROP,
        detection_filter: DetectionFilter = PUBLISHED,
    ) -> None:
        super().__init__(pyramid, num_classes, size, box_loss=box_loss, drop=drop, detection_filter=detection_filter)
        self.first_steps, self.view_cache, self.region_cache = size.first_steps, ViewCache(), ViewCache()
        self.engine = SamEngine(load_sam(size.variant))  # neither trained nor saved
        self.roi_heads.box_roi_pool = _CutOuts(size)
        inputs = self.cut_outs.sam.channels * size.patches**2
        self.roi_heads.box_head = _BoxHead(inputs, size.hidden, size.dropout)

    @property
    def cut_outs(self) -> _CutOuts:
        """Pooling of the regions."""
        return self.roi_heads.box_roi_pool  # pyright: ignore[reportReturnType]

    def load_pretrained(self, weights: str | None) -> None:
        super().load_pretrained(weights)
        self.cut_outs.sam.load_pretrained()

    def early_parameters(self) -> tuple[list[nn.Parameter], int]:
        """Returns the first stage's parameters and its steps."""
        parts = (*self.backbone.parameters(), *self.rpn.parameters())
        return [p for p in parts if p.requires_grad], self.first_steps

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets], step: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """See `Detector.losses`; the losses of a stage are 0 while the other is trained."""
        self._start_step(step, generators)
        # every weight must take part; one element of each is enough
        zero = torch.stack([p.reshape(-1)[0] for p in self.parameters() if p.requires_grad]).sum() * 0
        nothing = dict.fromkeys(self._result_keys(), zero)
        if step < self.first_steps:
            batch, maps = self._backbone_maps(images)
            listed = [{"boxes": image_targets.boxes, "labels": image_targets.classes + 1} for image_targets in targets]
            return nothing | self.rpn(batch, maps, listed)[1]
        cached = [
            self.view_cache.recall([image, image_targets.boxes], partial(self._region_maps, image, image_targets.boxes))
            for image, image_targets in zip(images, targets, strict=True)
        ]
        return nothing | self._second_stage(cached, targets, step, generators)

    def _result_keys(self) -> tuple[str, ...]:
        """Returns the keys of the result of `losses`."""
        dropped = () if self.roi_heads.drop.gate == "off" else ("dropped_cls", "dropped_reg")
        return "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", *dropped

    def _second_stage(
        self,
        cached: list[list[Tensor]],
        targets: Sequence[Targets],
        step: int,
        generators: Sequence[torch.Generator],
    ) -> dict[str, Tensor]:
        """Returns the losses of the second stage from the cached maps of each image."""
        heads: Any = self.roi_heads
        samples = self._sample(cached, targets)
        return self._roi_losses(cached, samples, step, generators).sums(heads.drop)

    def _sample(self, cached: list[list[Tensor]], targets: Sequence[Targets]) -> _Samples:
        """Returns all regions and target boxes with their targets."""
        listed = [{"boxes": image_targets.boxes, "labels": image_targets.classes + 1} for image_targets in targets]
        heads: Any = self.roi_heads
        return _Samples(*heads.select_training_samples([row[0] for row in cached], listed))

    def _roi_losses(
        self, cached: list[list[Tensor]], samples: _Samples, step: int, generators: Sequence[torch.Generator]
    ) -> RoiLosses:
        heads: Any = self.roi_heads
        noise = SampleNoise(generators, [len(image_labels) for image_labels in samples.labels])
        logits, deltas = heads.box_predictor(heads.box_head(torch.cat([row[1] for row in cached]), noise))
        return roi_losses(logits, deltas, samples.labels, samples.regression_targets, heads.beta, heads.drop, step)

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        detections = []
        for image in images:
            regions, maps, sizes = self._propose(image)
            (result,), _ = self.roi_heads(maps, [regions], sizes)
            detections.append(Detections(result["boxes"], result["labels"] - 1, result["scores"]))
        return detections

    @torch.no_grad()
    def _region_maps(self, image: Tensor, boxes: Tensor) -> list[Tensor]:
        """Returns regions (N, 4), and the SAM's maps of them and of the target boxes (N + G, E, s, s)."""
        regions = self._regions(image)
        self.cut_outs.pixels = self.normaliser([image]).pixels
        every = torch.cat([regions, boxes])
        return [regions, *self._keep(every, boxes, self.cut_outs.pyramid([every]))]

    def _regions(self, image: Tensor) -> Tensor:
        """Returns regions (N, 4) of an image; a mirrored image reuses its regions, mirrored, which saves most time.

        Which of the two the SAM processes does not depend on their order, so that a resumed training continues
        unchanged.
        """
        mirrored = image.flip(2)
        is_other = view_digest([mirrored]) < view_digest([image])
        source = mirrored if is_other else image
        self.rpn.eval()
        (regions,) = self.region_cache.recall([source], lambda: [self._propose(source)[0]])
        self.rpn.train()
        return mirror_boxes(regions, image.shape[2]) if is_other else regions

    def _keep(self, every: Tensor, boxes: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """Returns the maps to cache for regions and target boxes, `every` (N + G, 4)."""
        return maps[-1:]

    def _propose(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor], list[tuple[int, int]]]:
        """Returns regions (N, 4) of an image (3, H, W), the backbone's maps, and the image's size."""
        batch, maps = self._backbone_maps([image])
        (regions,), _ = self.rpn(batch, maps)
        if self.engine.sam.device != image.device:
            self.engine = SamEngine(self.engine.sam.to(image.device))
        pixels = image.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        with torch.autocast(image.device.type, enabled=False):  # the engine has a precision of its own
            snapped = self.engine.snap_boxes(pixels, regions.cpu().numpy())
        return torch.from_numpy(snapped).to(regions), maps, batch.image_sizes

    def _backbone_maps(self, images: Sequence[Tensor]) -> tuple[ImageList, dict[str, Tensor]]:
        batch, maps = super()._backbone_maps(images)
        self.cut_outs.pixels = batch.tensors
        return batch, maps


class _BoxHead(nn.Sequential):
    """Maps (R, E, s, s) to (R, hidden): two layers, with dropout after each if there is noise."""

    def __init__(self, inputs: int, hidden: int, rate: float) -> None:
        super().__init__(
            nn.Flatten(),
            *(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(rate)),
            *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(rate)),
        )

    def forward(self, input: Tensor, noise: SampleNoise | None = None) -> Tensor:
        for layer in self:
            input = dropout(input, noise, rate=layer.p) if isinstance(layer, nn.Dropout) else layer(input)
        return input


class _CutOuts(nn.Module):
    """Replaces RoIAlign: (R, E, s, s) of RoIs, from `pixels`, set before each call, instead of feature maps."""

    pixels: Tensor

    def __init__(self, size: SmallRcnnSize) -> None:
        super().__init__()
        self.side, self.margin = size.patches * VARIANTS[size.variant].patch_size, size.margin
        self.sam = FrozenSam(size.variant, self.side, depth=size.depth)
        self.channels = (*(conv.out_channels for conv in self.sam.encoder.patch_embed.convs[:-1]), self.sam.channels)

    def forward(self, maps: Any, rois: list[Tensor], sizes: Any) -> Tensor:
        return self.pyramid(rois)[-1]

    @torch.no_grad()
    def pyramid(self, rois: list[Tensor]) -> list[Tensor]:
        """Returns the SAM's maps of RoIs, fine to coarse: (R, D, h, w) of strides 4, 8 and of a patch."""
        crops = cut_out(self.pixels, rois, self.side, self.margin)
        if not len(crops):  # the SAM needs at least one crop
            return [level[:0] for level in self.sam.pyramid(crops.new_zeros(1, 3, self.side, self.side))]
        return [torch.cat(maps) for maps in zip(*map(self.sam.pyramid, crops.split(_AT_ONCE)), strict=True)]
