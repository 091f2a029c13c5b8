"""Checks of a step's inputs that need their tables: missing rows, rows of another dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from weaksam.core import schemas
from weaksam.core.step import Step
from weaksam.errors import ConfigError, DataError
from weaksam.ops.box_areas import has_area

if TYPE_CHECKING:
    from weaksam.data.remarks import Remarks


def check_rows(step: Step, key: str, image_ids: Sequence[str]) -> None:
    """Raises DataError when the input named by `key` lacks one of these images."""
    source = step.inputs[key]
    existing = set(source.read([]).column("image_id").to_pylist())
    if missing := [image_id for image_id in image_ids if image_id not in existing]:
        raise DataError(
            f"steps.{step.name}.{key}: step {source.name} has no row for {len(missing)} of {len(image_ids)} "
            f"images, e.g. {missing[0]}: let it run on this split too"
        )


def with_states(source: pa.Table, rows: pa.Table, what: str) -> pa.Table:
    """Returns `source` with the status of each image in an earlier step: images that failed there fail here too.

    Args:
        source: the images that a step maps.
        rows: `status` and `message` of the same images, in the same order.
        what: the name of the earlier step, for messages.
    """
    states = zip(rows.column("status").to_pylist(), rows.column("message").to_pylist(), strict=True)
    messages = ["" if status == schemas.OK else f"{what}: {message or status}" for status, message in states]
    source = source.append_column(schemas.EARLIER_STATUS, rows.column("status"))
    return source.append_column(schemas.EARLIER_MESSAGE, pa.array(messages, pa.string()))


def check_same_images(step: Step, key: str) -> None:
    """Raises DataError when the input named by `key` was made from other images than the step names."""
    source, images = step.inputs[key], step.inputs["images"]
    made_from = source.inputs["images"]
    if made_from.fingerprint != images.fingerprint:
        raise DataError(
            f"steps.{step.name}: step {source.name} was made from the images of {made_from.name}, "
            f"not of {images.name}: name the same step for both"
        )


def check_same_classes(step: Step, key: str) -> None:
    """Raises ConfigError when the detector named by `key` learnt other classes than those of the step's images."""
    trained = step.inputs[key]
    learnt, names = (used.inputs["images"].class_names() for used in (trained, step))
    if learnt != names:
        raise ConfigError(
            f"steps.{step.name}.{key}: step {trained.name} knows the classes {', '.join(learnt[:3])}, ..., the "
            f"images have {', '.join(names[:3])}, ...: give both datasets the same `classes`"
        )


_PER_OBJECT = ("boxes", "classes", "scores", "masks")


def keep_areas(row: Mapping[str, Any], remarks: Remarks) -> dict[str, Any]:
    """Returns a row of detections or pseudo ground truth without objects whose box has no area; `remarks` counts them.

    A detector cannot learn from such boxes, and they would make its weights NaN.
    """
    from weaksam.data.remarks import NO_AREA

    boxes = np.array([] if row.get("boxes") is None else row["boxes"], np.float32).reshape(-1, 4)
    kept = has_area(boxes)
    for _ in range(np.count_nonzero(~kept)):
        remarks.add(NO_AREA, f"image {row['image_id']}")
    if kept.all():
        return dict(row)
    objects = {key: [row[key][i] for i in np.flatnonzero(kept)] for key in _PER_OBJECT if row.get(key) is not None}
    return {**row, **objects}
