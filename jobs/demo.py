"""The demo: draws a small dataset, runs a config on it and shows the results.

python -m jobs.demo FOLDER            (`make demo`: configs/demo.yaml; the same command again resumes)
python -m jobs.demo FOLDER --full     (`make demo-full`: configs/demo_full.yaml, with every detector)
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from weaksam.cli.run_command import run_pipeline
from weaksam.cli.terminal import end_on_sigterm, set_up_logging
from weaksam.core import schemas, storage
from weaksam.core.step import Step
from weaksam.demo.scenes import write_scenes
from weaksam.report.page import write_report

CONFIGS = Path(__file__).parents[1] / "configs"
TEACHERS = {"oicr": "OICR", "mist": "MIST"}
STUDENTS = {
    "faster_rcnn": "Faster R-CNN",
    "faster_rcnn_top1": "on best of a class",
    "faster_rcnn_drop": "+ RoI drop",
    "dino": "DINO",
    "mask_rcnn": "Mask R-CNN",
    "mask2former": "Mask2Former",
}
PROMPTS = {"mist_grid": "grid alone", "mist_cam": "+ CAM peaks", "mist_cross": "+ cross peaks"}
SCENES, SEED = 660, 7


def main(folder: str, config: str) -> None:
    """Runs a config of the demo below `folder`."""
    set_up_logging()
    overrides = prepare(folder)
    steps = {step.name: step for step in run_pipeline(config, overrides)}
    report = write_report(storage.join(folder, "run"))
    print(recall_table(read_report(steps["recall"])))
    print("\nDetectors that learnt from image-level labels")
    print(detector_table({TEACHERS[name]: reports_of(steps, name) for name in TEACHERS if name in steps}))
    if PROMPTS.keys() <= steps.keys():
        print("\nMIST by what prompted its proposals, the grid suppressed as published")
        print(detector_table({label: reports_of(steps, name) for name, label in PROMPTS.items()}))
    print("\nPseudo ground truth made of MIST's detections, of which a detector is trained next")
    quality = {"best of a class": "pgt_top1_quality", "adaptive": "pgt_quality"}
    print(pgt_table({label: read_report(steps[name]) for label, name in quality.items()}))
    print("\nMasks of the adaptive one, drawn by SAM")
    print(pgt_table({"adaptive": read_report(steps["masks_quality"])}))
    print("\nDetectors trained on it, on the adaptive one where nothing else is said")
    print(detector_table({STUDENTS[name]: reports_of(steps, name) for name in STUDENTS if name in steps}))
    print("\nTheir masks, on test")
    masks = {label: steps[key] for name, label in STUDENTS.items() if (key := f"{name}_mask_ap") in steps}
    print(figure_table({label: read_report(step) for label, step in masks.items()}, ("AP25", "AP50", "AP70", "AP75")))
    print(f"\nTable:  {steps['proposals'].folder}/part-*.parquet")
    print(f"Report: {report}")


def prepare(folder: str) -> list[str]:
    """Draws the scenes below `folder`, unless they exist; returns the overrides that point a run file at them."""
    scenes = storage.join(storage.absolute(folder), "scenes")
    write_scenes(scenes, images=SCENES, seed=SEED, format="voc")
    return [f"run={storage.join(storage.absolute(folder), 'run')}", f"steps.images.root={scenes}"]


def read_report(step: Step) -> dict:
    """Returns the metrics.json of a finished `evaluate` step."""
    return storage.read_json(storage.join(step.folder, "metrics.json"))


def reports_of(steps: Mapping[str, Step], name: str) -> list[dict]:
    """Returns the reports of a detector: AP and, if there is such a step, CorLoc."""
    return [read_report(steps[key]) for key in (f"{name}_ap", f"{name}_corloc") if key in steps]


def detector_table(detectors: Mapping[str, list[dict]]) -> str:
    """Returns a table of detectors: AP on one split, CorLoc on another if measured, deviations over several seeds."""
    lines: list[str] = []
    for name, reports in detectors.items():
        shown = [("AP50", reports[0]), ("AP75", reports[0]), *(("CorLoc", report) for report in reports[1:])]
        if not lines:
            lines.append(_cells("", [f"{figure} {report['split']}" for figure, report in shown]))
        lines.append(_cells(name, [_percent(report["metrics"], figure) for figure, report in shown]))
    return "\n".join(lines)


def pgt_table(reports: Mapping[str, dict]) -> str:
    """Returns a table of pseudo ground truth: precision, recall, and the IoU of its masks if there are any."""
    keys = ["boxes_per_image", "precision@0.5", "recall@0.5", "precision@0.75", "recall@0.75"]
    if any("mask_iou" in report["metrics"] for report in reports.values()):
        keys.insert(1, "mask_iou")
    return figure_table(reports, keys)


def figure_table(reports: Mapping[str, dict], keys: Sequence[str]) -> str:
    """Returns a table of the figures `keys` of reports, by name."""
    lines = [_cells("", [key.replace("_", " ") for key in keys])]
    for name, report in reports.items():
        lines.append(_cells(name, [_figure(report["metrics"], key) for key in keys]))
    return "\n".join(lines)


def _figure(figures: dict, key: str) -> str:
    return f"{figures[key]:.2f}" if key == "boxes_per_image" else _percent(figures, key)


def _cells(name: str, cells: list[str]) -> str:
    return f"{name:20} " + " ".join(f"{cell:>16}" for cell in cells)


def _percent(figures: dict, key: str) -> str:
    deviation = f" ± {100 * figures[f'{key}_std']:.1f}" if f"{key}_std" in figures else ""
    return f"{100 * figures[key]:.1f}%{deviation}"


def recall_table(report: dict) -> str:
    """Returns an evaluation as a table: sources added one by one, all sources by object size, then peaks."""
    figures = report["metrics"]
    counts = [figures.get(f"boxes_per_image_{source}", 0.0) for source in schemas.SOURCES]
    rows = [("grid", "_grid", sum(counts[:1])), ("+ CAM peaks", "_grid+coarse+fine", sum(counts[:3]))]
    rows += [("+ cross peaks", "", sum(counts)), ("best 50 boxes", "_top50", min(50.0, sum(counts)))]
    rows += [(f"{size} objects", f"_{size}", sum(counts)) for size in ("small", "medium", "large")]
    lines = [
        f"\nProposals on the {report['split']} split: {report['num_images']} images, {report['num_objects']} objects",
        f"{'':16} {'boxes':>7} {'R@0.5':>7} {'R@0.75':>7} {'R@0.9':>7}",
    ]
    for name, suffix, boxes in rows:
        keys = [f"recall@{iou}{suffix}" for iou in ("0.5", "0.75", "0.9")]
        if keys[0] in figures:
            lines.append(f"{name:16} {boxes:7.1f} " + " ".join(f"{100 * figures[key]:6.1f}%" for key in keys))
    shares = {kind: f"peaks_{kind}_inside" for kind in schemas.SOURCES}
    shown = [f"{kind} {100 * figures[key]:.1f}%" for kind, key in shares.items() if key in figures]
    if shown:
        lines.append(f"Peaks inside an object of their class, by masks: {', '.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="demo")
    parser.add_argument("--full", action="store_true", help="every detector, and MIST by kinds of prompts")
    args = parser.parse_args()
    end_on_sigterm()
    main(args.folder, str(CONFIGS / ("demo_full.yaml" if args.full else "demo.yaml")))
