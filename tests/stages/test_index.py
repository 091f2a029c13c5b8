"""A dataset becomes the images table, and its ground truth lies apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from testing.places import SHARED_DATA
from weaksam import pipeline
from weaksam.core import schemas, storage, tables
from weaksam.core.step import Step
from weaksam.data.readers import DATASET_FORMATS, coco
from weaksam.data.readers.format import DatasetSource
from weaksam.errors import ConfigError
from weaksam.pipeline.looking import look_at
from weaksam.stages.index_config import IndexConfig


@pytest.fixture
def index(tmp_path: Path) -> Callable[..., Step]:
    def run(**settings: object) -> Step:
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
    table = step.read()
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
    ("settings", "fault"),
    [
        (
            {"format": "coco", "annotations": {"train": "t.json", "T": "t.json"}},
            "annotations: T: no such split: splits are train, val",
        ),
        ({"format": "coco", "image_folders": {"T": "t"}}, "image_folders: T: no such split: splits are train, val"),
        ({"format": "voc", "annotations": {"train": "t.json"}}, "annotations is for format coco, not voc"),
        ({"format": "voc_folder", "image_folders": {"train": "t"}}, "image_folders is for format coco, not voc_folder"),
        ({"format": "folder", "crowd_makes_label": True}, "crowd_makes_label is for format coco, not folder"),
        ({"format": "coco", "labels_file": "labels.tsv"}, "labels_file is for format folder, not coco"),
        (
            {"format": "coco", "difficult_makes_label": True},
            "difficult_makes_label is for format voc and voc_folder, not",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_faults(index: Callable, tmp_path: Path, settings: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=r"steps\.images[.:] ?" + fault):
        index(root=str(tmp_path), splits=["train", "val"], **settings)


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
    assert step.read().num_rows == rows
    assert len(schemas.class_names_of(truth.schema)) == classes


def make_labelled(folder: Path, labels: dict[str, str]) -> None:
    folder.mkdir()
    for name in labels:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(folder / name)
    lines = [f"{name},{one},{name.rpartition('/')[0] or 'train'}\n" for name, one in labels.items()]
    (folder / "labels.csv").write_text("file,labels,split\n" + "".join(lines))


def sampled(index: Callable, root: Path, count: int | None) -> dict[str, list[int]]:
    rows = index(format="folder", root=str(root), sample=count).read().to_pylist()
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
    ids = step.read().column("image_id").to_pylist()
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
    given = {"images": "images", "detections": "found"}
    steps = {
        "images": {"stage": "index", "format": "coco", "root": str(tmp_path / "data"), "splits": ["train"]},
        "found": {"stage": "import_detections", "images": "images", "results": str(tmp_path / "results.json")},
        "judged": {"stage": "evaluate", **given},
        "pgt": {"stage": "pgt", "split": "train", **given},
        "out": {"stage": "export", "images": "images", "pgt": "pgt", "format": "coco_results"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "steps": steps}))
    made = {step.name: step for step in pipeline.load(str(path))}
    pipeline.run_steps(list(made.values()))
    for table in (made["images"].read(), tables.read_ground_truth(made["images"].folder)):
        assert table is not None
        assert schemas.category_ids_of(table.schema) == [0, 1, 2]
    assert storage.read_json(f"{made['judged'].folder}/metrics.json")["metrics"]["AP50"] == pytest.approx(1.0)
    [entry] = json.loads(Path(made["out"].folder, "export", "results.json").read_text())
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (1, 2, [4, 4, 20, 20])


def write_photo(path: Path, *, orientation: int = 1, stated: tuple[int, int] = (48, 64)) -> None:
    """A photograph of 48 rows and 64 columns as stored, and its VOC file."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 48), "red").save(path, exif=exif)
    box = "<xmin>5</xmin><ymin>5</ymin><xmax>24</xmax><ymax>14</ymax>"
    size = f"<size><width>{stated[1]}</width><height>{stated[0]}</height></size>"
    path.with_suffix(".xml").write_text(
        f"<annotation>{size}<object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
    )


