"""Views of images with their boxes and masks, as a detector learns from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stages.detector_steps import MODELS, POOL, make_inputs, make_step
from tests.stages.test_train_wsod import finished
from weaksam.core import schemas
from weaksam.core.schemas import FAILED_STATUSES
from weaksam.core.step import Step
from weaksam.ops.masks import masks_to_boxes
from weaksam.ops.rle import encode_rle
from weaksam.stages.train_detector import make_task
from weaksam.training.state import draw_batch


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    return make_inputs(tmp_path)


def test_an_object_too_thin_for_a_view_is_left_out_of_it_and_counted(tmp_path: Path, inputs: dict[str, Step]) -> None:
    thin = np.zeros((64, 64), bool)
    thin[5:60, 7] = True  # at a quarter of the size no pixel is covered by half
    rows = inputs["pgt"].read().to_pylist()
    rows[0] |= {"boxes": [[7, 5, 8, 60], rows[0]["boxes"][1]], "masks": [encode_rle(thin), rows[0]["masks"][1]]}
    pgt = finished(tmp_path, "thin", rows[:1], schemas.DETECTIONS, {"images": inputs["images"]})
    task = make_task(make_step(tmp_path, {**inputs, "pgt": pgt}, model="mask_rcnn", scales=[16]))
    batch = task.load_batch(np.array([0]), np.array([[0, 0, 0]]), POOL) | {"step": torch.tensor(0)}
    assert batch["classes/0"].tolist() == [1]
    assert batch["masks/0"].shape == (1, 16, 16)
    assert len(batch["boxes/0"]) == 1
    _, values = task.loss(task.build_model(), batch)
    assert values["vanished"] == 1


def test_a_batch_holds_views_with_their_boxes(tmp_path: Path, inputs: dict[str, Step]) -> None:
    task = make_task(make_step(tmp_path, inputs, scales=[128], crop_chance=0.0))
    batch = task.load_batch(*draw_batch(0, 0, batch_size=4, num_samples=4), POOL)
    for i, index in enumerate(draw_batch(0, 0, batch_size=4, num_samples=4)[0]):
        image, boxes = batch[f"image/{i}"], batch[f"boxes/{i}"]
        assert image.shape == (3, 128, 128)
        square = boxes[0].int().tolist()
        inside = image[:, square[1] + 2 : square[3] - 2, square[0] + 2 : square[2] - 2].float().mean()
        assert inside > 190  # the bright square is still what the box is around
        sides = 2 * (task.objects.boxes[index][:, 2:] - task.objects.boxes[index][:, :2])
        assert np.allclose((boxes[:, 2:] - boxes[:, :2]).numpy(), sides)
    again = task.load_batch(*draw_batch(0, 0, batch_size=4, num_samples=4), POOL)
    assert all(torch.equal(value, again[key]) for key, value in batch.items())


def test_masks_go_with_their_boxes_into_every_view(tmp_path: Path, inputs: dict[str, Step]) -> None:
    task = make_task(make_step(tmp_path, inputs, model="mask_rcnn", scales=[96]))
    batch = task.load_batch(*draw_batch(0, 0, batch_size=4, num_samples=4), POOL)
    for i in range(4):
        masks, boxes = batch[f"masks/{i}"], batch[f"boxes/{i}"]
        assert masks.shape == (2, 96, 96)
        assert torch.allclose(masks_to_boxes(masks), boxes, atol=1.5)  # a pixel in each corner is half a pixel's share
    assert "masks/0" not in make_task(make_step(tmp_path, inputs)).load_batch(
        *draw_batch(0, 0, batch_size=4, num_samples=4), POOL
    )


def test_large_scale_jitter_makes_squares_of_objects_large_and_small(tmp_path: Path, inputs: dict[str, Step]) -> None:
    task = make_task(make_step(tmp_path, inputs, model="mask2former", square=96, jitter=[0.3, 2.5]))
    shares = []
    for step in range(6):
        batch = task.load_batch(*draw_batch(0, step, batch_size=4, num_samples=4), POOL)
        for i in range(4):
            image, masks = batch[f"image/{i}"], batch[f"masks/{i}"]
            assert image.shape[1:] == masks.shape[1:] == (96, 96)
            assert len(masks) == len(batch[f"classes/{i}"]) == len(batch[f"boxes/{i}"])
            assert masks.flatten(1).any(1).all()
            shares += masks.float().mean((1, 2)).tolist()
    assert min(shares) < 0.02
    assert max(shares) > 0.2


def test_detrs_crops_lose_no_class_of_a_box(tmp_path: Path, inputs: dict[str, Step]) -> None:
    task = make_task(make_step(tmp_path, inputs, scales=[96], crop_chance=1.0))
    sizes = set()
    for step in range(6):
        batch = task.load_batch(*draw_batch(0, step, batch_size=4, num_samples=4), POOL)
        for i in range(4):
            assert len(batch[f"boxes/{i}"]) == len(batch[f"classes/{i}"])
            height, width = batch[f"image/{i}"].shape[1:]
            sizes.add((height, width))
            assert (batch[f"boxes/{i}"] <= torch.tensor([width, height] * 2) + 1e-3).all()
    assert len(sizes) > 3


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_of_unreadable_images_moves_nothing_but_holds_every_weight(
    tmp_path: Path, inputs: dict[str, Step], model: str
) -> None:
    task = make_task(make_step(tmp_path, inputs, model=model))
    for uri in task.uris:
        Path(uri).write_bytes(b"junk")
    net = task.build_model()
    batch = task.load_batch(*draw_batch(0, 0, batch_size=2, num_samples=4), POOL) | {"step": torch.tensor(0)}
    assert batch["weight"].tolist() == [0, 0]
    assert [FAILED_STATUSES[code - 1] for code in batch["left_out"]] == ["unreadable"] * 2
    loss, _ = task.loss(net, batch)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name
