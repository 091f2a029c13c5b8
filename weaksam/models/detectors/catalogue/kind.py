"""Descriptions of detectors for settings, stages and the catalogue. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weaksam.models.backbones.catalogue import find_backbone, pyramid_backbones
from weaksam.models.detectors.rules import DetectionFilter, InferenceRules
from weaksam.ops.choices import check_choices
from weaksam.ops.roi_drop import NO_DROP, RoiDropRules

if TYPE_CHECKING:
    from weaksam.models.detectors.base import Detector

BoxLoss = Literal["l1", "smooth_l1"]


@dataclass(frozen=True)
class DetectorSpec:
    """Specifies a network; picklable, and cheap to send.

    Attributes:
        model: name of a `DetectorKind`.
        backbone: one of its backbones.
        num_classes: C.
        frozen_stages: number of frozen stages of resnet50 and efficientnet_lite0.
        box_loss: box loss of Faster and Mask R-CNN.
        drop: RoI drop.
        boxes_per_image: mean over training images, which divides the losses of the DETRs and Mask2Former.
        first_steps: steps of the first stage of the small Faster and Mask R-CNN.
        pretrained: start from the published weights of the backbone: torchvision's of ImageNet, fetched by name, or
            those that come with the installation.
        weights: URI of ImageNet weights to start from instead.
        start: URI of the weights of a whole detector to start from instead, see `load_detector`.
    """

    model: str
    backbone: str
    num_classes: int
    frozen_stages: int = 1
    box_loss: BoxLoss = "l1"
    drop: RoiDropRules = NO_DROP
    boxes_per_image: float = 1.0
    first_steps: int = 0
    pretrained: bool = True
    weights: str | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)


# For few images on CPUs; one size of 256 pixels, since the frozen SAM's maps of a view are cached.
FROZEN_SAM_RECIPE: dict[str, Any] = {
    "scales": [256],
    "batch_size": 8,
    "optimizer": "muon",
    "milestones": None,
    "ema": 0.98,
}


@dataclass(frozen=True)
class DetectorKind:
    """A detector of the catalogue.

    Attributes:
        name: value of `model` in a run file.
        build: builds the network with random weights; imports torch only when called.
        backbones: supported values of `backbone`; None: every backbone with maps for detectors.
        recipe: settings of `train_detector` that differ from that stage's defaults.
        recipes_by_backbone: per backbone, settings that differ from `recipe`.
        inference: published test settings.
        learns_masks: whether training needs a mask of every object.
        has_roi_drop: whether it can drop losses of single regions.
        is_two_stage: whether regions are proposed first and classified after.
        starts_from: names of other detectors whose weights it can start from.
    """

    name: str
    build: Callable[[DetectorSpec, DetectionFilter], Detector]
    backbones: tuple[str, ...] | None = ("resnet50", "frozen_sam")
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipes_by_backbone: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inference: InferenceRules = field(default_factory=InferenceRules)
    learns_masks: bool = False
    has_roi_drop: bool = False
    is_two_stage: bool = False
    starts_from: tuple[str, ...] = ()

    @property
    def supported_backbones(self) -> tuple[str, ...]:
        """Supported values of `backbone`."""
        return pyramid_backbones() if self.backbones is None else self.backbones

    def supports(self, backbone: str) -> bool:
        """Returns whether the detector can be built on a backbone; with all in the catalogue, also on those of timm."""
        if self.backbones is not None:
            return backbone in self.backbones
        kind = find_backbone(backbone)
        return kind is not None and kind.pyramid is not None
