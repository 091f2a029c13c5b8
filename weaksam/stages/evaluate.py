"""ground_truth and proposals, detections or pseudo ground truth -> metrics: how good is it?

The only stage, with the report, that may read boxes and masks made by people.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import model_validator

from weaksam.core import storage, tables
from weaksam.core.config import Reads, StageConfig, one_of
from weaksam.core.parquet_files import write_parquet
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import DataError
from weaksam.stages.evaluate_masks import Pair, mask_figures, pairs_with_masks
from weaksam.stages.evaluate_rows import check_pair, naming_image, pairs_of

if TYPE_CHECKING:
    from weaksam.ops.peak_metrics import PeakRecords

_TRUTH = ["boxes", "classes", "difficult", "crowd", "masks", "areas"]

# Of the many figures of a task, the ones to look at first.
HEADLINES = {
    "proposals": (
        *("boxes_per_image", "recall@0.5", "recall@0.75", "recall@0.9", "AR"),
        *("peaks_inside", "peaks_coarse_inside", "peaks_fine_inside", "peaks_cross_inside"),
    ),
    "detection": ("AP", "AP50", "AP75", "CorLoc"),
    "segmentation": ("AP", "AP25", "AP50", "AP70", "AP75"),
    "pgt": ("boxes_per_image", "mask_iou", "precision@0.5", "recall@0.5", "precision@0.75", "recall@0.75"),
}
_FOUND = ["status", "height", "width", "boxes", "source", "predicted_iou", "points"]
_DETECTED = ["status", "height", "width", "boxes", "classes", "scores"]


class EvaluateConfig(StageConfig):
    """Compares proposals, detections or pseudo ground truth with the ground truth.

    Proposals: recall, average recall and boxes per image. Recall is class-free: an object counts as found when any
    proposal of its image overlaps it enough. Where peaks of a classifier prompted, also the share of peaks inside an
    object of their class: `peaks_inside` by masks where the dataset has some, `peaks_in_box` by boxes alone, and by
    kind, as `peaks_fine_inside`. Detections: AP and CorLoc. Pseudo ground truth: precision and recall, to be known
    before a detector is trained on it, and with kind segm how much of the right mask each mask is. Size is by the area
    the dataset states, else by that of the mask, else of the box. Writes metrics.json and per_class.parquet, of
    detections with `curve`: the best precision at a recall of at least 0, 0.01, ... 1, at IoU 0.5.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step that holds the ground truth."""
    proposals: Annotated[str | None, Reads("proposals")] = None
    """The step to be judged."""
    detections: Annotated[str | list[str] | None, Reads("detections")] = None
    """The step to be judged, or several, of other seeds: then mean and standard deviation are reported. Detections of
    other programs come from an `import_detections` step."""
    pgt: Annotated[str | list[str] | None, Reads("pgt")] = None
    """The step to be judged, or several."""
    split: str | None = None
    """Only images of this split; all that have ground truth when left out."""
    include_difficult: bool = False
    """Whether objects flagged difficult count in recall."""
    include_crowd: bool = False
    """Whether crowd regions count in recall."""
    protocol: Literal["voc", "coco"] = "voc"
    """How AP is defined: AP50 and AP75 of boxes by the VOC devkit, AP25, AP50, AP70 and AP75 of masks as those who
    segment VOC12 count them; or COCO's twelve figures. Masks and COCO's figures are by pycocotools."""
    kind: Literal["bbox", "segm"] = "bbox"
    """Whether boxes or masks of detections or pgt are compared. Objects without a mask, as difficult ones of VOC are,
    do not count then; others flagged difficult do, but not in pgt."""
    eleven_point: bool = False
    """AP as the mean of 11 precisions, VOC07's way, instead of the area under the curve."""
    corloc: Literal["all", "not_difficult"] = "all"
    """Images that count for the CorLoc of a class: all that hold it, or, as detectron2 counts, those with an object of
    it that is not difficult."""
    reference_rules: bool = False
    """Count as the published evaluators do: in recall one proposal finds one object, difficult and crowd included,
    images with none left out, objects shifted by a pixel; in VOC AP boxes are a pixel too large."""

    @model_validator(mode="after")
    def _judges_one_thing(self) -> EvaluateConfig:
        judged = one_of(self, "proposals", "detections", "pgt")
        if judged == "pgt" and self.protocol == "coco":
            raise ValueError("pgt is judged by protocol voc: it has no ranking that COCO's AP could tell")
        if self.kind == "segm" and judged == "proposals":
            raise ValueError("kind segm is for detections and pgt: proposals are judged by their boxes")
        if self.kind == "segm" and (self.eleven_point or self.reference_rules):
            raise ValueError("eleven_point and reference_rules are for kind bbox: they change nothing about masks")
        return self


@dataclass(frozen=True)
class Judged:
    """What is told about what was judged; a figure's name and value, a row per class."""

    task: str
    num_objects: int
    figures: dict[str, float]
    per_class: list[dict[str, Any]]


def run(step: Step) -> Outcome:
    """Matches every annotated image and sums up."""
    config: EvaluateConfig = step.config
    truth, names = _read_truth(step, config.split)
    judge = _judge_proposals if config.proposals is not None else _judge_detections
    judged = judge(step, truth, names)
    figures = judged.figures
    report = {
        "task": judged.task,
        "dataset": step.inputs["images"].config.root,
        "split": config.split,
        "num_images": truth.num_rows,
        "num_objects": judged.num_objects,
        "metrics": figures,
    }
    told = [
        f"{name} {100 * figures[name]:.1f} %"
        for name in HEADLINES[judged.task]
        if name in figures and "boxes" not in name
    ]
    if "boxes_per_image" in figures:
        told.append(f"{figures['boxes_per_image']:.3g} boxes per image")
    write_parquet(storage.join(step.folder, "per_class.parquet"), pa.Table.from_pylist(judged.per_class))
    storage.write_json(storage.join(step.folder, "metrics.json"), report)
    return Outcome(rows=truth.num_rows, summary=", ".join(told))


