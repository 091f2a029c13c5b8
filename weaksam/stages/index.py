"""a dataset on storage -> images, and ground_truth beside it if the dataset has boxes.

All later stages read the `images` table, so only this stage knows a dataset's own conventions. Image files are listed.
Only headers of images are read: of some to compare sizes, of all to convert stored orientations.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from weaksam.core import schemas, storage, tables
from weaksam.core.look import Look
from weaksam.core.step import Outcome, Stage, Step
from weaksam.data.datasets import sample_dataset
from weaksam.data.images import read_sizes
from weaksam.data.orientation import turn_dataset
from weaksam.data.stated_sizes import warn_of_sizes
from weaksam.errors import ConfigError, DataError
from weaksam.stages.index_config import IndexConfig

_ROWS_PER_PART = 20_000
_HEADERS = 256  # headers that are read, about a second on object storage; later steps compare all images they decode


def run(step: Step) -> Outcome:
    """Reads the annotations and writes both tables."""
    config: IndexConfig = step.config
    dataset = config.kind.read(config.source)
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
    """Returns identities of the listings and files of everything that is read, by paths below the root.

    A file that is added, removed or rewritten makes another dataset; a dataset that moved is the same.
    """
    source = config.source
    if not storage.exists(source.root):
        raise ConfigError(f"root: there is no folder {source.root}")
    return {name: content.identity() for name, content in config.kind.contents(source).items()}


def _look(step: Step) -> Look:
    """Checks the dataset; reads no image file.

    Raises:
        StorageError: the storage is at fault.
    """
    try:
        return step.config.kind.look(step.config.source)
    except DataError as error:
        return Look("its lists", "what they name", error.faults)


STAGE = Stage(
    "index",
    3,
    IndexConfig,
    run,
    writes="images",
    outside=_identify,
    places=lambda config: dict(config.kind.places(config.source)),
    listed=lambda config: config.kind.listed_folders(config.source),
    look=_look,
)
