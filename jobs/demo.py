"""The demo: draws a small world, runs `configs/demo.yaml` on it and shows what came out.

python -m jobs.demo FOLDER     (what `make demo` does; the same command again goes on where it stopped)
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from weaksam import pipeline, storage, tables
from weaksam.cli import run_pipeline, set_up_logging
from weaksam.data.images import decode_image
from weaksam.data.scenes import write_scenes
from weaksam.pictures import contact_sheet, draw_proposals, png_bytes
from weaksam.stage import Step

CONFIG = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
SHOWN, BOXES_SHOWN = 6, 15


def main(folder: str) -> None:
    """Runs the demo below `folder`."""
    set_up_logging()
    scenes = storage.join(storage.absolute(folder), "scenes")
    write_scenes(scenes, images=240, seed=7, format="voc")
    overrides = [f"run={storage.join(storage.absolute(folder), 'run')}", f"steps.images.root={scenes}"]
    run_pipeline(CONFIG, overrides)
    steps = {step.name: step for step in pipeline.load(CONFIG, overrides)}
    picture = storage.join(storage.absolute(folder), "proposals.png")
    storage.write_bytes(picture, png_bytes(_picture(steps["images"], steps["proposals"])))
    metrics = storage.read_json(storage.join(steps["recall"].folder, "metrics.json"))
    print(recall_table(metrics))
    print(f"\nPicture: {picture}\nTable:   {steps['proposals'].folder}\nLook at it:\n")
    print("  import pandas as pd, glob")
    print(f"  table = pd.concat(map(pd.read_parquet, glob.glob('{steps['proposals'].folder}/part-*.parquet')))")
    print("  print(table[['image_id', 'status', 'boxes', 'predicted_iou']])")


def recall_table(report: dict) -> str:
    """The figures of an evaluation as a table for people."""
    figures = report["metrics"]
    rows = [("all", "", "AR"), ("best 10 boxes", "_top10", "AR@10"), ("best 50 boxes", "_top50", "AR@50")]
    rows += [(f"{size} objects", f"_{size}", f"AR_{size}") for size in ("small", "medium", "large")]
    lines = [
        f"\nGrid proposals on the {report['split']} split: {report['num_images']} images, "
        f"{report['num_objects']} objects, {figures['boxes_per_image']:.1f} boxes per image",
        f"{'recall at IoU':16} {'0.5':>7} {'0.75':>7} {'0.9':>7} {'AR':>7}",
    ]
    for name, suffix, average in rows:
        keys = [*(f"recall@{iou}{suffix}" for iou in ("0.5", "0.75", "0.9")), average]
        if keys[0] in figures:
            lines.append(f"{name:16} " + " ".join(f"{100 * figures[key]:6.1f}%" for key in keys))
    return "\n".join(lines)


def _picture(images: Step, proposals: Step) -> Image.Image:
    """The best-rated proposals of some images, masks tinted."""
    uris = {row["image_id"]: row["uri"] for row in tables.read_step(images, columns=["uri"]).to_pylist()}
    shown = tables.read_step(proposals, columns=["boxes", "masks"])[-SHOWN:].to_pylist()
    drawn = []
    for row in shown:
        boxes = np.array(row["boxes"][:BOXES_SHOWN], np.float32).reshape(-1, 4)
        image = decode_image(storage.read_bytes(uris[row["image_id"]]))
        drawn.append(draw_proposals(image, boxes, row["masks"][:BOXES_SHOWN]))
    return contact_sheet(drawn, columns=3)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
