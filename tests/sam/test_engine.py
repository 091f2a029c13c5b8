"""The engine against SamAutomaticMaskGenerator and SamPredictor of `segment_anything`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam

from testing.calibrate import noise_image
from weaksam.errors import ImageError
from weaksam.ops.rle import decode_rle
from weaksam.sam.encoder import FastEncoder
from weaksam.sam.engine import EngineSettings, Proposals, SamEngine
from weaksam.sam.prompts import Prompts, grid_points

SIZES = [(90, 120), (120, 90), (128, 128), (1, 1), (1, 50), (37, 53), (301, 457), (260, 131)]
STRICT, LOOSE, UNSUPPRESSED = (0.88, 0.95, 0.7), (0.3, 0.3, 0.3), (0.88, 0.6, 1.0)
POINTS_PER_SIDE = 6


def thresholds(values: tuple[float, float, float]) -> dict[str, float]:
    """As keyword arguments of `propose`."""
    return dict(zip(("pred_iou_threshold", "stability_threshold", "nms_threshold"), values, strict=True))


def box_of(record: dict) -> list[float]:
    """Our box of a record of the generator, which has x, y, width, height from the first to the last pixel."""
    x, y, width, height = record["bbox"]
    return [x, y, x + width + 1, y + height + 1]


def assert_same(found: Proposals, expected: list[dict], image_hw: tuple[int, int]) -> None:
    """Same masks in the same order, same boxes, same scores.

    Of the pixels 1 in 100 000 may differ (and 2, for small images): a logit within rounding of 0 may fall on either
    side of it. Masks whose predicted IoU is equal to rounding may change places.
    """
    assert len(found.boxes) == len(expected)
    expected = reorder_ties(found, expected)
    masks = np.array([decode_rle(mask, *image_hw) for mask in found.masks]).reshape(-1, *image_hw)
    theirs = np.array([record["segmentation"] for record in expected]).reshape(-1, *image_hw)
    assert np.sum(masks != theirs) <= 2 + 1e-5 * masks.size
    np.testing.assert_array_equal(found.boxes, np.array([box_of(record) for record in expected]).reshape(-1, 4))
    scores = np.array([[record["predicted_iou"], record["stability_score"]] for record in expected]).reshape(-1, 2)
    np.testing.assert_allclose(found.predicted_iou, scores[:, 0], atol=1e-4)
    # Rounding may move single pixels over a cut, each worth 1 / area of the mask.
    areas = masks.sum(axis=(1, 2))
    assert (np.abs(found.stability - scores[:, 1]) <= np.maximum(1e-4, 3 / np.maximum(areas, 1))).all()
    assert found.boxes.dtype == np.float32
    assert found.source.dtype == np.uint8


def reorder_ties(found: Proposals, expected: list[dict]) -> list[dict]:
    """`expected` with neighbours swapped where their predicted IoU ties and only the swapped boxes fit."""
    expected = list(expected)
    for index in range(len(expected) - 1):
        first, second = expected[index : index + 2]
        tied = abs(first["predicted_iou"] - second["predicted_iou"]) <= 1e-5
        if tied and found.boxes[index].tolist() != box_of(first):
            expected[index : index + 2] = second, first
    return expected


def check_against_generator(sam: Sam, image: np.ndarray, values: tuple[float, float, float]) -> int:
    """Compares whole runs; returns the number of proposals."""
    pred_iou, stability, nms = values
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=POINTS_PER_SIDE,
        pred_iou_thresh=pred_iou,
        stability_score_thresh=stability,
        box_nms_thresh=nms,
    )
    engine = SamEngine(sam, settings=EngineSettings(points_per_side=POINTS_PER_SIDE))
    (found,) = engine.propose([image], **thresholds(values), return_masks=True)
    assert_same(found, generator.generate(image), image.shape[:2])
    return len(found.boxes)


@pytest.mark.parametrize("values", [STRICT, LOOSE, UNSUPPRESSED], ids=["strict", "loose", "unsuppressed"])
@pytest.mark.parametrize("image_hw", SIZES, ids=lambda hw: f"{hw[0]}x{hw[1]}")
def test_grid_gives_the_masks_of_the_generator(tiny_sam, image_hw, values):
    check_against_generator(tiny_sam, noise_image(*image_hw, seed=1), values)


def test_the_comparison_is_not_empty(tiny_sam):
    assert check_against_generator(tiny_sam, noise_image(90, 120), UNSUPPRESSED) > 20


@pytest.mark.parametrize("values", [STRICT, LOOSE], ids=["strict", "loose"])
def test_the_bundled_model_gives_the_masks_of_the_generator(bundled_sam, values):
    check_against_generator(bundled_sam, noise_image(150, 200, seed=2), values)


def test_joint_points_give_the_masks_of_the_predictor(tiny_sam):
    image = noise_image(90, 120, seed=3)
    joint = [
        np.array([[20.0, 30.0]]),
        np.array([[20.0, 30.0], [60.0, 70.0], [100.0, 5.0]]),
        np.array([[5, 5], [9, 80]]),
    ]
    singles = np.array([[33.0, 44.0], [70.0, 20.0]], dtype=np.float32)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    masks, scores = [], []
    for points in [*(point[None] for point in singles), *joint]:
        drawn, iou, _ = predictor.predict(points, np.ones(len(points)))
        masks += list(drawn[1:])
        scores += list(iou[1:])
    full = np.array([mask.any() for mask in masks])
    prompts = Prompts(points=singles, joint=joint, source=np.array([0, 1, 2, 2, 3], dtype=np.uint8))
    (found,) = SamEngine(tiny_sam).propose(
        [image], [prompts], **thresholds((0, 0, None)), keep_masks={1, 2}, return_masks=True
    )
    ours = np.array([decode_rle(mask, 90, 120) for mask in found.masks])
    assert np.mean(ours != np.array(masks)[full]) <= 1e-5
    np.testing.assert_allclose(found.predicted_iou, np.array(scores)[full], atol=1e-4)
    np.testing.assert_array_equal(found.source, np.repeat(prompts.source, 2)[full])


@pytest.mark.parametrize("multimask", [False, True])
def test_boxes_give_the_masks_of_the_predictor(tiny_sam, multimask):
    image = noise_image(90, 120, seed=4)
    boxes = np.array([[10, 10, 60, 50], [0, 0, 120, 90], [30, 5, 33, 80]], dtype=np.float32)
    predictor = SamPredictor(tiny_sam)
    predictor.set_image(image)
    expected = [predictor.predict(box=box, multimask_output=multimask)[:2] for box in boxes]
    engine = SamEngine(tiny_sam, settings=EngineSettings(points_per_chunk=2))
    found = engine.masks_for_boxes(image, boxes, multimask=multimask)
    masks = np.array([[decode_rle(mask, 90, 120) for mask in row] for row in found.masks])
    assert np.mean(masks != np.array([masks for masks, _ in expected])) <= 1e-5
    np.testing.assert_allclose(found.predicted_iou, np.array([iou for _, iou in expected]), atol=1e-4)


def test_boxes_snap_to_the_masks_that_sam_draws_for_them(tiny_sam):
    image = noise_image(90, 120, seed=2)
    boxes = np.array([[3, 4, 50, 60], [20, 10, 110, 85], [60, 50, 62, 53]], np.float32)
    engine = SamEngine(tiny_sam)
    drawn = [decode_rle(row[0], 90, 120) for row in engine.masks_for_boxes(image, boxes).masks]
    wanted = [
        [mask.any(0).argmax(), mask.any(1).argmax(), 120 - mask.any(0)[::-1].argmax(), 90 - mask.any(1)[::-1].argmax()]
        if mask.any()
        else box
        for mask, box in zip(drawn, boxes, strict=True)
    ]
    np.testing.assert_array_equal(engine.snap_boxes(image, boxes), np.array(wanted, np.float32))
    assert engine.snap_boxes(image, np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_no_prompts_give_no_proposals(tiny_sam):
    engine = SamEngine(tiny_sam)
    image = noise_image(40, 50)
    (found,) = engine.propose([image], [Prompts()], **thresholds(LOOSE), return_masks=True)
    assert found.boxes.shape == (0, 4)
    assert found.masks == []
    assert len(found.source) == 0
    assert engine.masks_for_boxes(image, np.zeros((0, 4))).predicted_iou.shape == (0, 1)


def test_each_image_is_encoded_once(tiny_sam):
    engine = SamEngine(tiny_sam, settings=EngineSettings(points_per_side=3))
    images = [noise_image(40, 50), noise_image(60, 50)]
    engine.propose(images, **thresholds(LOOSE))
    assert engine.encoder_calls == 2
    encoded = engine.encode(images[0])
    again = engine.propose([encoded, encoded], **thresholds(LOOSE))
    assert engine.encoder_calls == 3
    np.testing.assert_array_equal(again[0].boxes, again[1].boxes)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_do_not_change_proposals(tiny_sam, chunk):
    image = noise_image(90, 120, seed=5)
    settings = [EngineSettings(6, points_per_chunk=7), EngineSettings(6, points_per_chunk=chunk, pixels_at_once=999)]
    first, second = (
        SamEngine(tiny_sam, settings=s).propose([image], **thresholds(UNSUPPRESSED), return_masks=True)[0]
        for s in settings
    )
    np.testing.assert_array_equal(first.boxes, second.boxes)
    np.testing.assert_allclose(first.predicted_iou, second.predicted_iou, atol=1e-5)
    masks = [np.array([decode_rle(mask, 90, 120) for mask in found.masks]) for found in (first, second)]
    assert np.mean(masks[0] != masks[1]) <= 1e-5


class ShortOfMemory(SamEngine):
    """An engine on a device that holds few prompts at a time."""

    room = 3

    def _decode(self, encoded, tokens, wanted):
        if len(tokens) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._decode(encoded, tokens, wanted)


def test_chunks_halve_when_memory_runs_out_and_stay_halved(tiny_sam):
    image = noise_image(90, 120, seed=6)
    engine = ShortOfMemory(tiny_sam, settings=EngineSettings(5, points_per_chunk=16))
    expected = SamEngine(tiny_sam, settings=engine.settings).propose([image], **thresholds(LOOSE))[0]
    found = engine.propose([image], **thresholds(LOOSE))[0]
    assert engine.amounts.points == 2
    assert (engine.oom_backoffs, engine.prompts_decoded) == (3, 25)  # 16, 8 and 4 at a time were too many
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_one_prompt_too_many_is_an_image_error(tiny_sam):
    engine = ShortOfMemory(tiny_sam)
    engine.room = 0
    with pytest.raises(ImageError, match="oom: no device memory to decode a single prompt"):
        engine.propose([noise_image(30, 40)], **thresholds(LOOSE))


def test_encoder_out_of_memory_is_an_image_error(tiny_sam, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FastEncoder, "__call__", fail)
    with pytest.raises(ImageError, match="oom: no device memory to encode"):
        SamEngine(tiny_sam).encode(noise_image(30, 40))


def test_max_proposals_keeps_the_first(tiny_sam):
    engine = SamEngine(tiny_sam, settings=EngineSettings(6))
    encoded = engine.encode(noise_image(90, 120))
    every = engine.propose([encoded], **thresholds(UNSUPPRESSED), return_masks=True)[0]
    few = engine.propose([encoded], **thresholds(UNSUPPRESSED), max_proposals=4, return_masks=True)[0]
    np.testing.assert_array_equal(few.boxes, every.boxes[:4])
    assert few.masks == every.masks[:4]
    assert (np.diff(every.predicted_iou) <= 0).all()


def test_wrong_arguments_are_named(tiny_sam):
    engine = SamEngine(tiny_sam)
    with pytest.raises(ValueError, match=r"image must be .* got \(4, 5\) uint8"):
        engine.encode(np.zeros((4, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match="prompts are for 1 images, images are 2"):
        engine.propose([noise_image(4, 4)] * 2, [Prompts()], **thresholds(LOOSE))
    with pytest.raises(ValueError, match=r"keep_masks must be some of 0, 1, 2, got \[3\]"):
        engine.propose([], **thresholds(LOOSE), keep_masks={3})
    with pytest.raises(ValueError, match="source must have one value per prompt"):
        Prompts(points=np.zeros((2, 2)), source=np.zeros(3))
    with pytest.raises(ValueError, match="joint prompt must be"):
        Prompts(joint=[np.zeros((0, 2))])


def test_the_grid_is_the_generators():
    generator_grid = SamAutomaticMaskGenerator.__init__.__globals__["build_all_layer_point_grids"](32, 0, 1)[0]
    np.testing.assert_array_equal(grid_points(375, 500, 32), generator_grid * np.array([[500, 375]]))
