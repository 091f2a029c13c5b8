"""images, detections -> pgt: which detections a detector is retrained on.

Only image-level labels are looked at, never boxes that people drew, with one exception, which the run file must name:
what people made of exported tasks (`reviewed`). A few numbers per image: this needs no cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from weaksam.core import schemas, storage, tables
from weaksam.core.config import Added, OutsideFile, Reads, StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import ConfigError
from weaksam.stages.checks import check_rows, check_same_images, keep_areas
from weaksam.stages.labels import labelled_images

if TYPE_CHECKING:
    from weaksam.data.readers.label_studio import Review, Size
    from weaksam.data.remarks import Remarks

log = logging.getLogger(__name__)

_ROWS_PER_PART = 4096
_NO_SCORE = "boxes have a score that is not finite and are left out"
_COLUMNS = ["status", "message", "height", "width", "boxes", "classes", "scores"]


class PgtConfig(StageConfig):
    """Chooses the pseudo ground truth: per image and class the best detection, and those not much worse.

    Detections of classes that are not among an image's labels are left out. Images that people have reviewed hold what
    they say. Also writes statistics.json.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step with the images and their labels."""
    detections: Annotated[str, Reads("detections")]
    """The step whose detections are chosen from; those of other programs come from an `import_detections` step."""
    reviewed: Annotated[str | None, OutsideFile()] = None
    """URI of a Label Studio export (JSON) of tasks that `export` wrote. Images with an annotation get its boxes, with
    score 1, and its polygons, and are `trusted`: no detection, label or rule changes them, in any run that names the
    file. The one place where boxes that people drew reach training, and only if it is named."""
    split: str
    """Split that is to be trained on."""
    norm: Literal["range", "minmax", "max", "raw"] = "max"
    """Scores s of a class in an image, from m to M, count as s / (M - m), as published, (s - m) / (M - m), s / M, or
    with `raw` as they are, the rule of SoS-WSOD."""
    threshold: float = Field(default=0.3, ge=0)
    """Detections whose normalised score is at least this stay, and the best of each class always."""
    containment: float = Field(default=0.85, gt=0, le=1)
    """A box with this share of its area in another of its class is a part of that one, and goes."""
    containment_rule: Literal["greedy", "all_pairs", "off"] = "greedy"
    """`greedy`: parts of better boxes go. `all_pairs`, as published: parts of any box go, of two equal ones both."""
    containment_except: Annotated[list[str], Added()] = Field(default_factory=list)
    """Classes whose parts stay. SoS-WSOD names bottle, bus, car, chair, cow, pottedplant and sheep of VOC."""
    top_k: int | None = Field(default=None, ge=1)
    """The best so many of each class instead of all these rules, for comparison."""
    max_per_class: int | None = Field(default=None, ge=1)
    """Most boxes of a class in an image; unset = no limit."""
    max_per_image: int | None = Field(default=None, ge=1)
    """Most boxes of an image, the best of each class first; unset = no limit."""


def run(step: Step) -> Outcome:
    """Chooses for every labelled or reviewed image of the split, in this process."""
    from weaksam.data.remarks import Remarks
    from weaksam.ops.pgt import PgtRules

    config: PgtConfig = step.config
    reviews = _read_reviews(step)
    images, labels = labelled_images(step, also=reviews)
    names = step.inputs["images"].class_names()
    ids = images.column("image_id").to_pylist()
    reviews = _of_images(step, reviews, ids)
    found = _read_found(step, ids, reviews)
    given: dict[str, Any] = {key: getattr(config, key) for key in PgtRules.__dataclass_fields__}
    given["containment_except"] = _indices(step, names)
    rules = PgtRules(**given)
    schema = schemas.with_metadata(schemas.PGT, fingerprint=step.fingerprint, class_names=names)
    parts, counts, failures, remarks = [], [], [], Remarks(f"steps.{step.name}")
    for start in range(0, len(ids), _ROWS_PER_PART):
        piece = zip(ids[start : start + _ROWS_PER_PART], found.slice(start, _ROWS_PER_PART).to_pylist(), strict=True)
        rows = []
        for i, (image_id, row) in enumerate(piece):
            is_reviewed = image_id in reviews
            row = keep_areas(trust(image_id, reviews[image_id]) if is_reviewed else row, remarks)
            rows.append(row if is_reviewed else choose(row, np.flatnonzero(labels[start + i]), rules, remarks))
        parts.append(tables.write_part(step.folder, schemas.to_table(rows, schema)))
        counts += [np.bincount(row.get("classes", []), minlength=len(names)) for row in rows]
        failures += [f"{r['image_id']}: {r['status']}: {r['message']}" for r in rows if r["status"] != schemas.OK]
        log.info("%s  %d/%d images", step.name, min(start + _ROWS_PER_PART, len(ids)), len(ids))
    remarks.log()
    told = statistics(np.stack(counts), labels, names) | {"trusted_images": len(reviews)}
    storage.write_json(storage.join(step.folder, "statistics.json"), told)
    return Outcome(
        rows=len(ids),
        failed=len(failures),
        failures=failures[:10],
        parts=parts,
        summary=f"{told['boxes_per_image']:.2f} boxes per image, {told['images_without']} images without any, "
        f"{told['labels_without']} of {told['labels']} labels without any"
        + (f", {len(reviews)} images reviewed and trusted" if config.reviewed is not None else ""),
    )


def _indices(step: Step, names: list[str]) -> tuple[int, ...]:
    """Which classes `containment_except` names."""
    given = step.config.containment_except
    if unknown := [name for name in given if name not in names]:
        raise ConfigError(
            f"steps.{step.name}.containment_except: the images have no class {unknown[0]!r}: they have "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    return tuple(names.index(name) for name in given)


def _read_reviews(step: Step) -> dict[str, Review]:
    """What people say, by image id, of all splits."""
    if step.config.reviewed is None:
        return {}
    from weaksam.data.readers.label_studio import read_reviews

    images = step.inputs["images"].read(["height", "width"])
    sizes: dict[str, Size | None] = dict.fromkeys(images.column("image_id").to_pylist())
    found = step.inputs["detections"].read(["height", "width"])  # of decoded images
    for row in (row for table in (images, found) for row in table.to_pylist() if row["height"] and row["width"]):
        sizes[row["image_id"]] = row["height"], row["width"]
    is_sample = step.inputs["images"].config.sample is not None
    return read_reviews(step.config.reviewed, sizes, step.inputs["images"].class_names(), is_sample=is_sample)


def _of_images(step: Step, reviews: Mapping[str, Review], ids: list[str]) -> dict[str, Review]:
    """The reviews of these images; those of other splits are counted in the log."""
    ours = {image_id: reviews[image_id] for image_id in ids if image_id in reviews}
    if len(ours) < len(reviews):
        others = len(reviews) - len(ours)
        log.info("%s: %d reviewed images are of other splits than '%s': left out", step.name, others, step.config.split)
    return ours


def _read_found(step: Step, ids: list[str], reviewed: Collection[str]) -> pa.Table:
    """Rows of detections of these images, in their order; null for a reviewed one that has none.

    Raises:
        DataError: another image has no row, or the detections are of other images.
    """
    check_same_images(step, "detections")
    check_rows(step, "detections", [image_id for image_id in ids if image_id not in reviewed])
    return tables.rows_for(step.inputs["detections"].read(_COLUMNS), ids, may_lack=True)


def trust(image_id: str, review: Review) -> dict[str, Any]:
    """A row of pseudo ground truth that holds what people say of an image."""
    height, width = review.size or (None, None)
    row = {"image_id": image_id, "status": schemas.OK, "message": "", "height": height, "width": width}
    masks = review.masks if any(mask is not None for mask in review.masks) else None
    scores = np.ones(len(review.boxes), np.float32)
    return row | {
        "boxes": review.boxes, "classes": review.classes, "scores": scores, "masks": masks, "trusted": True
    }  # fmt: skip


def choose(row: dict[str, Any], labels: np.ndarray, rules: Any, remarks: Remarks | None = None) -> dict[str, Any]:
    """A row of pseudo ground truth from a row of detections; scores stay what they were, a failed row fails.

    Boxes whose score is not finite are left out, and `remarks` counts them.
    """
    from weaksam.ops.pgt import select_pgt

    if row["status"] != schemas.OK:
        return {key: row[key] for key in ("image_id", "status", "message")} | {"trusted": False}
    boxes = np.array(row["boxes"], np.float32).reshape(-1, 4)
    classes, scores = np.array(row["classes"], np.int32), np.array(row["scores"], np.float32)
    usable = np.isfinite(scores)
    if remarks is not None:
        for _ in range(np.count_nonzero(~usable)):
            remarks.add(_NO_SCORE, f"image {row['image_id']}")
    boxes, classes, scores = boxes[usable], classes[usable], scores[usable]
    kept = select_pgt(boxes, classes, scores, labels.tolist(), rules)
    return row | {"boxes": boxes[kept], "classes": classes[kept], "scores": scores[kept], "trusted": False}


def statistics(counts: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Any]:
    """What was chosen, in numbers.

    Args:
        counts: (images, C) int, boxes of each class.
        labels: (images, C) bool.
        names: of the classes.
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
