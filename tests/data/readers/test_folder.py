"""Plain folders: labels.csv, and VOC XML beside the images."""

from __future__ import annotations

from pathlib import Path

import pytest

from testing.places import SHARED_DATA
from weaksam.core import schemas, storage
from weaksam.data.datasets import Dataset, fill_sizes, make_dataset
from weaksam.data.readers.folder import read_folder
from weaksam.data.readers.voc_folder import read_voc_xml_folder
from weaksam.errors import DataError


def fill(root: Path, *paths: str, table: str | bytes | None = None) -> str:
    for path in paths:
        storage.write_bytes(str(root / path), b"12345")
    if table is not None:
        data = table.encode() if isinstance(table, str) else table
        storage.write_bytes(str(root / "labels.csv"), data)
    return str(root)


def labels(dataset: Dataset) -> dict[str, list[str] | None]:
    assert dataset.images.schema.equals(schemas.IMAGES)
    return {
        row["image_id"]: None if row["labels"] is None else [dataset.class_names[i] for i in row["labels"]]
        for row in dataset.images.to_pylist()
    }


def xml(*names: str) -> bytes:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name>{box}</object>" for name in names)
    return f"<annotation><filename>else.png</filename>{objects}</annotation>".encode()


# --- labels.csv


def test_a_table_with_labels_and_splits(tmp_path: Path) -> None:
    table = "file,labels,split,note\na.jpg,dog;cat,train,x\nsub/b.png,,val,\nc.jpg,dog|cow ,train,\n"
    root = fill(tmp_path, "a.jpg", "sub/b.png", "c.jpg", "notes.txt", table=table)
    dataset = read_folder(root)
    assert dataset.class_names == ["cat", "cow", "dog"]
    assert dataset.ground_truth is None
    assert labels(dataset) == {"a.jpg": ["cat", "dog"], "c.jpg": ["cow", "dog"], "sub/b.png": []}
    assert dataset.images["split"].to_pylist() == ["train", "train", "val"]
    assert dataset.images["bytes"].to_pylist() == [5] * 3
    assert dataset.images["uri"][2].as_py() == str(tmp_path / "sub" / "b.png")
    assert labels(read_folder(root, ["val"])) == {"sub/b.png": []}
    assert read_folder(root, ["val"]).class_names == ["cat", "cow", "dog"]  # the same ids whatever is read
    with pytest.raises(DataError, match="no split test; there are: train, val"):
        read_folder(root, ["test"])


@pytest.mark.parametrize(
    "table",
    [
        "file,labels\na b.jpg,dog; cat\n",
        "\ufefffile,labels\r\na b.jpg,dog;cat\r\n\r\n",
        ' File , LABELS \n"a b.jpg", "dog ; cat"\n',
        "labels,file\ndog;;cat;,./a b.jpg",
        "file,labels\na b.jpg,dog\na b.jpg,cat\n",
        "file,labels\nsub/../a b.jpg,dog\n.\\a b.jpg,cat\n",
    ],
)
def test_ways_to_write_the_same_table(tmp_path: Path, table: str) -> None:
    assert labels(read_folder(fill(tmp_path, "a b.jpg", table=table))) == {"a b.jpg": ["cat", "dog"]}


def test_unlisted_images_are_kept_as_unlabelled(tmp_path: Path) -> None:
    root = fill(tmp_path, "a.jpg", "b.JPG", ".hidden.jpg", "labels.txt", table="file,labels\na.jpg,dog\n")
    dataset = read_folder(root)
    assert labels(dataset) == {"a.jpg": ["dog"], "b.JPG": None}
    assert dataset.images["split"].to_pylist() == ["train", "unlabelled"]
    assert labels(read_folder(root, ["train"])) == {"a.jpg": ["dog"]}


