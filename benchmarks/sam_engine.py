"""One image through SAM: our engine beside `SamAutomaticMaskGenerator`, in one process, and are the masks the same?

    python benchmarks/sam_engine.py --model vit_b --points-per-side 16 --threads 1

Models without a checkpoint get random weights with calibrated heads (`weaksam.sam.calibrate`), so that realistic shares
of the masks pass the filters. The ratio is of CPU seconds, which other programs on the machine disturb least; seconds
by the clock are printed beside it. Exits with 1 when the masks differ.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from weaksam.data.scene_drawing import draw_scene
from weaksam.ops.masks import decode_rle
from weaksam.sam import SHIPPED
from weaksam.sam import engine as engine_module
from weaksam.sam.build import build_sam
from weaksam.sam.calibrate import calibrate
from weaksam.sam.checkpoints import load_sam
from weaksam.sam.engine import EngineSettings, Proposals, SamEngine

FEW_PIXELS = 1e-5  # share of mask pixels that may differ: logits within rounding of 0
TIE = 1e-4  # of predicted IoU
PHASES = ("decode_prompts", "draw_masks", "measure_masks", "nms_of_mask_boxes", "encode_masks", "make_image_side")


class Clock:
    """CPU and wall seconds by phase."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, with its time added to `name`."""

        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_xs", help="vit_xs, vit_b, vit_l or vit_h")
    parser.add_argument("--checkpoint", help="weights file; without one: bundled weights, or random calibrated ones")
    parser.add_argument("--image", help="image file; without one: a drawn scene of --image-size")
    parser.add_argument("--image-size", default="375x500", help="height x width of the drawn scene")
    parser.add_argument("--points-per-side", type=int, default=16)
    parser.add_argument(
        "--thresholds", type=float, nargs=3, default=(0.88, 0.95, 0.7), metavar=("IOU", "STABLE", "NMS")
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--chunk", type=int, help="prompts decoded at a time by the engine")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def make_model(args: argparse.Namespace, image: np.ndarray) -> tuple[Sam, str]:
    """The model and in words where its weights come from."""
    if args.checkpoint or args.model in SHIPPED:
        return load_sam(args.model, args.checkpoint, device=args.device), args.checkpoint or "bundled"
    torch.manual_seed(0)
    sam = build_sam(args.model).to(args.device).requires_grad_(False)
    return calibrate(sam, image), "random, calibrated"


def make_image(args: argparse.Namespace) -> np.ndarray:
    """(H, W, 3) uint8."""
    if args.image:
        return np.array(Image.open(args.image).convert("RGB"))
    height, width = (int(side) for side in args.image_size.split("x"))
    return draw_scene(3, family="varied", size=(height, width)).image


def run_reference(sam: Sam, image: np.ndarray, args: argparse.Namespace, clock: Clock) -> list[dict]:
    """One image through `segment_anything`, by phase."""
    pred_iou, stability, nms = args.thresholds
    generator = SamAutomaticMaskGenerator(
        sam, args.points_per_side, 64, pred_iou, stability, box_nms_thresh=nms, output_mode="coco_rle"
    )
    generator.predictor.set_image = clock.timed("encode", generator.predictor.set_image)
    originals = sam.mask_decoder.forward, sam.postprocess_masks
    sam.mask_decoder.forward = clock.timed("decode + draw", originals[0])
    sam.postprocess_masks = clock.timed("upsample", originals[1])
    try:
        with clock.phase("total"):
            return generator.generate(image)
    finally:
        del sam.mask_decoder.forward, sam.postprocess_masks


def run_engine(engine: SamEngine, image: np.ndarray, args: argparse.Namespace, clock: Clock) -> Proposals:
    """One image through the engine, by phase."""
    pred_iou, stability, nms = args.thresholds
    originals = {name: getattr(engine_module, name) for name in PHASES}
    for name, function in originals.items():
        setattr(engine_module, name, clock.timed(name, function))
    engine.encode = clock.timed("encode", type(engine).encode.__get__(engine))
    try:
        with clock.phase("total"):
            (found,) = engine.propose(
                [image],
                pred_iou_threshold=pred_iou,
                stability_threshold=stability,
                nms_threshold=nms,
                return_masks=True,
            )
    finally:
        for name, function in originals.items():
            setattr(engine_module, name, function)
    return found


def compare(found: Proposals, expected: list[dict], image_hw: tuple[int, int]) -> dict[str, object]:
    """How far two results are from the same. Masks whose predicted IoU ties may come in another order."""
    if len(found.boxes) != len(expected):
        return {"same": False, "masks": [len(found.boxes), len(expected)]}
    assert found.masks is not None
    theirs = [decode_rle(record["segmentation"]["counts"].encode(), *image_hw) for record in expected]
    scores = np.array([record["predicted_iou"] for record in expected])
    used: set[int] = set()
    different, moved = 0, 0
    for index, (rle, score) in enumerate(zip(found.masks, found.predicted_iou, strict=True)):
        mask = decode_rle(rle, *image_hw)
        tied = [i for i in np.flatnonzero(np.abs(scores - score) <= TIE).tolist() if i not in used]
        if not tied:
            return {"same": False, "masks": len(expected), "without_counterpart": index}
        best = min(tied, key=lambda i, mask=mask: int((mask != theirs[i]).sum()))
        used.add(best)
        different += int((mask != theirs[best]).sum())
        moved += best != index
    same = different <= FEW_PIXELS * max(1, len(expected)) * image_hw[0] * image_hw[1]
    return {"same": same, "masks": len(expected), "pixels": different, "moved_by_ties": moved}


def report(args: argparse.Namespace, weights: str, image: np.ndarray, reference: Clock, ours: Clock) -> dict:
    """Everything needed to read the ratio."""
    runs = args.repeats
    return {
        "ratio": round(reference.cpu["total"] / ours.cpu["total"], 2),
        "ratio_wall": round(reference.wall["total"] / ours.wall["total"], 2),
        "model": args.model,
        "weights": weights,
        "image_hw": image.shape[:2],
        "points": args.points_per_side**2,
        "thresholds": args.thresholds,
        "reference_cpu_s": {name: round(seconds / runs, 3) for name, seconds in reference.cpu.items()},
        "engine_cpu_s": {name: round(seconds / runs, 3) for name, seconds in ours.cpu.items()},
        "threads": args.threads,
        "device": torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine(),
        "cpu": _cpu_name(),
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Runs both, prints one JSON object."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    image = make_image(args)
    sam, weights = make_model(args, image)
    engine = SamEngine(sam, settings=EngineSettings(args.points_per_side, points_per_chunk=args.chunk))
    engine.propose([image[:32, :32]], pred_iou_threshold=0.9, stability_threshold=0.9, nms_threshold=0.5)  # warm
    reference, ours = Clock(), Clock()
    agreement: dict[str, object] = {}
    for _ in range(args.repeats):
        expected = run_reference(sam, image, args, reference)
        agreement = compare(run_engine(engine, image, args, ours), expected, image.shape[:2])
    print(json.dumps(report(args, weights, image, reference, ours) | {"agreement": agreement}, indent=1))
    return 0 if agreement["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
