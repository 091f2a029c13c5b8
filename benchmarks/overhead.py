"""Measures the overhead of the pipeline: proposals with one actor against the engine alone, on the same images.

python -m benchmarks.overhead [--images 500] [--points-per-side 16]

Same scenes, weights, settings and number of compute threads. Both times include loading the model, reading and
decoding; the pipeline's also includes starting its actor and writing Parquet, but not starting Ray. Exits 1 below 0.85.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from testing.local_ray import disconnect
from weaksam import pipeline
from weaksam.cli.terminal import set_up_logging
from weaksam.core import storage
from weaksam.data.images import decode_image
from weaksam.demo.scenes import write_scenes
from weaksam.execution.connection import connect
from weaksam.stages.proposal_settings import GridSettings

CONFIG = """
run: {folder}/run
steps:
  images: {{stage: index, format: voc, root: {folder}/scenes, splits: [trainval, test]}}
  proposals:
    stage: proposals
    images: images
    sam: {{model: vit_xs}}
    grid: {{points_per_side: {points}}}
    resources: {{actor_cpus: 1.0, max_actors: 1}}
"""
LEAST_SHARE = 0.85


def main() -> int:
    """Runs both and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--points-per-side", type=int, default=16)
    args = parser.parse_args()
    set_up_logging()
    with tempfile.TemporaryDirectory(prefix="weaksam-bench-") as folder:
        write_scenes(str(Path(folder) / "scenes"), images=args.images, seed=3, format="voc")
        config = Path(folder) / "run.yaml"
        config.write_text(CONFIG.format(folder=folder, points=args.points_per_side))
        steps = pipeline.load(str(config))
        connect()
        pipeline.run_steps(steps)
        manifest = steps[-1].manifest()
        assert manifest is not None
        disconnect()
        uris = steps[0].read(["uri"]).column("uri").to_pylist()
        bare = bare_loop(uris, steps[-1].config.grid)
    piped = manifest["seconds"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "pyarrow"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    print(f"{args.images} scenes, vit_xs, {args.points_per_side}x{args.points_per_side} points, one compute thread")
    print(f"bare engine in a loop {bare:7.1f} s  {args.images / bare:6.2f} images/s")
    print(f"pipeline, one actor   {piped:7.1f} s  {args.images / piped:6.2f} images/s")
    print(f"share of the bare engine's throughput: {bare / piped:.2f} (wanted: at least {LEAST_SHARE})")
    return 0 if bare / piped >= LEAST_SHARE else 1


def bare_loop(uris: Sequence[str], grid: GridSettings) -> float:
    """Returns the seconds that the engine takes for images in this process, on one thread, loading included."""
    import torch

    from weaksam.sam.checkpoints import load_sam
    from weaksam.sam.engine import EngineSettings, SamEngine

    torch.set_num_threads(1)
    started = time.perf_counter()
    engine = SamEngine(load_sam("vit_xs"), settings=EngineSettings(grid.points_per_side))
    for uri in uris:
        engine.propose(
            [decode_image(storage.read_bytes(uri))],
            pred_iou_threshold=grid.pred_iou_threshold,
            stability_threshold=grid.stability_threshold,
            nms_threshold=grid.nms_threshold,
        )
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
