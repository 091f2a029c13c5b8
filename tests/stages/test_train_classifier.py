"""Training the classifier: from image-level labels alone, the same whatever interrupts it or shares it."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from weaksam import pipeline
from weaksam.core import schemas, storage, tables
from weaksam.core.config import StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError, DataError, StageError
from weaksam.models.classifiers import weaktr_weights
from weaksam.models.classifiers.weaktr import WeakTrSize
from weaksam.stages import train_classifier
from weaksam.stages.train_classifier import TrainClassifierConfig, train_settings
from weaksam.training.classifier_task import ClassifierTask, LabelledImages, Recipe
from weaksam.training.log import progress_line
from weaksam.training.loop import TrainResources, TrainSettings, check_workers, share_of
from weaksam.training.state import TrainState, draw_batch

POOL = ThreadPoolExecutor(2)
RECIPE = Recipe(image_size=32, min_scale=0.5, rand_augment=0.0, erase=0.0, drop_path=0.0)
TINY = WeakTrSize(dim=32, depth=2, heads=2, patch=8, grid=4)


@pytest.fixture
def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weaktr_weights, "size_of", lambda backbone: TINY)


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    """Class 0 is a red square somewhere, class 1 a blue one; 24 grey noise images hold either or both."""
    rng, uris, labels = np.random.default_rng(0), [], []
    for i in range(24):
        pixels = rng.integers(100, 150, (40, 48, 3))
        present = [i % 3 != 1, i % 3 != 0]
        for c in np.flatnonzero(present):
            y, x = rng.integers(0, 24, 2)
            pixels[y : y + 14, x : x + 14] = [[220, 30, 30], [30, 30, 220]][c]
        path = tmp_path / f"{i}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        uris.append(str(path))
        labels.append(present)
    return LabelledImages(uris, np.array(labels))


def make_task(images: LabelledImages, **changes: object) -> ClassifierTask:
    task = ClassifierTask("tiny", False, None, None, False, images, images, RECIPE)
    return dataclasses.replace(task, **changes)


def settings(**changes: object) -> TrainSettings:
    return TrainSettings(**{"steps": 12, "batch_size": 8, "lr": 3e-3, "warmup": 2, "weight_decay": 0.01} | changes)


def train(task: ClassifierTask, settings: TrainSettings, until: int, trainee: TrainState | None = None) -> TrainState:
    trainee = trainee or TrainState(task, settings, torch.device("cpu"))
    parts = share_of(settings, 0)
    while trainee.step < until:
        drawn = draw_batch(settings.seed, trainee.step, batch_size=settings.batch_size, num_samples=task.num_samples)
        indices, seeds = drawn
        trainee.take_step(iter([task.load_batch(indices[part], seeds[part], POOL) for part in parts]), len(parts))
    return trainee


@pytest.mark.usefixtures("tiny_backbone")
def test_it_learns_what_is_in_the_images(images: LabelledImages) -> None:
    task = make_task(images)
    before = task.validate(task.build_model().eval(), POOL)
    after = train(task, settings(steps=60), 60).validate(task, POOL)
    assert after["held_out_loss"] < 0.5 * before["held_out_loss"]
    assert after["held_out_mAP"] > 0.95


@pytest.mark.usefixtures("tiny_backbone")
def test_a_batch_is_a_pure_function_of_its_seeds(images: LabelledImages) -> None:
    task = make_task(images, recipe=dataclasses.replace(RECIPE, rand_augment=9.0, erase=0.5, drop_path=0.3))
    indices, seeds = draw_batch(0, 3, batch_size=8, num_samples=24)
    whole = task.load_batch(indices, seeds, POOL)
    halves = [task.load_batch(indices[part], seeds[part], POOL) for part in (slice(0, 3), slice(3, 8))]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([half[key] for half in halves])), key
    assert set(whole) == {"image", "labels", "weight", "keep", "left_out"}
    assert 0 < (whole["keep"][:, 1] == 0).float().mean() < 1
    assert (whole["keep"][:, 0] == 1).all()  # the first layer never drops


@pytest.mark.usefixtures("tiny_backbone")
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_shares_of_a_batch_add_up_to_the_whole(images: LabelledImages, drop_path: float) -> None:
    task = make_task(images, recipe=dataclasses.replace(RECIPE, drop_path=drop_path))
    whole = train(task, settings(), 4)
    parts = train(task, settings(resources=TrainResources(micro_batch_size=3)), 4)
    for key, value in whole.weights().items():
        torch.testing.assert_close(parts.weights()[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("tiny_backbone")
def test_a_restored_training_ends_like_an_unbroken_one(images: LabelledImages, tmp_path: Path) -> None:
    task = make_task(images, gated=True)
    unbroken = train(task, settings(ema=0.9), 8)
    train(task, settings(ema=0.9), 3).save(str(tmp_path))
    restored = TrainState(task, settings(ema=0.9), torch.device("cpu"))
    restored.restore(str(tmp_path))
    train(task, settings(ema=0.9), 8, restored)
    assert all(torch.equal(value, unbroken.weights()[key]) for key, value in restored.weights().items())


@pytest.mark.usefixtures("tiny_backbone")
def test_a_broken_and_a_missing_image_count_for_nothing(images: LabelledImages) -> None:
    Path(images.uris[0]).write_bytes(b"junk")
    Path(images.uris[1]).unlink()
    task = make_task(images)
    batch = task.load_batch(np.arange(4), np.zeros((4, 3), np.int64), POOL)
    assert batch["weight"].tolist() == [0, 0, 1, 1]
    assert batch["left_out"].tolist() == [2, 1, 0, 0]  # unreadable, not_found
    model = task.build_model()
    total, _ = task.loss(model, batch)
    rest, _ = task.loss(model, {key: value[2:] for key, value in batch.items()})
    torch.testing.assert_close(total, rest)
    assert sum(len(rows) for _, rows in task._held_out_batches(POOL)) == 22
    for uri in task.held_out.uris:
        Path(uri).unlink(missing_ok=True)
    with pytest.raises(StageError, match="none of the 24 held-out images can be read"):
        task.validate(model.eval(), POOL)


def test_weights_of_vectors_tokens_and_positions_are_not_decayed(images: LabelledImages) -> None:
    task = make_task(images, backbone="frozen_sam")
    optimizer = task.build_optimizer(task.build_model(), lr=1e-3, weight_decay=0.5)
    decayed, others = ({p.ndim for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert 1 not in decayed
    assert others == {1, 3}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_that_is_learnt_has_one_place_in_the_optimizer(images: LabelledImages, optimizer: str) -> None:
    task = make_task(images, backbone="frozen_sam", optimizer=optimizer)
    model = task.build_model()
    groups = task.build_optimizer(model, lr=1e-3, weight_decay=0.5).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(p.ndim == 2 for p in groups[0]["params"]) or optimizer == "adamw"


def test_epochs_become_steps() -> None:
    config = TrainClassifierConfig(images="images", split="train", epochs=3, batch_size=4, warmup_epochs=0.5)
    found = train_settings(config, 10)
    assert (found.steps, found.warmup, found.log_every, found.validate_every) == (8, 1, 3, 15)
    assert found.validates_at(8)
    assert train_settings(config, 2).batch_size == 2


def index_step(folder: Path, rows: list[dict]) -> Step:
    stage = Stage("index", 1, StageConfig, lambda step: Outcome(0), writes="images")
    step = Step("images", stage, StageConfig(), {}, {}, "f", str(folder / "images-f"))
    schema = schemas.with_metadata(schemas.IMAGES, fingerprint="f", class_names=["red", "blue"])
    part = tables.write_part(step.folder, schemas.to_table(rows, schema))
    storage.write_json(step.manifest_uri, {"parts": [part], "excluded": {}})
    return step


def classifier_step(folder: Path, images: Step, **changes: object) -> Step:
    config = TrainClassifierConfig(
        **{"images": "images", "split": "train", "backbone": "frozen_sam", "image_size": 64} | changes
    )
    return Step("classifier", train_classifier.STAGE, config, {"images": images}, {}, "c", str(folder / "classifier-c"))


def rows_of(images: LabelledImages, split: str = "train") -> list[dict]:
    return [
        {"image_id": f"{i:02d}", "uri": uri, "split": split, "labels": np.flatnonzero(labels).tolist()}
        for i, (uri, labels) in enumerate(zip(images.uris, images.labels, strict=True))
    ]


def test_held_out_images_are_the_same_ones_each_time_and_never_of_another_split(
    images: LabelledImages, tmp_path: Path
) -> None:
    rows = rows_of(images)
    for row in rows[20:]:
        row["split"] = "test"
    rows[3]["labels"] = None  # nobody knows what it holds
    index = index_step(tmp_path, rows)
    train, held_out = train_classifier._split(classifier_step(tmp_path, index, held_out=0.25))
    assert (len(train.uris), len(held_out.uris)) == (15, 4)
    assert {*train.uris, *held_out.uris} == set(images.uris[:20]) - {images.uris[3]}
    assert train.labels.sum() > 0
    again = train_classifier._split(classifier_step(tmp_path, index, held_out=0.25, seed=5))
    assert again[1].uris == held_out.uris


def test_a_split_without_labels_is_refused(images: LabelledImages, tmp_path: Path) -> None:
    index = index_step(tmp_path, [{**row, "labels": None} for row in rows_of(images)])
    with pytest.raises(DataError, match=r"steps.classifier.split: no image of split 'train' has image-level labels"):
        train_classifier._split(classifier_step(tmp_path, index))
    with pytest.raises(ConfigError, match=r"no image has split 'val'"):
        train_classifier._split(classifier_step(tmp_path, index, split="val"))


def test_no_epochs_take_the_weights_as_they_are(images: LabelledImages, tmp_path: Path) -> None:
    index = index_step(tmp_path, rows_of(images))
    theirs = weaktr_weights.build_weaktr("frozen_sam", 2)
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    step = classifier_step(tmp_path, index, epochs=0, weights=str(tmp_path / "published.pth"), held_out=0.3)
    outcome = train_classifier.run(step)
    assert outcome.rows == 24
    assert outcome.summary.startswith("held-out mAP")
    kept = load_file(Path(step.folder) / "checkpoint" / "model.safetensors")
    assert all(torch.equal(value, kept[key]) for key, value in theirs.state_dict().items())
    with pytest.raises(DataError, match="epochs is 0 and there are no weights"):
        train_classifier.run(classifier_step(tmp_path / "other", index, epochs=0, pretrained=False))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_trains_on_two_workers_reports_and_is_not_repeated(images: LabelledImages, tmp_path: Path) -> None:
    index = index_step(tmp_path, rows_of(images))
    step = classifier_step(
        tmp_path, index, epochs=2, batch_size=8, held_out=0.2, resources=TrainResources(workers=2), precision="fp32"
    )
    outcome = train_classifier.run(step)
    assert outcome.rows == 24
    assert "held-out mAP" in outcome.summary
    rows = [json.loads(line) for line in (Path(step.folder) / "training_log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 5
    assert {"loss", "cls_loss", "patch_loss", "held_out_loss", "held_out_mAP", "lr"} <= set(rows[-1])
    told = storage.read_json(f"{step.folder}/progress.json")
    assert [told[key] for key in ("stage", "state", "done", "total", "unit", "loss")] == [
        *("train_classifier", "finished", 5, 5, "steps", rows[-1]["loss"])
    ]
    weights = Path(step.folder) / "checkpoint" / "model.safetensors"
    weaktr_weights.load_trained(weights, "frozen_sam", 2)
    written = weights.stat().st_mtime_ns
    train_classifier.run(step)
    assert weights.stat().st_mtime_ns == written


def test_workers_that_never_fit_are_refused_at_once() -> None:
    resources = TrainResources(workers=3, cpus_per_worker=2)
    check_workers(resources, [{"CPU": 4.0}, {"CPU": 3.0}])
    with pytest.raises(ConfigError, match=r"3 worker\(s\) of 2 CPU and 0 GPU do not fit, the cluster has room for 2"):
        check_workers(resources, [{"CPU": 4.0}, {"CPU": 1.0}])
    with pytest.raises(ConfigError, match="room for 1"):
        check_workers(TrainResources(workers=2, gpus_per_worker=1), [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}])


def test_the_progress_line_says_how_long() -> None:
    row = {"step": 6, "loss": 0.51234, "lr": 0.001, "images_per_second": 4.0}
    assert progress_line(row, settings()) == "step 6/12  loss 0.512  lr 0.001  4 images/s  eta 12 s"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"weights": "a.pth"}, "weights are for networks of timm: efficientnet_lite0 has weights of its own"),
        ({"gated": True}, "gated and fine_of are for ViTs: efficientnet_lite0 has no attention"),
    ],
)
def test_what_efficientnet_cannot_take_is_refused(settings: dict, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        TrainClassifierConfig.model_validate({"images": "i", "split": "s", "backbone": "efficientnet_lite0"} | settings)


def test_features_of_pictures_that_nothing_varies_are_remembered() -> None:
    base = {"images": "i", "split": "s", "backbone": "efficientnet_lite0"}
    plain = base | {"min_scale": 1.0, "rand_augment": 0.0, "erase": 0.0}
    assert TrainClassifierConfig.model_validate(plain).course(10).views == 2
    for varied in ({"min_scale": 0.5}, {"rand_augment": 9.0}, {"erase": 0.25}, {"backbone": "frozen_sam"}):
        assert TrainClassifierConfig.model_validate(plain | varied).course(10).views is None


def test_a_run_file_knows_the_stage(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: somewhere\nsteps:\n  images: {stage: index, format: folder, root: here}\n"
        "  classifier: {stage: train_classifier, images: images, split: train, lr: 0}\n"
        "  proposals: {stage: proposals, images: images, classifier: images, sam: {model: vit_xs}}\n"
    )
    with pytest.raises(ConfigError) as error:
        pipeline.parse(str(path))
    assert sorted(error.value.faults) == [
        "steps.classifier.lr: input should be greater than 0, got 0",
        "steps.proposals.classifier: needs a step that writes classifier, 'images' writes images",
    ]
