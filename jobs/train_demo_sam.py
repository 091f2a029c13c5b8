"""Trains the small SAM of the package, `vit_xs`, on drawn scenes: `python -m jobs.train_demo_sam RUN_FOLDER`.

The same command again resumes the training. The result, `RUN_FOLDER/vit_xs.safetensors`, is scored on scenes of shapes
that are not in its training data. On two cores the defaults take about three hours.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file

from weaksam.cli.terminal import end_on_sigterm, set_up_logging
from weaksam.demo.sam_training import SegmenterTask, export_weights, sam_weights
from weaksam.demo.sam_training_loss import DICE_WEIGHT
from weaksam.demo.sam_training_scores import score_segmenter
from weaksam.demo.scene_cache import cache_scenes
from weaksam.execution.connection import connect
from weaksam.sam.build import build_sam
from weaksam.training.settings import TrainResources, TrainSettings

log = logging.getLogger("weaksam.jobs")
BATCH = 24  # pictures a step
HELD_OUT_SEED = 8  # independent of the training seed, so that scores are comparable


def main(
    run_folder: Annotated[Path, typer.Argument(help="Local folder for scenes, checkpoints and the result.")],
    scenes: Annotated[int, typer.Option(min=1, help="Scenes to draw and train on.")] = 12_000,
    steps: Annotated[int, typer.Option(min=1, help=f"Steps, {BATCH} pictures each.")] = 10_000,
    workers: Annotated[int, typer.Option(min=1, help="Processes; one per core beats threads.")] = 2,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per process.")] = 0,
    lr: Annotated[float, typer.Option(min=1e-6, help="Highest learning rate; it falls to zero.")] = 2e-3,
    dice: Annotated[float, typer.Option(min=0, help="Weight of the dice term; raise it for last steps.")] = DICE_WEIGHT,
    seed: Annotated[int, typer.Option(min=0, help="Decides scenes, weights and order.")] = 1,
    weights: Annotated[Path | None, typer.Option(help="To start from: vit_xs, or a run's model.safetensors.")] = None,
) -> None:
    """Draw scenes, train, score on unseen shapes, export."""
    set_up_logging()
    folder = run_folder.resolve()
    drawn = cache_scenes(folder / "scenes", images=scenes, seed=seed, family="varied")
    held_out = cache_scenes(folder / "heldout", images=300, seed=HELD_OUT_SEED, family="demo")
    connect()
    from weaksam.training.loop import train  # imports Ray

    settings = TrainSettings(
        steps=steps,
        batch_size=BATCH,
        lr=lr,
        warmup=60,
        weight_decay=0.01,
        clip=1.0,
        ema=0.995,
        precision="bf16",
        seed=seed,
        checkpoint_every=100,
        resources=TrainResources(workers=workers, gpus_per_worker=gpus),
    )
    task = SegmenterTask(str(drawn), weights=str(weights.resolve()) if weights else None, dice_weight=dice)
    finish(train(task, settings, str(folder / "training")), held_out, folder, settings)


def finish(weights: str, held_out: Path, folder: Path, settings: TrainSettings) -> None:
    """Scores the weights on shapes they were not trained on and exports them with their metadata."""
    sam, state = build_sam("vit_xs"), sam_weights(load_file(weights))
    sam.load_state_dict(state)
    scores = score_segmenter(sam, held_out)
    about = {
        "model": "vit_xs",
        "licence": "Apache-2.0",
        "trained_by": "jobs/train_demo_sam.py on scenes drawn by weaksam.demo.scene_drawing, family varied",
        "settings": settings.model_dump_json(exclude={"resources"}),
        "scores": json.dumps(scores),
        "scored_on": "300 drawn scenes of family demo, none of whose shapes was trained on",
    }
    export_weights(state, folder / "vit_xs.safetensors", about)
    (folder / "metrics.json").write_text(json.dumps({"task": "segmenter", "metrics": scores}, indent=2) + "\n")
    log.info("scores %s", json.dumps(scores))


if __name__ == "__main__":
    end_on_sigterm()
    typer.run(main)
