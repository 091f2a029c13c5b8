"""Training a detector from pseudo ground truth: a task of the training loop. Does not depend on the cluster.

In: URIs of images and their pseudo boxes. Out: a `TrainTask`.
Axis legend: B images, G objects of an image, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from weaksam.data.images import left_out_codes, read_for_training
from weaksam.data.views import View, crop_view, fill_view, flip_view, resize_view, view_size
from weaksam.errors import DataError, ImageError
from weaksam.models.detectors.base import Detector, Targets
from weaksam.models.detectors.targets import TargetError
from weaksam.models.noise import make_generators, noise_seeds
from weaksam.ops.box_areas import has_area
from weaksam.ops.choices import check_choices
from weaksam.ops.rle import decode_rle
from weaksam.training.optimizers import MuonAdamW

# Layers without weight decay. For embeddings as published for Mask2Former; DINO decays them by 1e-4.
_UNDECAYED = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)
_CROP_SIDES = (384, 600)  # DETR's: sides of a crop, from an image of one of the scales below
_CROP_SCALES = (400, 500, 600)


@dataclass(frozen=True)
class PseudoObjects:
    """The pseudo ground truth of a set of images.

    Attributes:
        boxes: (G, 4) float32 of each image, xyxy, pixels of the image.
        classes: (G,) int64 of each image.
        masks: G COCO compressed counts of each image, for detectors that learn masks.
    """

    boxes: list[np.ndarray]
    classes: list[np.ndarray]
    masks: list[list[bytes]] | None = None


@dataclass(frozen=True)
class DetectorRecipe:
    """Augmentation and optimisation.

    Attributes:
        scales: lengths of the shorter side, drawn at random per image; pixels.
        max_side: maximum of the longer side.
        crop_chance: probability of a random crop before resizing, as in DETR.
        square: replaces the settings above: side of a square input, pixels, with `jitter`.
        jitter: minimum and maximum scale of an image, relative to the size that fits into the square, before it is
            cropped or padded to the square.
        optimizer: `sgd` has momentum 0.9; `muon` is for matrices outside the backbone, with AdamW for the rest.
        backbone_lr: factor of the learning rate for the backbone and for parameters that are trained before the others.
    """

    scales: tuple[int, ...]
    max_side: int = 1333
    crop_chance: float = 0.0
    square: int | None = None
    jitter: tuple[float, float] = (0.1, 2.0)
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    backbone_lr: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self)


class _Kind(NamedTuple):
    """Properties that determine the optimiser settings of a weight."""

    is_matrix: bool
    in_backbone: bool
    is_undecayed: bool
    is_early: bool


def _kinds(model: Detector) -> Iterator[tuple[_Kind, nn.Parameter]]:
    """Yields the trainable weights and their kinds."""
    backbone = {id(p) for p in model.backbone_parameters()}
    undecayed = {id(p) for module in model.modules() if isinstance(module, _UNDECAYED) for p in module.parameters()}
    early = {id(p) for p in model.early_parameters()[0]}
    for p in model.parameters():
        if p.requires_grad:
            is_undecayed = id(p) in undecayed
            yield _Kind(p.ndim == 2 and not is_undecayed, id(p) in backbone, is_undecayed, id(p) in early), p


@dataclass(frozen=True)
class DetectorTask:
    """Any `Detector`.

    Attributes:
        make_net: builds the network with its starting weights; picklable.
        uris: URIs of the images.
        objects: objects of the images, in their order.
        recipe: augmentation and optimisation.
    """

    make_net: Callable[[], Detector]
    uris: list[str]
    objects: PseudoObjects
    recipe: DetectorRecipe

    @property
    def num_samples(self) -> int:
        """Number of training images."""
        return len(self.uris)

    def name_of(self, index: int) -> str:
        """Returns the URI of an image."""
        return self.uris[index]

    def build_model(self) -> Detector:
        """Returns the network with its starting weights."""
        return self.make_net().train()

    def build_optimizer(self, model: Detector, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns the optimiser: no decay of norms and embeddings, another rate of backbone and early weights."""
        kinds: dict[_Kind, list[nn.Parameter]] = {}
        for kind, parameter in _kinds(model):
            kinds.setdefault(kind, []).append(parameter)
        _, early_steps = model.early_parameters()
        groups: dict[_Kind, dict[str, Any]] = {
            kind: {
                "params": params,
                "window": (0, early_steps) if kind.is_early else (early_steps, None),
                "lr": lr * (self.recipe.backbone_lr if kind.in_backbone or kind.is_early else 1.0),
            }
            for kind, params in kinds.items()
        }
        if self.recipe.optimizer == "muon":
            matrices = [group for kind, group in groups.items() if kind.is_matrix and not kind.in_backbone]
            others = [group for kind, group in groups.items() if not kind.is_matrix or kind.in_backbone]
            return MuonAdamW(matrices, others, lr=lr, weight_decay=weight_decay)
        listed = [
            group | {"weight_decay": 0.0 if kind.is_undecayed else weight_decay} for kind, group in groups.items()
        ]
        if self.recipe.optimizer == "sgd":
            return torch.optim.SGD(listed, lr=lr, momentum=0.9)
        return torch.optim.AdamW(listed, lr=lr)

    def load_batch(self, indices: np.ndarray, seeds: np.ndarray, pool: Executor) -> dict[str, Tensor]:
        """Returns the inputs of `loss`.

        Returns:
            `index`, `seed` (B,) int64; `weight` (B,), 0 for an unreadable image, and `left_out` (B,), the reason, see
            `left_out_codes`; for image i `image/i` (3, H, W) uint8, `boxes/i` (G, 4) xyxy on it, `classes/i` (G,)
            int64 and, for detectors with masks, `masks/i` (G, H, W) bool and `vanished/i` (), the number of objects
            left out because they have no pixel in this view.
        """
        rows = list(pool.map(self._load, indices.tolist(), seeds))
        batch = {
            f"{key}/{i}": value
            for i, row in enumerate(rows)
            if not isinstance(row, ImageError)
            for key, value in row.items()
        }
        left_out = torch.from_numpy(left_out_codes(rows))
        weight, index = (left_out == 0).float(), torch.from_numpy(indices)
        return batch | {"weight": weight, "left_out": left_out, "index": index, "seed": noise_seeds(seeds)}

    def _load(self, index: int, seed: np.ndarray) -> dict[str, Tensor] | ImageError:
        pixels = read_for_training(self.uris[index])
        if isinstance(pixels, ImageError):
            return pixels
        boxes, classes = self.objects.boxes[index], self.objects.classes[index]
        view, stays = self._vary(np.random.default_rng(seed), View(pixels, boxes, self._masks(index, pixels.shape[:2])))
        view, is_kept = _without_vanished(view)
        row = {
            "image": torch.from_numpy(np.ascontiguousarray(view.pixels.transpose(2, 0, 1))),
            "boxes": torch.from_numpy(np.ascontiguousarray(view.boxes, np.float32)),
            "classes": torch.from_numpy(classes[stays][is_kept].astype(np.int64)),
        }
        if view.masks is None:
            return row
        vanished = torch.tensor(float((~is_kept).sum()))
        return row | {"masks": torch.from_numpy(np.ascontiguousarray(view.masks)), "vanished": vanished}

    def _masks(self, index: int, hw: tuple[int, ...]) -> np.ndarray | None:
        if self.objects.masks is None:
            return None
        height, width = hw
        try:
            masks = [decode_rle(counts, height, width) for counts in self.objects.masks[index]]
        except ValueError as error:
            raise DataError(
                f"{self.uris[index]}: {error}: its masks are of another image: run the steps before this again"
            ) from error
        return np.array(masks).reshape(-1, height, width)

    def _vary(self, rng: np.random.Generator, view: View) -> tuple[View, np.ndarray]:
        """Returns a random view, by mirroring, cropping and resizing, and which objects are still on it."""
        recipe, stays = self.recipe, np.ones(len(view.boxes), bool)
        if rng.random() < 0.5:
            view = flip_view(view)
        if recipe.square:
            return _jitter(rng, view, recipe.square, recipe.jitter)
        if rng.random() < recipe.crop_chance:
            view = resize_view(view, *view_size(*view.size, int(rng.choice(_CROP_SCALES)), recipe.max_side))
            view, stays = _cut(rng, view, _CROP_SIDES)
        hw = view_size(*view.size, int(rng.choice(recipe.scales)), recipe.max_side)
        return resize_view(view, *hw), stays

    def loss(self, model: Detector, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over images of all losses; unreadable images have weight 0."""
        step, weights, seeds = int(batch["step"]), batch["weight"].tolist(), batch["seed"].tolist()
        rows = [i for i, weight in enumerate(weights) if weight]
        images = [batch[f"image/{i}"] for i in rows]
        targets = [Targets(batch[f"boxes/{i}"], batch[f"classes/{i}"], batch.get(f"masks/{i}")) for i in rows]
        if not rows:  # every weight takes part in every step
            images = [batch["weight"].new_zeros((3, 64, 64), dtype=torch.uint8)]
            targets = [Targets(batch["weight"].new_zeros(0, 4), batch["weight"].new_zeros(0, dtype=torch.int64))]
        try:
            generators = make_generators([seeds[i] for i in rows or [0]], images[0].device)
            losses = model.losses(images, targets, step, generators)
        except TargetError as error:
            uri = self.uris[int(batch["index"][rows[error.image]])]
            raise DataError(f"{uri}: {error.fault}: this cannot be learnt from") from error
        metrics = {key: value if rows else value * 0 for key, value in losses.items()}
        total = torch.stack([value for key, value in metrics.items() if key.startswith("loss")]).sum()
        if model.learns_masks:
            metrics["vanished"] = sum((batch[f"vanished/{i}"] for i in rows), total.new_zeros(()))
        return total, {key: value.detach() for key, value in metrics.items()}

    def validate(self, model: Detector, pool: Executor) -> dict[str, float]:
        """Returns no scores: all boxes are used for training."""
        return {}


def _without_vanished(view: View) -> tuple[View, np.ndarray]:
    """Returns a view without objects that have no area or no mask pixel in it, and the kept objects, (N,) bool.

    A thin object may cover no pixel by half after shrinking; its empty mask would train the object as background.
    """
    stays = has_area(view.boxes)
    if view.masks is not None:
        stays &= view.masks.any((1, 2))
    masks = None if view.masks is None else view.masks[stays]
    return View(view.pixels, view.boxes[stays], masks), stays


def _cut(rng: np.random.Generator, view: View, sides: tuple[int, int]) -> tuple[View, np.ndarray]:
    """Crops a part with random sides between `sides`, at most the image's."""
    height, width = (int(rng.integers(min(sides[0], s), min(sides[1], s) + 1)) for s in view.size)
    top, left = (int(rng.integers(s - c + 1)) for s, c in zip(view.size, (height, width), strict=True))
    return crop_view(view, top, left, height, width)


def _jitter(rng: np.random.Generator, view: View, square: int, factors: tuple[float, float]) -> tuple[View, np.ndarray]:
    """Large-scale jitter (Ghiasi et al. 2021, arXiv 2012.07177): squares with a wide range of object sizes."""
    height, width = view.size
    scale = rng.uniform(*factors) * square / max(height, width)
    view = resize_view(view, max(1, round(scale * height)), max(1, round(scale * width)))
    view, stays = _cut(rng, view, (square, square))
    return fill_view(view, square, square), stays