def test_one_dataset_is_one_dataset_however_its_place_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    places = [str(tmp_path / "data"), f"{tmp_path}/data/", "data", "./data", f"file://{tmp_path}/data"]
    found = {resolved(tmp_path, format="folder", root=place, labels_file="labels.csv").fingerprint for place in places}
    table = resolved(tmp_path, format="folder", root="data", labels_file=str(tmp_path / "data" / "labels.csv"))
    assert found == {table.fingerprint}


@pytest.mark.parametrize("format", ["folder", "voc_folder", "coco", "voc"])
def test_a_dataset_that_moved_is_the_same_and_is_listed_again(
    index: Callable, tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    images = {"coco": root / "train", "voc": root / "JPEGImages"}.get(format, root)
    images.mkdir(parents=True)
    write_photo(images / "a.jpg")
    settings = {"format": format, "splits": ["train"]}
    if format == "folder":
        (root / "labels.csv").write_text("file,labels\na.jpg,cat\n")
    elif format == "coco":
        entry = {"id": 1, "file_name": "a.jpg", "height": 48, "width": 64}
        content = {"images": [entry], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        storage.write_json(str(root / "annotations" / "instances_train.json"), content)
    elif format == "voc":
        storage.write_bytes(str(root / "Annotations" / "a.xml"), (images / "a.xml").read_bytes())
        storage.write_bytes(str(root / "ImageSets" / "Main" / "train.txt"), b"a\n")
    first = index(root=str(root), **settings)
    root.rename(tmp_path / "moved")
    step = resolved(tmp_path, root=str(tmp_path / "moved"), **settings)
    assert (step.fingerprint, step.manifest()) == (first.fingerprint, None)  # its rows name files that are no more
    with pytest.raises(ConfigError, match="root: there is no folder"):
        resolved(tmp_path, root=str(root), **settings)
    again = index(root=str(tmp_path / "moved"), **settings)
    assert again.folder == first.folder
    assert again.manifest() is not None
    [row] = again.read().to_pylist()
    assert row["uri"].startswith(str(tmp_path / "moved"))
    assert len(tables.list_parts(again.folder)) == 1
    config = storage.read_json(storage.join(again.folder, "config.json"))
    assert config["settings"]["root"] == str(tmp_path / "moved")
    caplog.clear()
    with caplog.at_level("INFO"):
        index(root=str(tmp_path / "moved"), **settings)
    assert "images: finished, skipped" in caplog.text


@pytest.mark.parametrize("format", ["folder", "voc_folder", "coco"])
def test_a_run_inside_the_folder_that_is_listed_is_refused(tmp_path: Path, format: str) -> None:
    inside = tmp_path if format != "coco" else tmp_path / "train"
    inside.mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=rf"steps\.images: the run {inside}/run lies inside the dataset's folder"):
        resolved(inside, format=format, root=str(tmp_path), splits=["train"])
    (tmp_path / "link").symlink_to(inside)
    linked = {"root": str(tmp_path / "link")} if format != "coco" else {"image_folders": {"train": "link"}}
    with pytest.raises(ConfigError, match="lies inside the dataset's folder"):
        resolved(inside, **{"format": format, "root": str(tmp_path), "splits": ["train"], **linked})


def test_an_export_into_the_folder_that_is_listed_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    steps = {
        "images": {"stage": "index", "format": "folder", "root": str(tmp_path / "data")},
        "found": {"stage": "import_detections", "images": "images", "results": str(tmp_path / "results.json")},
        "pgt": {"stage": "pgt", "images": "images", "detections": "found", "split": "train"},
        "out": {
            "stage": "export",
            "images": "images",
            "pgt": "pgt",
            "format": "coco",
            "to": str(tmp_path / "data/out"),
        },
    }
    (tmp_path / "results.json").write_text("[]")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "steps": steps}))
    with pytest.raises(ConfigError, match=rf"^steps\.out: to: {tmp_path}/data/out lies inside the dataset's folder"):
        pipeline.load(str(path))
    pipeline.load(str(path), [f"steps.out.to={tmp_path}/out"])


