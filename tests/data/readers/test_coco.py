"""COCO's form: made by hand here, and real files where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from tests.data.readers.coco_files import CATEGORIES, image, note, shared, write
from tests.data.readers.merged import rows
from weaksam.core import storage
from weaksam.data.categories import COCO_IDS, COCO_NAMES
from weaksam.data.datasets import sample_dataset
from weaksam.data.readers.coco import read_coco
from weaksam.errors import DataError


def test_images_without_annotations_are_kept_with_empty_labels(tmp_path: Path) -> None:
    root = write(tmp_path, [image(7)], [])
    row = rows(read_coco(root, ["train"]))["7"]
    assert (row["labels"], row["boxes"], row["bytes"]) == ([], [], 7)
    assert (row["height"], row["width"], row["split"]) == (10, 20, "train")


def test_names_of_categories_lose_blanks_at_their_ends(tmp_path: Path) -> None:
    root = write(tmp_path, [image(1)], [note(1, category=13)])
    uri = f"{root}/annotations/instances_train.json"
    content = json.loads(storage.read_bytes(uri))
    content["categories"] = [{"id": 13, "name": "Stiletto "}]
    storage.write_json(uri, content)
    assert read_coco(root, ["train"]).class_names == ["Stiletto"]
    assert read_coco(root, ["train"], classes=["Stiletto "]).class_names == ["Stiletto"]


def test_categories_boxes_and_crowds(tmp_path: Path) -> None:
    rle = {"size": [10, 20], "counts": [0, 200]}
    notes = [note(1, category=90), note(2, category=13, iscrowd=1, segmentation=rle), note(3, category=90, iscrowd=0)]
    root = write(tmp_path, [image(1)], notes)
    dataset = read_coco(root, ["train"])
    assert dataset.class_names == ["person", "stop sign", "toothbrush"]  # by id
    row = rows(dataset)["1"]
    assert row["classes"] == [2, 1, 2]
    assert row["boxes"][0] == [1, 2, 4, 6]
    assert row["crowd"] == [False, True, False]
    assert row["difficult"] == [False] * 3
    assert row["labels"] == [2]
    assert rows(read_coco(root, ["train"], crowd_makes_label=True))["1"]["labels"] == [1, 2]
    assert rows(read_coco(root, ["train"], classes=["toothbrush", "stop sign"]))["1"]["classes"] == [0, 1, 0]
    with pytest.raises(DataError, match=r"image 1: class 'stop sign' is not among the classes \['toothbrush'\]"):
        read_coco(root, ["train"], classes=["toothbrush"])


def test_a_file_without_annotations_gives_null_labels(tmp_path: Path) -> None:
    root = write(tmp_path, [image(1)], None, split="test", form="image_info")
    dataset = read_coco(root, ["test"])
    assert dataset.ground_truth is None
    assert dataset.images["labels"].to_pylist() == [None]


def test_splits_may_be_anywhere_and_files_in_subfolders(tmp_path: Path) -> None:
    write(tmp_path, [image(1, "a/b.jpg"), image("x", "c.png")], [note(5, image_id="x")])
    splits = {"mini": ("annotations/instances_train.json", str(tmp_path / "train"))}
    found = rows(read_coco(str(tmp_path), splits))
    assert found["1"]["uri"] == str(tmp_path / "train" / "a" / "b.jpg")
    assert {row["split"] for row in found.values()} == {"mini"}
    assert found["x"]["labels"] == [0]


def test_an_image_of_unknown_size_is_kept(tmp_path: Path) -> None:
    root = write(tmp_path, [image(1, height=0)], [note(5, box=(1, 2, 5000, 4))])
    row = rows(read_coco(root, ["train"]))["1"]
    assert (row["height"], row["width"], row["boxes"]) == (None, None, [[1, 2, 5001, 6]])


SIZE_10_20 = {"size": [10, 20]}


@pytest.mark.parametrize(
    ("images", "notes", "message"),
    [
        ([image(1), image(1)], [], r"train\.json: images: 1 id\(s\) occur more than once: 1"),
        ([{"id": 1}], [], r"train\.json: image 1: 'file_name' must be str, got None"),
        ([{"file_name": "a"}], [], r"train\.json: images: 'id' must be int or str, got None"),
        ([image(1)], [note(8, image_id=2)], r"annotation 8: its image_id 2 is not among the images"),
        ([image(1)], [note(8, category=2)], r"annotation 8: its category_id 2 is not among the categories"),
        ([image(1)], [note(8, box=[1, 2, 3])], r"annotation 8: its bbox must be 4 finite numbers .* got \[1, 2, 3\]"),
        ([image(1)], [note(8, box="1234")], r"annotation 8: its bbox must be 4 finite numbers"),
        ([image(1)], [note(8, box=[1, 2, 3, float("nan")])], r"annotation 8: its bbox must be 4 finite numbers"),
        ([image(1)], ["what"], r"annotation 'what': 'image_id' must be int or str"),
        ([image(1)], [note(8, segmentation=[1, 2, 3, 4, 5, 6])], "annotation 8: its segmentation is neither"),
        ([image(1)], [note(8, segmentation=[["a"] * 6])], "annotation 8: its segmentation is neither"),
        ([image(1)], [note(8, segmentation=SIZE_10_20)], "annotation 8: its segmentation is neither"),
        (
            [image(1)],
            [note(8, segmentation={"size": [20, 10], "counts": [200]})],
            r"RLE is of size \[20, 10\], its image",
        ),
        ([image(1)], [note(8, segmentation=SIZE_10_20 | {"counts": [9]})], "covers 9 pixels, its image has 200"),
        ([image(1, height=0)], [note(8, segmentation=[[1] * 6])], "its image has no height and width"),
    ],
)
def test_faults_are_named_by_id(tmp_path: Path, images: list, notes: list, message: str) -> None:
    content = {"images": images, "annotations": notes, "categories": CATEGORIES}
    storage.write_bytes(str(tmp_path / "annotations" / "instances_train.json"), json.dumps(content).encode())
    storage.write_bytes(str(tmp_path / "train" / "1.jpg"), b"")
    with pytest.raises(DataError, match=message):
        read_coco(str(tmp_path), ["train"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n "categories": [}', r"train\.json, line 2, column 17: not valid JSON"),
        ("[]", "no list under the key 'images'"),
        ('{"images": [], "categories": {}}', "no list under the key 'categories'"),
        ('{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', r"1 id\(s\) occur more"),
        ('{"images": [], "annotations": {}, "categories": []}', r"not in COCO's form: 'annotations' is {}, not a list"),
        ('{"images": [1' + 5000 * "0" + '], "categories": []}', "cannot be read as JSON"),
        ('{"images": [], "categories": [{"id": "1", "name": "a"}]}', "categories: 'id' must be int, got '1'"),
        ("\xff", "not UTF-8 text|not valid JSON"),
    ],
)
def test_what_is_not_cocos_form_is_told(tmp_path: Path, text: str, message: str) -> None:
    storage.write_bytes(str(tmp_path / "annotations" / "instances_train.json"), text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_coco(str(tmp_path), ["train"])


def test_faults_of_the_whole_dataset_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, [image(i) for i in range(12)], [])
    write(tmp_path, [image(3)], [], split="val")
    with pytest.raises(DataError, match=r"splits \['train', 'val'\] \(give every .*: 1 image id\(s\) occur .*: 3$"):
        read_coco(root, ["train", "val"])
    with pytest.raises(DataError, match=r"instances_nope\.json: no such file"):
        read_coco(root, ["nope"])
    for path in (tmp_path / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"12 of 12 images are not in .*: 0\.jpg, .*, 9\.jpg and 2 more$"):
        read_coco(root, ["train"])
    other = json.dumps({"images": [], "categories": [{"id": 1, "name": "cat"}]})
    storage.write_bytes(str(tmp_path / "annotations" / "instances_odd.json"), other.encode())
    with pytest.raises(DataError, match=r"instances_odd\.json: category 1 is 'cat', another split says 'person'"):
        read_coco(root, ["val", "odd"])


def test_null_for_annotations_is_as_if_absent(tmp_path: Path) -> None:
    content = {"images": [image(1)], "annotations": None, "categories": CATEGORIES}
    storage.write_bytes(str(tmp_path / "annotations" / "instances_train.json"), json.dumps(content).encode())
    storage.write_bytes(str(tmp_path / "train" / "1.jpg"), b"")
    dataset = read_coco(str(tmp_path), ["train"])
    assert dataset.ground_truth is None
    assert dataset.images["labels"].to_pylist() == [None]


def test_categories_keep_their_own_ids(tmp_path: Path) -> None:
    root = write(tmp_path, [image(1)], [note(1, category=13)])
    assert read_coco(root, ["train"]).category_ids == [1, 13, 90]
    dataset = read_coco(root, ["train"], classes=["toothbrush", "unicorn", "stop sign"])
    assert dataset.category_ids == [90, 91, 13]  # a class of another dataset: an id that this one does not use
    assert sample_dataset(dataset, 1).category_ids == [90, 91, 13]


def write_categories(root: Path, split: str, categories: list[tuple[int, str]], notes: list[dict]) -> None:
    number = {"train": 1, "val": 2}[split]
    named = [{"id": k, "name": name} for k, name in categories]
    content = {"images": [image(number)], "annotations": notes, "categories": named}
    storage.write_bytes(str(root / "annotations" / f"instances_{split}.json"), json.dumps(content).encode())
    storage.write_bytes(str(root / split / f"{number}.jpg"), b"")


def test_a_category_without_annotations_gives_way_to_another_of_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = [(0, "cat"), (1, " cat "), (2, "dog")]
    write_categories(tmp_path, "train", both, [note(1, category=1)])
    write_categories(tmp_path, "val", both, [])
    for classes in (None, ["cat", "dog"]):
        dataset = read_coco(str(tmp_path), ["train", "val"], classes=classes)
        assert (dataset.class_names, dataset.category_ids) == (["cat", "dog"], [1, 2])
        assert dataset.images["labels"].to_pylist() == [[0], []]
    warning = "1 categories have no annotation and the name of another and are left out: 0 cat"
    assert warning in caplog.text
    write_categories(tmp_path, "val", both, [note(1, image_id=2, category=0)])
    with pytest.raises(DataError, match="categories 0 and 1 are both called 'cat' and have annotations"):
        read_coco(str(tmp_path), ["train", "val"])


def test_real_coco_equals_pycocotools() -> None:
    root = shared("tiny_coco")
    dataset = read_coco(str(root), ["train2017", "val2017"])
    found = rows(dataset)
    assert len(dataset.class_names) == 80
    assert (tuple(dataset.class_names), dataset.category_ids) == (COCO_NAMES, list(COCO_IDS))
    assert dataset.images["split"].to_pylist() == ["train2017"] * 50 + ["val2017"] * 50
    assert sum(len(row["boxes"]) for row in found.values()) == 852
    assert sum(sum(row["crowd"]) for row in found.values()) == 10
    for split in ("train2017", "val2017"):
        coco = COCO(str(root / "annotations" / f"instances_{split}.json"))
        ids = sorted(coco.cats)
        for number, entry in coco.imgs.items():
            row, notes = found[str(number)], coco.imgToAnns[number]
            assert row["classes"] == [ids.index(n["category_id"]) for n in notes]
            assert row["labels"] == sorted({ids.index(n["category_id"]) for n in notes if not n["iscrowd"]})
            assert row["masks"] == [coco.annToRLE(n)["counts"] for n in notes]
            expected = np.array([n["bbox"] for n in notes]).reshape(-1, 4)
            expected[:, 2:] += expected[:, :2]
            np.testing.assert_allclose(np.array(row["boxes"]).reshape(-1, 4), expected, atol=0.02)
            assert row["bytes"] == (root / split / entry["file_name"]).stat().st_size


def test_real_2014_file_with_placeholder_images(tmp_path: Path) -> None:
    source = shared("coco_oracle", "instances_val2014_100.json")
    content = json.loads(source.read_bytes())
    for entry in content["images"]:
        storage.write_bytes(str(tmp_path / entry["file_name"]), b"")
    dataset = read_coco(str(tmp_path), {"val2014": (str(source), str(tmp_path))})
    assert dataset.ground_truth is not None
    assert sum(len(boxes) for boxes in dataset.ground_truth["boxes"].to_pylist()) == 839
    assert sum(sum(crowd) for crowd in dataset.ground_truth["crowd"].to_pylist()) == 9


@pytest.mark.parametrize(
    ("numbers", "are_numbers"),
    [([12345678901234567, 7, -1], True), (["12", "a"], False), (["12", 13], None)],
)
def test_whether_image_ids_are_numbers_stays_known(tmp_path: Path, numbers: list, are_numbers: bool | None) -> None:
    dataset = read_coco(write(tmp_path, [image(number) for number in numbers], []), ["train"])
    assert dataset.images.column("image_id").to_pylist() == [str(number) for number in numbers]
    assert dataset.ids_are_numbers is are_numbers
    assert sample_dataset(dataset, 1).ids_are_numbers is are_numbers


def test_a_file_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instances_train\.json: lists no image$"):
        read_coco(write(tmp_path, [], []), ["train"])


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("images", "'id' must be int or str"),
        ("image_id", "'image_id' must be"),
        ("category_id", "'category_id' must be"),
    ],
)
def test_true_is_no_id(tmp_path: Path, where: str, fault: str) -> None:
    entry = image(1)
    root = write(tmp_path, [entry | {"id": True} if where == "images" else entry], [note(1) | {where: True}])
    with pytest.raises(DataError, match=fault):
        read_coco(root, ["train"])


def test_an_image_id_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, [image("\ud800", "1.jpg"), image("b")], [])
    with pytest.raises(DataError, match=r"image ids that are not UTF-8: '\\ud800': give these images other ids"):
        read_coco(root, ["train"])
