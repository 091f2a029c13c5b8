"""images -> classifier: trains a network that locates classes, from image-level labels alone.

Its peaks prompt SAM in `proposals`. The stage selects no checkpoint: the result is the weights of the last step, and
the held-out part of the training split only measures them.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from weaksam.core import step_files, storage
from weaksam.core.config import Added, Matching, NotInFingerprint, OutsideFile, Reads, Recipe, changed, with_defaults
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import DataError
from weaksam.models.backbones.catalogue import BACKBONES, backbone_kind, has_own_classifier, listed_in
from weaksam.models.backbones.catalogue.kind import PHOTOGRAPHS_CLASSIFIER_RECIPE
from weaksam.stages.labels import labelled_images
from weaksam.stages.training_run import identify_shipped, loop_settings, make_course, outcome_of, train_task
from weaksam.training.settings import Course, LoopSettings, TrainSettings, pilot_steps

if TYPE_CHECKING:
    from weaksam.training.classifier_task import ClassifierTask, LabelledImages


_PILOT_HELD_OUT = 0.25


_PUBLISHED = with_defaults(LoopSettings, batch_size=64, lr=7.5e-5, final_lr=0.13, weight_decay=0.03, precision="bf16")


def _is_convolutional(backbone: str) -> bool:
    """Returns whether a name is that of a network of timm that WeakTr is not for."""
    return not listed_in(backbone) and has_own_classifier(backbone)


class TrainClassifierConfig(_PUBLISHED):
    """Trains a classifier from image-level labels: WeakTr, or class activation maps on `efficientnet_lite0`.

    Defaults are the published recipe for VOC (batch 64, learning rate 7.5e-5, 60 epochs, DeiT-S).
    """

    recipes = (
        *(Recipe({"backbone": kind.name}, kind.classifier_recipe) for kind in BACKBONES if kind.classifier_recipe),
        Recipe(
            {"backbone": Matching("a convolutional network of timm", _is_convolutional)}, PHOTOGRAPHS_CLASSIFIER_RECIPE
        ),
    )

    images: Annotated[str, Reads("images")]
    """The `index` step with the images and their labels."""
    split: str
    """Split to train on."""
    backbone: str = "deit_small_patch16_224"
    """A plain ViT of timm, for WeakTr, or a convolutional network of timm, for class maps of its frozen features;
    `efficientnet_lite0`, whose features were trained on ImageNet's photographs and need no download; or `frozen_sam`,
    the encoder of the shipped SAM, for drawn scenes."""
    pretrained: bool = True
    """Whether to start from the weights of the backbone: timm's, downloaded by name, or weights in the installation."""
    weights: Annotated[str | None, OutsideFile()] = None
    """URI of weights to start from instead: those of the network of timm, or a published WeakTr checkpoint."""
    class_rows: list[int] | None = None
    """For each class of the dataset, its index among the classes of `weights`; the same order when left out."""
    gated: bool = False
    """Whether to fuse attention maps by the published learnt gate instead of their plain mean."""
    fine_of: Annotated[Literal["both", "coarse", "cross"], Added()] = "both"
    """The map that patch attention spreads into the fine map: the product of the coarse map and the attention of class
    tokens (`both`, as published), or one of them alone, which are options of the published code."""
    image_size: int = Field(default=224, ge=32)
    """Side of training images, pixels."""
    epochs: int = Field(default=60, ge=0)
    """Number of passes over the images; with 0 the starting weights are the result."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon trains randomly initialised layers, such as the layers on frozen features, in far fewer steps."""
    warmup_epochs: float = Field(default=5, ge=0)
    """Epochs over which the learning rate rises."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Probability to drop a residual branch of the last layer; lower for earlier layers."""
    min_scale: float = Field(default=0.08, gt=0, le=1)
    """Smallest share of an image that a random crop keeps."""
    rand_augment: float = Field(default=9.0, ge=0, le=10)
    """Magnitude of RandAugment, random operations on colour and shape; 0 = none."""
    erase: float = Field(default=0.25, ge=0, le=1)
    """Probability to erase a random rectangle."""
    held_out: float = Field(default=0.05, ge=0, le=0.5)
    """Share of the images held out of training to measure mAP."""
    max_held_out: int = Field(default=1000, ge=1)
    """Most images held out."""
    validate_epochs: Annotated[int, NotInFingerprint()] = Field(default=5, ge=1)
    """Epochs between two validations on the held-out images."""

    @model_validator(mode="after")
    def _fits_its_backbone(self) -> Self:
        if self.backbone == "vit_xs":
            raise ValueError("backbone 'vit_xs' is now 'frozen_sam'")
        is_set = self.gated or self.fine_of != "both"
        if not (is_set or self.weights) or not has_own_classifier(self.backbone):
            return self
        if is_set:
            raise ValueError(f"gated and fine_of are for ViTs: {self.backbone} has no attention")
        if not backbone_kind(self.backbone).takes_weights:
            raise ValueError(f"weights are for networks of timm: {self.backbone} has weights of its own")
        return self

    def num_held_out(self, images: int) -> int:
        """Returns the number of images held out of training."""
        return min(int(self.held_out * images), self.max_held_out)

    def course(self, images: int) -> Course:
        held_out = self.num_held_out(images)
        settings = train_settings(self, images - held_out)
        # frozen features are cached if the mirror image is the only augmentation
        is_cached = self.min_scale == 1 and not self.rand_augment and has_own_classifier(self.backbone)
        views = 2 if is_cached and not self.erase else None
        return make_course(settings, images - held_out, views=views, held_out=held_out)

    def shortened(self, images: int) -> Self:
        # with few held-out images the time would be the overhead of a validation, not the time of the images
        held_out = max(self.held_out, _PILOT_HELD_OUT) if self.held_out else 0.0
        whole = changed(self, held_out=held_out).course(images)
        steps = pilot_steps(whole.steps, whole.images, whole.batch_size)
        epochs = min(self.epochs, math.ceil(steps * whole.batch_size / whole.images))
        share = epochs / max(self.epochs, 1)
        return changed(
            self,
            epochs=epochs,
            held_out=held_out,
            warmup_epochs=share * self.warmup_epochs,
            checkpoint_every=max(1, round(epochs * whole.images / whole.batch_size) - 1),
            validate_epochs=max(1, epochs // 2),
        )


def run(step: Step) -> Outcome:
    """Trains, continuing an earlier call, and reports the held-out mAP."""
    config: TrainClassifierConfig = step.config
    task = _make_task(step)
    rows = len(task.train.uris) + len(task.held_out.uris)
    if config.epochs == 0:
        summary = _keep_weights(task, step.folder)
    else:
        summary = _describe(train_task(step, task, train_settings(config, len(task.train.uris))))
    return outcome_of(step, rows, summary)


def train_settings(config: TrainClassifierConfig, num_images: int) -> TrainSettings:
    """Returns the settings of the loop, with epochs of `num_images` as steps."""
    batch_size = min(config.batch_size, num_images)
    per_epoch = num_images / batch_size
    log_every = max(1, math.ceil(per_epoch))
    return loop_settings(
        config,
        steps=max(1, round(config.epochs * per_epoch)),
        batch_size=batch_size,
        warmup=round(config.warmup_epochs * per_epoch),
        log_every=log_every,
        validate_every=log_every * config.validate_epochs,
    )


def _make_task(step: Step) -> ClassifierTask:
    from weaksam.training.classifier_task import ClassifierTask, Recipe

    config: TrainClassifierConfig = step.config
    train, held_out = _split(step)
    return ClassifierTask(
        backbone=config.backbone,
        pretrained=config.pretrained,
        weights=config.weights,
        class_rows=tuple(config.class_rows) if config.class_rows is not None else None,
        gated=config.gated,
        fine_of=config.fine_of,
        train=train,
        held_out=held_out,
        recipe=Recipe(config.image_size, config.min_scale, config.rand_augment, config.erase, config.drop_path),
        optimizer=config.optimizer,
    )


def _split(step: Step) -> tuple[LabelledImages, LabelledImages]:
    """Splits the images into training and held-out images by a hash of their ids: the same split in every run."""
    from weaksam.training.classifier_task import LabelledImages

    config: TrainClassifierConfig = step.config
    images, labels = labelled_images(step)
    ids, uris = (images.column(name).to_pylist() for name in ("image_id", "uri"))
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    count = config.num_held_out(len(order))
    train, held_out = sorted(order[count:]), order[:count]
    return tuple(LabelledImages([uris[i] for i in part], labels[part]) for part in (train, held_out))  # type: ignore[return-value]


def _keep_weights(task: ClassifierTask, folder: str) -> str:
    from safetensors.torch import save

    if task.weights is None and not task.pretrained:
        raise DataError("epochs is 0 and there are no weights to take: set weights, or pretrained, or epochs")
    model = task.build_model().eval()
    storage.write_bytes(step_files.weights_uri(folder), save(model.state_dict()))
    with ThreadPoolExecutor() as pool:
        return _describe(task.validate(model, pool))


def _describe(metrics: dict[str, Any]) -> str:
    value = metrics.get("held_out_mAP")
    return f"held-out mAP {100 * value:.1f} %" if value is not None and math.isfinite(value) else ""


def _shipped_weights(config: TrainClassifierConfig) -> dict[str, str]:
    return identify_shipped(config.backbone) if config.pretrained and config.weights is None else {}


STAGE = Stage("train_classifier", 1, TrainClassifierConfig, run, writes="classifier", outside=_shipped_weights)
