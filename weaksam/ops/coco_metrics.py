"""COCO's twelve figures through pycocotools, from rows of the tables.

Axis legend: G objects (ground truth), N detections of an image.
Boxes are xyxy, absolute pixels, right and bottom exclusive; COCO's xywh of the same box has the same corners.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from weaksam.schemas import OK

NAMES: tuple[str, ...] = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
         "AR@1", "AR@10", "AR@100", "AR_small", "AR_medium", "AR_large")  # fmt: skip


def coco_metrics(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]],
    class_names: Sequence[str],
    *,
    kind: Literal["bbox", "segm"] = "bbox",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The figures of a set of detections, and `AP`, `AP50`, `AP75` of each class.

    Args:
        pairs: for each image its rows of `ground_truth` (`boxes`, `classes`, `crowd`, `masks`, and `areas` where they
            are known) and of `detections` (`status`, `boxes`, `classes`, `scores`, `masks`). Masks are COCO
            compressed counts, their size is the detections' (`height`, `width`).
        class_names: of the dataset.
        kind: whether boxes or masks are compared.
    """
    truth, found = _as_coco(pairs, len(class_names), kind)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        gt: Any = COCO()
        gt.dataset = truth
        gt.createIndex()
        if not found:
            return dict.fromkeys(NAMES, 0.0), []
        evaluation = COCOeval(gt, gt.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: float(value) for name, value in zip(NAMES, evaluation.stats, strict=True) if value > -1}
    return figures, _by_class(evaluation, class_names)


def _as_coco(
    pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], num_classes: int, kind: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    images, objects, found = [], [], []
    for image_id, (truth, row) in enumerate(pairs, start=1):
        size = [int(row["height"] or 1), int(row["width"] or 1)]
        images.append({"id": image_id, "height": size[0], "width": size[1]})
        boxes, masks = _xywh(truth["boxes"]), truth.get("masks")
        areas = truth.get("areas")
        areas = boxes[:, 2] * boxes[:, 3] if areas is None else areas
        for i, box in enumerate(boxes.tolist()):
            thing = {"id": len(objects) + 1, "image_id": image_id, "category_id": int(truth["classes"][i]) + 1}
            thing |= {"bbox": box, "area": float(areas[i]), "iscrowd": int(truth["crowd"][i])}
            if kind == "segm":
                thing["segmentation"] = {"size": size, "counts": masks[i]}  # pyright: ignore[reportOptionalSubscript]
            objects.append(thing)
        if row["status"] != OK:
            continue
        for i, box in enumerate(_xywh(row["boxes"]).tolist()):
            thing = {"image_id": image_id, "category_id": int(row["classes"][i]) + 1, "score": float(row["scores"][i])}
            thing |= {"segmentation": {"size": size, "counts": row["masks"][i]}} if kind == "segm" else {"bbox": box}
            found.append(thing)
    categories = [{"id": label + 1} for label in range(num_classes)]
    return {"images": images, "annotations": objects, "categories": categories}, found


def _xywh(boxes: Any) -> np.ndarray:
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _by_class(evaluation: COCOeval, class_names: Sequence[str]) -> list[dict[str, Any]]:
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes; all sizes, most detections
    rows = []
    for label, name in enumerate(class_names):
        here = precision[:, :, label]
        values = {"AP": here, "AP50": here[0], "AP75": here[5]}
        means = {key: float(v[v > -1].mean()) if (v > -1).any() else None for key, v in values.items()}
        rows.append({"class": name} | means)
    return rows
