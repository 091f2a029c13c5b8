"""The training task of weakly supervised detectors: its batches, losses and optimiser."""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import roi_align

from weaksam.data.proposal_boxes import ProposalBoxes
from weaksam.models.backbones.roi_net import RoiNet
from weaksam.models.noise import SampleNoise, dropout
from weaksam.models.wsod.build import WsodSpec
from weaksam.models.wsod.network import METHODS, WsodNet
from weaksam.training.wsod_task import WsodRecipe, WsodTask

POOL = ThreadPoolExecutor(2)


def test_ratings_are_the_prior_of_what_is_left_of_the_proposals(task: WsodTask) -> None:
    boxes, ratings = task._boxes.of(0, min_side=4)
    ratings[:] = np.linspace(0, 1, len(boxes))
    rated = dataclasses.replace(task._boxes, boxes=boxes, ratings=ratings, starts=np.array([0, len(boxes)]))
    task = dataclasses.replace(
        task, read_boxes=lambda: rated, recipe=dataclasses.replace(task.recipe, rating_power=2.0)
    )
    prior = task.load_batch(np.array([0]), np.zeros((1, 3), int), POOL)["prior/0"]
    torch.testing.assert_close(prior.exp(), torch.from_numpy(ratings).clamp(min=0.01) ** 2)


@pytest.fixture
def task(tmp_path: Path) -> WsodTask:
    """20 grey images; class 0 is a red disc somewhere, class 1 a blue square; most proposals miss them."""
    rng = np.random.default_rng(0)
    uris, labels, boxes = [], np.zeros((20, 2), bool), []
    for i in range(20):
        pixels = rng.integers(90, 160, (64, 80, 3)).astype(np.uint8)
        labels[i] = [i % 3 != 1, i % 3 != 0]
        here = [[*(corner := rng.integers(0, [60, 44])), *(corner + rng.integers(8, 20, 2))] for _ in range(10)]
        for label in np.flatnonzero(labels[i]):
            x, y = (int(v) for v in rng.integers(0, [60, 44]))
            patch = pixels[y : y + 18, x : x + 18]
            inside = (
                np.hypot(*(np.indices(patch.shape[:2]) - 8.5)) < 9 if label == 0 else np.ones(patch.shape[:2], bool)
            )
            patch[inside] = [[220, 30, 30], [30, 30, 220]][label]
            here.append([x, y, x + patch.shape[1], y + patch.shape[0]])
        boxes.append(np.array(here, np.float32))
        uris.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(uris[-1])
    every = np.concatenate(boxes)
    packed = ProposalBoxes(
        every,
        np.full(len(every), 0.5, np.float32),
        np.cumsum([0, *map(len, boxes)]),
        np.full((20, 2), [64, 80], np.int32),
    )
    recipe = WsodRecipe(scales=(64,), min_side=4, optimizer="adamw")
    make = functools.partial(_two_class_net, "mist")
    return WsodTask(make, uris, labels, functools.partial(_same, packed), recipe)


class LearntCrops(RoiNet):
    """A backbone that learns from its first layer on: twenty images are too few for a long vector of features."""

    pooled_channels, dim = 3, 256

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for before, after in ((3, 8), (8, 16), (16, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, self.dim))

    def pool(self, image: Tensor, boxes: Tensor) -> Tensor:
        margin = 0.1 * (boxes[:, 2:] - boxes[:, :2])
        rois = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
        return roi_align(self.normalise(image), [rois], (32, 32), aligned=True)

    def neck(self, pooled: Tensor, noise: SampleNoise | None = None) -> Tensor:
        return dropout(self.layers(pooled).relu(), noise)


def _two_class_net(method: str) -> WsodNet:
    return WsodNet(LearntCrops(), 2, METHODS[method])


def _same(boxes: ProposalBoxes) -> ProposalBoxes:
    return boxes


@pytest.mark.parametrize("flip", [True, False])
def test_images_are_mirrored_half_of_the_time_or_never(task: WsodTask, flip: bool) -> None:
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, flip=flip))
    seeds = np.stack([np.zeros(16, np.int64), np.arange(16), np.full(16, 3)], 1)
    batch = task.load_batch(np.full(16, 3), seeds, POOL)
    plain = torch.from_numpy(np.asarray(Image.open(task.uris[3])).transpose(2, 0, 1).copy())
    is_plain = [torch.equal(batch[f"image/{i}"], plain) for i in range(16)]
    mirrored = [torch.equal(batch[f"image/{i}"], plain.flip(2)) for i in range(16)]
    assert all(a != b for a, b in zip(is_plain, mirrored, strict=True))
    assert (4 <= sum(mirrored) <= 12) if flip else not any(mirrored)


