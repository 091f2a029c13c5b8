"""Training WeakTr from image-level labels: a task of the training loop. Does not depend on the cluster.

In: URIs of images and their labels. Out: a `TrainTask`. Source of the recipe: WeakTr (arXiv 2304.01184).

Axis legend: B images, C classes, L layers, S side of a training picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weaksam.data.augment import augment_for_classification, resize_for_classification
from weaksam.data.images import left_out_codes, read_for_training
from weaksam.errors import ImageError, StageError
from weaksam.models.classifiers.build import (
    Classifier,
    build_classifier,
    depth_of,
    load_pretrained,
    load_weights,
    pixels_of,
)
from weaksam.models.classifiers.weaktr import FineOf
from weaksam.ops.choices import check_choices
from weaksam.ops.classification import mean_average_precision
from weaksam.training.optimizers import MuonAdamW

_UNDECAYED = ("cls_token", "pos_embed")


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        uris: URIs of N images.
        labels: (N, C) bool.
    """

    uris: list[str]
    labels: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """Augmentation and regularisation. The defaults are the published recipe."""

    image_size: int = 224
    min_scale: float = 0.08
    rand_augment: float = 9.0
    erase: float = 0.25
    drop_path: float = 0.1


@dataclass(frozen=True)
class ClassifierTask:
    """Multi-label classification with the losses of WeakTr.

    Attributes:
        backbone: `efficientnet_lite0`, `frozen_sam` or the name of a timm ViT.
        pretrained: start from the published weights of the backbone; `weights` replaces them.
        weights: URI of a file to start from.
        class_rows: row in `weights` of each class of the dataset.
        gated: whether attention is fused by the published gate.
        train, held_out: images for training and for validation.
        recipe: augmentation and regularisation.
        optimizer: optimiser of the matrices inside the network; the rest uses AdamW.
        fine_of: see `WeakTr`.
    """

    backbone: str
    pretrained: bool
    weights: str | None
    class_rows: tuple[int, ...] | None
    gated: bool
    train: LabelledImages
    held_out: LabelledImages
    recipe: Recipe = Recipe()
    optimizer: Literal["adamw", "muon"] = "adamw"
    fine_of: FineOf = "both"

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def num_samples(self) -> int:
        """Number of training images."""
        return len(self.train.uris)

    @cached_property
    def _pixels(self) -> tuple[Sequence[float], Sequence[float]]:
        return pixels_of(self.backbone)

    @cached_property
    def _drop_rates(self) -> np.ndarray:
        """(L,) probability that a residual branch is dropped, rising linearly with depth."""
        return np.linspace(0, self.recipe.drop_path, depth_of(self.backbone))

    def name_of(self, index: int) -> str:
        """Returns the URI of an image."""
        return self.train.uris[index]

    def build_model(self) -> Classifier:
        """Returns the network with its starting weights."""
        model = build_classifier(self.backbone, self.train.labels.shape[1], gated=self.gated, fine_of=self.fine_of)
        if self.weights is not None:
            load_weights(model, self.weights, class_rows=self.class_rows)
        elif self.pretrained:
            load_pretrained(model, self.backbone)
        return model.train()

    def build_optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns the chosen optimiser; vectors, class tokens and positions have no weight decay."""
        if self.optimizer == "muon":
            linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
            inside, others = _split_parameters(model, lambda name, p: id(p) in linear)
            return MuonAdamW(inside, others, lr=lr, weight_decay=weight_decay)
        decayed, others = _split_parameters(model, lambda name, p: p.ndim > 1 and name not in _UNDECAYED)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr)

    def load_batch(self, indices: np.ndarray, seeds: np.ndarray, pool: Executor) -> dict[str, Tensor]:
        """Returns augmented pictures (B, 3, S, S), labels (B, C), weights (B,) and kept branches (B, L, 2).

        Also `left_out` (B,), the reason why an image could not be read, see `left_out_codes`; its weight is 0.
        """
        rows = list(pool.map(self._load, indices.tolist(), seeds))
        read, keep = zip(*rows, strict=True)
        left_out = torch.from_numpy(left_out_codes(read))
        blank = np.zeros((3, self.recipe.image_size, self.recipe.image_size), np.float32)
        pictures = np.stack([blank if isinstance(picture, ImageError) else picture for picture in read])
        return {
            "image": torch.from_numpy(pictures),
            "weight": (left_out == 0).float(),
            "left_out": left_out,
            "keep": torch.from_numpy(np.stack(keep)),
            "labels": torch.from_numpy(self.train.labels[indices].astype(np.float32)),
        }

    def _load(self, index: int, seed: np.ndarray) -> tuple[np.ndarray | ImageError, np.ndarray]:
        rng, recipe = np.random.default_rng(seed), self.recipe
        rates = self._drop_rates[:, None]
        keep = ((rng.random((len(rates), 2)) >= rates) / (1 - rates)).astype(np.float32)
        pixels = read_for_training(self.train.uris[index])
        if isinstance(pixels, ImageError):
            return pixels, keep
        picture = augment_for_classification(
            pixels,
            rng,
            size=recipe.image_size,
            min_scale=recipe.min_scale,
            rand_augment=recipe.rand_augment,
            erase=recipe.erase,
            mean=self._pixels[0],
            std=self._pixels[1],
        )
        return picture, keep

    def loss(self, model: Classifier, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over images of the multi-label losses of class tokens, coarse map and gated fine map."""
        keep = batch["keep"] if self.recipe.drop_path else None
        logits = model(batch["image"], keep)
        losses = {
            f"{name}_loss": _label_loss(class_logits, batch)
            for name, class_logits in (("cls", logits.cls), ("patch", logits.patch), ("fine", logits.fine))
            if class_logits is not None
        }
        return torch.stack(list(losses.values())).sum(), {key: value.detach() for key, value in losses.items()}

    @torch.inference_mode()
    def validate(self, model: Classifier, pool: Executor) -> dict[str, float]:
        """Returns loss and multi-label mAP of the class tokens on the held-out images."""
        if not self.held_out.uris:
            return {}
        device = model.device
        outputs, kept = [], []
        for pictures, rows in self._held_out_batches(pool):
            outputs.append(model(pictures.to(device)).cls.float().cpu())
            kept += rows
        if not kept:
            raise StageError(
                f"none of the {len(self.held_out.uris)} held-out images can be read, e.g. {self.held_out.uris[0]}: "
                "make the dataset readable again; the same command goes on"
            )
        logits, labels = torch.cat(outputs), self.held_out.labels[kept]
        loss = F.multilabel_soft_margin_loss(logits, torch.from_numpy(labels.astype(np.float32)))
        return {"held_out_loss": loss.item(), "held_out_mAP": mean_average_precision(logits.numpy(), labels)}

    def _held_out_batches(self, pool: Executor, size: int = 32) -> Iterator[tuple[Tensor, list[int]]]:
        """Yields pictures (B, 3, S, S) and their rows among the held-out images, without unreadable images."""
        side, (mean, std) = self.recipe.image_size, self._pixels
        for start in range(0, len(self.held_out.uris), size):
            uris = self.held_out.uris[start : start + size]
            read = enumerate(pool.map(read_for_training, uris), start)
            pixels = {row: image for row, image in read if not isinstance(image, ImageError)}
            if pixels:
                options = {"size": side, "mean": mean, "std": std}
                pictures = np.stack([resize_for_classification(image, **options) for image in pixels.values()])
                yield torch.from_numpy(pictures), list(pixels)


def _split_parameters(
    model: nn.Module, belongs: Callable[[str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits the trainable parameters by `belongs`."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[0 if belongs(name, parameter) else 1].append(parameter)
    return parts


def _label_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Returns the sum over images of the mean loss of their classes."""
    losses = F.multilabel_soft_margin_loss(logits.float(), batch["labels"], reduction="none")
    return (losses * batch["weight"]).sum()