def test_the_table_may_be_elsewhere_and_classes_given(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "a.jpg")
    storage.write_bytes(str(tmp_path / "t.csv"), b"file,labels\na.jpg,dog\n")
    dataset = read_folder(root, table=str(tmp_path / "t.csv"), classes=["dog", "ant"])
    assert dataset.class_names == ["dog", "ant"]
    assert dataset.images["labels"].to_pylist() == [[0]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", r"labels\.csv: lists no image"),
        ("file,labels\n", r"labels\.csv: lists no image"),
        ("a.jpg,dog\n", r"labels\.csv, line 1: a header with the columns file, labels .* got 'a\.jpg,dog'"),
        ("file;labels\na.jpg;dog\n", r"line 1: a header .* between commas was expected, got 'file;labels'"),
        ("\nfile,labels,labels\n", "line 2: a header"),
        ("file,labels\na.jpg,dog,cat\n", r"line 2: 3 cells, the header has 2: separate labels with ';'"),
        ("file,labels\na.jpg\n", "line 2: 1 cells, the header has 2"),
        ("file,labels\n\n,dog\n", "line 3: the file is ''"),
        ("file,labels\n../a.jpg,dog\n", r"line 2: the file is '\.\./a\.jpg': a path below the folder"),
        ("file,labels\n/a.jpg,dog\n", "line 2: the file is '/a.jpg'"),
        ("file,labels\na.jpg,dog\na.jpg,dog\n", r"line 3: a\.jpg has label 'dog' already"),
        ("file,labels\na.jpg,dog;dog\n", r"line 2: a\.jpg has label 'dog' already"),
        ("file,labels\na.jpg,\na.jpg,\n", r"line 3: a\.jpg has label '' already"),
        (
            "file,labels\na.jpg,\na.jpg,dog\n",
            r"line 3: a\.jpg is also in line 2: only one of them says that it shows no",
        ),
        (
            "file,labels\na.jpg,dog\na.jpg,\n",
            r"line 3: a\.jpg is also in line 2: only one of them says that it shows no",
        ),
        ("file,labels,split\na.jpg,dog,\n", r"line 2: the split of a\.jpg is empty"),
        ("file,labels,split\na.jpg,dog,x\na.jpg,cat,y\n", r"line 3: a\.jpg is in split 'y', line 2 says 'x'"),
        ("file,labels\na.jpg,zebra\n", r"line 2: class 'zebra' is not among the classes \['dog', 'cat'\]"),
        ("file,labels\nno.jpg,dog\na.jpg,dog\n", r"1 listed files are not in .*: no\.jpg \(line 2\)"),
        ('file,labels\n"a.jpg,dog\n', r"line \d: not valid CSV"),
        ("file,labels\na.jpg,d\xf6g\n".encode("latin-1"), r"labels\.csv: not UTF-8 text"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, table: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_folder(fill(tmp_path, "a.jpg", table=table), classes=["dog", "cat"])


def test_all_faults_of_a_table_are_named_at_once(tmp_path: Path) -> None:
    table = "file,labels\nnope.jpg,dog\na.jpg,dog\na.jpg,dog\n,cat\nb.jpg\n"
    with pytest.raises(DataError) as caught:
        read_folder(fill(tmp_path, "a.jpg", "b.jpg", table=table))
    uri = f"{tmp_path}/labels.csv"
    assert caught.value.faults == [
        f"{uri}, line 4: a.jpg has label 'dog' already: remove the line or the label",
        f"{uri}, line 5: the file is '': a path below the folder was expected",
        f"{uri}, line 6: 1 cells, the header has 2: separate labels with ';'",
        f"{uri}: 1 listed files are not in {tmp_path}: nope.jpg (line 2)",
    ]
    storage.write_bytes(uri, b"file,labels\n" + b",cat\n" * 500)
    with pytest.raises(DataError) as caught:
        read_folder(str(tmp_path))
    assert len(caught.value.faults) == 21
    assert caught.value.faults[-1] == f"{uri}: 480 more lines have faults"


@pytest.mark.parametrize(
    "table",
    [
        "file,labels,,\na.jpg,dog,,\nb.jpg,,,\n,,,\n",
        "file,labels,split,,\na.jpg,dog,train,,\nb.jpg,,train,,\n",
        "file,,labels,note,note,\na.jpg,,dog,x,y,\nb.jpg,,,,,\n",
        "file,labels\na.jpg,dog,,\nb.jpg,,,,\n",
    ],
)
def test_columns_that_are_empty_or_of_another_name_are_no_fault(tmp_path: Path, table: str) -> None:
    assert labels(read_folder(fill(tmp_path, "a.jpg", "b.jpg", table=table))) == {"a.jpg": ["dog"], "b.jpg": []}


def test_class_names_lose_blanks_at_their_ends(tmp_path: Path) -> None:
    root = fill(tmp_path, "a.jpg", table="file,labels\na.jpg, dog \n")
    assert read_folder(root, classes=[" dog", "cat "]).class_names == ["dog", "cat"]
    for classes, message in (
        (["dog", "dog "], r"1 class\(s\) occur more than once: dog"),
        (["dog", " "], "the list of classes: '': a name needs letters"),
        (["caf\u00e9", "cafe\u0301"], r"'caf.xe9', 'cafe.u0301': the same letters as different characters of Unicode"),
        (["dog", "a\tb"], r"'a\\tb': a name needs letters, and no control characters"),
    ):
        with pytest.raises(DataError, match=message):
            read_folder(root, classes=classes)


def test_no_table_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.csv: no such file: a CSV file with columns file and labels"):
        read_folder(fill(tmp_path, "a.jpg"))


# --- VOC XML beside the images


def test_folders_are_splits_and_stems_make_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = fill(tmp_path, "train/a.JPG", "train/b.jpg", "test/a.jpg", "test/deep/c.png")
    for path, names in {"train/a": ["dog"], "test/a": [], "test/deep/c": ["cat", "dog"], "train/gone": ["cow"]}.items():
        storage.write_bytes(str(tmp_path / f"{path}.xml"), xml(*names))
    dataset = read_voc_xml_folder(root)
    assert dataset.class_names == ["cat", "dog"]
    assert labels(dataset) == {
        "test/a.jpg": [],
        "test/deep/c.png": ["cat", "dog"],
        "train/a.JPG": ["dog"],
        "train/b.jpg": None,
    }
    assert dataset.images["split"].to_pylist() == ["test", "test", "train", "train"]
    assert dataset.images["height"].to_pylist() == [None] * 4
    assert dataset.ground_truth is not None
    assert dataset.ground_truth.schema.equals(schemas.GROUND_TRUTH)
    assert dataset.ground_truth["image_id"].to_pylist() == ["test/a.jpg", "test/deep/c.png", "train/a.JPG"]
    assert dataset.ground_truth["boxes"].to_pylist()[1] == [[0, 0, 3, 4]] * 2
    assert "1 XML files have no image beside them and are left out: train/gone.xml" in caplog.text
    assert "1 images have no XML file beside them, their labels are null: train/b.jpg" in caplog.text
    assert list(labels(read_voc_xml_folder(root, ["train"], classes=["dog"]))) == ["train/a.JPG", "train/b.jpg"]


def test_a_flat_folder_is_split_train(tmp_path: Path) -> None:
    root = fill(tmp_path, "a.jpg")
    storage.write_bytes(str(tmp_path / "a.xml"), xml("dog"))
    assert read_voc_xml_folder(root).images["split"].to_pylist() == ["train"]


def test_faults_of_an_xml_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        read_voc_xml_folder(str(tmp_path))
    root = fill(tmp_path, "a.jpg")
    with pytest.raises(DataError, match="none of 1 images has an XML file of the same name beside it"):
        read_voc_xml_folder(root)
    storage.write_bytes(str(tmp_path / "a.xml"), b"<annotation>")
    with pytest.raises(DataError, match=r"a\.xml, line 1: not well-formed XML"):
        read_voc_xml_folder(root)
    with pytest.raises(DataError, match="no split val; there are: train"):
        read_voc_xml_folder(root, ["val"])
    fill(tmp_path, "a.png")
    with pytest.raises(DataError, match="two files of one image"):
        read_voc_xml_folder(root)


def test_real_folder_with_xml() -> None:
    root = SHARED_DATA / "cards"
    if not root.exists():
        pytest.skip(f"no data at {root}")
    dataset = read_voc_xml_folder(str(root), ["train", "test"])
    assert dataset.class_names == ["ace", "jack", "king", "nine", "queen", "ten"]
    assert dataset.images["split"].to_pylist() == ["train"] * 296 + ["test"] * 67
    assert dataset.ground_truth is not None
    assert sum(len(boxes) for boxes in dataset.ground_truth["boxes"].to_pylist()) == 527 + 143
    nulls = dataset.images.select(["image_id", "uri"])
    blank = schemas.to_table(nulls.to_pylist(), schemas.IMAGES)
    assert fill_sizes(blank).select(["height", "width"]).equals(dataset.images.select(["height", "width"]))


@pytest.mark.parametrize("unseen", ["\u200b", "\ufeff", "\x85", "\u2028"])
def test_class_names_have_no_unseen_characters(tmp_path: Path, unseen: str) -> None:
    root = fill(tmp_path, "a.jpg", "b.jpg", table=f"file,labels\na.jpg,cat\nb.jpg,ca{unseen}t\n")
    with pytest.raises(DataError, match=r"the list of classes: .*: a name needs letters, and no control"):
        read_folder(root)


@pytest.mark.parametrize("split", ["../z", "x/.y", "/x", "x\x1fy", "a\u200b"])
def test_splits_can_be_names_of_files(tmp_path: Path, split: str) -> None:
    root = fill(tmp_path, "a.jpg", table=f"file,labels,split\na.jpg,cat,{split}\n")
    with pytest.raises(DataError, match=r"the splits: .*: a name needs letters, no dot before them") as caught:
        read_folder(root)
    assert repr(split) in str(caught.value)
    assert read_folder(fill(tmp_path, "a.jpg", table="file,labels,split\na.jpg,cat,a/b\n")).class_names == ["cat"]


def test_a_dataset_has_an_image() -> None:
    with pytest.raises(DataError, match="the dataset: lists no image"):
        make_dataset([], ["cat"])
