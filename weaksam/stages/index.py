"""a dataset on storage -> images, and ground_truth beside it where the dataset has boxes.

Everything later reads the `images` table, so a dataset's own conventions end here. Image files are listed; read are the
headers of some, to compare sizes, or of all where they are to be turned.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from weaksam.core import schemas, storage, tables
from weaksam.core.step import Outcome, Stage, Step
from weaksam.data.datasets import sample_dataset
from weaksam.data.images import read_sizes
from weaksam.data.orientation import turn_dataset
from weaksam.data.readers.voc import find_devkit
from weaksam.data.stated_sizes import warn_of_sizes
from weaksam.errors import ConfigError
from weaksam.stages.index_config import IndexConfig, below, coco_split, read_dataset
from weaksam.stages.index_look import look

_ROWS_PER_PART = 20_000
_HEADERS = 256  # images whose headers are read, a second's work on object storage; later steps compare all they decode
_VOC_FOLDERS = ("ImageSets", "Annotations", "JPEGImages", "SegmentationObject")


def run(step: Step) -> Outcome:
    """Reads the annotations and writes both tables."""
    config: IndexConfig = step.config
    dataset = read_dataset(config)
    if config.sample is not None:
        dataset = sample_dataset(dataset, config.sample)
    if config.orientation == "stored":
        dataset = turn_dataset(dataset, config.root)
    _compare_sizes(step, dataset.images)
    names = dataset.class_names
    schema = schemas.with_metadata(
        schemas.IMAGES,
        fingerprint=step.fingerprint,
        class_names=names,
        category_ids=dataset.category_ids,
        ids_are_numbers=dataset.ids_are_numbers,
    )
    images = dataset.images.replace_schema_metadata(schema.metadata)
    if dataset.ground_truth is not None:
        tables.write_ground_truth(step.folder, dataset.ground_truth.replace_schema_metadata(schema.metadata))
    parts = [
        tables.write_part(step.folder, images.slice(start, _ROWS_PER_PART))
        for start in range(0, images.num_rows, _ROWS_PER_PART)
    ]
    splits = images.column("split").value_counts().to_pylist()
    counts = ", ".join(f"{row['counts']} {row['values']}" for row in splits)
    truth = "with boxes" if dataset.ground_truth is not None else "no boxes"
    return Outcome(rows=images.num_rows, parts=parts, summary=f"{counts}; {len(names)} classes, {truth}")


def _compare_sizes(step: Step, images: pa.Table) -> None:
    """Warns when the dataset states other sizes than the headers of some of its images do."""
    stated = images.filter(images["height"].is_valid())  # a width is stated with it
    some = stated.take(pa.array(np.linspace(0, stated.num_rows - 1, min(stated.num_rows, _HEADERS)).astype(int)))
    rows = some.select(["image_id", "uri", "height", "width"]).to_pylist()
    sizes = read_sizes([row["uri"] for row in rows])
    pairs = [
        (row["image_id"], (row["height"], row["width"]), size or (None, None))
        for row, size in zip(rows, sizes, strict=True)
    ]
    warn_of_sizes(f"{step.name}: of {len(rows)} images looked at", pairs)


def _identify(config: IndexConfig) -> dict[str, str]:
    """Listings of everything that is read, by paths below the root.

    A file added, removed or rewritten makes another dataset, a dataset that moved is the same.
    """
    root = storage.absolute(config.root)
    if not storage.exists(root):
        raise ConfigError(f"root: there is no folder {root}")
    found = {}
    if config.format == "coco":
        for split in config.splits or []:
            annotations, folder = coco_split(config, split)
            found |= {f"annotations.{split}": storage.identity(annotations), f"images.{split}": _list_identity(folder)}
    elif config.format == "voc":
        devkit = find_devkit(root)
        found |= {folder: _list_identity(storage.join(devkit, folder)) for folder in _VOC_FOLDERS}
    else:
        found["listing"] = _list_identity(root)
    if config.format == "folder":
        found["labels"] = storage.identity(below(root, config.labels_file))
    return found


def _list_identity(folder: str) -> str:
    return storage.listing_identity(storage.list_files(folder))


def _places(config: IndexConfig) -> dict[str, str]:
    """Where the images lie: rows hold their URIs."""
    if config.format != "coco":
        return {"root": storage.absolute(config.root)}
    return {f"images.{split}": coco_split(config, split)[1] for split in config.splits or []}


def _listed(config: IndexConfig) -> list[str]:
    """Folders that `_identify` lists; of a devkit, those of one year, which may lie one folder down."""
    if config.format == "coco":
        return [coco_split(config, split)[1] for split in config.splits or []]
    if config.format == "voc":
        root = storage.absolute(config.root)
        years = [root, *(storage.join(root, name) for name in storage.list_folders(root) if name.startswith("VOC"))]
        return [storage.join(year, name) for year in years for name in _VOC_FOLDERS]
    return [storage.absolute(config.root)]


STAGE = Stage(
    "index",
    3,
    IndexConfig,
    run,
    writes="images",
    outside=_identify,
    places=_places,
    listed=_listed,
    look=lambda step: look(step.config),
)