def _judge_proposals(step: Step, truth: pa.Table, names: list[str]) -> Judged:
    from weaksam.ops import peak_metrics, proposal_metrics

    config: EvaluateConfig = step.config
    rules = (
        proposal_metrics.REFERENCE_RULES
        if config.reference_rules
        else proposal_metrics.RecallRules(
            include_difficult=config.include_difficult, include_crowd=config.include_crowd
        )
    )
    found = step.inputs["proposals"].read(_FOUND)
    matched, located = [], []
    for one, other in pairs_of(step, "proposals", truth, found):
        with naming_image(step, "proposals", one):
            matched.append(proposal_metrics.match_row(one, other, rules))
        located.append(_locate_peaks(step, one, other))
    records = proposal_metrics.concat_records(matched)
    per_class = proposal_metrics.recall_by_class(records, names)
    figures = proposal_metrics.proposal_metrics(records, rules) | peak_metrics.peak_metrics(
        peak_metrics.concat_records(located)
    )
    return Judged("proposals", records.num_objects, figures, per_class)


def _locate_peaks(step: Step, truth: dict[str, Any], found: Mapping[str, Any]) -> PeakRecords:
    from weaksam.ops.peak_metrics import locate_peaks

    try:
        return locate_peaks(truth, found)
    except ValueError as error:
        name = step.inputs["proposals"].name
        raise DataError(
            f"steps.{step.name}: image {truth['image_id']} of step {name}: {error}: both must be of the same files"
        ) from error


def _judge_detections(step: Step, truth: pa.Table, names: list[str]) -> Judged:
    """Mean figures of every step to be judged, `<name>_std` when there are several; classes are those of the first."""
    config: EvaluateConfig = step.config
    judged, pairs = [], []
    columns = [*_DETECTED, "masks"] if config.kind == "segm" else _DETECTED
    for key in [key for key in step.inputs if key != "images"]:
        found = step.inputs[key].read(columns)
        pairs = list(pairs_of(step, key, truth, found))
        for one, other in pairs:
            with naming_image(step, key, one):
                check_pair(one, other, len(names))
        if config.kind == "segm":
            pairs = pairs_with_masks(step, key, pairs)
        judged.append(_detection_figures(config, pairs, names))
    task = "pgt" if config.pgt else "segmentation" if config.kind == "segm" else "detection"
    num_objects = sum(_num_objects(config, row) for row, _ in pairs)
    return Judged(task, num_objects, mean_and_std([figures for figures, _ in judged]), judged[0][1])


def _num_objects(config: EvaluateConfig, truth: dict[str, Any]) -> int:
    """How many objects of an image are to be found."""
    ignored = np.asarray(truth["crowd"], bool)
    if config.kind == "bbox" or config.protocol == "coco" or config.pgt:
        ignored = ignored | np.asarray(truth["difficult"], bool)
    if config.kind == "segm":
        from weaksam.ops.mask_metrics import has_mask

        ignored = ignored | ~has_mask(truth)
    return int((~ignored).sum())


def _detection_figures(
    config: EvaluateConfig, pairs: list[Pair], names: list[str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    from weaksam.ops import detection_metrics as voc

    rules = voc.DetectionRules(
        eleven_point=config.eleven_point,
        plus_one=config.reference_rules,
        corloc_difficult=config.corloc == "all",
    )
    if config.protocol == "coco":
        from weaksam.ops.coco_metrics import coco_metrics

        return coco_metrics(pairs, names, kind=config.kind)
    if config.kind == "segm":
        return mask_figures(pairs, names, rules, of_pgt=bool(config.pgt))
    records = voc.concat_records(voc.match_image(one, other, len(names), rules) for one, other in pairs)
    if config.pgt:
        from weaksam.ops.pgt_metrics import pgt_metrics, pgt_table

        return pgt_metrics(records, rules), pgt_table(records, names, rules)
    rows = voc.detection_table(records, names, rules)
    return voc.detection_metrics(rows, rules), rows


def mean_and_std(figures: list[dict[str, float]]) -> dict[str, float]:
    """Means of the same figures of several seeds, and `<name>_std`; of one alone the figures themselves."""
    if len(figures) == 1:
        return figures[0]
    # A figure that one of them lacks, such as the precision of no boxes, has no mean.
    values = {key: [one[key] for one in figures] for key in figures[0] if all(key in one for one in figures)}
    means = {key: float(np.mean(found)) for key, found in values.items()}
    return means | {f"{key}_std": float(np.std(found, ddof=1)) for key, found in values.items()}


def _read_truth(step: Step, split: str | None) -> tuple[pa.Table, list[str]]:
    """Ground truth of the images asked for, and the class names."""
    images = step.inputs["images"].read(["split"])
    truth = tables.read_ground_truth(step.inputs["images"].folder)
    if truth is None:
        raise DataError(
            f"steps.{step.name}: the dataset of step {step.inputs['images'].name} has no boxes to compare with"
        )
    if split is not None:
        images = tables.of_split(images, split, where=f"steps.{step.name}.split")
    truth = tables.with_ids(truth, images.column("image_id").to_pylist())
    if not truth.num_rows:
        raise DataError(f"steps.{step.name}.split: no image of split '{split}' has boxes to compare with")
    return truth.select(["image_id", *_TRUTH]), step.inputs["images"].class_names()


STAGE = Stage("evaluate", 4, EvaluateConfig, run, writes="metrics")
