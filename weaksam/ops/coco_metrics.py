"""AP by pycocotools from rows of the tables: COCO's twelve metrics, and the four of instance segmentation on VOC.

Axis legend: G objects (ground truth), N detections of an image.
Boxes are xyxy, absolute pixels, right and bottom exclusive; converting to COCO's xywh needs no offset.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from weaksam.core.schemas import OK
from weaksam.ops.checks import check_objects
from weaksam.ops.detection_metrics import ap_name
from weaksam.ops.mask_metrics import check_cover

NAMES: tuple[str, ...] = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
         "AR@1", "AR@10", "AR@100", "AR_small", "AR_medium", "AR_large")  # fmt: skip
VOC_THRESHOLDS: tuple[float, ...] = (0.25, 0.5, 0.7, 0.75)  # IoU of masks

Pairs = Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]


def coco_metrics(
    pairs: Pairs,
    class_names: Sequence[str],
    *,
    kind: Literal["bbox", "segm"] = "bbox",
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns COCO's metrics of a set of detections, and `AP`, `AP50`, `AP75` and `curve` of each class.

    A metric without objects, such as AP_large without large objects, is omitted; null in the row of a class.

    Args:
        pairs: for each image its rows of `ground_truth` (`boxes`, `classes`, and `crowd` and `areas` if known) and of
            `detections` (`boxes`, `classes`, `scores`, and `status` unless it is ok). For kind segm also `masks` of
            both, COCO compressed counts, with the size of the detections (`height`, `width`).
        class_names: class names of the dataset.
        kind: whether boxes or masks are compared.

    Raises:
        ValueError: a box or a score is not finite, a class is not in the dataset, lengths differ, or an object or a
            detection has no mask or a mask of another size.
    """
    truth, detections = _as_coco(pairs, len(class_names), kind)
    with contextlib.redirect_stdout(io.StringIO()):  # prints its progress
        evaluation = _evaluation(truth, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: float(value) for name, value in zip(NAMES, evaluation.stats, strict=True) if value > -1}
    return figures, _means_by_class(evaluation, class_names, {"AP": slice(None), "AP50": 0, "AP75": 5}, curve=0)


def voc_mask_metrics(pairs: Pairs, class_names: Sequence[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns `AP25`, `AP50`, `AP70`, `AP75` of masks as published for VOC12: means over classes, and rows by class.

    Uses COCO's matching and its mean of 101 precisions, for the 100 best detections of a class in an image. Objects
    flagged difficult count like others, crowds are ignored. A class without objects is null and not part of a mean.
    Metrics without any objects are omitted. Rows also have `curve`.

    Args:
        pairs: see `coco_metrics`; all objects have masks.
        class_names: class names of the dataset.

    Raises:
        ValueError: a box or a score is not finite, a class is not in the dataset, lengths differ, or an object or a
            detection has no mask or a mask of another size.
    """
    truth, detections = _as_coco(pairs, len(class_names), "segm")
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluation(truth, detections, "segm")
        params: Any = evaluation.params
        params.iouThrs = np.array(VOC_THRESHOLDS)
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]  # only the size class `all`
        params.maxDets = params.maxDets[-1:]
        evaluation.evaluate()
        evaluation.accumulate()
    columns = {ap_name(threshold): index for index, threshold in enumerate(VOC_THRESHOLDS)}
    rows = _means_by_class(evaluation, class_names, columns, curve=VOC_THRESHOLDS.index(0.5))
    # The usual script counts a class without objects as 0. On VOC's val every class has objects: the metrics are equal.
    values = {key: [row[key] for row in rows if row[key] is not None] for key in columns}
    return {key: float(np.mean(class_values)) for key, class_values in values.items() if class_values}, rows


def _evaluation(truth: dict[str, Any], detections: list[dict[str, Any]], kind: Literal["bbox", "segm"]) -> COCOeval:
    gt = _index(truth)
    # loadRes fails on an empty list
    return COCOeval(gt, gt.loadRes(detections) if detections else _index({**truth, "annotations": []}), kind)


def _index(dataset: dict[str, Any]) -> Any:
    coco: Any = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _as_coco(pairs: Pairs, num_classes: int, kind: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    images, objects, detections = [], [], []
    for image_id, (truth, row) in enumerate(pairs, start=1):
        is_ok = row.get("status", OK) == OK
        size = [int(row.get("height") or 1), int(row.get("width") or 1)]
        images.append({"id": image_id, "height": size[0], "width": size[1]})
        where = f"image {truth.get('image_id', image_id)}"
        check_objects({key: truth[key] for key in ("boxes", "classes")}, f"objects of {where}", num_classes)
        if is_ok:
            check_objects(row, f"detections of {where}", num_classes)
        boxes, masks = _xywh(truth["boxes"]), truth.get("masks")
        if kind == "segm" and is_ok:  # a failed row has no size, and nothing is compared with it
            for what, rles, count in (("objects", masks, len(boxes)), ("detections", row["masks"], len(row["boxes"]))):
                check_cover(rles, count, (size[0], size[1]), f"{what} of {where}")
        crowd = truth.get("crowd")
        areas = truth.get("areas")
        areas = boxes[:, 2] * boxes[:, 3] if areas is None else areas
        for i, box in enumerate(boxes.tolist()):
            entry = {"id": len(objects) + 1, "image_id": image_id, "category_id": int(truth["classes"][i]) + 1}
            entry |= {"bbox": box, "area": float(areas[i]), "iscrowd": int(crowd[i]) if crowd is not None else 0}
            if kind == "segm":
                entry["segmentation"] = {"size": size, "counts": masks[i]}  # pyright: ignore[reportOptionalSubscript]
            objects.append(entry)
        if not is_ok:
            continue
        for i, box in enumerate(_xywh(row["boxes"]).tolist()):
            entry = {"image_id": image_id, "category_id": int(row["classes"][i]) + 1, "score": float(row["scores"][i])}
            entry |= {"segmentation": {"size": size, "counts": row["masks"][i]}} if kind == "segm" else {"bbox": box}
            detections.append(entry)
    categories = [{"id": label + 1} for label in range(num_classes)]
    return {"images": images, "annotations": objects, "categories": categories}, detections


def _xywh(boxes: Any) -> np.ndarray:
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _means_by_class(
    evaluation: COCOeval, class_names: Sequence[str], columns: Mapping[str, int | slice], *, curve: int
) -> list[dict[str, Any]]:
    """Returns a row per class with mean precisions; `columns` maps a metric to the indices of its thresholds.

    `curve` is the index of the threshold of `curve` in a row: precisions at recall 0, 0.01, ... 1.
    """
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes; all sizes, most detections
    rows = []
    for label, name in enumerate(class_names):
        values = {key: precision[column, :, label] for key, column in columns.items()}
        means = {key: float(v[v > -1].mean()) if (v > -1).any() else None for key, v in values.items()}
        points = precision[curve, :, label]
        rows.append({"class": name} | means | {"curve": points.tolist() if (points > -1).all() else None})
    return rows
