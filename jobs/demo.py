"""The demo: draws a small world, runs `configs/demo.yaml` on it and shows what came out.

python -m jobs.demo FOLDER     (what `make demo` does; the same command again goes on where it stopped)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from weaksam import pipeline, schemas, storage, tables
from weaksam.cli import run_pipeline, set_up_logging
from weaksam.data.images import decode_image
from weaksam.data.scenes import write_scenes
from weaksam.models.clues import KINDS, find_clues
from weaksam.models.weaktr_weights import load_trained
from weaksam.pictures import SOURCE_COLOURS, contact_sheet, draw_boxes, draw_heatmap, png_bytes
from weaksam.stage import Step

CONFIG = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
SCENES, SEED = 900, 7
SHOWN, BOXES_SHOWN = 3, 40


def main(folder: str) -> None:
    """Runs the demo below `folder`."""
    set_up_logging()
    overrides = prepare(folder)
    run_pipeline(CONFIG, overrides)
    steps = {step.name: step for step in pipeline.load(CONFIG, overrides)}
    picture = storage.join(storage.absolute(folder), "proposals.png")
    storage.write_bytes(picture, png_bytes(_picture(steps)))
    print(recall_table(read_report(steps["recall"])))
    print("\nDetectors that learnt from image-level labels")
    print(detector_table({name.upper(): (steps[f"{name}_ap"], steps[f"{name}_corloc"]) for name in ("oicr", "mist")}))
    print(f"\nPicture: {picture}\nTable:   {steps['proposals'].folder}\nLook at it:\n")
    print("  import pandas as pd, glob")
    print(f"  table = pd.concat(map(pd.read_parquet, glob.glob('{steps['proposals'].folder}/part-*.parquet')))")
    print("  print(table[['image_id', 'status', 'boxes', 'source', 'points', 'labels']])")


def prepare(folder: str) -> list[str]:
    """Draws the scenes below `folder`, unless they are there; gives the overrides that point a run file at them."""
    scenes = storage.join(storage.absolute(folder), "scenes")
    write_scenes(scenes, images=SCENES, seed=SEED, format="voc")
    return [f"run={storage.join(storage.absolute(folder), 'run')}", f"steps.images.root={scenes}"]


def read_report(step: Step) -> dict:
    """What a finished `evaluate` step wrote."""
    return storage.read_json(storage.join(step.folder, "metrics.json"))


def detector_table(steps: dict[str, tuple[Step, Step]]) -> str:
    """AP on one split and CorLoc on another of detectors by name; with deviations, where there are several seeds."""
    splits = [read_report(step)["split"] for step in next(iter(steps.values()))]
    lines = [_cells("", [f"AP50 {splits[0]}", f"AP75 {splits[0]}", f"CorLoc {splits[1]}"])]
    for name, (ap, corloc) in steps.items():
        found, located = read_report(ap)["metrics"], read_report(corloc)["metrics"]
        lines.append(_cells(name, [_percent(found, "AP50"), _percent(found, "AP75"), _percent(located, "CorLoc")]))
    return "\n".join(lines)


def _cells(name: str, cells: list[str]) -> str:
    return f"{name:16} " + " ".join(f"{cell:>16}" for cell in cells)


def _percent(figures: dict, key: str) -> str:
    deviation = f" ± {100 * figures[f'{key}_std']:.1f}" if f"{key}_std" in figures else ""
    return f"{100 * figures[key]:.1f}%{deviation}"


def recall_table(report: dict) -> str:
    """The figures of an evaluation as a table for people: sources added one by one, then all by size of objects."""
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
    return "\n".join(lines)


def _picture(steps: dict[str, Step]) -> Image.Image:
    """A row per image: a heatmap of each kind with its peaks, and the proposals by what prompted them."""
    classifier, proposals = steps["classifier"], steps["proposals"]
    images = tables.read_step(steps["images"], columns=["uri"])
    uris = dict(zip(images.column("image_id").to_pylist(), images.column("uri").to_pylist(), strict=True))
    weights = storage.fetch(storage.join(classifier.folder, "checkpoint", "model.safetensors"))
    model = load_trained(weights, classifier.config.backbone, len(schemas.class_names_of(images.schema)))
    rules = proposals.config.clues.rules(model.size.depth)
    drawn = []
    table = tables.read_step(proposals, columns=["boxes", "source", "labels"])
    for row in table[-SHOWN:].to_pylist():
        image = decode_image(storage.read_bytes(uris[row["image_id"]]))
        clues, heatmaps = find_clues(model, image, row["labels"], rules)
        first = clues.labels[0]
        for kind, maps in heatmaps.items():
            here = (clues.kinds == KINDS.index(kind)) & (clues.point_labels == first)
            drawn.append(draw_heatmap(image, maps[0].mean(0).cpu().numpy(), clues.points[here]))
        boxes = np.array(row["boxes"][:BOXES_SHOWN], np.float32).reshape(-1, 4)
        colours = [SOURCE_COLOURS[schemas.SOURCES[source]] for source in row["source"][:BOXES_SHOWN]]
        drawn.append(draw_boxes(Image.fromarray(image), boxes, colours))
    return contact_sheet(drawn, columns=4, cell=280)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
