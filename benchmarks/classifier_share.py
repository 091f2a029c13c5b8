"""Measures the cost of the classifier beside SAM: the share of CAM and peaks in the time of a proposals actor.

    python -m benchmarks.classifier_share [--images 20] [--backbone frozen_sam] [--model vit_xs] [--points-per-side 16]

Drawn scenes with three labels each pass through the mapper of `proposals`. The classifier has random weights, which
do not change its time. Times are CPU seconds, or wall-clock seconds on a GPU.
"""

from __future__ import annotations

import argparse
import io
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from weaksam.core import schemas
from weaksam.demo.scenes import draw_dataset_scene
from weaksam.execution.mapping import map_batch
from weaksam.models.classifiers.weaktr_weights import build_weaktr
from weaksam.stages.proposals import ProposalsConfig, ProposeBoxes, TrainedClassifier

CLASSES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--backbone", default="frozen_sam", help="of the classifier: frozen_sam or a timm name")
    parser.add_argument("--model", default="vit_xs", help="SAM")
    parser.add_argument("--checkpoint", help="weights of SAM, for other models than vit_xs")
    parser.add_argument("--points-per-side", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        save_file(build_weaktr(args.backbone, CLASSES).state_dict(), weights)
        config = ProposalsConfig.model_validate(
            {
                "images": "images",
                "sam": {"model": args.model, "checkpoint": args.checkpoint},
                "grid": {"points_per_side": args.points_per_side},
            }
        )
        propose = ProposeBoxes(config, TrainedClassifier(str(weights), args.backbone, False, CLASSES))
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    spent = _measure_classifier(propose, clock, on_gpu=on_gpu)
    map_batch(propose, _batch(0, 2), schema=schemas.PROPOSALS, max_pixels=config.max_pixels)  # warm-up
    spent.clear()
    start = clock()
    map_batch(propose, _batch(2, args.images), schema=schemas.PROPOSALS, max_pixels=config.max_pixels)
    total = clock() - start
    print(f"{args.images} scenes, classifier {args.backbone}, SAM {args.model}, grid {args.points_per_side}")
    print(f"CAM and peaks {1000 * sum(spent) / args.images:7.1f} ms an image")
    print(f"all           {1000 * total / args.images:7.1f} ms an image")
    print(f"share         {100 * sum(spent) / total:7.1f} %")
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    print(f"{device}, Python {sys.version.split()[0]}, torch {torch.__version__}")


def _measure_classifier(propose: ProposeBoxes, clock: Any, *, on_gpu: bool) -> list[float]:
    """Makes `propose` record the seconds of each pass of its classifier; returns the list of seconds."""
    spent: list[float] = []
    find = propose.find_prompts
    assert find is not None

    def timed(image: Any, labels: Any) -> Any:
        start = clock()
        prompts = find(image, labels)
        if on_gpu:
            torch.cuda.synchronize()
        spent.append(clock() - start)
        return prompts

    propose.find_prompts = timed
    return spent


def _batch(first: int, count: int) -> pa.Table:
    rows = []
    for index in range(first, first + count):
        buffer = io.BytesIO()
        Image.fromarray(draw_dataset_scene(index, 7).image).save(buffer, "JPEG", quality=90)
        rows.append({"image_id": str(index), "data": buffer.getvalue(), "status": "ok", "message": ""})
    table = pa.Table.from_pylist(rows)
    return table.append_column("labels", pa.array([[0, 1, 2]] * count, pa.list_(pa.int32())))


if __name__ == "__main__":
    main()
