"""Reads folders of images with VOC XML files beside them (LabelImg and similar).

An image's id is its path below the root, with '/' between folders. Hidden files are ignored. Boxes and labels are those
of `voc`.
"""

from __future__ import annotations

from collections.abc import Sequence

from weaksam.core import storage
from weaksam.core.look import Look
from weaksam.core.storage import FileInfo
from weaksam.data.datasets import (
    Dataset,
    MapFiles,
    by_stem,
    check_split_names,
    keep_splits,
    make_dataset,
    map_in_threads,
    warn_of,
)
from weaksam.data.images import EXTENSIONS
from weaksam.data.readers.format import DatasetFormat, DatasetSource
from weaksam.data.readers.labels_csv import DEFAULT_SPLIT
from weaksam.data.readers.voc_annotations import VocFiles, check_sample, make_record, read_annotation, warn_of_objects
from weaksam.errors import DataError


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
    parsed = map_files(read_annotation, [VocFiles(xmls[stem].uri) for stem in annotated])
    annotations = dict(zip(annotated, parsed, strict=True))
    warn_of_objects(root, list(annotations.values()))
    records = [
        make_record(file.path, file, _split_of(stem), annotations.get(stem), difficult_makes_label)
        for stem, file in pictures.items()
    ]
    names = classes or sorted({name for annotation in annotations.values() for name in annotation.names})
    return make_dataset(keep_splits(records, splits, root), names)


def find_pairs(root: str, splits: Sequence[str] | None) -> tuple[dict[str, FileInfo], dict[str, FileInfo]]:
    """Returns images and XML files of the requested splits, by their path without extension."""
    files = storage.list_files(root)
    pictures, xmls = by_stem(files, EXTENSIONS), by_stem(files, (".xml",))
    if not pictures:
        raise DataError(f"{root}: holds no image")
    if not pictures.keys() & xmls.keys():
        raise DataError(f"{root}: none of {len(pictures)} images has an XML file of the same name beside it")
    check_split_names(splits, {_split_of(stem) for stem in pictures}, root)
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


# --- the format


def _read(source: DatasetSource) -> Dataset:
    difficult = source.difficult_makes_label
    return read_voc_xml_folder(source.root, source.splits, classes=source.classes, difficult_makes_label=difficult)


def _look(source: DatasetSource) -> Look:
    """Reads the names of the images and a sample of the XML files."""
    pictures, xmls = find_pairs(source.root, source.splits)
    read, unread, faults = check_sample([xmls[stem].uri for stem in pictures if stem in xmls], source.classes)
    return Look(f"the names of {len(pictures)} images and {read}", f"{unread}the images themselves", faults)


FORMAT = DatasetFormat(
    "voc_folder", "images with VOC XML files beside them", _read, _look, settings=("difficult_makes_label",)
)
