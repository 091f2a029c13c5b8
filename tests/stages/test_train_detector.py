"""Training a detector on pseudo ground truth as a stage: what is learnt from, recipes, faults, resume of the loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import resnet50

from tests.stages.detector_steps import MODELS, POOL, make_inputs, make_step
from tests.stages.test_train_wsod import finished
from weaksam.core import schemas
from weaksam.core.step import Step
from weaksam.errors import ConfigError, DataError, WeightsError
from weaksam.models.detectors.build import build_to_train, build_untrained, load_detector
from weaksam.models.detectors.catalogue import kind_of
from weaksam.models.detectors.catalogue.kind import DetectorSpec
from weaksam.ops.roi_drop import RoiDropRules
from weaksam.stages import detect, train_detector
from weaksam.stages.detect import DetectConfig
from weaksam.stages.train_detector import TrainDetectorConfig, make_task, read_objects
from weaksam.stages.training_run import loop_settings
from weaksam.training.loop import TrainResources
from weaksam.training.state import TrainState, draw_batch


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    return make_inputs(tmp_path)


def test_images_with_boxes_are_learnt_from(tmp_path: Path, inputs: dict[str, Step]) -> None:
    uris, objects, classes = read_objects(make_step(tmp_path, inputs))
    assert [Path(uri).stem for uri in uris] == ["0", "1", "3", "5"]
    assert [len(boxes) for boxes in objects.boxes] == [2] * 4
    assert objects.classes[0].tolist() == [0, 1]
    assert classes == 2
    kept, objects, _ = read_objects(make_step(tmp_path, inputs, keep_empty=True))
    assert [Path(uri).stem for uri in kept] == ["0", "1", "2", "3", "5"]
    assert objects.boxes[2].shape == (0, 4)


def test_boxes_without_area_and_unknown_classes_are_not_learnt_from(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    rows = inputs["pgt"].read().to_pylist()
    rows[0]["boxes"][0] = [9, 9, 9, 20]
    rows[1]["boxes"] = [[9, 9, float("nan"), 20], [20, 9, 9, 20]]
    spoilt = finished(tmp_path, "spoilt", rows, schemas.DETECTIONS, {"images": inputs["images"]})
    step = make_step(tmp_path, {**inputs, "pgt": spoilt}, model="mask_rcnn")
    uris, objects, _ = read_objects(step)
    assert [Path(uri).stem for uri in uris] == ["0", "3", "5"]
    assert [len(boxes) for boxes in objects.boxes] == [1, 2, 2]
    assert objects.masks is not None
    assert objects.masks[0] == [rows[0]["masks"][1]]
    assert objects.classes[0].tolist() == [1]
    counted = "3 boxes have no area inside their image and are left out: image 0, image 1, image 1"
    assert caplog.messages == [f"steps.net: step spoilt: {counted}"]
    rows[3]["classes"] = [0, 2]
    spoilt = finished(tmp_path, "other", rows, schemas.DETECTIONS, {"images": inputs["images"]})
    with pytest.raises(DataError, match=r"steps.net.pgt: step other has boxes of classes that .* 1 images, e\.g\. 3"):
        read_objects(make_step(tmp_path, {**inputs, "pgt": spoilt}))


def test_a_target_that_cannot_be_learnt_from_names_its_image(tmp_path: Path, inputs: dict[str, Step]) -> None:
    task = make_task(make_step(tmp_path, inputs))
    task.objects.boxes[1][0] = [0, 0, 1e6, 9]  # of an image that was replaced by a smaller one, say
    batch = task.load_batch(np.array([0, 1]), np.array([[0, 0, 0], [0, 0, 1]]), POOL) | {"step": torch.tensor(0)}
    with pytest.raises(
        DataError, match=r"1\.png: row 0: box .* lies far beyond the image.*: this cannot be learnt from"
    ):
        task.loss(task.build_model(), batch)


def test_of_a_reviewed_image_without_boxes_is_learnt_that_nothing_is_there(
    tmp_path: Path, inputs: dict[str, Step]
) -> None:
    rows = [row | {"trusted": row["image_id"] == "2"} for row in inputs["pgt"].read().to_pylist()]
    reviewed = finished(tmp_path, "reviewed", rows, schemas.PGT, {"images": inputs["images"]})
    kept, objects, _ = read_objects(make_step(tmp_path, {**inputs, "pgt": reviewed}))
    assert [Path(uri).stem for uri in kept] == ["0", "1", "2", "3", "5"]
    assert objects.boxes[2].shape == (0, 4)


def test_a_small_faster_rcnn_learns_its_first_stage_first_and_at_a_rate_of_its_own(
    tmp_path: Path, inputs: dict[str, Step]
) -> None:
    task = make_task(make_step(tmp_path, inputs, steps=10, first_stage=0.3, optimizer="muon", backbone_lr=0.25))
    model = task.build_model()
    groups = task.build_optimizer(model, lr=4e-3, weight_decay=0.1).param_groups
    learnt = {id(p): (group["window"], group["lr"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted = ((3, None), 4e-3) if name.startswith("roi_heads.") else ((0, 3), 1e-3)
            assert learnt.pop(id(parameter)) == wanted, name
    assert not learnt


def test_masks_are_learnt_from_steps_that_have_some(tmp_path: Path, inputs: dict[str, Step]) -> None:
    rows = [{"image_id": "0", "status": "ok", "boxes": [[1, 1, 9, 9]], "classes": [0], "scores": [1.0]}]
    bare = finished(tmp_path, "bare", rows, schemas.DETECTIONS, {"images": inputs["images"]})
    with pytest.raises(DataError, match=r"steps.net.pgt: step bare has no masks, which mask_rcnn learns from"):
        read_objects(make_step(tmp_path, inputs | {"pgt": bare}, model="mask_rcnn"))
    mask = {"masks": [None], "trusted": True}  # people drew the box alone
    reviewed = finished(tmp_path, "reviewed", [rows[0] | mask], schemas.PGT, {"images": inputs["images"]})
    with pytest.raises(DataError, match=r"step reviewed has no masks, which mask_rcnn learns from"):
        read_objects(make_step(tmp_path, inputs | {"pgt": reviewed}, model="mask_rcnn"))


@pytest.mark.parametrize("model", MODELS)
def test_training_that_goes_on_from_a_checkpoint_ends_with_the_same_weights(
    tmp_path: Path, inputs: dict[str, Step], model: str
) -> None:
    step = make_step(tmp_path, inputs, model=model, roi_drop=RoiDropRules())
    task, settings = make_task(step), loop_settings(step.config)

    def batches(first: int) -> Any:
        for number in range(first, settings.steps):
            yield task.load_batch(*draw_batch(0, number, batch_size=2, num_samples=task.num_samples), POOL)

    def go_on(trainee: TrainState, until: int) -> None:
        source = batches(trainee.step)
        while trainee.step < until:
            trainee.take_step(source, 1)

    whole = TrainState(task, settings, torch.device("cpu"))
    go_on(whole, 4)
    first = TrainState(task, settings, torch.device("cpu"))
    go_on(first, 2)
    first.save(str(tmp_path))
    second = TrainState(task, settings, torch.device("cpu"))
    second.restore(str(tmp_path))
    go_on(second, 4)
    for key, value in whole.weights().items():
        assert torch.equal(value, second.weights()[key]), key
    assert any(not torch.equal(value, first.weights()[key]) for key, value in whole.weights().items())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_step_trains_and_tells_how_many_regions_it_dropped(tmp_path: Path, inputs: dict[str, Step]) -> None:
    drop = RoiDropRules("cls", cls_threshold=0.01, start=2)
    step = make_step(tmp_path, inputs, roi_drop=drop, resources=TrainResources(workers=2).model_dump())
    assert train_detector.run(step).rows == 4
    rows = [json.loads(line) for line in (Path(step.folder) / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["dropped_cls"] == 0 < rows[1]["dropped_cls"]
    assert load_file(Path(step.folder) / "checkpoint" / "model.safetensors")


def test_pseudo_ground_truth_of_other_images_or_without_boxes_is_refused(
    tmp_path: Path, inputs: dict[str, Step]
) -> None:
    others = Step("others", inputs["images"].stage, inputs["images"].config, {}, {}, "g", inputs["images"].folder)
    with pytest.raises(DataError, match=r"steps.net: step pgt was made from the images of images, not of others"):
        read_objects(make_step(tmp_path, inputs | {"images": others}))
    nothing = [{"image_id": "0", "status": "ok", "boxes": [], "classes": [], "scores": []}]
    empty = finished(tmp_path, "empty", nothing, schemas.DETECTIONS, {"images": inputs["images"]})
    with pytest.raises(DataError, match="step empty holds no box to learn from"):
        read_objects(make_step(tmp_path, inputs | {"pgt": empty}))


def test_published_recipes_are_the_defaults_of_each_model() -> None:
    base = {"images": "i", "pgt": "p"}
    config = TrainDetectorConfig.model_validate(base)
    assert (config.optimizer, config.lr, config.steps, config.milestones) == ("sgd", 0.02, 9000, [6000, 8000])
    assert (config.box_loss, config.frozen_stages, config.max_side) == ("l1", 1, 2000)
    assert (config.scales[0], config.scales[-1], len(config.scales)) == (480, 1216, 24)
    dino = TrainDetectorConfig.model_validate(base | {"model": "dino"})
    assert (dino.optimizer, dino.lr, dino.backbone_lr, dino.clip) == ("adamw", 9e-5, 0.1, 0.1)
    assert TrainDetectorConfig.model_validate(base | {"model": "dino", "lr": 1e-4}).lr == 1e-4
    masked = TrainDetectorConfig.model_validate(base | {"model": "mask_rcnn"})
    assert (masked.optimizer, masked.lr, masked.scales[-1], masked.max_side) == ("sgd", 0.02, 800, 1333)
    former = TrainDetectorConfig.model_validate(base | {"model": "mask2former"})
    assert (former.square, former.jitter, former.clip, former.weight_decay) == (1024, [0.1, 2.0], 0.01, 0.05)
    rules = DetectConfig(images="i", detector="d").rules(kind_of("dino").inference)
    assert (rules.scales, rules.flip, rules.max_detections) == ((800,), False, 300)
    assert DetectConfig(images="i", detector="d", scales=[64]).rules(kind_of("faster_rcnn").inference).scales == (64,)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"backbone": "frozen_sam", "weights": "x"}, "weights are for resnet50"),
        ({"optimizer": "muon"}, "optimizer muon is for backbone frozen_sam: resnet50 has"),
        ({"backbone": "efficientnet_lite0", "optimizer": "muon"}, "backbone frozen_sam: efficientnet_lite0 has"),
        (
            {"backbone": "efficientnet_lite0", "weights": "x"},
            "resnet50 and networks of timm: efficientnet_lite0 has",
        ),
        (
            {"backbone": "efficientnet_lite0", "model": "dino"},
            "backbone efficientnet_lite0 is not for dino: it has resnet50 and frozen_sam",
        ),
        (
            {"model": "rt_detr_v2", "roi_drop": RoiDropRules("and")},
            "roi_drop is for faster_rcnn, dino and mask_rcnn: rt_detr_v2 has",
        ),
        ({"jitter": [2.0, 0.1]}, "jitter must be two factors above 0"),
        ({"start": "d", "weights": "x"}, "weights would be ignored"),
        ({"backbone": "frozen_sam", "first_stage": 0.0}, "first_stage must be above 0 where no step to start from"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        TrainDetectorConfig.model_validate({"images": "i", "pgt": "p"} | settings)


def test_weights_of_imagenet_are_taken_by_uri(tmp_path: Path) -> None:
    path, theirs = tmp_path / "resnet.pth", resnet50(weights=None).state_dict()
    torch.save(theirs, path)
    net = build_to_train(DetectorSpec("faster_rcnn", "resnet50", 2, weights=str(path)))
    assert torch.equal(net.state_dict()["backbone.body.layer3.2.conv2.weight"], theirs["layer3.2.conv2.weight"])
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"conv1", "layer1"}
    del theirs["layer3.2.conv2.weight"]
    torch.save(theirs, path)
    with pytest.raises(WeightsError, match=r"resnet.pth: has no layer3.2.conv2.weight"):
        build_to_train(DetectorSpec("dino", "resnet50", 2, weights=str(path)))


def test_mask_rcnn_starts_from_a_faster_rcnn_and_leaves_its_first_stage_as_it_is(
    tmp_path: Path, inputs: dict[str, Step]
) -> None:
    boxes = replace(make_step(tmp_path, inputs), name="boxes", folder=str(tmp_path / "boxes"))
    torch.manual_seed(1)
    given = {key: value.contiguous() for key, value in build_to_train(boxes.config.spec(2)).state_dict().items()}
    path = tmp_path / "boxes" / "checkpoint" / "model.safetensors"
    path.parent.mkdir(parents=True)
    save_file(given, path)
    step = make_step(tmp_path, inputs | {"start": boxes}, model="mask_rcnn", start="boxes", first_stage=0.0)
    task = make_task(step)
    trainee = TrainState(task, loop_settings(step.config), torch.device("cpu"))
    assert all(torch.equal(trainee.weights()[key], value) for key, value in given.items())
    draws = (draw_batch(0, number, batch_size=2, num_samples=task.num_samples) for number in range(2))
    source = iter([task.load_batch(*draw, POOL) for draw in draws])
    trainee.take_step(source, 1)
    trainee.take_step(source, 1)
    moved = {key for key, value in given.items() if not torch.equal(trainee.weights()[key], value)}
    assert moved
    assert {key.partition(".")[0] for key in moved} == {"roi_heads"}

    given["rpn.head.conv.0.0.weight"] = torch.zeros(3)
    save_file(given, path)
    with pytest.raises(WeightsError, match=r"model.safetensors: rpn.head.conv.0.0.weight \(3,\) is no weight of this"):
        task.build_model()
    dino = replace(boxes, config=make_step(tmp_path, inputs, model="dino").config)
    with pytest.raises(
        ConfigError, match=r"step boxes trained dino on frozen_sam: name one that trained faster_rcnn or mask"
    ):
        make_task(replace(step, inputs=inputs | {"start": dino}))
    image = {"image_id": "0", "uri": "0.png", "split": "train", "labels": [0]}
    others = finished(tmp_path, "others", [image], schemas.IMAGES, {}, names=("green",))
    unlike = replace(boxes, inputs={"images": others})
    with pytest.raises(ConfigError, match=r"steps.net.start: step boxes knows the classes green, ..., the images"):
        make_task(replace(step, inputs=inputs | {"start": unlike}))


def test_the_published_mask_rcnn_holds_all_of_faster_rcnn() -> None:
    given = build_untrained(DetectorSpec("faster_rcnn", "resnet50", 2)).state_dict()
    network = build_untrained(DetectorSpec("mask_rcnn", "resnet50", 2))
    load_detector(network, given, where="here")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in given.items())


def test_the_stages_read_what_the_others_write() -> None:
    reads = {"images": ("images",), "proposals": ("proposals",), "detector": ("wsod", "detector")}
    assert detect.STAGE.reads == reads
    assert train_detector.STAGE.reads == {"images": ("images",), "pgt": ("pgt",), "start": ("detector",)}
