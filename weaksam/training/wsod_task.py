"""Training a weakly supervised detector from image-level labels and proposals: a task of the training loop.

In: URIs of images, their labels and their proposals. Out: a `TrainTask`. Does not depend on the cluster.
Every image has its own size, so images of a batch go through the backbone one by one, and their proposals through the
layers above together.

Axis legend: B images, N proposals of an image, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from weaksam.data.images import left_out_codes, read_for_training
from weaksam.data.proposal_boxes import ProposalBoxes
from weaksam.data.views import View, flip_view, resize_view, view_size
from weaksam.errors import ConfigError, ImageError
from weaksam.models.noise import SampleNoise, make_generators, noise_seeds
from weaksam.models.wsod.network import WsodNet, forward_losses
from weaksam.ops.choices import check_choices
from weaksam.training.optimizers import MuonAdamW

log = logging.getLogger(__name__)

_LEAST_RATING = 0.01  # SAM's ratings are not bounded


@dataclass(frozen=True)
class WsodRecipe:
    """Augmentation and optimisation.

    Attributes:
        scales: lengths of the shorter side, drawn at random per image; pixels.
        max_side: maximum of the longer side.
        flip: whether images are mirrored with probability 1/2.
        min_side: smaller proposals are left out; pixels of the original image.
        rating_power: exponent of a proposal's rating in the detection stream's softmax over proposals.
        optimizer: `adam` adds weight decay to the gradient, as published; `adamw` decouples it; `muon` is for the
            matrices of a `frozen_sam` backbone, with AdamW for the rest.
        refine_lr: factor of the learning rate for the refinement heads.
        dropblock_lr: factor of the learning rate for the dropblock.
        second_pass: whether the dropblock is trained in its own pass.
    """

    scales: tuple[int, ...] = (480, 576, 688, 864, 1000, 1200)
    max_side: int = 2000
    flip: bool = True
    min_side: float = 20.0
    rating_power: float = 0.0
    optimizer: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    refine_lr: float = 1.0
    dropblock_lr: float = 1.0
    second_pass: bool = True

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class WsodTask:
    """OICR or MIST.

    Attributes:
        make_net: builds the network with its starting weights; picklable.
        uris: URIs of the images.
        labels: (images, C) bool.
        read_boxes: returns the proposals of the images, in their order; picklable, called once on each worker.
        recipe: augmentation and optimisation.
    """

    make_net: Callable[[], WsodNet]
    uris: list[str]
    labels: np.ndarray
    read_boxes: Callable[[], ProposalBoxes]
    recipe: WsodRecipe = WsodRecipe()

    @cached_property
    def _boxes(self) -> ProposalBoxes:
        boxes, min_side = self.read_boxes(), self.recipe.min_side
        without = boxes.images_without(min_side=min_side)
        if len(without) == len(self.uris):
            advice = (
                "lower min_side" if len(boxes.boxes) else "there is none at all: lower the thresholds of their step"
            )
            raise ConfigError(
                f"min_side: no proposal of any of the {len(without)} images has sides of {min_side:g} pixels or more: "
                f"{advice}, or name other sources"
            )
        if without:
            log.warning(
                "warning: %d of %d images are not learnt from, e.g. %s: no proposal with sides of %g pixels (min_side)",
                *(len(without), len(self.uris), self.uris[without[0]], min_side),
            )
        return boxes

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_boxes"}

    @property
    def num_samples(self) -> int:
        """Number of training images."""
        return len(self.uris)

    def name_of(self, index: int) -> str:
        """Returns the URI of an image."""
        return self.uris[index]

    def build_model(self) -> WsodNet:
        """Returns the network with its starting weights."""
        return self.make_net().train()

    def build_optimizer(self, model: WsodNet, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """Returns the optimiser; biases have twice the rate and no weight decay, as published, except with Muon."""
        if self.recipe.optimizer == "muon":
            inside = [p for p in model.roi_net.parameters() if p.requires_grad and p.ndim == 2]
            matrices = {id(p) for p in inside}
            others = [p for p in model.parameters() if p.requires_grad and id(p) not in matrices]
            return MuonAdamW(inside, others, lr=lr, weight_decay=weight_decay)
        groups = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                factor = 2.0 if name.endswith("bias") else 1.0
                factor *= self.recipe.refine_lr if name.startswith("ref") else 1.0
                factor *= self.recipe.dropblock_lr if name.startswith("dropblock") else 1.0
                decay = 0.0 if name.endswith("bias") else weight_decay
                groups.append({"params": [parameter], "lr": lr * factor, "weight_decay": decay})
        if self.recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=0.9)
        return (torch.optim.Adam if self.recipe.optimizer == "adam" else torch.optim.AdamW)(groups, lr=lr)

    def load_batch(self, indices: np.ndarray, seeds: np.ndarray, pool: Executor) -> dict[str, Tensor]:
        """Returns the inputs of `loss`.

        Returns:
            `seed` (B,) int64, `weight` (B,) and `left_out` (B,), the reason why an image could not be read, see
            `left_out_codes`; for image i `image/i` (3, H, W) uint8, `boxes/i` (N, 4) xyxy on it,
            `prior/i` (N,) logarithms, and `present/i` (P,) int64.
        """
        _ = self._boxes  # read once, before the threads use them
        read = list(pool.map(self._load, indices.tolist(), seeds))
        rows = [_nothing() if row is None or isinstance(row, ImageError) else row for row in read]
        batch = {f"{key}/{i}": value for i, row in enumerate(rows) for key, value in row.items()}
        weights = [batch.pop(f"weight/{i}") for i in range(len(rows))]
        left_out = torch.from_numpy(left_out_codes(read))
        return batch | {"weight": torch.stack(weights), "left_out": left_out, "seed": noise_seeds(seeds)}

    def _load(self, index: int, seed: np.ndarray) -> dict[str, Tensor] | ImageError | None:
        """Returns a view with its proposals; None for an image without proposals."""
        rng, recipe = np.random.default_rng(seed), self.recipe
        boxes, ratings = self._boxes.of(index, min_side=recipe.min_side)
        if not len(boxes):
            return None
        pixels = read_for_training(self.uris[index])
        if isinstance(pixels, ImageError):
            return pixels
        view = View(pixels, boxes)
        view = resize_view(view, *view_size(*view.size, int(rng.choice(recipe.scales)), recipe.max_side))
        if recipe.flip and rng.random() < 0.5:
            view = flip_view(view)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(view.pixels.transpose(2, 0, 1))),
            "boxes": torch.from_numpy(view.boxes),
            "prior": recipe.rating_power * torch.from_numpy(ratings).clamp(_LEAST_RATING, 1).log(),
            "present": torch.from_numpy(np.flatnonzero(self.labels[index])),
            "weight": torch.tensor(1.0),
        }

    def loss(self, model: WsodNet, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the sum over images of all losses, weighted; unreadable images have weight 0."""
        count = len(batch["weight"])
        keys = ("image", "boxes", "present", "prior")
        images, boxes, present, priors = ([batch[f"{key}/{i}"] for i in range(count)] for key in keys)
        generators = make_generators(batch["seed"].tolist(), images[0].device)
        noise = SampleNoise(generators, [len(image_boxes) for image_boxes in boxes])
        losses, adverse = forward_losses(
            model, images, boxes, present, noise, priors, second_pass=self.recipe.second_pass
        )
        sums = {
            key: torch.stack([row[key] * weight for row, weight in zip(losses, batch["weight"], strict=True)]).sum()
            for key in losses[0]
        }
        total = torch.stack(list(sums.values())).sum()
        return total + (adverse - adverse.detach()), {key: value.detach() for key, value in sums.items()}

    def validate(self, model: WsodNet, pool: Executor) -> dict[str, float]:
        """Returns no scores: there are no boxes to compare with, and labels are memorised."""
        return {}


def _nothing() -> dict[str, Tensor]:
    """Returns a sample of weight 0, since every parameter must take part in every step."""
    nothing = torch.tensor([[0.0, 0.0, 32.0, 32.0]])
    blank = torch.zeros(3, 64, 64, dtype=torch.uint8)
    none = {"prior": torch.zeros(1), "present": torch.zeros(0).long(), "weight": torch.tensor(0.0)}
    return {"image": blank, "boxes": nothing} | none
