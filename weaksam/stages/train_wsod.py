"""images, proposals -> wsod: trains a detector that classifies proposals, from image-level labels alone.

The stage selects no checkpoint: the result is the weights of the last step. Without boxes, checkpoints cannot be
compared.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from weaksam.core import schemas, tables
from weaksam.core.config import Added, Choice, Matching, OutsideFile, Reads, Recipe, with_defaults
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError
from weaksam.models.backbones.catalogue import are_of_timm, kinds_in, wsod_backbones
from weaksam.models.backbones.catalogue.kind import PHOTOGRAPHS_WSOD_RECIPE
from weaksam.stages.checks import check_rows
from weaksam.stages.labels import count_labels, describe_everywhere, labelled_images, warn_of_classes_everywhere
from weaksam.stages.training_run import (
    describe_loss,
    identify_shipped,
    is_frozen,
    loop_settings,
    make_course,
    outcome_of,
    train_task,
)
from weaksam.training.settings import Course, StepSettings

if TYPE_CHECKING:
    from weaksam.data.proposal_boxes import ProposalBoxes
    from weaksam.models.wsod.build import WsodSpec
    from weaksam.training.wsod_task import WsodTask

log = logging.getLogger(__name__)

Source = Literal["grid", "coarse", "fine", "cross"]  # schemas.SOURCES, as a type


_PUBLISHED = with_defaults(
    StepSettings,
    steps=30_000,
    batch_size=8,
    lr=1e-5,
    warmup=200,
    warmup_from=1 / 3,
    milestones=[20_000, 26_700],
    weight_decay=5e-4,
)


_RENAMED = {"small": "frozen_sam", "efficientnet_lite0+small": "efficientnet_lite0+frozen_sam"}
_BACKBONES = wsod_backbones()


def _is_of_timm(backbone: str) -> bool:
    return backbone not in (*_BACKBONES, *_RENAMED) and are_of_timm(backbone)


class TrainWsodConfig(_PUBLISHED):
    """Trains a weakly supervised detector, OICR or MIST, from image-level labels and proposals.

    Defaults are the published recipe of MIST for VOC07 (Adam, batch 8, learning rate 1e-5, 30,000 steps).
    """

    recipes = (
        *(
            Recipe({"backbone": name}, kinds_in(name)[0].wsod_recipe)
            for name in _BACKBONES
            if kinds_in(name)[0].wsod_recipe
        ),
        Recipe({"backbone": Matching("a network of timm", _is_of_timm)}, PHOTOGRAPHS_WSOD_RECIPE),
    )

    images: Annotated[str, Reads("images")]
    """The `index` step with the images and their labels."""
    proposals: Annotated[str, Reads("proposals")]
    """The step with the proposals of these images."""
    sources: list[Source] | None = Field(default=None, min_length=1)
    """Use only the proposals of these sources; all when left out. Detection uses only these too."""
    split: str
    """Split to train on."""
    method: Literal["oicr", "mist"] = "mist"
    """OICR refines classifiers; MIST also selects several objects of a class and regresses boxes."""
    mining: Literal["top", "near_top", "mist"] | None = None
    """Rule that selects pseudo boxes; the rule of the method when left out: `near_top` for OICR (classic OICR:
    `top`)."""
    shared_boxes: Annotated[bool, Added()] = False
    """For OICR: add a class-agnostic box regression layer, as in `oicr_bbox_vgg16` of the published code."""
    backbone: Annotated[str, Choice(_BACKBONES, _RENAMED, Matching("a network of timm", _is_of_timm))] = "vgg16"
    """All but vgg16 and resnet50 are for few images: two layers on the frozen features of a crop of each box. Use
    `efficientnet_lite0`, which comes with ImageNet weights, or a network of timm by name, e.g.
    `vit_small_patch14_dinov2`, for photographs; `frozen_sam`, the small SAM, was trained on drawn scenes; `+`
    concatenates the features of two."""
    pretrained: bool = True
    """Whether to start from pretrained weights of the backbone: torchvision's for ImageNet, or the weights of the
    frozen features."""
    weights: Annotated[str | None, OutsideFile()] = None
    """URI of ImageNet weights to start from instead (a state dict with torchvision's or Caffe's numbering)."""
    pixels: Literal["torchvision", "caffe"] = "torchvision"
    """Pixel format that `weights` expect: RGB of unit variance, or BGR in 0..255 less a mean."""
    last_relu: bool = True
    """Whether a ReLU follows vgg16's last convolution; the published MIST has none."""
    frozen_stages: int = Field(default=2, ge=0, le=4)
    """Number of first stages of the backbone that are not trained."""
    crop: int = Field(default=64, ge=28, le=256)
    """Side of the crop of each box for frozen features, pixels; time grows with its square. A multiple of the
    largest stride: 16 of `frozen_sam`, 32 of `efficientnet_lite0`, 14 of DINOv2."""
    margin: float = Field(default=0.15, ge=0, le=1)
    """Margin around a box in its crop for frozen features, as a share of the box's size, on each side."""
    dropblock: Literal["off", "one_pass", "two_pass"] = "two_pass"
    """Concrete DropBlock, trained in a second pass (`two_pass`, as published) or, cheaper, in the pass of the
    detector."""
    scales: list[int] = Field(default=[480, 576, 688, 864, 1000, 1200], min_length=1)
    """Lengths of the shorter side of training images, pixels; sampled for each image."""
    max_side: int = Field(default=2000, ge=32)
    """Maximum length of the longer side, pixels."""
    flip: bool = True
    """Whether training images are mirrored with probability 0.5. Frozen features are computed for the mirror image too:
    without flip, their first computation takes half the time."""
    min_side: float = Field(default=20.0, ge=0)
    """Proposals with a shorter side are left out, pixels of the original image; published: 20 on VOC, 2 on COCO."""
    rating_power: float = Field(default=0.0, ge=0)
    """Weight of SAM's rating when proposals compete for the label of their image: this power times the rating's
    logarithm is added to WSDDN's detection logits. 0 = none, as published; higher values suppress parts of objects."""
    optimizer: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    """`adam` has weight decay as part of the gradient, as published; `muon` is for frozen features only. Except with
    muon, biases have twice the learning rate and no weight decay."""
    refine_lr: float = Field(default=1.0, gt=0)
    """Learning rate of the refinement heads, times `lr`."""
    dropblock_lr: float = Field(default=1.0, gt=0)
    """Learning rate of the dropblock, times `lr`."""

    @model_validator(mode="after")
    def _weights_fit(self) -> TrainWsodConfig:
        if self.shared_boxes and self.method != "oicr":
            raise ValueError("shared_boxes is for method oicr: MIST has box layers of its own")
        if self.weights is not None and not any(kind.takes_weights for kind in kinds_in(self.backbone)):
            raise ValueError(
                f"weights are for vgg16, resnet50 and networks of timm: {self.backbone} has weights of its own"
            )
        if not is_frozen(self.backbone) and self.optimizer == "muon":
            raise ValueError("optimizer muon is for frozen features: vgg16 and resnet50 have adam, adamw or sgd")
        multiples = [kind.crop_multiple for kind in kinds_in(self.backbone)]
        if is_frozen(self.backbone) and any(max(multiples) % each for each in multiples):
            raise ValueError(f"strides {multiples} of {self.backbone} do not go together: use one alone")
        multiple = max(multiples, default=1)
        if is_frozen(self.backbone) and self.crop % multiple:
            raise ValueError(f"crop must be a multiple of {multiple} for {self.backbone}, got {self.crop}")
        if self.optimizer == "muon" and (self.refine_lr, self.dropblock_lr) != (1.0, 1.0):
            raise ValueError("optimizer muon has one lr for all: leave refine_lr and dropblock_lr out, or use adamw")
        if self.pixels == "caffe" and self.weights is None:
            raise ValueError("pixels caffe goes with weights: torchvision's own want pixels torchvision")
        return self

    def course(self, images: int) -> Course:
        views = len(self.scales) * (2 if self.flip else 1) if is_frozen(self.backbone) else None
        return make_course(loop_settings(self), images, views=views)

    @property
    def source_indices(self) -> list[int] | None:
        """Values of the column `source` for `sources`."""
        return None if self.sources is None else [schemas.SOURCES.index(name) for name in self.sources]

    def spec(self, num_classes: int) -> WsodSpec:
        """Returns the specification of the network."""
        from weaksam.models.wsod.build import WsodSpec
        from weaksam.models.wsod.network import METHODS

        rules = replace(METHODS[self.method], shared_boxes=self.shared_boxes)
        return WsodSpec(
            backbone=self.backbone,
            num_classes=num_classes,
            rules=replace(rules, mining=self.mining) if self.mining else rules,
            dropblock=self.dropblock != "off",
            pixels=self.pixels,
            last_relu=self.last_relu,
            frozen_stages=self.frozen_stages,
            crop=self.crop,
            margin=self.margin,
            pretrained=self.pretrained,
            weights=self.weights,
        )


