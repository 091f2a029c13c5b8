"""ground_truth and proposals, detections or pseudo ground truth -> metrics.

Only this stage and the report may read boxes and masks made by people.
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

_TRUTH_COLUMNS = ["boxes", "classes", "difficult", "crowd", "masks", "areas"]

# The main figures of each task, which reports show first.
HEADLINES = {
    "proposals": (
        *("boxes_per_image", "recall@0.5", "recall@0.75", "recall@0.9", "AR"),
        *("peaks_inside", "peaks_coarse_inside", "peaks_fine_inside", "peaks_cross_inside"),
    ),
    "detection": ("AP", "AP50", "AP75", "CorLoc"),
    "segmentation": ("AP", "AP25", "AP50", "AP70", "AP75"),
    "pgt": ("boxes_per_image", "mask_iou", "precision@0.5", "recall@0.5", "precision@0.75", "recall@0.75"),
}
_PROPOSAL_COLUMNS = ["status", "height", "width", "boxes", "source", "predicted_iou", "points"]
_DETECTION_COLUMNS = ["status", "height", "width", "boxes", "classes", "scores"]


class EvaluateConfig(StageConfig):
    """Compares proposals, detections or pseudo ground truth with the ground truth.

    Proposals: recall, average recall and boxes per image. Recall is class-free: an object is detected if any proposal
    of its image overlaps it enough. If peaks of a classifier prompted SAM, also the share of peaks inside an object of
    their class: `peaks_inside` by masks if the dataset has masks, `peaks_in_box` by boxes alone, and the share of each
    kind of peak, e.g. `peaks_fine_inside`. Detections: AP and CorLoc. Pseudo ground truth: precision and recall, which
    can be checked before a detector is trained on it, and with kind segm the IoU of its masks with the true masks. The
    size of an object is the area that the dataset states, else the area of the mask, else of the box. Writes
    metrics.json and per_class.parquet; for detections, its column `curve` is the best precision at a recall of at least
    0, 0.01, ... 1, at IoU 0.5.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step that holds the ground truth."""
    proposals: Annotated[str | None, Reads("proposals")] = None
    """The step to evaluate."""
    detections: Annotated[str | list[str] | None, Reads("detections")] = None
    """The step to evaluate, or several steps with different seeds, for which mean and standard deviation are reported.
    Detections of other programs come from an `import_detections` step."""
    pgt: Annotated[str | list[str] | None, Reads("pgt")] = None
    """The step to evaluate, or several."""
    split: str | None = None
    """Only images of this split; all that have ground truth when left out."""
    include_difficult: bool = False
    """Whether objects flagged difficult count in recall."""
    include_crowd: bool = False
    """Whether crowd regions count in recall."""
    protocol: Literal["voc", "coco"] = "voc"
    """The definition of AP. `voc`: AP50 and AP75 of boxes as in the VOC devkit; AP25, AP50, AP70 and AP75 of masks as
    in papers on VOC12 segmentation. `coco`: COCO's twelve figures. pycocotools computes AP of masks and COCO's
    figures."""
    kind: Literal["bbox", "segm"] = "bbox"
    """Whether to compare boxes or masks of detections or pgt. With segm, objects without a mask do not count, such as
    difficult objects of VOC; other difficult objects count, except in pgt."""
    eleven_point: bool = False
    """AP as the mean of 11 precisions, as in VOC07, instead of the area under the curve."""
    corloc: Literal["all", "not_difficult"] = "all"
    """Images that count for the CorLoc of a class: all images with the class, or, as in detectron2, images with an
    object of the class that is not difficult."""
    reference_rules: bool = False
    """Count as the published evaluators do. Recall: a proposal matches one object, difficult and crowd objects
    included; images without proposals are left out; objects are shifted by a pixel. VOC AP: boxes are a pixel too
    large."""

    @model_validator(mode="after")
    def _check_input(self) -> EvaluateConfig:
        judged = one_of(self, "proposals", "detections", "pgt")
        if judged == "pgt" and self.protocol == "coco":
            raise ValueError("pgt is judged by protocol voc: it has no ranking that COCO's AP could measure")
        if self.kind == "segm" and judged == "proposals":
            raise ValueError("kind segm is for detections and pgt: proposals are judged by their boxes")
        if self.kind == "segm" and (self.eleven_point or self.reference_rules):
            raise ValueError("eleven_point and reference_rules are for kind bbox: they change nothing about masks")
        return self


@dataclass(frozen=True)
class Judged:
    """The result of an evaluation: `figures` by name, and a row per class."""

    task: str
    num_objects: int
    figures: dict[str, float]
    per_class: list[dict[str, Any]]


def run(step: Step) -> Outcome:
    """Matches the rows of every annotated image and writes the figures."""
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
    texts = [
        f"{name} {100 * figures[name]:.1f} %"
        for name in HEADLINES[judged.task]
        if name in figures and "boxes" not in name
    ]
    if "boxes_per_image" in figures:
        texts.append(f"{figures['boxes_per_image']:.3g} boxes per image")
    write_parquet(storage.join(step.folder, "per_class.parquet"), pa.Table.from_pylist(judged.per_class))
    storage.write_json(storage.join(step.folder, "metrics.json"), report)
    return Outcome(rows=truth.num_rows, summary=", ".join(texts))


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
    proposals = step.inputs["proposals"].read(_PROPOSAL_COLUMNS)
    matched, located = [], []
    for truth_row, row in pairs_of(step, "proposals", truth, proposals):
        with naming_image(step, "proposals", truth_row):
            matched.append(proposal_metrics.match_row(truth_row, row, rules))
        located.append(_locate_peaks(step, truth_row, row))
    records = proposal_metrics.concat_records(matched)
    per_class = proposal_metrics.recall_by_class(records, names)
    figures = proposal_metrics.proposal_metrics(records, rules) | peak_metrics.peak_metrics(
        peak_metrics.concat_records(located)
    )
    return Judged("proposals", records.num_objects, figures, per_class)


def _locate_peaks(step: Step, truth_row: dict[str, Any], row: Mapping[str, Any]) -> PeakRecords:
    from weaksam.ops.peak_metrics import locate_peaks

    try:
        return locate_peaks(truth_row, row)
    except ValueError as error:
        name = step.inputs["proposals"].name
        raise DataError(
            f"steps.{step.name}: image {truth_row['image_id']} of step {name}: {error}: both must be of the same files"
        ) from error


def _judge_detections(step: Step, truth: pa.Table, names: list[str]) -> Judged:
    """Returns the mean figures of the steps to evaluate, with `<name>_std` for several; classes of the first step."""
    config: EvaluateConfig = step.config
    judged, pairs = [], []
    columns = [*_DETECTION_COLUMNS, "masks"] if config.kind == "segm" else _DETECTION_COLUMNS
    for key in [key for key in step.inputs if key != "images"]:
        detections = step.inputs[key].read(columns)
        pairs = list(pairs_of(step, key, truth, detections))
        for truth_row, row in pairs:
            with naming_image(step, key, truth_row):
                check_pair(truth_row, row, len(names))
        if config.kind == "segm":
            pairs = pairs_with_masks(step, key, pairs)
        judged.append(_detection_figures(config, pairs, names))
    task = "pgt" if config.pgt else "segmentation" if config.kind == "segm" else "detection"
    num_objects = sum(_num_objects(config, truth_row) for truth_row, _ in pairs)
    return Judged(task, num_objects, mean_and_std([figures for figures, _ in judged]), judged[0][1])


def _num_objects(config: EvaluateConfig, truth_row: dict[str, Any]) -> int:
    """Returns the number of objects of an image that count."""
    ignored = np.asarray(truth_row["crowd"], bool)
    if config.kind == "bbox" or config.protocol == "coco" or config.pgt:
        ignored = ignored | np.asarray(truth_row["difficult"], bool)
    if config.kind == "segm":
        from weaksam.ops.mask_metrics import has_mask

        ignored = ignored | ~has_mask(truth_row)
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
    records = voc.concat_records(voc.match_image(truth_row, row, len(names), rules) for truth_row, row in pairs)
    if config.pgt:
        from weaksam.ops.pgt_metrics import pgt_metrics, pgt_table

        return pgt_metrics(records, rules), pgt_table(records, names, rules)
    rows = voc.detection_table(records, names, rules)
    return voc.detection_metrics(rows, rules), rows


def mean_and_std(figures: list[dict[str, float]]) -> dict[str, float]:
    """Returns the means of the figures of several seeds, and `<name>_std`; for a single seed, its figures."""
    if len(figures) == 1:
        return figures[0]
    # A figure that a seed lacks, such as the precision of no boxes, has no mean.
    values = {key: [seed[key] for seed in figures] for key in figures[0] if all(key in seed for seed in figures)}
    means = {key: float(np.mean(of_seeds)) for key, of_seeds in values.items()}
    return means | {f"{key}_std": float(np.std(of_seeds, ddof=1)) for key, of_seeds in values.items()}


def _read_truth(step: Step, split: str | None) -> tuple[pa.Table, list[str]]:
    """Returns the ground truth of the images of the split, and the class names."""
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
    return truth.select(["image_id", *_TRUTH_COLUMNS]), step.inputs["images"].class_names()


STAGE = Stage("evaluate", 4, EvaluateConfig, run, writes="metrics")
