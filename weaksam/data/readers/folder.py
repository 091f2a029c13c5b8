"""Reads folders of images: with a `labels.csv`, or with VOC XML files beside the images (LabelImg and similar).

An image's id is its path below the root, with '/' between folders. Hidden files are ignored.

Images that are not in `labels.csv` (`labels_csv`) become split `unlabelled` with null labels: detectors can still run
on them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from weaksam.core import storage
from weaksam.core.storage import FileInfo
from weaksam.data.datasets import (
    Dataset,
    ImageRecord,
    MapFiles,
    by_stem,
    class_list,
    first_ten,
    make_dataset,
    map_in_threads,
    warn_of,
)
from weaksam.data.images import EXTENSIONS
from weaksam.data.readers import voc
from weaksam.data.readers.labels_csv import DEFAULT_SPLIT, read_labels
from weaksam.errors import DataError

UNLABELLED = "unlabelled"


def read_folder(
    root: str,
    splits: Sequence[str] | None = None,
    *,
    table: str = "labels.csv",
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Reads a folder of images with labels in a CSV file. It has no boxes, so no ground truth.

    Args:
        root: URI of the folder.
        splits: splits to keep, may include `unlabelled`. None: all.
        table: path of the CSV file below `root`, or a URI.
        classes: names in class order; any other name is an error. None: the names in the table, sorted.

    Raises:
        DataError: the table is invalid; has every fault, each with file and line.
        StorageError: the storage is at fault.
    """
    root = storage.absolute(root)
    uri = table if storage.is_uri(table) or table.startswith("/") else storage.join(root, table)
    classes = None if classes is None else class_list(classes)
    listed, faults = read_labels(uri, classes)
    files = {file.path: file for file in storage.list_files(root)}
    if missing := [f"{path} (line {row.line})" for path, row in listed.items() if path not in files]:
        faults.append(f"{uri}: {len(missing)} listed files are not in {root}: {first_ten(missing)}")
    if faults:
        raise DataError(*faults)
    records = [
        ImageRecord(path, files[path].uri, row.split, files[path].size, row.labels, f"{uri}, line {row.line}")
        for path, row in listed.items()
    ]
    for path, file in files.items():
        if path not in listed and path.lower().endswith(EXTENSIONS):
            records.append(ImageRecord(path, file.uri, UNLABELLED, file.size, None, file.uri))
    names = classes or sorted({label for row in listed.values() for label in row.labels})
    return make_dataset(_of_splits(records, splits, root), names)


def _of_splits(records: list[ImageRecord], splits: Sequence[str] | None, root: str) -> list[ImageRecord]:
    available = sorted({record.split for record in records})
    _check_splits(splits, available, root)
    return [record for split in splits or available for record in records if record.split == split]


def _check_splits(splits: Sequence[str] | None, available: Collection[str], root: str) -> None:
    if unknown := [split for split in splits or () if split not in available]:
        raise DataError(f"{root}: no split {', '.join(unknown)}; there are: {first_ten(sorted(available))}")


def read_voc_xml_folder(
    root: str,
    splits: Sequence[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    difficult_makes_label: bool = False,
    map_files: MapFiles = map_in_threads,
) -> Dataset:
    """Reads a folder of images with VOC XML files of the same name beside them.

    Folders directly below `root` are splits; images in `root` itself are split `train`. An image without XML has
    null labels: many tools write no file for an image that nobody opened. XML without an image is skipped with a
    warning.

    Args:
        root: URI of the folder.
        splits: splits to keep. None: all.
        classes: names in class order; any other name is an error. None: the names in these splits, sorted.
        difficult_makes_label: whether an object flagged difficult gives an image-level label.
        map_files: calls a function on many `VocFiles`, like the builtin `map`.

    Raises:
        DataError: a file is invalid, with file and line, or no image has an XML file.
        StorageError: the storage is at fault.
    """
    root = storage.absolute(root)
    pictures, xmls = find_pairs(root, splits)
    annotated = [stem for stem in pictures if stem in xmls]
    parsed = map_files(voc.read_annotation, [voc.VocFiles(xmls[stem].uri) for stem in annotated])
    annotations = dict(zip(annotated, parsed, strict=True))
    voc.warn_of_objects(root, list(annotations.values()))
    records = [
        voc.make_record(file.path, file, _split_of(stem), annotations.get(stem), difficult_makes_label)
        for stem, file in pictures.items()
    ]
    names = classes or sorted({name for annotation in annotations.values() for name in annotation.names})
    return make_dataset(_of_splits(records, splits, root), names)


def find_pairs(root: str, splits: Sequence[str] | None) -> tuple[dict[str, FileInfo], dict[str, FileInfo]]:
    """Returns images and XML files of the requested splits, by their path without extension."""
    files = storage.list_files(root)
    pictures, xmls = by_stem(files, EXTENSIONS), by_stem(files, (".xml",))
    if not pictures:
        raise DataError(f"{root}: holds no image")
    if not pictures.keys() & xmls.keys():
        raise DataError(f"{root}: none of {len(pictures)} images has an XML file of the same name beside it")
    _check_splits(splits, {_split_of(stem) for stem in pictures}, root)
    pictures, xmls = (
        {stem: file for stem, file in group.items() if splits is None or _split_of(stem) in splits}
        for group in (pictures, xmls)
    )
    lost = [file.path for stem, file in xmls.items() if stem not in pictures]
    warn_of(root, "XML files have no image beside them and are left out", lost)
    unlabelled = [file.path for stem, file in pictures.items() if stem not in xmls]
    warn_of(root, "images have no XML file beside them, their labels are null", unlabelled)
    return pictures, xmls


def _split_of(path: str) -> str:
    return path.partition("/")[0] if "/" in path else DEFAULT_SPLIT
