"""images, pgt -> detector: trains an ordinary detector on pseudo ground truth.

The stage selects no checkpoint: the result is the weights of the last step. All available boxes are used for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from weaksam.core import schemas
from weaksam.core.config import Choice, Matching, OutsideFile, Reads, Recipe, changed, with_defaults
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError, DataError
from weaksam.models.backbones.catalogue import backbone_kind, pyramid_backbones
from weaksam.models.backbones.catalogue.of_timm import is_of_timm
from weaksam.models.detectors.catalogue import KINDS, kind_of
from weaksam.models.detectors.catalogue.kind import BoxLoss, DetectorKind, DetectorSpec
from weaksam.ops.roi_drop import RoiDropRules
from weaksam.stages.checks import check_same_classes, check_same_images, keep_areas
from weaksam.stages.training_run import (
    describe_loss,
    identify_shipped,
    loop_settings,
    make_course,
    outcome_of,
    train_task,
)
from weaksam.training.settings import Course, StepSettings, pilot_steps

if TYPE_CHECKING:
    from weaksam.training.detector_task import DetectorTask, PseudoObjects

_BACKBONE = Choice(pyramid_backbones(), {"small": "frozen_sam"}, Matching("a network of timm", is_of_timm))


_PUBLISHED = with_defaults(
    StepSettings,
    steps=9000,
    batch_size=16,
    lr=0.02,
    warmup=30,
    warmup_from=1e-3,
    milestones=[6000, 8000],
    weight_decay=1e-4,
)


class TrainDetectorConfig(_PUBLISHED):
    """Trains Faster R-CNN, DINO, RT-DETRv2, Mask R-CNN or Mask2Former on pseudo ground truth.

    Defaults are the published recipe of Faster R-CNN for VOC07 (SGD, batch 16, learning rate 0.02, 9,000 steps). Other
    models have their own recipes: DINO for VOC07 (AdamW, batch 16, learning rate 9e-5), RT-DETRv2 the same (1e-4), Mask
    R-CNN for VOC12 (as Faster R-CNN, other sizes) and Mask2Former for VOC12 (AdamW, batch 16, learning rate 1e-4,
    33,069 steps of large-scale jitter). The last two learn masks: their pseudo ground truth comes from `pseudo_masks`.
    """

    recipes = (
        *(Recipe({"model": kind.name}, kind.recipe) for kind in KINDS),
        *(
            Recipe({"model": kind.name, "backbone": backbone}, recipe)
            for kind in KINDS
            for backbone, recipe in kind.recipes_by_backbone.items()
        ),
    )

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""
    pgt: Annotated[str, Reads("pgt")]
    """The step with the boxes, and masks, to train on; its images are used."""
    model: Annotated[str, Choice(tuple(kind.name for kind in KINDS))] = "faster_rcnn"
    """The detector to train."""
    backbone: Annotated[str, _BACKBONE] = "resnet50"
    """`frozen_sam` and `efficientnet_lite0` are for few images and no GPU. Use `efficientnet_lite0`, which comes with
    ImageNet weights, for photographs, or a network of timm by name, e.g. `convnext_tiny` (both for Faster and Mask
    R-CNN); `frozen_sam` is a smaller network on the features of the frozen small SAM."""
    pretrained: bool = True
    """Whether to start from pretrained weights of the backbone: torchvision's for ImageNet, or the weights that come
    with weaksam."""
    weights: Annotated[str | None, OutsideFile()] = None
    """URI of weights to start from instead: a state dict with torchvision's keys for resnet50, else with timm's."""
    start: Annotated[str | None, Reads("detector")] = None
    """The step whose detector to start from instead: the same model, or Faster R-CNN for Mask R-CNN."""
    frozen_stages: int = Field(default=1, ge=0, le=4)
    """Number of first stages of the backbone that are not trained; efficientnet_lite0 and most networks of timm have
    five stages (strides 2 to 32), of a plain ViT all layers are frozen unless this is 0."""
    box_loss: BoxLoss = "l1"
    """Box loss of Faster and Mask R-CNN: `l1` as published; `smooth_l1` is torchvision's own."""
    first_stage: float = Field(default=0.4, ge=0, lt=1)
    """Share of the steps in which a small Faster or Mask R-CNN learns to locate objects, before it learns to classify
    them; 0 if the detector of `start` has learnt to locate them."""
    roi_drop: RoiDropRules = RoiDropRules()
    """Rules for regions that are left out of the losses."""
    keep_empty: bool = False
    """Whether to train on images without boxes, as background, although they may contain undetected objects."""
    scales: list[int] = Field(default=list(range(480, 1217, 32)), min_length=1)
    """Lengths of the shorter side of training images, pixels; sampled for each image."""
    max_side: int = Field(default=2000, ge=32)
    """Maximum length of the longer side, pixels."""
    crop_chance: float = Field(default=0.0, ge=0, le=1)
    """Probability of a random crop, as in DETR."""
    square: int | None = Field(default=None, ge=32)
    """Large-scale jitter instead of `scales`, `max_side` and `crop_chance`: side of the square training images,
    pixels."""
    jitter: list[float] = Field(default=[0.1, 2.0], min_length=2, max_length=2)
    """Smallest and largest scale of an image relative to the size that fits into the square, before it is cropped."""
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """`sgd` has momentum 0.9; `muon` is for backbone `frozen_sam`."""
    backbone_lr: float = Field(default=1.0, gt=0)
    """Learning rate of the backbone, and of the first stage of a small Faster R-CNN, times `lr`."""

    @property
    def kind(self) -> DetectorKind:
        """The kind of detector to train."""
        return kind_of(self.model)

    @property
    def _is_frozen(self) -> bool:
        """Whether the backbone is not trained at all, so that its maps of a view are cached."""
        return backbone_kind(self.backbone).is_pyramid_frozen

    @property
    def _learns_in_turn(self) -> bool:
        """Whether the network learns to locate objects before it learns to classify them."""
        return self._is_frozen and self.kind.is_two_stage

    @model_validator(mode="after")
    def _fits(self) -> TrainDetectorConfig:
        if self.weights is not None and not backbone_kind(self.backbone).takes_weights:
            raise ValueError(f"weights are for resnet50 and networks of timm: {self.backbone} has weights of its own")
        if not self.kind.supports(self.backbone):
            supported = self.kind.supported_backbones
            raise ValueError(f"backbone {self.backbone} is not for {self.model}: it has {_list(supported)}")
        if self.start is not None and self.weights is not None:
            raise ValueError("weights would be ignored: the detector of start has its own")
        if self.first_stage == 0 and self._learns_in_turn and self.start is None:
            raise ValueError("first_stage must be above 0 where no step to start from has learnt it")
        if not self._is_frozen and self.optimizer == "muon":
            raise ValueError(f"optimizer muon is for backbone frozen_sam: {self.backbone} has sgd or adamw")
        if self.roi_drop.gate != "off" and not self.kind.has_roi_drop:
            dropping = [kind.name for kind in KINDS if kind.has_roi_drop]
            raise ValueError(f"roi_drop is for {_list(dropping)}: {self.model} has its losses summed up elsewhere")
        if not 0 < self.jitter[0] <= self.jitter[1]:
            raise ValueError(f"jitter must be two factors above 0, the smaller first, got {self.jitter}")
        return self

    @property
    def first_steps(self) -> int:
        """Steps in which a small Faster or Mask R-CNN learns to locate objects."""
        return round(self.first_stage * self.steps)

    def course(self, images: int) -> Course:
        in_turn = self._learns_in_turn and self.first_steps > 0
        varied = not self._is_frozen or self.square is not None or self.crop_chance > 0
        phases = (0, self.first_steps) if in_turn else (0,)
        return make_course(loop_settings(self), images, views=None if varied else 2 * len(self.scales), phases=phases)

    def shortened(self, images: int) -> Self:
        in_turn = len(self.course(images).phases) > 1
        shortest = min(self.first_stage, 1 - self.first_stage) if in_turn else 1.0
        steps = pilot_steps(self.steps, images, self.batch_size, shortest)
        return self.scaled_to(steps)

    def scaled_to(self, steps: int) -> Self:
        drop = replace(self.roi_drop, start=round(steps / self.steps * self.roi_drop.start))
        return changed(super().scaled_to(steps), roi_drop=drop)

    def spec(self, num_classes: int, boxes_per_image: float = 1.0) -> DetectorSpec:
        """Returns the specification of the network."""
        return DetectorSpec(
            model=self.model,
            backbone=self.backbone,
            num_classes=num_classes,
            frozen_stages=self.frozen_stages,
            box_loss=self.box_loss,
            drop=self.roi_drop,
            boxes_per_image=boxes_per_image,
            first_steps=self.first_steps,
            pretrained=self.pretrained,
            weights=self.weights,
        )


