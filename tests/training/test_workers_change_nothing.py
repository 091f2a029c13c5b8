"""A batch that is cut into parts, as workers and micro-batches do, gives the gradient of the whole, for every model.

In train mode, with dropout, samplers and noise. Images have different sizes and numbers of objects, so that a batch of
them is padded and filled up.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from weaksam.data.proposal_boxes import ProposalBoxes
from weaksam.models.detectors.build import build_to_train
from weaksam.models.detectors.catalogue import kind_of
from weaksam.models.detectors.catalogue.kind import DetectorSpec
from weaksam.models.wsod.build import WsodSpec
from weaksam.models.wsod.network import METHODS
from weaksam.ops.rle import encode_rle
from weaksam.ops.roi_drop import RoiDropRules
from weaksam.training.classifier_task import ClassifierTask, LabelledImages, Recipe
from weaksam.training.detector_task import DetectorRecipe, DetectorTask, PseudoObjects
from weaksam.training.state import draw_batch
from weaksam.training.wsod_task import WsodRecipe, WsodTask

POOL = ThreadPoolExecutor(2)
SIZES = [(64, 64), (40, 90), (64, 60), (120, 70)]  # height and width; the first and the third are padded alike
OBJECTS = (2, 1, 0, 3)
CUTS = {"two workers": (0, 2, 4), "uneven workers": (0, 3, 4), "micro-batches of one": (0, 1, 2, 3, 4)}
FIRST_STEPS = 3  # of the small Faster and Mask R-CNN, whose stages learn one after the other


def draw_images(folder: Path) -> tuple[list[str], PseudoObjects]:
    """Noisy images with bright rectangles."""
    rng = np.random.default_rng(0)
    uris, boxes, masks = [], [], []
    for i, ((height, width), count) in enumerate(zip(SIZES, OBJECTS, strict=True)):
        pixels = rng.integers(60, 120, (height, width, 3))
        corners = rng.integers(0, [width // 2, height // 2], (count, 2))
        own = np.concatenate([corners, corners + rng.integers(12, [width // 2, height // 2], (count, 2))], 1)
        inside = np.zeros((count, height, width), bool)
        for k, (left, top, right, bottom) in enumerate(own):
            inside[k, top:bottom, left:right] = True
            pixels[inside[k]] += 100
        uris.append(str(folder / f"{i}.png"))
        Image.fromarray(pixels.astype(np.uint8)).save(uris[-1])
        boxes.append(own.astype(np.float32))
        masks.append([encode_rle(mask) for mask in inside])
    return uris, PseudoObjects(boxes, [np.arange(count) % 2 for count in OBJECTS], masks)


def detector_task(folder: Path, model: Any, backbone: Any) -> DetectorTask:
    drop = RoiDropRules("independent", cls_threshold=1.0, reg_threshold=2.0, start=0)
    spec = DetectorSpec(
        model, backbone, 2, drop=drop, boxes_per_image=1.5, first_steps=FIRST_STEPS if backbone == "frozen_sam" else 0
    )
    uris, objects = draw_images(folder)
    if not kind_of(model).learns_masks:
        objects = PseudoObjects(objects.boxes, objects.classes)
    make_net = functools.partial(build_to_train, spec)
    return DetectorTask(make_net, uris, objects, DetectorRecipe(scales=(40, 64, 80), max_side=128))


def wsod_task(folder: Path, method: str) -> WsodTask:
    uris, objects = draw_images(folder)
    rng = np.random.default_rng(1)
    rows = [np.concatenate([own, rng.uniform([0, 0, 20, 20], [20, 20, 40, 40], (6, 4))]) for own in objects.boxes]
    every = np.concatenate(rows).astype(np.float32)
    starts = np.cumsum([0, *map(len, rows)])
    packed = ProposalBoxes(every, np.full(len(every), 0.5, np.float32), starts, np.array(SIZES, np.int32))
    labels = np.array([[True, False], [True, True], [False, True], [True, True]])
    make_net = WsodSpec("frozen_sam", 2, METHODS[method], dropblock=True).with_starting_weights
    return WsodTask(make_net, uris, labels, functools.partial(_same, packed), WsodRecipe(scales=(40, 64), min_side=4))


def _same(boxes: ProposalBoxes) -> ProposalBoxes:
    return boxes


def classifier_task(folder: Path, backbone: str) -> ClassifierTask:
    images = LabelledImages(
        draw_images(folder)[0], np.array([[True, False], [True, True], [False, True], [True, True]])
    )
    recipe = Recipe(image_size=64, drop_path=0.5)
    return ClassifierTask(backbone, True, None, None, False, images, images, recipe)


def take_gradients(
    task: Any, model: nn.Module, parts: list[slice], step: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and metrics of a step, summed over the parts of its batch; torch's own generators differ each time."""
    indices, seeds = draw_batch(7, step, batch_size=4, num_samples=4)
    model.zero_grad()
    sums: dict[str, float] = {}
    for part in parts:
        torch.seed()
        batch = task.load_batch(indices[part], seeds[part], POOL) | {"step": torch.tensor(step)}
        loss, metrics = task.loss(model, batch)
        loss.backward()
        for key, value in {"loss": loss, **metrics}.items():
            sums[key] = sums.get(key, 0.0) + float(value)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums


