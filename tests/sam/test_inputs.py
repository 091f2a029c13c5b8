"""What the engine takes, and what it refuses before any work."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from testing.calibrate import noise_image
from tests.sam.tiny import build_tiny_sam
from weaksam.data.images import decode_image, pixels_of
from weaksam.sam.checkpoints import load_sam
from weaksam.sam.engine import EngineSettings, SamEngine
from weaksam.sam.prompts import Prompts
from weaksam.sam.results import Proposals
from weaksam.sam.sources import PromptSet, join_sources, point_prompts, propose_from_sources

ALL: dict[str, Any] = {"pred_iou_threshold": 0.0, "stability_threshold": 0.0, "nms_threshold": None}
POINTS = [[10.0, 12.0], [20.0, 5.0]]
IMAGE = noise_image(24, 32, seed=3)


@pytest.fixture(scope="module")
def engine() -> SamEngine:
    return SamEngine(build_tiny_sam(), settings=EngineSettings(points_per_side=2))


@pytest.mark.parametrize(
    "same",
    [Image.fromarray(IMAGE), torch.from_numpy(IMAGE), np.asfortranarray(IMAGE), Image.fromarray(IMAGE).convert("RGBA")],
    ids=["pillow", "tensor", "fortran", "rgba"],
)
def test_images_of_other_kinds_give_the_proposals_of_the_array(engine: SamEngine, same: Any) -> None:
    expected, found = (engine.propose([one], **ALL)[0] for one in (IMAGE, same))
    assert len(expected.boxes) > 0
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.predicted_iou, expected.predicted_iou)


def test_an_image_of_pillow_is_turned_upright_like_its_file(engine: SamEngine) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(IMAGE).save(file, "JPEG", exif=exif)
    upright = decode_image(file.getvalue())
    assert upright.shape == (32, 24, 3)
    np.testing.assert_array_equal(pixels_of(Image.open(file)), upright)
    assert engine.encode(Image.open(file)).frame.image_hw == (32, 24)


def test_lists_are_prompts(engine: SamEngine) -> None:
    boxes = [[2, 3, 20, 18], [0, 0, 32, 24]]
    as_lists: Any = Prompts(points=POINTS, joint=[POINTS], boxes=boxes, source=[1, 2, 3, 4, 255])  # type: ignore[arg-type]
    as_arrays = Prompts(np.array(POINTS), [np.array(POINTS)], np.array(boxes), np.array([1, 2, 3, 4, 255]))
    first, second = (engine.propose([IMAGE], [one], **ALL)[0] for one in (as_lists, as_arrays))
    np.testing.assert_array_equal(first.boxes, second.boxes)
    assert set(first.source.tolist()) <= {1, 2, 3, 4, 255}
    assert engine.masks_for_boxes(IMAGE, boxes).masks == engine.masks_for_boxes(IMAGE, np.array(boxes)).masks
    np.testing.assert_array_equal(engine.snap_boxes(IMAGE, boxes), engine.snap_boxes(IMAGE, np.array(boxes)))
    assert engine.snap_boxes(IMAGE, []).shape == (0, 4)
    assert len(Prompts(points=[], boxes=[])) == 0  # type: ignore[arg-type]


REFUSED: list[tuple[str, Any]] = [
    (r"got \(3, 24, 32\) uint8: for a \(3, H, W\) tensor", lambda e: e.encode(torch.zeros(3, 24, 32).byte())),
    (r"got \(24, 32, 3\) float32", lambda e: e.encode(IMAGE.astype(np.float32))),
    ("or an image of Pillow, got str", lambda e: e.encode("photo.jpg")),
    ("images must be a list", lambda e: e.propose(IMAGE, **ALL)),
    ("prompts must be a list", lambda e: e.propose([IMAGE], Prompts(POINTS), **ALL)),
    ("prompts must be Prompts for each image, got list", lambda e: e.propose([IMAGE], [POINTS], **ALL)),
    ("max_proposals must be .* got -1", lambda e: e.propose([IMAGE], **ALL, max_proposals=-1)),
    ("max_proposals must be .* got 2.5", lambda e: e.propose([IMAGE], **ALL, max_proposals=2.5)),
    ("pred_iou_threshold must be .* got nan", lambda e: e.propose([IMAGE], **ALL | {"pred_iou_threshold": np.nan})),
    ("nms_threshold must be .* got '0.7'", lambda e: e.propose([IMAGE], **ALL | {"nms_threshold": "0.7"})),
    ("source must be from 0 to 255, got 300 to 300", lambda e: Prompts(POINTS[:1], source=[300])),
    ("source must be from 0 to 255, got -1 to -1", lambda e: Prompts(POINTS[:1], source=np.array([-1]))),
    ("source must be whole numbers", lambda e: Prompts(POINTS[:1], source=[0.5])),
    (r"boxes must be \(M, 4\), got \(4,\)", lambda e: e.masks_for_boxes(IMAGE, [1, 2, 3, 4])),
    ("right of box 1 is left of its left", lambda e: e.masks_for_boxes(IMAGE, [[0, 0, 2, 2], [9, 0, 2, 2]])),
    ("boxes must be finite", lambda e: e.snap_boxes(IMAGE, [[0, 0, np.nan, 2]])),
    ("points must be finite numbers", lambda e: Prompts(points=[[np.inf, 2]])),
    (r"points must be \(P, 2\), got rows of different", lambda e: Prompts(points=[[1, 2], [3]])),
    ("precision must be one of .*'bf16'.* got 'int8'", lambda e: EngineSettings(precision="int8")),  # type: ignore[arg-type]
    ("points_per_side must be a whole number from 1 on, got 0", lambda e: EngineSettings(0)),
    ("points_per_chunk must be .* got -3", lambda e: EngineSettings(points_per_chunk=-3)),
    ("images_per_batch must be .* got True", lambda e: EngineSettings(images_per_batch=True)),
    ("pixels_at_once must be .* got 0", lambda e: EngineSettings(pixels_at_once=0)),
    ("max_proposals must be .* got -1", lambda e: join_sources([NOTHING], duplicate_threshold=None, max_proposals=-1)),
]
NOTHING = Proposals(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0), np.zeros(0, np.uint8), None)


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_what_cannot_be_meant_is_refused_before_any_work(engine: SamEngine, message: str, call: Any) -> None:
    before = engine.encoder_calls, engine.prompts_decoded
    with pytest.raises(ValueError, match=message):
        call(engine)
    assert (engine.encoder_calls, engine.prompts_decoded) == before


def test_a_wrong_image_is_refused_before_the_right_ones_are_encoded(engine: SamEngine) -> None:
    before = engine.encoder_calls
    with pytest.raises(ValueError, match="image must be"):
        engine.propose([IMAGE, IMAGE[:, :, 0]], **ALL)
    assert engine.encoder_calls == before


def test_a_source_beyond_a_byte_is_refused_also_for_points(engine: SamEngine) -> None:
    points, labels = np.array(POINTS), np.array([0, 0])
    with pytest.raises(ValueError, match="source must be from 0 to 255"):
        point_prompts(points, labels, joint=False, source=300)
    prompted = PromptSet(point_prompts(points, labels, joint=False, source=200), 0.0, 0.0, None)
    proposals = propose_from_sources(engine, engine.encode(IMAGE), [prompted], duplicate_threshold=None)
    assert set(proposals.source.tolist()) == {200}


def test_an_image_that_another_sam_encoded_is_refused(engine: SamEngine) -> None:
    other = SamEngine(build_tiny_sam(seed=1))
    encoded = pickle.loads(pickle.dumps(engine.encode(IMAGE)))
    for call in (
        lambda one: one.propose([encoded], **ALL),
        lambda one: one.masks_for_boxes(encoded, [[0, 0, 9, 9]]),
        lambda one: one.snap_boxes(encoded, [[0, 0, 9, 9]]),
    ):
        with pytest.raises(ValueError, match="encoded by another SAM"):
            call(other)
        call(engine)
        call(SamEngine(build_tiny_sam()))  # a copy of the same weights


def test_devices_on_which_nothing_was_ever_compared_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"device mps: .* cpu and cuda"):
        load_sam("vit_xs", device="mps")
    with pytest.raises(ValueError, match=r"device meta: .* cpu and cuda"):
        SamEngine(build_tiny_sam().to("meta"))
