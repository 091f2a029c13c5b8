"""Reads Pascal VOC devkits (2007 and 2012 layout) as tables.

Image-level labels are the classes of an image's objects; objects flagged difficult give no label, as in the WSOD
papers' code. An image without an annotation file has null labels. Sizes are those in the annotation; images are
not opened. A box without area inside the image is left out with a warning, but its class remains a label: the
annotator did see the object. The class of an object without <bndbox> is a label too; its box is the bounding box of
its <robndbox>, <polygon> or mask, if it has any. Each <bndbox> of an object with several becomes an object.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from weaksam.core import storage
from weaksam.core.look import Look
from weaksam.core.storage import FileInfo
from weaksam.data.datasets import (
    Dataset,
    ImageRecord,
    MapFiles,
    by_stem,
    check_unique,
    first_ten,
    make_dataset,
    map_in_threads,
    warn_of,
)
from weaksam.data.images import EXTENSIONS
from weaksam.data.readers.format import DatasetFormat, DatasetSource, Listed
from weaksam.data.readers.voc_annotations import VocFiles, check_sample, make_record, read_annotation, warn_of_objects
from weaksam.data.readers.voc_xml import VocAnnotation
from weaksam.errors import DataError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_FOLDERS = ("ImageSets", "Annotations", "JPEGImages", "SegmentationObject")
_OF_CLASS = re.compile(r"\S\s+(?:-1|0|1)\s*$")


def read_voc(
    root: str,
    splits: Sequence[str],
    *,
    classes: Sequence[str] | None = None,
    difficult_makes_label: bool = False,
    masks: bool = True,
    map_files: MapFiles = map_in_threads,
) -> Dataset:
    """Reads a VOC devkit.

    Args:
        root: URI of the folder with ImageSets and JPEGImages, or of a VOCdevkit folder with one such folder.
        splits: names of files in ImageSets/Main without `.txt`; a name with a slash is relative to ImageSets.
        classes: names in class order. None: the 20 of VOC if no other occurs, else the names that occur, sorted.
        difficult_makes_label: whether an object flagged difficult gives an image-level label.
        masks: whether to read SegmentationObject if it exists: its value i is the i-th object of the XML.
        map_files: calls a function on 10^5 `VocFiles`, like the builtin `map`.

    Raises:
        DataError: the data is invalid; names the file and line, or the first ten image ids.
        StorageError: the storage is at fault.
    """
    root = find_devkit(storage.absolute(root))
    pictures = by_stem(storage.list_files(storage.join(root, "JPEGImages"), recursive=False), EXTENSIONS)
    ids = read_splits(root, splits, pictures)
    annotations = _read_annotations(root, [i for split_ids in ids.values() for i in split_ids], masks, map_files)
    images = []
    for split, split_ids in ids.items():
        unlabelled = [i for i in split_ids if i not in annotations]
        if len(unlabelled) < len(split_ids):
            warn_of(root, f"images of split {split!r} have no annotation file, their labels are null", unlabelled)
        for i in split_ids:
            images.append(make_record(i, pictures[i], split, annotations.get(i), difficult_makes_label))
    warn_of_objects(root, list(annotations.values()))
    return make_dataset(images, classes or default_classes(images))


def read_splits(root: str, splits: Sequence[str], pictures: Collection[str]) -> dict[str, list[str]]:
    """Reads the image ids of each split of the devkit `root`.

    Args:
        root: URI of the folder with ImageSets and JPEGImages.
        splits: see `read_voc`.
        pictures: names in JPEGImages without extension; must include every id.

    Raises:
        DataError: a list is invalid; names the list and the line, or the first ten image ids.
    """
    ids = {split: _read_split(root, split, pictures) for split in splits}
    check_unique([i for split_ids in ids.values() for i in split_ids], f"{root}: splits {list(splits)}", "image id")
    for split, split_ids in ids.items():
        if missing := [i for i in split_ids if i not in pictures]:
            raise DataError(
                f"{root}/ImageSets: {len(missing)} of {len(split_ids)} ids of split {split!r} have no file in "
                f"JPEGImages: {first_ten(missing)}"
            )
    return ids


def find_devkit(root: str) -> str:
    """Returns the folder with ImageSets and JPEGImages: `root`, or the only VOC folder in it.

    Raises:
        DataError: there is no such folder, or more than one.
    """
    folders = storage.list_folders(root)
    if {"ImageSets", "JPEGImages"} <= set(folders):
        return root
    inner = [name for name in folders if name.startswith("VOC")]
    if len(inner) == 1:
        return find_devkit(storage.join(root, inner[0]))
    if inner:
        raise DataError(
            f"{root}: holds {', '.join(inner)}: say which, for example root: {storage.join(root, inner[0])}"
        )
    raise DataError(
        f"{root}: not a VOC devkit: ImageSets and JPEGImages were expected, "
        + (f"found {first_ten(folders)}" if folders else "found no folder")
    )


def _read_split(root: str, split: str, pictures: Collection[str]) -> list[str]:
    uri = storage.join(root, "ImageSets", (split if "/" in split else f"Main/{split}") + ".txt")
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        listed = storage.list_files(uri.rpartition("/")[0], recursive=False)
        names = [file.path.removesuffix(".txt") for file in listed if file.path.endswith(".txt")]
        per_class = tuple(f"{name}_" for name in CLASSES)
        names = [name for name in names if not name.startswith(per_class)]
        raise DataError(f"{uri}: no such split; there are: {first_ten(names) or 'none'}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{uri}: not a text file ({error})") from error
    ids = [line.strip() for line in text.splitlines() if line.strip()]
    # Names may contain blanks; in the list of a class each id is followed by 1, 0 or -1 (difficult).
    for count, line in enumerate(text.splitlines(), start=1):
        if _OF_CLASS.search(line) and line.strip() not in pictures:
            raise DataError(f"{uri}, line {count}: one image id was expected, got {line!r} (a list of one class?)")
    if not ids:
        raise DataError(f"{uri}: lists no image id")
    check_unique(ids, uri, "image id")
    return ids


def _read_annotations(root: str, ids: Sequence[str], masks: bool, map_files: MapFiles) -> dict[str, VocAnnotation]:
    xmls = by_stem(storage.list_files(storage.join(root, "Annotations"), recursive=False), (".xml",))
    pngs: dict[str, FileInfo] = {}
    if masks:
        pngs = by_stem(storage.list_files(storage.join(root, "SegmentationObject"), recursive=False), (".png",))
    annotated = [i for i in ids if i in xmls]
    files = [VocFiles(xmls[i].uri, pngs[i].uri if i in pngs else None) for i in annotated]
    return dict(zip(annotated, map_files(read_annotation, files), strict=True))


def default_classes(images: Sequence[ImageRecord]) -> list[str]:
    """Returns the 20 classes of VOC if no other occurs, else the names that occur, sorted."""
    names = {name for image in images if image.objects for name in image.objects.names}
    names |= {name for image in images for name in image.labels or ()}
    return list(CLASSES) if names <= set(CLASSES) else sorted(names)


# --- the format


def _read(source: DatasetSource) -> Dataset:
    return read_voc(
        source.root,
        source.splits or [],
        classes=source.classes,
        difficult_makes_label=source.difficult_makes_label,
        masks=source.masks,
    )


def _look(source: DatasetSource) -> Look:
    """Reads the lists of the splits and a sample of the XML files."""
    root = find_devkit(source.root)
    pictures = by_stem(storage.list_files(storage.join(root, "JPEGImages"), recursive=False), EXTENSIONS)
    ids = [i for split in read_splits(root, source.splits or [], pictures).values() for i in split]
    xmls = by_stem(storage.list_files(storage.join(root, "Annotations"), recursive=False), (".xml",))
    read, unread, faults = check_sample([xmls[i].uri for i in ids if i in xmls], source.classes)
    return Look(f"the lists of {len(ids)} images and {read}", f"{unread}the images themselves", faults)


def _contents(source: DatasetSource) -> dict[str, Listed]:
    devkit = find_devkit(source.root)
    return {folder: Listed(storage.join(devkit, folder)) for folder in _FOLDERS}


def _listed(source: DatasetSource) -> list[str]:
    """Returns the folders of the devkit, which may be in the root or in the folder of a year."""
    root = source.root
    years = [root, *(storage.join(root, name) for name in storage.list_folders(root) if name.startswith("VOC"))]
    return [storage.join(year, name) for year in years for name in _FOLDERS]


FORMAT = DatasetFormat(
    "voc",
    "a devkit: ImageSets, Annotations, JPEGImages",
    _read,
    _look,
    contents=_contents,
    listed=_listed,
    settings=("difficult_makes_label",),
    needs_splits=True,
)