def check_parts(task: Any, steps: tuple[int, ...]) -> None:
    """The whole batch, and the same in parts."""
    torch.manual_seed(0)
    model = task.build_model()
    for step in steps:
        whole, metrics = take_gradients(task, model, [slice(0, 4)], step)
        assert any(grad.abs().max() > 0 for grad in whole.values())
        for cut, ends in CUTS.items():
            parts = [slice(first, last) for first, last in pairwise(ends)]
            found, sums = take_gradients(task, model, parts, step)
            assert sums == pytest.approx(metrics, rel=1e-3, abs=1e-4), cut
            assert found.keys() == whole.keys()
            for name, grad in whole.items():
                far = (found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-4)
                assert far < 1e-2, f"{cut}: {name}"


@pytest.mark.parametrize(
    ("model", "backbone", "steps"),
    [
        ("faster_rcnn", "frozen_sam", (0, FIRST_STEPS)),
        ("mask_rcnn", "frozen_sam", (0, FIRST_STEPS)),
        ("faster_rcnn", "efficientnet_lite0", (0,)),
        ("mask_rcnn", "efficientnet_lite0", (0,)),
        ("dino", "frozen_sam", (0, 1)),
        ("mask2former", "frozen_sam", (0, 1)),
    ],
)
def test_a_detector_learns_from_parts_what_it_learns_from_the_whole(
    tmp_path: Path, model: str, backbone: str, steps: tuple[int, ...]
) -> None:
    check_parts(detector_task(tmp_path, model, backbone), steps)


@pytest.mark.parametrize("method", METHODS)
def test_the_weakly_supervised_detector_too(tmp_path: Path, method: str) -> None:
    check_parts(wsod_task(tmp_path, method), (0, 1))


@pytest.mark.parametrize("backbone", ["frozen_sam", "efficientnet_lite0"])
def test_the_classifier_too(tmp_path: Path, backbone: str) -> None:
    check_parts(classifier_task(tmp_path, backbone), (0, 1))


def test_rt_detr_v2_learns_after_an_interruption_what_it_learns_without(tmp_path: Path) -> None:
    """It sees a micro-batch together, see `RtDetrV2`; but nothing else decides its draws."""
    task = detector_task(tmp_path, "rt_detr_v2", "frozen_sam")
    torch.manual_seed(0)
    model = task.build_model()
    (first, metrics), (again, sums) = (take_gradients(task, model, [slice(0, 4)], 0) for _ in range(2))
    assert sums == pytest.approx(metrics)
    torch.testing.assert_close(again, first)
