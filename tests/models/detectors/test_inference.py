"""Views of an image and what of their boxes stays."""

from __future__ import annotations

import pytest
import torch

from tests.models.wsod.nets import BOXES, make_image, make_net
from weaksam.models.detectors.inference import detect_objects, select_detections
from weaksam.models.detectors.rules import InferenceRules


def test_one_view_at_its_own_size_is_the_network_itself() -> None:
    net = make_net().eval()
    scores, boxes = net.detect(make_image().float(), BOXES)
    rules = InferenceRules(scales=(48,), flip=False)
    wanted = select_detections(scores, boxes, rules)
    for one, other in zip(detect_objects(net, make_image(), BOXES, rules)[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one, other)


def test_a_mirrored_image_gives_mirrored_detections() -> None:
    net = make_net().eval()
    rules = InferenceRules(scales=(48, 64), nms_threshold=1.0)
    boxes, classes, scores, _ = detect_objects(net, make_image(), BOXES, rules)
    mirrored = torch.stack([64 - BOXES[:, 2], BOXES[:, 1], 64 - BOXES[:, 0], BOXES[:, 3]], 1)
    again = detect_objects(net, make_image().flip(2), mirrored, rules)
    torch.testing.assert_close(again[2], scores, atol=1e-5, rtol=1e-4)
    assert torch.equal(again[1].bincount(minlength=3), classes.bincount(minlength=3))
    back = torch.stack([64 - again[0][:, 2], again[0][:, 1], 64 - again[0][:, 0], again[0][:, 3]], 1)
    torch.testing.assert_close(back.sum(0), boxes.sum(0), atol=1e-2, rtol=1e-4)


def test_a_negative_number_of_detections_is_refused() -> None:
    with pytest.raises(ValueError, match="max_detections must be a whole number from 1 on, got -1"):
        InferenceRules(max_detections=-1)


def test_no_proposals_no_detections() -> None:
    boxes, classes, scores, _ = detect_objects(make_net().eval(), make_image(), BOXES[:0], InferenceRules())
    assert (len(boxes), len(classes), len(scores)) == (0, 0, 0)


def test_suppression_takes_boxes_from_their_first_to_their_last_pixel() -> None:
    """As wetectron's inclusive boxes: 18 and 27 of 81 pixels are shared with the best, not 30 and 40 of 100."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3], [0, 0, 10, 4]])[:, None]
    scores = torch.tensor([[0.9], [0.8], [0.7]])
    rules = InferenceRules(nms_threshold=0.299)
    kept = select_detections(scores, boxes, rules)[2].tolist()
    assert kept == pytest.approx([0.9, 0.8])


def test_what_is_detected_can_be_learnt_from() -> None:
    net = make_net().eval()
    found = detect_objects(net, make_image(), BOXES, InferenceRules(scales=(48,)))
    parts = [*found[:3], *net.detect(make_image().float(), BOXES)]
    assert not any(part.is_inference() for part in parts)
    weight = torch.ones(1, requires_grad=True)
    (found.scores * weight).sum().backward()  # inference tensors cannot be saved for backward
    found.boxes.add_(1)


def test_suppression_stays_within_a_class() -> None:
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.6], [0.3, 0.0]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])[:, None].expand(-1, 2, -1)
    kept, classes, values, _ = select_detections(scores, boxes, InferenceRules())
    assert list(zip(classes.tolist(), values.tolist(), strict=True)) == [
        (0, pytest.approx(0.9)),
        (1, pytest.approx(0.6)),
        (0, pytest.approx(0.3)),
    ]
    assert kept[1].tolist() == [0, 0, 10, 9]
    assert len(select_detections(scores, boxes, InferenceRules(max_detections=1))[0]) == 1