def _list(names: Sequence[str]) -> str:
    """Returns names as text: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def run(step: Step) -> Outcome:
    """Trains, continuing an earlier call."""
    task = make_task(step)
    last = train_task(step, task, loop_settings(step.config))
    return outcome_of(step, len(task.uris), describe_loss(last))


def make_task(step: Step) -> DetectorTask:
    """Returns the training task of a step, with the images of its pseudo ground truth.

    Raises:
        DataError: no image has a box, or the boxes are of other images.
    """
    from weaksam.models.detectors.build import build_to_train
    from weaksam.training.detector_task import DetectorRecipe, DetectorTask

    config: TrainDetectorConfig = step.config
    uris, objects, num_classes = read_objects(step)
    boxes_per_image = sum(map(len, objects.boxes)) / len(uris)
    recipe = DetectorRecipe(
        scales=tuple(config.scales),
        max_side=config.max_side,
        crop_chance=config.crop_chance,
        square=config.square,
        jitter=(config.jitter[0], config.jitter[1]),
        optimizer=config.optimizer,
        backbone_lr=config.backbone_lr,
    )
    spec = config.spec(num_classes, boxes_per_image)
    if config.start is not None:
        _check_start(step)
        spec = replace(spec, start=step.inputs["start"].weights_uri)
    return DetectorTask(partial(build_to_train, spec), uris, objects, recipe)


def _check_start(step: Step) -> None:
    """Raises ConfigError when the weights of the step to start from are of another network."""
    config, start = step.config, step.inputs["start"]
    models = (*config.kind.starts_from, config.model)
    if start.config.model not in models or start.config.backbone != config.backbone:
        raise ConfigError(
            f"steps.{step.name}.start: step {start.name} trained {start.config.model} on {start.config.backbone}: name "
            f"one that trained {' or '.join(models)} on {config.backbone}"
        )
    check_same_classes(step, "start")


def read_objects(step: Step) -> tuple[list[str], PseudoObjects, int]:
    """Returns the URIs of the images to train on, their objects, and the number of classes."""
    from weaksam.data.remarks import Remarks
    from weaksam.training.detector_task import PseudoObjects

    check_same_images(step, "pgt")
    source = step.inputs["pgt"]
    images = step.inputs["images"].read(["uri"])
    uri_of = dict(zip(images.column("image_id").to_pylist(), images.column("uri").to_pylist(), strict=True))
    learns_masks = step.config.kind.learns_masks
    columns = ["status", "boxes", "classes", "trusted", *(["masks"] if learns_masks else [])]
    remarks = Remarks(f"steps.{step.name}: step {source.name}")
    rows = [row for row in source.read(columns).to_pylist() if row["status"] == schemas.OK]
    rows = [keep_areas(row, remarks) for row in rows]
    remarks.log()
    # a reviewed image without boxes has no objects
    rows = [row for row in rows if row["boxes"] or row.get("trusted") or step.config.keep_empty]
    boxes = [np.array(row["boxes"], np.float32).reshape(-1, 4) for row in rows]
    classes = [np.array(row["classes"], np.int64) for row in rows]
    if not any(map(len, boxes)):
        raise DataError(f"steps.{step.name}: step {source.name} holds no box to learn from: lower its threshold")
    num_classes = len(step.inputs["images"].class_names())
    if wrong := [row["image_id"] for row, own in zip(rows, classes, strict=True) if not _exist(own, num_classes)]:
        raise DataError(
            f"steps.{step.name}.pgt: step {source.name} has boxes of classes that the images do not have, in "
            f"{len(wrong)} images, e.g. {wrong[0]}: they have {num_classes} classes, 0 to {num_classes - 1}"
        )
    uris = [uri_of[row["image_id"]] for row in rows]
    masks = [row["masks"] or [] for row in rows] if learns_masks else None
    pairs = zip(masks or (), boxes, strict=False)
    if any(len(image_masks) != len(image_boxes) or None in image_masks for image_masks, image_boxes in pairs):
        raise DataError(
            f"steps.{step.name}.pgt: step {source.name} has no masks, which {step.config.model} learns from: name a "
            "pseudo_masks step"
        )
    return uris, PseudoObjects(boxes, classes, masks), num_classes


def _exist(classes: np.ndarray, num_classes: int) -> bool:
    return bool(((classes >= 0) & (classes < num_classes)).all())


def _shipped_weights(config: TrainDetectorConfig) -> dict[str, str]:
    moves_boxes = config.kind.is_two_stage  # the shipped SAM moves boxes, with any weights of the backbone
    is_used = config.pretrained or (moves_boxes and backbone_kind(config.backbone).is_pyramid_frozen)
    return identify_shipped(config.backbone) if is_used else {}


STAGE = Stage("train_detector", 5, TrainDetectorConfig, run, writes="detector", outside=_shipped_weights)
