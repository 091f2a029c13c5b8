"""Training and using a weakly supervised detector as stages: two workers equal one, faults are named."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import vgg16

from weaksam.core import schemas, storage, tables
from weaksam.core.config import StageConfig, parse_settings
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError, DataError, WeightsError
from weaksam.execution.mapping import map_batch
from weaksam.execution.rows import Fetch
from weaksam.models.detectors.rules import InferenceRules
from weaksam.models.wsod.build import WsodSpec
from weaksam.models.wsod.network import METHODS
from weaksam.stages import detect, train_wsod
from weaksam.stages.detect import DetectConfig, DetectObjects, WsodFinder
from weaksam.stages.train_wsod import TrainWsodConfig, make_task
from weaksam.stages.training_run import loop_settings
from weaksam.training.loop import TrainResources


def finished(
    folder: Path,
    name: str,
    rows: list[dict],
    schema: object,
    inputs: dict[str, Step],
    names: tuple[str, ...] = ("red", "blue"),
) -> Step:
    stage = Stage(name, 1, StageConfig, lambda step: Outcome(0), writes=name)
    step = Step(name, stage, StageConfig(), inputs, {}, "f", str(folder / name))
    table = schemas.to_table(rows, schemas.with_metadata(schema, fingerprint="f", class_names=names))
    storage.write_json(step.manifest_uri, {"parts": [tables.write_part(step.folder, table)], "excluded": {}})
    return step


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    """Nine images of noise with a few boxes each; one has none, one could not be read by SAM."""
    rng, images, proposals = np.random.default_rng(0), [], []
    for i in range(9):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)).save(path)
        images.append({"image_id": str(i), "uri": str(path), "split": "train", "labels": [i % 2]})
        corners = rng.integers(0, 20, (6, 2))
        boxes = np.concatenate([corners, corners + rng.integers(8, 20, (6, 2))], 1).astype(np.float32)
        boxes = boxes if i else boxes[:0]
        row = {"image_id": str(i), "status": "ok", "boxes": boxes, "height": 40, "width": 48}
        row |= {"predicted_iou": np.full(len(boxes), 0.5, np.float32)}
        proposals.append(row if i != 4 else {"image_id": "4", "status": "oom"})
    index = finished(tmp_path, "images", images, schemas.IMAGES, {})
    return {"images": index, "proposals": finished(tmp_path, "proposals", proposals, schemas.PROPOSALS, {})}


def make_step(folder: Path, inputs: dict[str, Step], **changes: object) -> Step:
    settings = {"images": "images", "proposals": "proposals", "split": "train", "backbone": "frozen_sam", "min_side": 4}
    settings |= {"scales": [40, 56], "steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 1, "log_every": 2}
    config = TrainWsodConfig(**settings | changes)
    return Step("mist", train_wsod.STAGE, config, inputs, {}, "m", str(folder / "mist-m"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("dropblock", ["off", "two_pass"])
def test_two_workers_learn_what_one_learns(tmp_path: Path, inputs: dict[str, Step], dropblock: str) -> None:
    weights = []
    for workers, micro_batch_size in ((1, None), (2, 1)):
        resources = TrainResources(workers=workers, micro_batch_size=micro_batch_size)
        step = make_step(tmp_path / str(workers), inputs, dropblock=dropblock, resources=resources, optimizer="sgd")
        outcome = train_wsod.run(step)
        assert outcome.rows == 9
        weights.append(load_file(Path(step.folder) / "checkpoint" / "model.safetensors"))
        rows = [json.loads(line) for line in (Path(step.folder) / "training_log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        assert {"loss", "image_loss", "refine_loss", "box_loss"} <= set(rows[0])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_images_without_proposals_are_asked_for(tmp_path: Path, inputs: dict[str, Step]) -> None:
    some = [{"image_id": "0", "status": "ok", "boxes": [], "height": 40, "width": 48}]
    fewer = inputs | {"proposals": finished(tmp_path, "fewer", some, schemas.PROPOSALS, {})}
    with pytest.raises(DataError, match=r"steps.mist.proposals: step fewer has no row for 8 of 9 images, e\.g\. 1"):
        make_task(make_step(tmp_path, fewer))


def test_proposals_that_min_side_leaves_none_of_are_an_error_and_a_few_a_warning(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    draw = (np.array([1]), np.array([[0, 0, 1]]), ThreadPoolExecutor(1))
    with pytest.raises(ConfigError, match="min_side: no proposal of any of the 9 images has sides of 50 pixels"):
        make_task(make_step(tmp_path, inputs, min_side=50)).load_batch(*draw)
    none = [row | {"boxes": []} for row in inputs["proposals"].read().to_pylist()]
    nothing = inputs | {"proposals": finished(tmp_path, "none", none, schemas.PROPOSALS, {})}
    with pytest.raises(
        ConfigError, match="pixels or more: there is none at all: lower the thresholds of their step, or"
    ):
        make_task(make_step(tmp_path, nothing)).load_batch(*draw)
    task = make_task(make_step(tmp_path, inputs))
    assert task.load_batch(*draw)["weight"].tolist() == [1]
    Path(task.uris[2]).unlink()
    gone = task.load_batch(np.array([2]), *draw[1:])
    assert (gone["weight"].item(), schemas.FAILED_STATUSES[gone["left_out"].item() - 1]) == (0, "not_found")
    assert task.load_batch(np.array([0]), *draw[1:])["left_out"].tolist() == [0]  # nothing was read: it has no proposal
    assert caplog.messages == [
        f"warning: 2 of 9 images are not learnt from, e.g. {task.uris[0]}: "
        "no proposal with sides of 4 pixels (min_side)"
    ]


def test_labels_that_teach_nothing_are_refused_or_give_a_warning(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    rows = inputs["images"].read().to_pylist()
    single = finished(tmp_path, "single", [row | {"labels": [0]} for row in rows], schemas.IMAGES, {}, ("red",))
    step = make_step(tmp_path, inputs | {"images": single}, method="oicr")
    with pytest.raises(ConfigError, match=r"steps.mist.method: oicr learns nothing from a single class"):
        make_task(step)
    with pytest.raises(ValueError, match="the softmax over a single column is 1 whatever is learnt"):
        WsodSpec("frozen_sam", 1, METHODS["oicr"]).untrained()
    WsodSpec("frozen_sam", 1, METHODS["mist"]).untrained()
    everywhere = finished(
        tmp_path, "all", [row | {"labels": [0, *row["labels"][:1]]} for row in rows], schemas.IMAGES, {}
    )
    step = make_step(tmp_path, inputs | {"images": everywhere})
    text = "steps.mist.images: class 'red' is in 9 of 9 images: no image teaches where it is not"
    assert [one[: len(text)] for one in train_wsod.STAGE.warnings(step)] == [text]
    make_task(step)
    assert [one[: len(text) + 9] for one in caplog.messages] == [f"warning: {text}"]
    assert train_wsod.STAGE.warnings(make_step(tmp_path, inputs)) == []


def test_the_published_schedule_is_the_default() -> None:
    config = TrainWsodConfig(images="images", proposals="proposals", split="trainval")
    settings = loop_settings(config)
    assert (settings.steps, settings.batch_size, settings.lr) == (30_000, 8, 1e-5)
    assert (settings.milestones, settings.warmup_from) == ([20_000, 26_700], pytest.approx(1 / 3))
    assert config.spec(20).rules == METHODS["mist"]
    assert config.model_copy(update={"method": "oicr", "mining": "top"}).spec(20).rules.mining == "top"


def test_the_box_layer_for_all_classes_is_oicrs() -> None:
    given = {"images": "i", "proposals": "p", "split": "s", "shared_boxes": True}
    assert TrainWsodConfig(**given, method="oicr").spec(20).rules.shared_boxes
    with pytest.raises(ValueError, match="shared_boxes is for method oicr"):
        TrainWsodConfig(**given)


def test_starting_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    spec = WsodSpec("vgg16", 3, METHODS["oicr"], weights=str(path))
    with pytest.raises(
        WeightsError, match=r"vgg.pth: has nothing for \d+ weights of the backbone, e\.g\. body.features"
    ):
        spec.with_starting_weights()
    path.write_bytes(b"junk")
    with pytest.raises(WeightsError, match=r"vgg\.pth"):
        spec.with_starting_weights()
    theirs = vgg16(weights=None).state_dict()
    torch.save(theirs, path)
    network = spec.with_starting_weights()
    torch.testing.assert_close(network.roi_net.state_dict()["body.features.28.weight"], theirs["features.28.weight"])
    with pytest.raises(ValueError, match="weights are for vgg16, resnet50 and networks of timm"):
        TrainWsodConfig(images="i", proposals="p", split="s", backbone="frozen_sam", weights="x")


def test_what_frozen_features_stand_on_is_part_of_the_fingerprint() -> None:
    base = {"images": "i", "proposals": "p", "split": "s"}
    shipped = {
        "frozen_sam": {"sam.vit_xs"},
        "efficientnet_lite0": {"efficientnet_lite0"},
        "efficientnet_lite0+frozen_sam": {"sam.vit_xs", "efficientnet_lite0"},
    }
    for backbone, names in shipped.items():
        config = TrainWsodConfig.model_validate(base | {"backbone": backbone, "crop": 96})
        assert set(train_wsod.STAGE.outside(config)) == names
        assert config.course(10).views == 2 * len(config.scales)
    for other in ({"backbone": "frozen_sam", "pretrained": False}, {"backbone": "vgg16"}):
        assert train_wsod.STAGE.outside(TrainWsodConfig(**base, **other)) == {}


def test_every_source_of_proposals_can_be_chosen() -> None:
    base = {"images": "i", "proposals": "p", "split": "s"}
    assert TrainWsodConfig(**base).source_indices is None
    assert TrainWsodConfig(**base, sources=list(schemas.SOURCES)).source_indices == [0, 1, 2, 3]
    assert TrainWsodConfig(**base, sources=["cross", "grid"]).source_indices == [3, 0]
    with pytest.raises(ValueError, match="sources"):
        TrainWsodConfig(**base, sources=["peaks"])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"backbone": "resnet50"}, "optimizer muon is for frozen features"),
        ({"backbone": "frozen_sam", "refine_lr": 10.0}, "optimizer muon has one lr for all"),
    ],
)
def test_muon_is_refused_where_it_would_be_ignored(settings: dict, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        TrainWsodConfig(images="i", proposals="p", split="s", optimizer="muon", **settings)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"crop": 80}, "crop must be a multiple of 32 for efficientnet_lite0, got 80"),
        (
            {"weights": "a.pth"},
            "vgg16, resnet50 and networks of timm: efficientnet_lite0 has weights of its own",
        ),
    ],
)
def test_what_efficientnet_cannot_take_is_refused(settings: dict, fault: str) -> None:
    base = {"images": "i", "proposals": "p", "split": "s", "backbone": "efficientnet_lite0", "crop": 96}
    TrainWsodConfig.model_validate(base | {"optimizer": "muon"})
    with pytest.raises(ValueError, match=fault):
        TrainWsodConfig.model_validate(base | settings)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"batch_size": 1, "resources": {"workers": 2}}, "batch_size 1 leaves some of 2 workers without work"),
        ({"precision": "fp16"}, "precision fp16 needs gpus_per_worker"),
    ],
)
def test_what_workers_cannot_do_is_a_fault_of_the_run_file(settings: dict, fault: str) -> None:
    raw = {"images": "images", "proposals": "proposals", "split": "train", **settings}
    config, faults = parse_settings(TrainWsodConfig, raw, where="steps.mist")
    assert config is None
    assert len(faults) == 1
    assert fault in faults[0]


def detect_step(tmp_path: Path, inputs: dict[str, Step], **trained: object) -> Step:
    config = DetectConfig(images="images", proposals="proposals", detector="mist")
    given = inputs | {"detector": make_step(tmp_path, inputs, **trained)}
    return Step("found", detect.STAGE, config, given, {}, "d", str(tmp_path / "found-d"))


def test_an_image_whose_proposals_failed_fails_in_detection_too(
    tmp_path: Path, inputs: dict[str, Step], caplog: pytest.LogCaptureFixture
) -> None:
    source = inputs["images"].read(["uri"])
    fetched = Fetch()(detect.with_proposals(detect_step(tmp_path, inputs), source)).to_pylist()
    assert (fetched[4]["status"], fetched[4]["message"], fetched[4]["data"]) == ("oom", "step proposals: oom", None)
    assert {row["status"] for row in fetched if row["image_id"] != "4"} == {"ok"}
    assert [len(row["boxes"] or []) for row in fetched] == [0, 6, 6, 6, 0, 6, 6, 6, 6]
    assert caplog.messages == [
        "warning: steps.found.proposals: step proposals: 1 of 8 images have no proposal of the sources and of the "
        "min_side (4 pixels) that step mist was trained with, e.g. 0: nothing is found in them"
    ]


@pytest.mark.parametrize("trained", [{"min_side": 50}, {"sources": ["fine"]}])
def test_detection_without_any_box_to_look_at_is_an_error(
    tmp_path: Path, inputs: dict[str, Step], trained: dict[str, object]
) -> None:
    grid = [
        {**row, "source": np.zeros(len(row["boxes"] or []), np.uint8)} for row in inputs["proposals"].read().to_pylist()
    ]
    given = inputs | {"proposals": finished(tmp_path, "grid", grid, schemas.PROPOSALS, {})}
    step, source = detect_step(tmp_path, given, **trained), inputs["images"].read(["uri"])
    wanted = (
        r"steps\.found\.proposals: step grid: no proposal of any of the 8 images is of the sources and of the min_side"
    )
    with pytest.raises(ConfigError, match=wanted):
        detect.with_proposals(step, source)


def test_detections_come_from_every_readable_image(tmp_path: Path, inputs: dict[str, Step]) -> None:
    trained = make_step(tmp_path, inputs, dropblock="one_pass").config
    weights = tmp_path / "model.safetensors"
    from safetensors.torch import save_file

    save_file(trained.spec(2).untrained().state_dict(), weights)
    config = DetectConfig(images="i", proposals="p", detector="c", scales=[40, 56], max_detections=5)
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint="d", class_names=["red", "blue"])
    mapper = DetectObjects(config, WsodFinder(trained, 2, str(weights), config.rules(InferenceRules())))
    uris = inputs["images"].read(["uri"]).column("uri").to_pylist()
    boxes = inputs["proposals"].read(["boxes"]).column("boxes").to_pylist()
    rows = [
        {
            "image_id": str(i),
            "uri": uri,
            "boxes": boxes[i],
            "data": Path(uri).read_bytes(),
            "status": "ok",
            "message": "",
        }
        for i, uri in enumerate(uris)
    ]
    rows[2] |= {"data": b"junk"}
    rows[3] |= {"data": None, "status": "not_found", "message": "gone"}
    fields = [
        ("image_id", "string"),
        ("uri", "string"),
        ("data", "binary"),
        ("status", "string"),
        ("message", "string"),
    ]
    import pyarrow as pa

    batch = pa.table(
        {name: pa.array([row[name] for row in rows], kind) for name, kind in fields}
        | {"boxes": [r["boxes"] for r in rows]}
    )
    found = map_batch(mapper, batch, schema=schema, max_pixels=config.max_pixels)
    assert found.schema.equals(schema)
    by_id = {row["image_id"]: row for row in found.to_pylist()}
    assert [by_id[str(i)]["status"] for i in range(9)] == ["ok", "ok", "unreadable", "not_found"] + ["ok"] * 5
    assert [len(by_id[i]["boxes"]) for i in "04"] == [0, 0]
    for i in "15678":
        row = by_id[i]
        assert 0 < len(row["boxes"]) <= 5
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert np.array(row["boxes"]).min() >= 0
        assert set(row["classes"]) <= {0, 1}
