"""a dataset on storage -> images, and ground_truth beside it if the dataset has boxes.

All later stages read the `images` table, so only this stage knows a dataset's own conventions. Image files are listed.
Only headers of images are read: of some to compare sizes, of all to convert stored orientations.
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
_HEADERS = 256  # headers that are read, about a second on object storage; later steps compare all images they decode
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
    """Warns when the dataset states other sizes than the headers of a sample of its images."""
    stated = images.filter(images["height"].is_valid())  # a width is stated with it
    sample = stated.take(pa.array(np.linspace(0, stated.num_rows - 1, min(stated.num_rows, _HEADERS)).astype(int)))
    rows = sample.select(["image_id", "uri", "height", "width"]).to_pylist()
    sizes = read_sizes([row["uri"] for row in rows])
    pairs = [
        (row["image_id"], (row["height"], row["width"]), size or (None, None))
        for row, size in zip(rows, sizes, strict=True)
    ]
    warn_of_sizes(f"{step.name}: of {len(rows)} images looked at", pairs)


def _identify(config: IndexConfig) -> dict[str, str]:
    """Returns identities of the listings of everything that is read, by paths below the root.

    A file that is added, removed or rewritten makes another dataset; a dataset that moved is the same.
    """
    root = storage.absolute(config.root)
    if not storage.exists(root):
        raise ConfigError(f"root: there is no folder {root}")
    identities = {}
    if config.format == "coco":
        for split in config.splits or []:
            annotations, folder = coco_split(config, split)
            identities[f"annotations.{split}"] = storage.identity(annotations)
            identities[f"images.{split}"] = _list_identity(folder)
    elif config.format == "voc":
        devkit = find_devkit(root)
        identities |= {folder: _list_identity(storage.join(devkit, folder)) for folder in _VOC_FOLDERS}
    else:
        identities["listing"] = _list_identity(root)
    if config.format == "folder":
        identities["labels"] = storage.identity(below(root, config.labels_file))
    return identities


def _list_identity(folder: str) -> str:
    return storage.listing_identity(storage.list_files(folder))


def _places(config: IndexConfig) -> dict[str, str]:
    """Returns the folders of the images, because rows hold their URIs."""
    if config.format != "coco":
        return {"root": storage.absolute(config.root)}
    return {f"images.{split}": coco_split(config, split)[1] for split in config.splits or []}


def _listed(config: IndexConfig) -> list[str]:
    """Returns the folders that `_identify` lists; in a devkit they may be one folder down, in the folder of a year."""
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
