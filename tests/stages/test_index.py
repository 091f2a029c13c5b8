"""A dataset becomes the images table, and its ground truth lies apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import SHARED_DATA
from weaksam import pipeline, schemas, storage, tables
from weaksam.errors import ConfigError


@pytest.fixture
def index(tmp_path: Path) -> Callable[..., pipeline.Step]:
    def run(**settings: object) -> pipeline.Step:
        path = tmp_path / "run.yaml"
        content = {"run": str(tmp_path / "run"), "steps": {"images": {"stage": "index", **settings}}}
        path.write_text(yaml.safe_dump(content))
        steps = pipeline.load(str(path))
        pipeline.run_steps(steps)
        return steps[0]

    return run


def make_folder(folder: Path) -> None:
    folder.mkdir()
    for name, size in (("a.jpg", (20, 10)), ("b.png", (8, 6))):
        Image.new("RGB", size, "red").save(folder / name)
    (folder / "labels.csv").write_text("file,labels\na.jpg,dog;cat\nb.png,cat\n")


def test_a_labelled_folder_becomes_images_without_ground_truth(index: Callable, tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    step = index(format="folder", root=str(tmp_path / "data"))
    table = tables.read_step(step)
    assert table.schema.equals(schemas.IMAGES)
    assert schemas.class_names_of(table.schema) == ["cat", "dog"]
    assert table.column("image_id").to_pylist() == ["a.jpg", "b.png"]
    assert table.column("labels").to_pylist() == [[0, 1], [0]]
    assert tables.read_ground_truth(step.folder) is None


def test_a_changed_dataset_is_another_result(index: Callable, tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    first = index(format="folder", root=str(tmp_path / "data"))
    assert index(format="folder", root=str(tmp_path / "data")).folder == first.folder
    (tmp_path / "data" / "labels.csv").write_text("file,labels\na.jpg,dog\nb.png,cat\n")
    assert index(format="folder", root=str(tmp_path / "data")).folder != first.folder


@pytest.mark.parametrize("format", ["voc", "coco", "folder", "voc_folder"])
def test_a_missing_root_is_found_before_anything_starts(index: Callable, tmp_path: Path, format: str) -> None:
    with pytest.raises(ConfigError, match=r"steps\.images: .*nowhere"):
        index(format=format, root=str(tmp_path / "nowhere"), splits=["train"])


def test_voc_and_coco_need_their_splits_named(index: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps\.images: .*splits is required for format voc"):
        index(format="voc", root=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "rows", "boxes", "classes"),
    [
        ({"format": "voc_folder", "root": "cards"}, 363, 670, 6),
        ({"format": "coco", "root": "tiny_coco", "splits": ["train2017", "val2017"]}, 100, 852, 80),
        ({"format": "voc", "root": "voc_devkit_mini/VOCdevkit/VOC2012", "splits": ["trainval"]}, 5, 11, 20),
    ],
    ids=["cards", "coco", "voc12"],
)
def test_real_datasets_are_read_whole(index: Callable, settings: dict, rows: int, boxes: int, classes: int) -> None:
    root = SHARED_DATA / settings["root"]
    if not root.exists():
        pytest.skip(f"{root} is not here: it holds real photographs that are not part of the project")
    step = index(**{**settings, "root": str(root)})
    truth = tables.read_ground_truth(step.folder)
    assert truth is not None
    assert truth.schema.equals(schemas.GROUND_TRUTH)
    assert sum(map(len, truth.column("boxes").to_pylist())) == boxes
    assert tables.read_step(step).num_rows == rows
    assert len(schemas.class_names_of(truth.schema)) == classes


def make_labelled(folder: Path, labels: dict[str, str]) -> None:
    folder.mkdir()
    for name in labels:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(folder / name)
    lines = [f"{name},{one},{name.rpartition('/')[0] or 'train'}\n" for name, one in labels.items()]
    (folder / "labels.csv").write_text("file,labels,split\n" + "".join(lines))


def sampled(index: Callable, root: Path, count: int | None) -> dict[str, list[int]]:
    rows = tables.read_step(index(format="folder", root=str(root), sample=count)).to_pylist()
    return {row["image_id"]: row["labels"] for row in rows}


def test_a_sample_has_so_many_images_of_each_split_and_is_always_the_same(index: Callable, tmp_path: Path) -> None:
    names = [f"{split}/{i}.jpg" for split, count in (("train", 9), ("test", 3)) for i in range(count)]
    make_labelled(tmp_path / "data", dict.fromkeys(names, "cat"))
    make_labelled(tmp_path / "moved", dict.fromkeys(reversed(names), "cat"))
    found = sampled(index, tmp_path / "data", 4)
    assert [sum(name.startswith(split) for name in found) for split in ("train", "test")] == [4, 3]
    assert found == sampled(index, tmp_path / "moved", 4)
    assert list(sampled(index, tmp_path / "data", None)) == sorted(names)
    assert sampled(index, tmp_path / "data", 100) == sampled(index, tmp_path / "data", None)


def test_a_sample_has_an_image_of_each_class_as_far_as_that_goes(index: Callable, tmp_path: Path) -> None:
    labels = {f"{i:02}.jpg": "dog" for i in range(40)} | {"40.jpg": "cat;owl", "41.jpg": "elk"}
    make_labelled(tmp_path / "data", labels)
    everything = sampled(index, tmp_path / "data", None)
    for count in (3, 10):
        found = sampled(index, tmp_path / "data", count)
        assert len(found) == count
        assert {label for one in found.values() for label in one} == {0, 1, 2, 3}
        assert found.items() <= everything.items()
    assert sorted(sampled(index, tmp_path / "data", 1)) <= ["40.jpg", "41.jpg"]


def test_the_ground_truth_of_a_sample_is_that_of_its_images(index: Callable, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (48, 32), "red").save(tmp_path / "data" / f"{i}.jpg")
        box = "<xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>25</ymax>"
        (tmp_path / "data" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><size><width>48</width><height>32</height><depth>3</depth></size>"
            f"<object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
        )
    step = index(format="voc_folder", root=str(tmp_path / "data"), sample=2)
    truth = tables.read_ground_truth(step.folder)
    assert truth is not None
    ids = tables.read_step(step).column("image_id").to_pylist()
    assert len(ids) == 2
    assert truth.column("image_id").to_pylist() == ids


def write_coco(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    Image.new("RGB", (64, 48), "red").save(root / "train" / "a.jpg")
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}],
        "categories": [{"id": 0, "name": "workers"}, {"id": 1, "name": "head"}, {"id": 2, "name": "helmet"}],
    }
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))


def test_results_and_exports_have_the_category_ids_of_the_dataset(tmp_path: Path) -> None:
    write_coco(tmp_path / "data")
    (tmp_path / "results.json").write_text(
        json.dumps([{"image_id": 1, "category_id": 2, "bbox": [4, 4, 20, 20], "score": 0.9}])
    )
    given = {"images": "images", "results": str(tmp_path / "results.json")}
    steps = {
        "images": {"stage": "index", "format": "coco", "root": str(tmp_path / "data"), "splits": ["train"]},
        "judged": {"stage": "evaluate", **given},
        "pgt": {"stage": "pgt", "split": "train", **given},
        "out": {"stage": "export", "images": "images", "pgt": "pgt", "format": "coco_results"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "steps": steps}))
    made = {step.name: step for step in pipeline.load(str(path))}
    pipeline.run_steps(list(made.values()))
    for table in (tables.read_step(made["images"]), tables.read_ground_truth(made["images"].folder)):
        assert table is not None
        assert schemas.category_ids_of(table.schema) == [0, 1, 2]
    assert storage.read_json(f"{made['judged'].folder}/metrics.json")["metrics"]["AP50"] == pytest.approx(1.0)
    [entry] = json.loads(Path(made["out"].folder, "export", "results.json").read_text())
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (1, 2, [4, 4, 20, 20])