@pytest.mark.parametrize("method", METHODS)
def test_twenty_images_are_overfitted(task: WsodTask, method: str) -> None:
    torch.manual_seed(1)
    task = dataclasses.replace(task, make_net=functools.partial(_two_class_net, method))
    model = task.build_model()
    optimizer = task.build_optimizer(model, lr=2e-3, weight_decay=0.0)
    for step in range(60):
        seeds = np.stack([np.full(20, step), np.zeros(20, int), np.arange(20)], 1)
        loss, _ = task.loss(model, task.load_batch(np.arange(20), seeds, POOL))
        optimizer.zero_grad()
        (loss / 20).backward()
        optimizer.step()
    hits = 0
    for i in range(20):
        boxes = torch.from_numpy(task._boxes.of(i, min_side=4)[0])
        image = torch.from_numpy(np.asarray(Image.open(task.uris[i])).transpose(2, 0, 1).copy())
        scores, _ = model.eval().detect(image, boxes)
        classes = np.flatnonzero(task.labels[i])  # the last proposals are the objects, in the order of their classes
        wanted = [len(boxes) - len(classes) + k for k in range(len(classes))]
        hits += sum(int(scores[:, label].argmax() == row) for label, row in zip(classes, wanted, strict=True))
    assert hits >= 0.9 * task.labels.sum()


def test_the_loss_of_a_batch_is_the_sum_over_its_images(task: WsodTask) -> None:
    model = task.build_model()
    indices, seeds = np.arange(4), np.arange(12).reshape(4, 3)
    total, sums = task.loss(model, task.load_batch(indices, seeds, POOL))
    parts = [task.loss(model, task.load_batch(indices[i : i + 1], seeds[i : i + 1], POOL))[0] for i in range(4)]
    torch.testing.assert_close(total, torch.stack(parts).sum())
    assert set(sums) == {"image_loss", "refine_loss", "box_loss"}


def test_a_broken_image_counts_for_nothing(task: WsodTask) -> None:
    Path(task.uris[1]).write_bytes(b"junk")
    model = task.build_model()
    batch = task.load_batch(np.arange(3), np.zeros((3, 3), np.int64), POOL)
    assert batch["weight"].tolist() == [1, 0, 1]
    both = [task.loss(model, task.load_batch(np.array([i]), np.zeros((1, 3), np.int64), POOL))[0] for i in (0, 2)]
    torch.testing.assert_close(task.loss(model, batch)[0], torch.stack(both).sum())


def test_muon_takes_the_trained_matrices_of_the_backbone(task: WsodTask) -> None:
    recipe = dataclasses.replace(task.recipe, optimizer="muon")
    task = dataclasses.replace(
        task, recipe=recipe, make_net=WsodSpec("frozen_sam", 2, METHODS["oicr"]).with_starting_weights
    )
    model = task.build_model()
    optimizer = task.build_optimizer(model, lr=1.0, weight_decay=0.5)
    named = {id(p): name for name, p in model.named_parameters()}
    decayed = {named[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"roi_net.first.weight", "roi_net.second.weight"}
    learnt = {named[id(p)] for group in optimizer.param_groups for p in group["params"]}
    assert learnt == {name for name, p in model.named_parameters() if p.requires_grad}


def test_biases_learn_twice_as_fast_and_do_not_decay(task: WsodTask) -> None:
    task = dataclasses.replace(task, recipe=dataclasses.replace(task.recipe, optimizer="adam", refine_lr=10.0))
    model = task.build_model()
    optimizer = task.build_optimizer(model, lr=1.0, weight_decay=0.5)
    found = {id(g["params"][0]): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    wanted = {"cls_score.weight": (1.0, 0.5), "cls_score.bias": (2.0, 0.0), "ref2.weight": (10.0, 0.5)}
    named = dict(model.named_parameters())
    assert {key: found[id(named[key])] for key in wanted} == wanted
