"""Selects the images of an export that a person should review first, for `most_uncertain`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pyarrow as pa

from weaksam.errors import DataError
from weaksam.stages.export_rows import Source


def keep_most_uncertain(source: Source, images: pa.Table, trusted: Collection[str], limit: int) -> Source:
    """Returns the source with only its most uncertain images, the most uncertain first.

    Reads classes and scores of all rows, part by part. Reviewed images are left out of the ranking: they need no second
    review, and their scores are not those of a detector.

    Args:
        source: all images that could be exported.
        images: `image_id` and `labels` of the dataset.
        trusted: ids of the reviewed images.
        limit: the largest number of images.

    Raises:
        DataError: all images are reviewed.
    """
    from weaksam.ops.uncertainty import best_scores, image_uncertainty, most_uncertain

    labels_of = dict(zip(images.column("image_id").to_pylist(), images.column("labels").to_pylist(), strict=True))
    ids, best, group_of = [], [], []
    for number, table in enumerate(source.tables(["classes", "scores"])):
        for row in table.to_pylist():
            image_id = row["image_id"]
            if image_id in trusted:
                continue
            classes, scores = np.array(row["classes"], np.int64), np.array(row["scores"], np.float64)
            best.append(best_scores(classes, scores, labels_of[image_id]))
            ids.append(image_id)
            group_of.append(number)
    if not ids:
        raise DataError(f"step {source.step.name}: all {len(trusted)} images are reviewed: none is left to be exported")
    uncertainty = image_uncertainty(best, [labels_of[image_id] for image_id in ids])
    chosen = most_uncertain(ids, uncertainty, limit)
    return replace(
        source,
        places={ids[index]: source.places[ids[index]] for index in chosen},
        groups=[source.groups[number] for number in sorted({group_of[index] for index in chosen})],
        uncertainty={ids[index]: float(uncertainty[index]) for index in chosen},
        passed_over={"trusted_images": len(trusted), "less_uncertain_images": len(ids) - len(chosen)},
    )
