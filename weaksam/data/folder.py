"""Plain folders of images: with a `labels.csv`, or with VOC XML files beside the images (LabelImg and its kin).

An image's id is its path below the root, with '/' between folders. Hidden files are no images.

`labels.csv` is UTF-8 with a header: columns `file` and `labels`, and `split` if wanted; others are ignored.
Labels are separated by ';' or '|', or stand on several lines of one file. An empty cell says that the image shows
none of the classes. Without a split column the images are split `train`. Images that the table does not list are
kept as split `unlabelled`, labels null: nothing is known of them, and they can still be detected on.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from weaksam import storage
from weaksam.data import voc
from weaksam.data.datasets import (
    Dataset,
    ImageRecord,
    MapFiles,
    by_stem,
    first_ten,
    make_dataset,
    map_in_threads,
    warn_of,
)
from weaksam.data.images import EXTENSIONS
from weaksam.errors import DataError
from weaksam.storage import FileInfo

DEFAULT_SPLIT = "train"
UNLABELLED = "unlabelled"


@dataclass
class _Listed:
    """What the table says of one file; `line` is where it is first named."""

    line: int
    split: str
    labels: list[str] = field(default_factory=list)


def read_folder(
    root: str,
    splits: Sequence[str] | None = None,
    *,
    table: str = "labels.csv",
    classes: Sequence[str] | None = None,
) -> Dataset:
    """A folder of images whose labels stand in a CSV file. It has no boxes, so no ground truth.

    Args:
        root: URI of the folder.
        splits: which splits to keep, `unlabelled` among them. None: all.
        table: path of the CSV file below `root`, or a URI.
        classes: names in the order wanted; another name is an error. None: those found, sorted.

    Raises:
        DataError: names the file and line.
        StorageError: the storage is at fault.
    """
    root = storage.absolute(root)
    uri = table if storage.is_uri(table) or table.startswith("/") else storage.join(root, table)
    listed = _read_table(uri, classes)
    files = {file.path: file for file in storage.list_files(root)}
    if missing := [f"{path} (line {one.line})" for path, one in listed.items() if path not in files]:
        raise DataError(f"{uri}: {len(missing)} listed files are not in {root}: {first_ten(missing)}")
    records = [
        ImageRecord(path, files[path].uri, one.split, files[path].size, one.labels, f"{uri}, line {one.line}")
        for path, one in listed.items()
    ]
    for path, file in files.items():
        if path not in listed and path.lower().endswith(EXTENSIONS):
            records.append(ImageRecord(path, file.uri, UNLABELLED, file.size, None, file.uri))
    names = classes or sorted({label for one in listed.values() for label in one.labels})
    return make_dataset(_of_splits(records, splits, root), names)


def _read_table(uri: str, classes: Sequence[str] | None) -> dict[str, _Listed]:
    listed: dict[str, _Listed] = {}
    for line, row in _rows(uri):
        where = f"{uri}, line {line}"
        path = posixpath.normpath(row["file"].replace("\\", "/")) if row["file"] else ""
        if not path or path.startswith(("/", "../")):
            raise DataError(f"{where}: the file is {row['file']!r}: a path below the folder was expected")
        split = row.get("split", DEFAULT_SPLIT)
        if not split:
            raise DataError(f"{where}: the split of {path} is empty")
        one = listed.setdefault(path, _Listed(line, split))
        if one.split != split:
            raise DataError(f"{where}: {path} is in split {split!r}, line {one.line} says {one.split!r}")
        labels = [label.strip() for label in re.split("[;|]", row["labels"]) if label.strip()]
        for label in labels or [""]:
            if classes is not None and label and label not in classes:
                raise DataError(f"{where}: class {label!r} is not among the classes {list(classes)}")
            if label in one.labels or (not label and one.line != line):
                raise DataError(f"{where}: {path} has label {label!r} already: remove the line or the label")
            one.labels += [label] if label else []
    if not listed:
        raise DataError(f"{uri}: lists no image")
    return listed


def _rows(uri: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by column name) of a CSV file with a header; blank lines are left out."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file: a CSV file with columns file and labels was expected") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not UTF-8 text ({error}): save it as CSV UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    header: list[str] = []
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{uri}, line {reader.line_num}: not valid CSV ({error})") from error
        if cells is None:
            return
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if not header:
            header = [cell.lower() for cell in cells]
            if not {"file", "labels"} <= set(header) or len(set(header)) != len(header):
                raise DataError(
                    f"{uri}, line {reader.line_num}: a header with the columns file, labels (and split) between "
                    f"commas was expected, got {','.join(cells)!r}"
                )
        elif len(cells) != len(header):
            raise DataError(
                f"{uri}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}: "
                "separate labels with ';'"
            )
        else:
            yield reader.line_num, dict(zip(header, cells, strict=True))


def _of_splits(records: list[ImageRecord], splits: Sequence[str] | None, root: str) -> list[ImageRecord]:
    found = sorted({record.split for record in records})
    _check_splits(splits, found, root)
    return [record for split in splits or found for record in records if record.split == split]


def _check_splits(splits: Sequence[str] | None, found: Collection[str], root: str) -> None:
    if unknown := [split for split in splits or () if split not in found]:
        raise DataError(f"{root}: no split {', '.join(unknown)}; there are: {first_ten(sorted(found))}")


def read_voc_xml_folder(
    root: str,
    splits: Sequence[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    difficult_makes_label: bool = False,
    map_files: MapFiles = map_in_threads,
) -> Dataset:
    """A folder of images with VOC XML files of the same name beside them.

    Folders directly below `root` are splits; images in `root` itself are split `train`. An image without XML has
    null labels: many tools write no file for an image nobody opened. XML without an image is left out with a warning.

    Args:
        root: URI of the folder.
        splits: which splits to keep. None: all.
        classes: names in the order wanted; another name is an error. None: those found in these splits, sorted.
        difficult_makes_label: whether an object flagged difficult makes an image-level label.
        map_files: how to call a function on many `VocFiles`; has the form of the builtin `map`.

    Raises:
        DataError: names the file and line, or that no image has an XML file.
        StorageError: the storage is at fault.
    """
    root = storage.absolute(root)
    pictures, xmls = _find_pairs(root, splits)
    annotated = [stem for stem in pictures if stem in xmls]
    found = map_files(voc.read_annotation, [voc.VocFiles(xmls[stem].uri) for stem in annotated])
    annotations = dict(zip(annotated, found, strict=True))
    voc.warn_of_objects(root, list(annotations.values()))
    records = [
        voc.make_record(file.path, file, _split_of(stem), annotations.get(stem), difficult_makes_label)
        for stem, file in pictures.items()
    ]
    names = classes or sorted({name for annotation in annotations.values() for name in annotation.names})
    return make_dataset(_of_splits(records, splits, root), names)


def _find_pairs(root: str, splits: Sequence[str] | None) -> tuple[dict[str, FileInfo], dict[str, FileInfo]]:
    """Images and XML files of the splits asked for, by their path without extension."""
    files = storage.list_files(root)
    pictures, xmls = by_stem(files, EXTENSIONS), by_stem(files, (".xml",))
    if not pictures:
        raise DataError(f"{root}: holds no image")
    if not pictures.keys() & xmls.keys():
        raise DataError(f"{root}: none of {len(pictures)} images has an XML file of the same name beside it")
    _check_splits(splits, {_split_of(stem) for stem in pictures}, root)
    pictures, xmls = (
        {stem: file for stem, file in some.items() if splits is None or _split_of(stem) in splits}
        for some in (pictures, xmls)
    )
    lost = [file.path for stem, file in xmls.items() if stem not in pictures]
    warn_of(root, "XML files have no image beside them and are left out", lost)
    unlabelled = [file.path for stem, file in pictures.items() if stem not in xmls]
    warn_of(root, "images have no XML file beside them, their labels are null", unlabelled)
    return pictures, xmls


def _split_of(path: str) -> str:
    return path.partition("/")[0] if "/" in path else DEFAULT_SPLIT
