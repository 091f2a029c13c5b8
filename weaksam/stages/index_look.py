"""Checks a dataset for `weaksam check`: reads whole lists and tables, and annotation files up to a limit."""

from __future__ import annotations

from collections.abc import Sequence

from weaksam.core import storage
from weaksam.core.step import Look
from weaksam.data.datasets import by_stem, class_list, map_in_threads
from weaksam.data.images import EXTENSIONS
from weaksam.data.readers import voc
from weaksam.data.readers.folder import find_pairs
from weaksam.data.readers.voc import VocAnnotation, VocFiles
from weaksam.errors import DataError
from weaksam.stages.index_config import IndexConfig, below, coco_split, read_dataset

_MOST_BYTES = 32 * 1024**2  # limit for json files that are read whole: a second or two
_MOST_XML = 200
_HEAD = 4096


def look(config: IndexConfig) -> Look:
    """Checks the dataset that a step will index; reads no image file.

    Raises:
        StorageError: the storage is at fault.
    """
    looks = {"folder": _at_folder, "coco": _at_coco, "voc": _at_voc, "voc_folder": _at_voc_folder}
    try:
        return looks[config.format](config)
    except DataError as error:
        return Look("its lists", "what they name", error.faults)


def _at_folder(config: IndexConfig) -> Look:
    table = below(config.root, config.labels_file)
    try:
        count = read_dataset(config).images.num_rows
    except DataError as error:
        return Look(table, "the images", error.faults)
    return Look(f"{table} and the names of {count} images", "the images themselves")


def _at_coco(config: IndexConfig) -> Look:
    uris = [coco_split(config, split)[0] for split in config.splits or []]
    if sum(storage.size(uri) for uri in uris) <= _MOST_BYTES:
        try:
            count = read_dataset(config).images.num_rows
        except DataError as error:
            return Look(", ".join(uris), "the images", error.faults)
        return Look(f"{', '.join(uris)} and the names of {count} images", "the images themselves")
    faults = []
    for uri in uris:
        head = storage.read_bytes(uri, length=_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not head.startswith(b"{"):
            faults.append(f"{uri}: not in COCO's form: it begins with {head[:20]!r}, not with an object")
    return Look(f"the beginning of {', '.join(uris)}", "the rest of what is larger than 32 MB, and the images", faults)


def _at_voc(config: IndexConfig) -> Look:
    root = voc.find_devkit(storage.absolute(config.root))
    pictures = by_stem(storage.list_files(storage.join(root, "JPEGImages"), recursive=False), EXTENSIONS)
    ids = [i for split in voc.read_splits(root, config.splits or [], pictures).values() for i in split]
    xmls = by_stem(storage.list_files(storage.join(root, "Annotations"), recursive=False), (".xml",))
    read, unread, faults = _check_xml([xmls[i].uri for i in ids if i in xmls], config)
    return Look(f"the lists of {len(ids)} images and {read}", f"{unread}the images themselves", faults)


def _at_voc_folder(config: IndexConfig) -> Look:
    pictures, xmls = find_pairs(storage.absolute(config.root), config.splits)
    read, unread, faults = _check_xml([xmls[stem].uri for stem in pictures if stem in xmls], config)
    return Look(f"the names of {len(pictures)} images and {read}", f"{unread}the images themselves", faults)


def _check_xml(uris: Sequence[str], config: IndexConfig) -> tuple[str, str, list[str]]:
    """Reads a sample of XML files; returns texts that describe the read and the unread files, and the faults."""
    sample = uris[:: -(-len(uris) // _MOST_XML) or 1]
    faults, annotations = [], []
    for result in map_in_threads(_read_xml, sample):
        (annotations if isinstance(result, VocAnnotation) else faults).append(result)
    if config.classes is not None:
        classes = class_list(config.classes)
        unknown = {name: xml.uri for xml in annotations for name in xml.names if name not in classes}
        faults += [f"{uri}: class {name!r} is not among the classes {classes}" for name, uri in unknown.items()]
    if len(faults) > 20:
        faults[20:] = [f"{len(faults) - 20} more files have faults"]
    unread = f"{len(uris) - len(sample)} other XML files and " if len(sample) < len(uris) else ""
    return f"{len(sample)} of {len(uris)} XML files", unread, faults


def _read_xml(uri: str) -> VocAnnotation | str:
    try:
        return voc.read_annotation(VocFiles(uri))
    except (DataError, FileNotFoundError) as error:
        return str(error)