def run(step: Step) -> Outcome:
    """Trains, continuing an earlier call."""
    task = make_task(step)
    last = train_task(step, task, loop_settings(step.config))
    return outcome_of(step, len(task.uris), describe_loss(last))


def make_task(step: Step) -> WsodTask:
    """Returns the training task of a step, with the images of its split that have labels.

    Raises:
        DataError: no image has labels, or an image has no row of proposals.
        ConfigError: the method learns nothing from these labels.
    """
    from weaksam.training.wsod_task import WsodRecipe, WsodTask

    config: TrainWsodConfig = step.config
    images, labels = labelled_images(step)
    if config.method == "oicr" and labels.shape[1] == 1:
        raise ConfigError(
            f"steps.{step.name}.method: oicr learns nothing from a single class, whose share of all is always 1: "
            "take mist, which has a background"
        )
    names = step.inputs["images"].class_names()
    for text in describe_everywhere(f"steps.{step.name}.images", count_labels(labels, names), len(labels)):
        log.warning("warning: %s", text)
    ids = images.column("image_id").to_pylist()
    check_rows(step, "proposals", ids)
    source = step.inputs["proposals"]
    manifest = source.manifest()
    assert manifest is not None
    recipe = WsodRecipe(
        scales=tuple(config.scales),
        max_side=config.max_side,
        flip=config.flip,
        min_side=config.min_side,
        rating_power=config.rating_power,
        optimizer=config.optimizer,
        refine_lr=config.refine_lr,
        dropblock_lr=config.dropblock_lr,
        second_pass=config.dropblock == "two_pass",
    )
    spec = config.spec(labels.shape[1])
    read = ReadProposals(source.folder, manifest, ids, config.source_indices)
    return WsodTask(spec.with_starting_weights, images.column("uri").to_pylist(), labels, read, recipe)


@dataclass(frozen=True)
class ReadProposals:
    """Reads the proposals of images from storage, on each worker; picklable."""

    folder: str
    manifest: dict[str, Any]
    image_ids: list[str]
    sources: list[int] | None = None

    def __call__(self) -> ProposalBoxes:
        from weaksam.data.proposal_boxes import PER_BOX, keep_sources, pack_proposals

        table = tables.read_table(self.folder, self.manifest, columns=[*PER_BOX, "height", "width"])
        return pack_proposals(keep_sources(table, self.sources), self.image_ids)


def _shipped_weights(config: TrainWsodConfig) -> dict[str, str]:
    return identify_shipped(config.backbone) if config.pretrained else {}


STAGE = Stage(
    "train_wsod",
    4,
    TrainWsodConfig,
    run,
    writes="wsod",
    outside=_shipped_weights,
    warnings=warn_of_classes_everywhere,
)
