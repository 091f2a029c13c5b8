"""images, detections -> pgt: selects the detections that a detector is retrained on.

The stage reads only image-level labels, never boxes that people drew, with one exception that the run file must name:
exported tasks that people corrected (`reviewed`). It handles a few numbers per image, so it needs no cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from weaksam.core import schemas, storage, tables
from weaksam.core.config import Added, OutsideFile, Reads, StageConfig
from weaksam.core.rules import rules_of, with_rules
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError
from weaksam.ops.pgt import PgtRules, select_pgt
from weaksam.stages.checks import check_rows, check_same_images, keep_areas
from weaksam.stages.labels import labelled_images

if TYPE_CHECKING:
    from weaksam.data.readers.label_studio import Review, Size
    from weaksam.data.remarks import Remarks

log = logging.getLogger(__name__)

_ROWS_PER_PART = 4096
_NO_SCORE = "boxes have a score that is not finite and are left out"
_NOT_POSITIVE = "boxes of labels of their image have a score of 0 or less and are left out (are they logits?)"
_COLUMNS = ["status", "message", "height", "width", "boxes", "classes", "scores"]


class PgtConfig(with_rules(StageConfig, PgtRules)):
    """Selects the pseudo ground truth: per image and class the best detection, and detections with similar scores.

    Detections of classes that are not among an image's labels are left out. Reviewed images have the objects that
    people annotated. Also writes statistics.json.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step with the images and their labels."""
    detections: Annotated[str, Reads("detections")]
    """The step whose detections are selected; detections of other programs come from an `import_detections` step."""
    reviewed: Annotated[str | None, OutsideFile()] = None
    """URI of a Label Studio export (JSON) of tasks that `export` wrote. Images with an annotation get its boxes, with
    score 1, and its polygons, and are `trusted`: no detection, label or rule changes them, in any run that names the
    file. Boxes that people drew reach training only through this setting."""
    split: str
    """Split to train on."""
    containment_except: Annotated[list[str], Added()] = Field(default_factory=list)
    """Classes whose parts are kept. SoS-WSOD names bottle, bus, car, chair, cow, pottedplant and sheep of VOC."""


def run(step: Step) -> Outcome:
    """Selects the detections of every labelled or reviewed image of the split, in this process."""
    from weaksam.data.remarks import Remarks

    config: PgtConfig = step.config
    reviews = _read_reviews(step)
    images, labels = labelled_images(step, also=reviews)
    names = step.inputs["images"].class_names()
    ids = images.column("image_id").to_pylist()
    reviews = _of_images(step, reviews, ids)
    detections = _read_detections(step, ids, reviews)
    rules = rules_of(config, PgtRules, containment_except=_indices(step, names))
    schema = schemas.with_metadata(schemas.PGT, fingerprint=step.fingerprint, class_names=names)
    parts, counts, failures, remarks = [], [], [], Remarks(f"steps.{step.name}")
    for start in range(0, len(ids), _ROWS_PER_PART):
        batch = detections.slice(start, _ROWS_PER_PART).to_pylist()
        rows = []
        for i, (image_id, row) in enumerate(zip(ids[start : start + _ROWS_PER_PART], batch, strict=True)):
            is_reviewed = image_id in reviews
            row = keep_areas(trust(image_id, reviews[image_id]) if is_reviewed else row, remarks)
            rows.append(row if is_reviewed else choose(row, np.flatnonzero(labels[start + i]), rules, remarks))
        parts.append(tables.write_part(step.folder, schemas.to_table(rows, schema)))
        counts += [np.bincount(row.get("classes", []), minlength=len(names)) for row in rows]
        failures += [f"{r['image_id']}: {r['status']}: {r['message']}" for r in rows if r["status"] != schemas.OK]
        log.info("%s  %d/%d images", step.name, min(start + _ROWS_PER_PART, len(ids)), len(ids))
    remarks.log()
    summary = statistics(np.stack(counts), labels, names) | {"trusted_images": len(reviews)}
    storage.write_json(storage.join(step.folder, "statistics.json"), summary)
    return Outcome(
        rows=len(ids),
        failed=len(failures),
        failures=failures[:10],
        parts=parts,
        summary=f"{summary['boxes_per_image']:.2f} boxes per image, {summary['images_without']} images without any, "
        f"{summary['labels_without']} of {summary['labels']} labels without any"
        + (f", {len(reviews)} images reviewed and trusted" if config.reviewed is not None else ""),
    )


def _indices(step: Step, names: list[str]) -> tuple[int, ...]:
    """Returns the indices of the classes that `containment_except` names."""
    exceptions = step.config.containment_except
    if unknown := [name for name in exceptions if name not in names]:
        raise ConfigError(
            f"steps.{step.name}.containment_except: the images have no class {unknown[0]!r}: they have "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    return tuple(names.index(name) for name in exceptions)


def _read_reviews(step: Step) -> dict[str, Review]:
    """Returns the reviews of people, by image id, of all splits."""
    if step.config.reviewed is None:
        return {}
    from weaksam.data.readers.label_studio import read_reviews

    images = step.inputs["images"].read(["height", "width"])
    sizes: dict[str, Size | None] = dict.fromkeys(images.column("image_id").to_pylist())
    decoded = step.inputs["detections"].read(["height", "width"])
    for row in (row for table in (images, decoded) for row in table.to_pylist() if row["height"] and row["width"]):
        sizes[row["image_id"]] = row["height"], row["width"]
    is_sample = step.inputs["images"].config.sample is not None
    return read_reviews(step.config.reviewed, sizes, step.inputs["images"].class_names(), is_sample=is_sample)


def _of_images(step: Step, reviews: Mapping[str, Review], ids: list[str]) -> dict[str, Review]:
    """Returns the reviews of these images; logs the number of reviews of other splits."""
    kept = {image_id: reviews[image_id] for image_id in ids if image_id in reviews}
    if len(kept) < len(reviews):
        others = len(reviews) - len(kept)
        log.info("%s: %d reviewed images are of other splits than '%s': left out", step.name, others, step.config.split)
    return kept


def _read_detections(step: Step, ids: list[str], reviewed: Collection[str]) -> pa.Table:
    """Returns the rows of detections of these images, in their order; null for a reviewed image without a row.

    Raises:
        DataError: another image has no row, or the detections are of other images.
    """
    check_same_images(step, "detections")
    check_rows(step, "detections", [image_id for image_id in ids if image_id not in reviewed])
    return tables.rows_for(step.inputs["detections"].read(_COLUMNS), ids, may_lack=True)


def trust(image_id: str, review: Review) -> dict[str, Any]:
    """Returns a row of pseudo ground truth with the objects that people annotated."""
    height, width = review.size or (None, None)
    row = {"image_id": image_id, "status": schemas.OK, "message": "", "height": height, "width": width}
    masks = review.masks if any(mask is not None for mask in review.masks) else None
    scores = np.ones(len(review.boxes), np.float32)
    return row | {
        "boxes": review.boxes, "classes": review.classes, "scores": scores, "masks": masks, "trusted": True
    }  # fmt: skip


def choose(row: dict[str, Any], labels: np.ndarray, rules: PgtRules, remarks: Remarks | None = None) -> dict[str, Any]:
    """Returns a row of pseudo ground truth from a row of detections; scores are unchanged, a failed row stays failed.

    Boxes whose score is not finite or not above 0 are left out, and `remarks` counts them.
    """
    if row["status"] != schemas.OK:
        return {key: row[key] for key in ("image_id", "status", "message")} | {"trusted": False}
    boxes = np.array(row["boxes"], np.float32).reshape(-1, 4)
    classes, scores = np.array(row["classes"], np.int32), np.array(row["scores"], np.float32)
    usable = np.isfinite(scores)
    if remarks is not None:
        not_positive = usable & (scores <= 0) & np.isin(classes, labels)
        for kind, flags in ((_NO_SCORE, ~usable), (_NOT_POSITIVE, not_positive)):
            for _ in range(np.count_nonzero(flags)):
                remarks.add(kind, f"image {row['image_id']}")
    boxes, classes, scores = boxes[usable], classes[usable], scores[usable]
    kept = select_pgt(boxes, classes, scores, labels.tolist(), rules)
    return row | {"boxes": boxes[kept], "classes": classes[kept], "scores": scores[kept], "trusted": False}


def statistics(counts: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Returns the content of statistics.json.

    Args:
        counts: (images, C) int, boxes of each class.
        labels: (images, C) bool.
        names: the class names.
    """
    return {
        "images": len(counts),
        "boxes": int(counts.sum()),
        "boxes_per_image": float(counts.sum(1).mean()),
        "boxes_per_label": float(counts.sum() / max(labels.sum(), 1)),
        "images_without": int((counts.sum(1) == 0).sum()),
        "labels": int(labels.sum()),
        "labels_without": int((labels & (counts == 0)).sum()),
        "boxes_by_class": {name: int(total) for name, total in zip(names, counts.sum(0), strict=True)},
    }


STAGE = Stage("pgt", 2, PgtConfig, run, writes="pgt")
