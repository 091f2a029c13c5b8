"""What is written twice, or in two ways, counts as written, and a warning names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weaksam.core import storage
from weaksam.data.datasets import ImageRecord, Objects, make_dataset
from weaksam.data.readers.coco import read_coco
from weaksam.data.readers.coco_results import read_results
from weaksam.data.readers.folder import read_folder
from weaksam.data.readers.voc_folder import read_voc_xml_folder

TWICE = "images have an object twice, of the same class and box, and both count"
EQUAL = "entries equal another of their image, and both count"


def write_coco(root: Path, files: list[str], notes: list[dict]) -> str:
    images = [{"id": i, "file_name": name, "height": 10, "width": 20} for i, name in enumerate(files, 1)]
    content = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "cat"}]}
    storage.write_bytes(str(root / "annotations" / "instances_train.json"), json.dumps(content).encode())
    for name in files:
        storage.write_bytes(str(root / "train" / name), b"12345")
    return str(root)


def note(number: int, image: int, box: list[int]) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": 1, "bbox": box}


def boxes_of(dataset: Any) -> list[list[list[float]]]:
    return dataset.ground_truth["boxes"].to_pylist()


def test_an_object_twice_under_two_ids_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes = [note(1, 1, [1, 2, 3, 4]), note(2, 1, [1, 2, 3, 4]), note(3, 2, [1, 2, 3, 4])]
    root = write_coco(tmp_path, ["a.jpg", "b.jpg"], notes)
    assert boxes_of(read_coco(root, ["train"])) == [[[1, 2, 4, 6]] * 2, [[1, 2, 4, 6]]]
    assert f"1 {TWICE}" in caplog.text
    assert "instances_train.json: image 1" in caplog.text
    assert "instances_train.json: image 2" not in caplog.text


def test_an_object_twice_in_an_xml_file_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thing = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>"
    size = "<size><width>20</width><height>10</height></size>"
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "a.xml").write_text(f"<annotation>{size}{thing}{thing.replace('cat', 'dog')}</annotation>")
    assert boxes_of(read_voc_xml_folder(str(tmp_path))) == [[[0, 0, 3, 4]] * 2]
    assert TWICE not in caplog.text  # a box with two classes
    (tmp_path / "a.xml").write_text(f"<annotation>{size}{thing}{thing}</annotation>")
    assert boxes_of(read_voc_xml_folder(str(tmp_path))) == [[[0, 0, 3, 4]] * 2]
    assert f"1 {TWICE}" in caplog.text


def test_objects_with_masks_of_their_own_are_two(caplog: pytest.LogCaptureFixture) -> None:
    for masks, count in (([b"1", b"2"], 0), ([b"1", b"1"], 1)):
        objects = Objects(["cat"] * 2, np.ones((2, 4), np.float32), [False] * 2, [False] * 2, masks)
        make_dataset([ImageRecord("a", "/a.jpg", "train", 5, ["cat"], "a.xml", objects=objects)], ["cat"])
        assert caplog.text.count(TWICE) == count


def test_a_result_twice_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    others = [entry | {"score": 0.4}, entry | {"bbox": [1, 2, 3, 5]}, entry | {"image_id": 2}]
    path = tmp_path / "results.json"
    for entries, count in (([entry, *others], 0), ([entry, *others, entry], 1)):
        path.write_text(json.dumps(entries))
        row = read_results(str(path), ["1", "2"], ["cat"], category_ids=[1]).to_pylist()[0]
        assert len(row["boxes"]) == len(entries) - 1
        assert caplog.text.count(EQUAL) == count
    assert f"1 {EQUAL}" in caplog.text


def test_a_file_under_two_image_ids_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_coco(tmp_path, ["a.jpg", "b.jpg", "a.jpg"], [note(1, 1, [1, 2, 3, 4]), note(2, 3, [5, 5, 2, 2])])
    dataset = read_coco(root, ["train"])
    assert dataset.images["image_id"].to_pylist() == ["1", "2", "3"]
    assert dataset.images["labels"].to_pylist() == [[0], [], [0]]
    assert "1 images have the file of another image, and each counts" in caplog.text
    assert ": image 3 (a.jpg)" in caplog.text


def test_labels_that_are_nearly_the_same_or_joined_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "b.jpg").write_bytes(b"12345")
    table = tmp_path / "labels.csv"
    table.write_text("file,labels\na.jpg,Cat;dog\nb.jpg,cat\n")
    assert read_folder(str(tmp_path)).class_names == ["Cat", "cat", "dog"]
    assert "2 classes differ in capital letters alone and are different classes: Cat, cat" in caplog.text
    table.write_text('file,labels\na.jpg,"cat,dog"\nb.jpg,cat;dog\n')
    assert read_folder(str(tmp_path)).class_names == ["cat", "cat,dog", "dog"]
    assert "1 labels have a comma and are a class each" in caplog.text
    caplog.clear()
    assert read_folder(str(tmp_path), classes=["dog", "cat", "cat,dog"]).class_names == ["dog", "cat", "cat,dog"]
    assert caplog.text == ""


def test_names_that_programs_write_for_nothing_or_for_a_list_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    (tmp_path / "labels.csv").write_text("file,labels\na.jpg,\"['cat', 'dog'];nan;None;nanny;cat\"\n")
    assert read_folder(str(tmp_path)).class_names == ["None", "['cat', 'dog']", "cat", "nan", "nanny"]
    assert "3 classes are named as programs write an empty cell or a list" in caplog.text
    assert ": None, ['cat', 'dog'], nan" in caplog.text
