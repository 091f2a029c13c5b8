"""Arrow schemas of a run's tables: always one row per image.

Axis legend: N boxes of an image, P points of an image.
Boxes are xyxy, absolute pixels of the EXIF-transposed image, float32, right and bottom exclusive.
Classes are 0-based. Masks are COCO compressed counts (bytes); their size is the row's (height, width).
Lists of a row have equal length: N for boxes and their attributes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from weaksam.errors import DataError

SCHEMA_VERSION = "1.2"  # major.minor: a reader refuses another major version

OK = "ok"
NOT_FOUND = "not_found"
FAILED_STATUSES = (NOT_FOUND, "unreadable", "too_large", "oom", "timeout", "crash")

# Columns of a step's source: status and message of each image in an earlier step. Images that failed fail again.
EARLIER_STATUS, EARLIER_MESSAGE = "earlier_status", "earlier_message"

# Kinds of prompts; a value of `proposals.source` is an index into them.
SOURCES = ("grid", "coarse", "fine", "cross")


def _list(kind: pa.DataType, size: int = -1) -> pa.DataType:
    # Parquet calls the item of a list "element"; with this name a table that is read equals its declaration.
    return pa.list_(pa.field("element", kind), size)


_BOXES = _list(_list(pa.float32(), 4))
_FLOATS = _list(pa.float32())
_CLASSES = _list(pa.int32())
_MASKS = _list(pa.large_binary())

# x, y in pixels; label -1 = no class; kind is an index into SOURCES.
POINT = pa.struct(
    [
        ("x", pa.float32()),
        ("y", pa.float32()),
        ("label", pa.int32()),
        ("score", pa.float32()),
        ("kind", pa.uint8()),
    ]
)

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),  # the dataset's own id
        ("uri", pa.string()),
        ("height", pa.int32()),  # null: unknown until the image is decoded
        ("width", pa.int32()),
        ("split", pa.string()),
        ("labels", _CLASSES),  # image-level labels, sorted, each once; null: unknown (a test split)
        ("bytes", pa.int64()),
    ]
)

GROUND_TRUTH = pa.schema(
    [
        ("image_id", pa.string()),
        ("boxes", _BOXES),
        ("classes", _CLASSES),
        ("difficult", _list(pa.bool_())),
        ("crowd", _list(pa.bool_())),
        ("masks", _MASKS),  # an element is null if the dataset has no mask of the object
        ("areas", _FLOATS),  # square pixels from the dataset, for the size classes; null: not in the dataset
    ]
)

# Results of `hygiene` for each image; null when status is not ok.
HYGIENE = pa.schema(
    [
        ("image_id", pa.string()),
        ("status", pa.string()),
        ("message", pa.string()),
        ("height", pa.int32()),  # of the decoded image
        ("width", pa.int32()),
        ("sha256", pa.string()),  # of the file's bytes
        ("perceptual_hash", pa.uint64()),  # data.likeness
        ("thumbnail", pa.binary()),  # 16 x 16 grey pixels, row by row
    ]
)

PROPOSALS = pa.schema(
    [
        ("image_id", pa.string()),
        ("status", pa.string()),
        ("message", pa.string()),
        ("height", pa.int32()),  # of the decoded image; null when status is not ok
        ("width", pa.int32()),
        ("boxes", _BOXES),
        ("predicted_iou", _FLOATS),
        ("stability", _FLOATS),
        ("source", _list(pa.uint8())),  # index into SOURCES
        ("masks", _MASKS),  # null unless masks were requested
        ("points", _list(POINT)),  # class peaks used as prompts of SAM; without the grid
        ("labels", _CLASSES),  # predicted image-level labels; null when no classifier ran
    ]
)

DETECTIONS = pa.schema(
    [
        ("image_id", pa.string()),
        ("status", pa.string()),
        ("message", pa.string()),
        ("height", pa.int32()),  # of the decoded image; null when status is not ok
        ("width", pa.int32()),
        ("boxes", _BOXES),
        ("classes", _CLASSES),
        ("scores", _FLOATS),  # descending
        ("masks", _MASKS),  # null unless the detector predicts masks
    ]
)

# Masks are null except in trusted rows with masks drawn by people; a box of such a row may have no mask.
PGT = pa.schema(
    [
        *DETECTIONS,
        ("trusted", pa.bool_()),  # true: people reviewed the image, so detections are ignored; missing before 1.2
    ]
)

# Rows of `pgt` after `pseudo_masks`: one mask per box.
PSEUDO_MASKS = pa.schema(
    [
        *PGT,
        ("predicted_iou", _FLOATS),  # SAM's rating of each mask; null: drawn by people
        ("mask_state", _list(pa.uint8())),  # of SAM's own masks: index into ops.pseudo_masks.STATES
        ("dropped", _list(pa.uint8())),  # the same for the objects that were left out
    ]
)


def with_metadata(
    schema: pa.Schema,
    *,
    fingerprint: str,
    class_names: Sequence[str],
    category_ids: Sequence[int] | None = None,
    ids_are_numbers: bool | None = None,
) -> pa.Schema:
    """Returns `schema` with the metadata of every part: schema version, run fingerprint and class names.

    `category_ids` are the dataset's own ids of the classes, `ids_are_numbers` is whether its image ids are numbers;
    only tables of images and ground truth have them.
    """
    metadata = {
        "weaksam.schema_version": SCHEMA_VERSION,
        "weaksam.fingerprint": fingerprint,
        "weaksam.class_names": json.dumps(list(class_names)),
    }
    if category_ids is not None:
        metadata["weaksam.category_ids"] = json.dumps(list(category_ids))
    if ids_are_numbers is not None:
        metadata["weaksam.ids_are_numbers"] = json.dumps(ids_are_numbers)
    return schema.with_metadata(metadata)


def class_names_of(schema: pa.Schema) -> list[str]:
    """Returns the class names in a table's metadata; an empty list if it has none."""
    return json.loads((schema.metadata or {}).get(b"weaksam.class_names", b"[]"))


def category_ids_of(schema: pa.Schema) -> list[int] | None:
    """Returns the dataset's own ids of the classes, in the order of their names; None if the table has none."""
    return json.loads((schema.metadata or {}).get(b"weaksam.category_ids", b"null"))


def ids_are_numbers(schema: pa.Schema) -> bool | None:
    """Whether the dataset's own image ids are numbers, not texts; None: unknown."""
    return json.loads((schema.metadata or {}).get(b"weaksam.ids_are_numbers", b"null"))


def check_version(schema: pa.Schema, *, where: str) -> None:
    """Raises DataError if `schema` was written by another major version; `where` names the file."""
    version = (schema.metadata or {}).get(b"weaksam.schema_version", b"none").decode()
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise DataError(
            f"{where}: written with table version {version}, this weaksam reads {SCHEMA_VERSION.split('.')[0]}.x: "
            "run the step again with this version, or read it with the weaksam that wrote it"
        )


def to_table(rows: Sequence[dict], schema: pa.Schema) -> pa.Table:
    """Converts rows (dicts; missing keys become null) to a table of exactly `schema`.

    Ray Data widens int32 to int64 and float32 to double when it gets lists, so every batch of rows is converted.
    """
    columns = [pa.array([_plain(row.get(field.name)) for row in rows], type=field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, np.ndarray) and value.ndim > 1 else value  # Arrow needs a list of rows
