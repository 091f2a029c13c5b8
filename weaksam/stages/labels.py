"""Reads the images a step trains on, with their image-level labels, the only annotation that training may use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from weaksam.core import tables
from weaksam.core.step import Step
from weaksam.errors import DataError

_EVERYWHERE = 0.95  # a class in more than this share of the images counts as present in all


def labelled_images(step: Step, *, also: Collection[str] = ()) -> tuple[pa.Table, np.ndarray]:
    """Returns the images of the step's split whose labels are known, and their labels, (images, C) bool.

    Args:
        step: a step with a split.
        also: ids of images that are included without labels too, as images of no class.

    Raises:
        DataError: no image has labels.
    """
    split = step.config.split
    images = step.inputs["images"].read(["uri", "split", "labels"])
    names = step.inputs["images"].class_names()
    images = tables.of_split(images, split, where=f"steps.{step.name}.split")
    usable = [row["labels"] is not None or row["image_id"] in also for row in images.to_pylist()]
    images = images.filter(pa.array(usable, pa.bool_()))
    if not images.num_rows or not names:
        raise DataError(
            f"steps.{step.name}.split: no image of split '{split}' has image-level labels: name a split that has"
        )
    labels = np.zeros((images.num_rows, len(names)), bool)
    for row, present in enumerate(images.column("labels").to_pylist()):
        labels[row, present or []] = True
    return images, labels


def describe_everywhere(where: str, counts: Mapping[str, int], images: int) -> list[str]:
    """Returns a warning for each class in nearly every image: such images do not show where the class is absent.

    Args:
        where: the start of the texts.
        counts: number of images with each class.
        images: number of images whose labels are known.
    """
    return [
        f"{where}: class '{name}' is in {count} of {images} images: no image teaches where it is not, "
        "so it can hardly be located: add images without it"
        for name, count in counts.items()
        if count > _EVERYWHERE * images
    ]


def count_labels(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Returns the number of images with each class, from labels (images, C) bool."""
    return dict(zip(names, labels.sum(0).tolist(), strict=True))


def warn_of_classes_everywhere(step: Step) -> list[str]:
    """Returns `describe_everywhere` for the images that a step trains on; nothing until they are listed."""
    if step.inputs["images"].manifest() is None:
        return []
    try:
        _, labels = labelled_images(step)
    except DataError:
        return []  # the step itself reports it
    names = step.inputs["images"].class_names()
    return describe_everywhere(f"steps.{step.name}.images", count_labels(labels, names), len(labels))