def resolved(folder: Path, **settings: object) -> Step:
    """The step of a run file in `folder`, not run."""
    path = folder / "check.yaml"
    content = {"run": str(folder / "run"), "steps": {"images": {"stage": "index", **settings}}}
    path.write_text(yaml.safe_dump(content))
    [step] = pipeline.load(str(path))
    return step


def test_sizes_of_unturned_pictures_are_noticed_and_turned_when_asked(
    index: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    write_photo(tmp_path / "data" / "a.jpg", orientation=6)
    write_photo(tmp_path / "data" / "b.jpg")
    settings = {"format": "voc_folder", "root": str(tmp_path / "data")}
    plain = index(**settings)
    assert "images: of 2 images looked at: 1 images lie turned by a quarter" in caplog.text
    assert caplog.text.rstrip().endswith("orientation: stored of the index step turns them: a.jpg")
    caplog.clear()
    turned = index(**settings, orientation="stored")
    assert "turned by a quarter" not in caplog.text
    assert turned.fingerprint != plain.fingerprint
    sizes = [(row["height"], row["width"]) for row in turned.read().to_pylist()]
    assert sizes == [(64, 48), (48, 64)]
    truth = tables.read_ground_truth(turned.folder)
    assert truth is not None
    assert truth.column("boxes").to_pylist() == [[[34, 4, 44, 24]], [[4, 4, 24, 14]]]


def test_check_looks_at_what_is_quick_to_read(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in "ab":
        write_photo(data / f"{name}.jpg")
    settings: dict[str, Any] = {"format": "voc_folder", "root": str(data)}
    [line], faults = look_at([resolved(tmp_path, **settings)])
    assert line == ("images: looked at the names of 2 images and 2 of 2 XML files; not at the images themselves")
    assert faults == []
    (data / "b.xml").write_text("<annotation>")
    _, faults = look_at([resolved(tmp_path, **settings, classes=["dog"])])
    assert [fault.partition("/data/")[2] for fault in faults] == [
        "b.xml, line 1: not well-formed XML (no element found: line 1, column 12)",
        "a.xml: class 'cat' is not among the classes ['dog']",
    ]
    assert all(fault.startswith("steps.images: ") for fault in faults)


def test_check_reads_a_small_json_whole_and_of_a_large_one_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "data" / "annotations" / "instances_train.json")
    storage.write_bytes(uri, b'[{"images": []}]')
    (tmp_path / "data" / "train").mkdir()
    step = resolved(tmp_path, format="coco", root=str(tmp_path / "data"), splits=["train"])
    assert look_at([step])[1] == [f"steps.images: {uri}: not in COCO's form: it has no list under the key 'images'"]
    monkeypatch.setattr(coco, "_MOST_BYTES", 3)
    [line], [fault] = look_at([step])
    assert "not in COCO's form: it begins with" in fault
    assert line.endswith("not at the rest of what is larger than 32 MB, and the images")


def test_check_looks_at_the_lists_of_a_devkit(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    write_photo(root / "JPEGImages" / "a.jpg")
    (root / "JPEGImages" / "a.xml").rename(root / "Annotations" / "a.xml")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    step = resolved(tmp_path, format="voc", root=str(root), splits=["train"])
    [line], faults = look_at([step])
    assert (line, faults) == (
        "images: looked at the lists of 1 images and 1 of 1 XML files; not at the images themselves",
        [],
    )
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    _, [fault] = look_at([step])
    assert "1 of 2 ids of split 'train' have no file in JPEGImages: b" in fault


def test_an_unknown_format_is_a_fault_that_lists_the_known_formats(tmp_path: Path) -> None:
    fault = r"^steps\.images\.format: must be one of voc, coco, folder, voc_folder, got 'vocs': did you mean 'voc'\?$"
    with pytest.raises(ConfigError, match=fault):
        resolved(tmp_path, format="vocs", root=str(tmp_path))


def test_what_formats_read_are_settings_of_the_stage() -> None:
    for kind in DATASET_FORMATS:
        assert {*kind.settings} <= {field.name for field in fields(DatasetSource)} <= {*IndexConfig.model_fields}
