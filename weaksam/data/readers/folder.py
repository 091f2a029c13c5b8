"""Reads folders of images with a `labels.csv` (`labels_csv`).

An image's id is its path below the root, with '/' between folders. Hidden files are ignored. Images that are not in
`labels.csv` become split `unlabelled` with null labels: detectors can still run on them.
"""

from __future__ import annotations

from collections.abc import Sequence

from weaksam.core import storage
from weaksam.core.look import Look
from weaksam.data.datasets import Dataset, ImageRecord, class_list, first_ten, keep_splits, make_dataset, warn_of
from weaksam.data.images import EXTENSIONS
from weaksam.data.readers.format import DatasetFormat, DatasetSource, Listed, Whole, look_by_reading
from weaksam.data.readers.labels_csv import read_labels
from weaksam.errors import DataError

UNLABELLED = "unlabelled"
_COMMA = "labels have a comma and are a class each (are they several labels? separate them with ';')"


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
    if classes is None:
        warn_of(uri, _COMMA, [repr(name) for name in names if "," in name])
    return make_dataset(keep_splits(records, splits, root), names)


# --- the format


def _read(source: DatasetSource) -> Dataset:
    return read_folder(source.root, source.splits, table=source.uri_of(source.labels_file), classes=source.classes)


def _look(source: DatasetSource) -> Look:
    return look_by_reading(_read, source, source.uri_of(source.labels_file))


FORMAT = DatasetFormat(
    "folder",
    "images and a labels.csv",
    _read,
    _look,
    contents=lambda source: {"listing": Listed(source.root), "labels": Whole(source.uri_of(source.labels_file))},
    settings=("labels_file",),
)
