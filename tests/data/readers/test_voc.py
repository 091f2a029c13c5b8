"""VOC devkits: made by hand here, and real ones where they are at hand."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tests.data.readers.merged import rows
from tests.data.readers.voc_files import index_png, picture, shared, thing, write_devkit, xml
from weaksam.core import storage
from weaksam.data import datasets
from weaksam.data.datasets import fill_sizes
from weaksam.data.readers.voc import CLASSES, read_voc
from weaksam.data.readers.voc_annotations import VocFiles, with_masks
from weaksam.data.readers.voc_xml import VocAnnotation, parse_voc_xml
from weaksam.data.remarks import BELOW_A_PIXEL
from weaksam.errors import DataError

# --- one annotation file


# --- masks


def test_boxes_in_shares_of_the_image_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotation = xml(thing("dog", 1, 1, 9, 9), thing("dog", 0.1, 0.2, 0.6, 0.9))
    write_devkit(str(tmp_path), {"train": ["1"]}, {"1": annotation})
    read_voc(str(tmp_path), ["train"])
    assert f"1 {BELOW_A_PIXEL}: {tmp_path}/Annotations/1.xml object 2" in caplog.text


# --- whole devkits


def test_labels_leave_difficult_objects_out_unless_asked_for(tmp_path: Path) -> None:
    annotations = {
        "1": xml(thing("dog", 1, 1, 5, 5), thing("dog", 2, 2, 9, 9), thing("cat", 1, 1, 3, 3, difficult=1)),
        "2": xml(thing("cat", 1, 1, 3, 3, difficult=1)),
        "3": xml(),
    }
    root = write_devkit(str(tmp_path / "VOC2007"), {"train": ["1", "2"], "val": ["3"]}, annotations)
    dataset = read_voc(root, ["val", "train"])
    assert dataset.class_names == list(CLASSES)
    assert dataset.images["image_id"].to_pylist() == ["3", "1", "2"]  # split after split, as asked
    found = rows(dataset)
    assert {i: row["labels"] for i, row in found.items()} == {"1": [11], "2": [], "3": []}
    assert found["2"]["classes"] == [7]
    assert found["2"]["difficult"] == [True]
    assert found["3"]["boxes"] == []
    assert (found["1"]["height"], found["1"]["width"], found["1"]["split"]) == (80, 100, "train")
    assert found["1"]["bytes"] == len(picture())
    again = rows(read_voc(root, ["train"], difficult_makes_label=True))
    assert {i: row["labels"] for i, row in again.items()} == {"1": [7, 11], "2": [7]}


def test_a_split_without_annotations_has_null_labels_and_no_ground_truth(tmp_path: Path) -> None:
    root = write_devkit(str(tmp_path), {"test": ["1", "2"]}, {})
    dataset = read_voc(root, ["test"])
    assert dataset.ground_truth is None
    assert dataset.images["labels"].to_pylist() == [None, None]
    assert fill_sizes(dataset.images)["width"].to_pylist() == [100, 100]


def test_some_annotations_missing_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_devkit(str(tmp_path), {"train": ["1", "2"]}, {"2": xml(thing("dog", 1, 1, 5, 5))})
    dataset = read_voc(root, ["train"])
    assert dataset.images["labels"].to_pylist() == [None, [11]]
    assert dataset.ground_truth is not None
    assert dataset.ground_truth["image_id"].to_pylist() == ["2"]
    assert "1 images of split 'train' have no annotation file, their labels are null: 1" in caplog.text


def test_a_box_without_area_goes_with_a_warning_but_its_label_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    annotation = xml(thing("dog", 9, 9, 3, 3), thing("cat", 1, 1, 5000, 5))
    root = write_devkit(str(tmp_path), {"train": ["1"]}, {"1": annotation})
    row = rows(read_voc(root, ["train"]))["1"]
    assert row["labels"] == [7, 11]
    assert row["classes"] == [7]
    assert row["boxes"] == [[0, 0, 100, 5]]
    assert "1 boxes have no area inside their image and are left out: " in caplog.text
    assert "1.xml object 1" in caplog.text
    assert "1 boxes reach beyond their image and are cut at its border (is its size right?): " in caplog.text
    assert "1.xml object 2" in caplog.text


def test_an_object_without_bndbox_is_a_label_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = "<object><name>ship</name></object>"
    twice = thing("car", 2, 5, 12, 20, more="<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>")
    write_devkit(str(tmp_path), {"train": ["1", "2"]}, {"1": xml(bare, thing("cat", 1, 1, 4, 4)), "2": xml(twice)})
    dataset = read_voc(str(tmp_path), ["train"])
    assert dataset.class_names == ["car", "cat", "ship"]
    found = rows(dataset)
    assert (found["1"]["labels"], found["1"]["boxes"]) == ([1, 2], [[0, 0, 4, 4]])
    assert (found["2"]["labels"], found["2"]["classes"]) == ([0], [0, 0])
    assert "1 files with objects without <bndbox>; their labels count" in caplog.text
    assert "1 files with several <bndbox> in an object" in caplog.text
    assert "no area" not in caplog.text
    assert "smaller than a pixel" not in caplog.text


def test_names_with_blanks_are_ids_unless_a_flag_of_a_class_follows(tmp_path: Path) -> None:
    names = ["IMG (1)", "a  b 2", "photo 1", "c"]
    write_devkit(str(tmp_path), {"train": names}, {name: xml(thing("dog", 1, 1, 9, 9)) for name in names})
    assert read_voc(str(tmp_path), ["train"]).images.column("image_id").to_pylist() == names
    for flag in ("-1", "0", " 1"):
        storage.write_bytes(f"{tmp_path}/ImageSets/Main/dog_train.txt", f"c {flag}\n".encode())
        with pytest.raises(DataError, match=r"dog_train\.txt, line 1: .* \(a list of one class\?\)"):
            read_voc(str(tmp_path), ["dog_train"])


def test_masks_of_no_object_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotation = xml(thing("dog", 1, 1, 5, 5), width=6, height=5)
    root = write_devkit(str(tmp_path), {"train": ["1"]}, {"1": annotation})
    (tmp_path / "SegmentationObject").mkdir()
    (tmp_path / "SegmentationObject" / "1.png").write_bytes(index_png(np.arange(30).reshape(5, 6)))
    row = rows(read_voc(root, ["train"]))["1"]
    assert len(row["masks"]) == 1
    assert "1 files with fewer objects than their SegmentationObject has masks" in caplog.text


def test_class_names_found_or_given(tmp_path: Path) -> None:
    root = write_devkit(
        str(tmp_path), {"train": ["1"]}, {"1": xml(thing("zebra", 1, 1, 5, 5), thing("dog", 1, 1, 2, 2))}
    )
    assert read_voc(root, ["train"]).class_names == ["dog", "zebra"]
    dataset = read_voc(root, ["train"], classes=["zebra", "ant", "dog"])
    assert dataset.images["labels"].to_pylist() == [[0, 2]]
    with pytest.raises(DataError, match=r"1\.xml: class 'zebra' is not among the classes \['dog'\]"):
        read_voc(root, ["train"], classes=["dog"])
    with pytest.raises(DataError, match=r"1 class\(s\) occur more than once: dog"):
        read_voc(root, ["train"], classes=["dog", "zebra", "dog"])


def test_masks_are_read_where_there_are_some(tmp_path: Path) -> None:
    annotation = xml(thing("dog", 1, 1, 3, 3), width=4, height=4)
    root = write_devkit(str(tmp_path), {"train": ["1", "2"]}, {"1": annotation, "2": annotation})
    storage.write_bytes(f"{root}/SegmentationObject/2.png", index_png(np.eye(4)))
    found = rows(read_voc(root, ["train"]))
    assert found["1"]["masks"] == [None]
    np.testing.assert_array_equal(coco_mask.decode({"size": [4, 4], "counts": found["2"]["masks"][0]}), np.eye(4))
    assert rows(read_voc(root, ["train"], masks=False))["2"]["masks"] == [None]


def test_the_devkit_is_found_one_folder_up(tmp_path: Path) -> None:
    write_devkit(str(tmp_path / "VOCdevkit" / "VOC2012"), {"train": ["1"]}, {"1": xml()})
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        uri = read_voc(str(root), ["train"]).images["uri"][0].as_py()
        assert uri == str(tmp_path / "VOCdevkit" / "VOC2012" / "JPEGImages" / "1.jpg")
    write_devkit(str(tmp_path / "VOCdevkit" / "VOC2007"), {"train": ["1"]}, {"1": xml()})
    with pytest.raises(DataError, match="holds VOC2007, VOC2012: say which"):
        read_voc(str(tmp_path), ["train"])


def test_names_with_a_slash_are_below_imagesets_and_extensions_vary(tmp_path: Path) -> None:
    root = write_devkit(str(tmp_path), {"train": ["1"]}, {"1": xml()})
    (tmp_path / "JPEGImages" / "1.jpg").rename(tmp_path / "JPEGImages" / "1.JPEG")
    storage.write_bytes(f"{root}/ImageSets/Segmentation/val.txt", b"\xef\xbb\xbf1\r\n\r\n")
    dataset = read_voc(root, ["Segmentation/val"])
    assert dataset.images["split"].to_pylist() == ["Segmentation/val"]
    assert dataset.images["uri"][0].as_py().endswith("/1.JPEG")


def test_faults_of_a_devkit_are_named(tmp_path: Path) -> None:
    root = write_devkit(str(tmp_path), {"train": ["1"], "val": ["1"], "cat_train": ["1"]}, {"1": xml()})
    for name, text in {"gone": "1\n2\n3", "twice": "1\n1", "flags": "1  1\n", "none": "\n"}.items():
        storage.write_bytes(f"{root}/ImageSets/Main/{name}.txt", text.encode())
    for splits, message in (
        (["nope"], r"nope\.txt: no such split; there are: flags, gone, none, train, twice, val$"),
        (["gone"], r"2 of 3 ids of split 'gone' have no file in JPEGImages: 2, 3$"),
        (["twice"], r"twice\.txt: 1 image id\(s\) occur more than once: 1"),
        (["train", "val"], r"splits \['train', 'val'\]: 1 image id\(s\) occur more than once: 1"),
        (["flags"], r"flags\.txt, line 1: one image id was expected, got '1  1'"),
        (["none"], r"none\.txt: lists no image id"),
    ):
        with pytest.raises(DataError, match=message):
            read_voc(root, splits)
    with pytest.raises(DataError, match=r"not a VOC devkit: .* found Main"):
        read_voc(f"{root}/ImageSets", ["train"])
    storage.write_bytes(f"{root}/JPEGImages/1.png", b"")
    with pytest.raises(DataError, match="two files of one image"):
        read_voc(root, ["train"])


def test_any_map_and_any_storage_will_do() -> None:
    annotations = {str(i): xml(thing("dog", i, i, i + 1, i + 1)) for i in range(1, 30)}
    root = write_devkit("memory://test-voc/VOC2007", {"train": list(annotations)}, annotations)
    calls: list[Sequence[VocFiles]] = []

    def plain_map(function, items: Sequence[VocFiles]) -> Iterable[VocAnnotation]:
        calls.append(items)
        return map(function, items)

    dataset = read_voc(root, ["train"], map_files=plain_map)
    assert [len(items) for items in calls] == [29]
    assert dataset.images.equals(read_voc(root, ["train"], map_files=datasets.map_in_threads).images)
    assert dataset.ground_truth is not None
    assert dataset.ground_truth["boxes"].to_pylist() == [[[i - 1, i - 1, i + 1, i + 1]] for i in range(1, 30)]
    assert dataset.images["uri"][0].as_py() == "memory://test-voc/VOC2007/JPEGImages/1.jpg"


def test_listing_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_devkit(str(tmp_path), {"train": ["1"]}, {"1": xml()})
    read: list[str] = []
    original = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, **options: read.append(uri) or original(uri, **options))
    read_voc(root, ["train"])
    assert sorted(Path(uri).suffix for uri in read) == [".txt", ".xml"]


# --- real data


def test_real_devkits() -> None:
    root = shared("voc_devkit_mini", "VOCdevkit")
    for year, num_boxes in (("VOC2007", 17), ("VOC2012", 11)):
        dataset = read_voc(str(root / year), ["trainval"])
        found = rows(dataset)
        assert len(found) == 5
        assert sum(len(row["boxes"]) for row in found.values()) == num_boxes
        sizes = dataset.images.select(["height", "width"])
        assert all(path.endswith(".jpg") for path in dataset.images["uri"].to_pylist())
        assert sizes["height"].null_count == 0
    found = rows(read_voc(str(root / "VOC2007"), ["test"]))
    assert found["000001"]["boxes"] == [[47, 239, 195, 371], [7, 11, 352, 498]]
    assert found["000001"]["labels"] == [CLASSES.index("dog"), CLASSES.index("person")]


@pytest.mark.parametrize(("folder", "num_difficult"), [("Annotations", 38), ("Annotations_cvat_export", 0)])
def test_real_annotations_and_their_reexport(tmp_path: Path, folder: str, num_difficult: int) -> None:
    source = shared("voc2012_100")
    (tmp_path / "JPEGImages").symlink_to(source / "JPEGImages")
    (tmp_path / "Annotations").symlink_to(source / folder)
    ids = sorted(path.stem for path in (source / "JPEGImages").iterdir())
    storage.write_bytes(str(tmp_path / "ImageSets" / "Main" / "all.txt"), "\n".join(ids).encode())
    dataset = read_voc(str(tmp_path), ["all"])
    found = rows(dataset)
    assert dataset.class_names == list(CLASSES)
    assert len(found) == 100
    boxes = np.concatenate([row["boxes"] for row in found.values()])
    assert boxes.shape == (273, 4)
    assert boxes.min() == 0  # VOC's smallest coordinate is 1
    assert sum(sum(row["difficult"]) for row in found.values()) == num_difficult
    for row in found.values():
        kept = {c for c, d in zip(row["classes"], row["difficult"], strict=True) if not d}
        assert row["labels"] == sorted(kept)
        assert (np.array(row["boxes"])[:, 2:] <= [row["width"], row["height"]]).all()
    without = pa.table([pa.nulls(100, pa.int32())] * 2, names=["height", "width"])
    images = dataset.images
    for name in ("height", "width"):
        images = images.set_column(images.schema.get_field_index(name), images.schema.field(name), without[name])
    assert fill_sizes(images).equals(dataset.images)  # the headers say what the annotations say


def test_only_the_first_254_objects_have_masks(tmp_path: Path) -> None:
    objects = [thing("cat", 1, 1, 9, 9) for _ in range(256)]
    values = np.zeros((80, 100), np.uint8)
    values[0, :3], values[5, :7] = 254, 255
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    found = with_masks(parse_voc_xml(xml(*objects), "a.xml"), stream.getvalue(), "a.png")
    assert [place for place, mask in zip(found.places, found.masks, strict=True) if mask is not None] == [254]
    rle: object = {"size": [80, 100], "counts": found.masks[253]}
    assert coco_mask.area(rle) == 3  # type: ignore[arg-type]
