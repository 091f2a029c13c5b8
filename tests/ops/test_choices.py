"""A name that is none of those known, or a number outside its limits, is refused; the message says what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from weaksam.models.backbones.pyramids import ResNet50
from weaksam.models.classifiers.peak_prompts import PeakRule
from weaksam.models.detectors.build import build_untrained
from weaksam.models.detectors.catalogue.kind import DetectorSpec
from weaksam.models.detectors.faster_rcnn import FasterRcnn
from weaksam.models.detectors.rules import InferenceRules
from weaksam.models.wsod.build import WsodSpec
from weaksam.models.wsod.network import METHODS, WsodRules
from weaksam.ops.pgt import PgtRules, normalise_scores
from weaksam.ops.pseudo_masks import MaskRules
from weaksam.ops.roi_drop import RoiDropRules
from weaksam.training.detector_task import DetectorRecipe
from weaksam.training.wsod_task import WsodRecipe

UNKNOWN: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda name: build_untrained(DetectorSpec(name, "resnet50", 2)),
        "model must be one of 'faster_rcnn', 'dino', .*'mask2former'",
    ),
    (
        lambda name: build_untrained(DetectorSpec("dino", name, 2)),
        "dino: backbone must be one of 'resnet50', 'frozen_sam'",
    ),
    (
        lambda name: build_untrained(DetectorSpec("faster_rcnn", name, 2)),
        "faster_rcnn: backbone must be one of 'resnet50', 'frozen_sam', 'efficientnet_lite0'",
    ),
    (lambda name: DetectorSpec("dino", "frozen_sam", 2, box_loss=name), "box_loss must be one of 'l1', 'smooth_l1'"),
    (lambda name: FasterRcnn(ResNet50(), 2, box_loss=name), "box_loss must be one of l1, smooth_l1"),
    (lambda name: WsodSpec(name, 2, METHODS["mist"]), "backbone must be one of 'vgg16', 'resnet50', 'frozen_sam'"),
    (lambda name: WsodSpec("vgg16", 2, METHODS["mist"], pixels=name), "pixels must be one of 'torchvision', 'caffe'"),
    (lambda name: WsodRules(mining=name), "mining must be one of 'top', 'near_top', 'mist'"),
    (lambda name: WsodRules(image_reduction=name), "image_reduction must be one of 'mean', 'sum'"),
    (lambda name: DetectorRecipe((64,), optimizer=name), "optimizer must be one of 'sgd', 'adamw', 'muon'"),
    (lambda name: WsodRecipe(optimizer=name), "optimizer must be one of 'adam', 'adamw', 'sgd', 'muon'"),
    (lambda name: PgtRules(norm=name), "norm must be one of 'range', 'minmax', 'max'"),
    (lambda name: PgtRules(containment_rule=name), "containment_rule must be one of 'greedy', 'all_pairs', 'off'"),
    (lambda name: normalise_scores(torch.rand(2).numpy(), name), "norm must be one of range, minmax, max"),
    (
        lambda name: RoiDropRules(name),
        "gate must be one of 'off', 'and', 'independent', 'independent_all'",
    ),
    (lambda name: MaskRules(empty=name), "empty must be one of 'box', 'drop'"),
    (lambda name: PeakRule(3, cluster=name), "cluster must be one of 'per_class', 'pooled', 'off'"),
]


OUTSIDE: list[tuple[Callable[[], Any], str]] = [
    (lambda: PgtRules(threshold=-0.1), "threshold must be a finite number from 0 on, got -0.1"),
    (lambda: PgtRules(containment=0.0), "containment must be a finite number above 0 and at most 1, got 0.0"),
    (lambda: PgtRules(containment=1.1), "containment must be a finite number above 0 and at most 1, got 1.1"),
    (lambda: PgtRules(top_k=0), "top_k must be None or a whole number from 1 on, got 0"),
    (lambda: MaskRules(max_outside=2.0), "max_outside must be a finite number from 0 on and at most 1, got 2.0"),
    (lambda: RoiDropRules(cls_threshold=-1.0), "cls_threshold must be a finite number from 0 on, got -1.0"),
    (lambda: RoiDropRules(start=None), "start must be a whole number from 0 on, got None"),  # type: ignore[arg-type]
    (lambda: InferenceRules(nms_threshold=0.0), "nms_threshold must be a finite number above 0 and at most 1, got 0.0"),
    (lambda: InferenceRules(max_side=31), "max_side must be a whole number from 32 on, got 31"),
]


@pytest.mark.parametrize(("make", "fault"), OUTSIDE)
def test_a_number_outside_its_limits_is_refused(make: Callable[[], Any], fault: str) -> None:
    with pytest.raises(ValueError, match=f"^{fault}$"):
        make()


@pytest.mark.parametrize(("choose", "fault"), UNKNOWN)
def test_an_unknown_name_is_refused(choose: Callable[[Any], Any], fault: str) -> None:
    for name in ("maskrcnn", "resnet102", "", None):
        with pytest.raises(ValueError, match=f"{fault}.*, got {name!r}"):
            choose(name)
