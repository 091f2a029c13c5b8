"""The images a step learns from, with their image-level labels: all that training may know of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa

from weaksam.core import tables
from weaksam.core.step import Step
from weaksam.errors import DataError

_EVERYWHERE = 0.95  # share of the images from which on a class is said to be in all of them


def labelled_images(step: Step, *, also: Collection[str] = ()) -> tuple[pa.Table, np.ndarray]:
    """Images of the step's split whose labels are known, and which of the C classes each holds, (images, C) bool.

    Args:
        step: has a split.
        also: ids of images that are there without labels too, as if nothing was in them.

    Raises:
        DataError: there are none.
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
    """A warning for each class that nearly every image has: none of them teaches where it is not.

    Args:
        where: what the texts start with.
        counts: images with each class.
        images: whose labels are known.
    """
    return [
        f"{where}: class '{name}' is in {count} of {images} images: no image teaches where it is not, "
        "so it can hardly be located: add images without it"
        for name, count in counts.items()
        if count > _EVERYWHERE * images
    ]


def count_labels(labels: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Images with each class, of labels (images, C) bool."""
    return dict(zip(names, labels.sum(0).tolist(), strict=True))


def warn_of_classes_everywhere(step: Step) -> list[str]:
    """`describe_everywhere` for the images that a step learns from; nothing as long as they are not listed."""
    if step.inputs["images"].manifest() is None:
        return []
    try:
        _, labels = labelled_images(step)
    except DataError:
        return []  # the step itself says so
    names = step.inputs["images"].class_names()
    return describe_everywhere(f"steps.{step.name}.images", count_labels(labels, names), len(labels))
