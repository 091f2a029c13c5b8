"""Compares our engine over whole images, in each precision, with `segment_anything`'s mask generator, in one process.

    python -m benchmarks.sam_engine --models vit_b --points-per-side 32 --threads 1

Same images, points, thresholds and weights. Models without a checkpoint get random weights with calibrated heads
(`testing.calibrate`), so that realistic shares of the masks pass the filters; these are printed. In fp32 the masks
must be those of `segment_anything`, but for logits within rounding of 0 and ties. For other precisions the output has
the share of fp32's masks that they match at IoU 0.9. Ratios compare wall-clock seconds on a GPU, and elsewhere CPU
seconds, which other programs on the machine disturb least. Phases are timed in a separate run, in which each phase
waits for the GPU. Exits with 1 when the masks of fp32 differ.
"""

# segment_anything declares no attribute types.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchvision
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from benchmarks.clock import Clock, peak_memory, seconds_of
from benchmarks.mask_agreement import compare, matched
from testing.calibrate import calibrate
from weaksam.demo.scene_drawing import draw_scene
from weaksam.sam import engine as engine_module
from weaksam.sam.backend import Backend
from weaksam.sam.build import build_sam
from weaksam.sam.checkpoints import load_sam
from weaksam.sam.engine import EngineSettings, Proposals, SamEngine
from weaksam.sam.settings import Precision
from weaksam.sam.shipped import SHIPPED

PEER = "segment_anything"
# Images/s of one H200 that only did the multiplications of 1024 points at 790 TFLOP/s, reformulated as in our engine.
LIMITS = {"vit_h": 97, "vit_l": 147, "vit_b": 229}


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the filters that a mask must pass."""

    predicted_iou: float
    stability: float
    nms: float | None

    def arguments(self) -> dict[str, Any]:
        """Returns keyword arguments for `SamEngine.propose`."""
        names = ("pred_iou_threshold", "stability_threshold", "nms_threshold")
        return dict(zip(names, (self.predicted_iou, self.stability, self.nms), strict=True))


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_xs"], help="of vit_xs, vit_b, vit_l, vit_h")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="FILE", help="weights, one for each model")
    parser.add_argument("--images", nargs="*", default=[], metavar="FILE", help="else scenes are drawn")
    parser.add_argument("--image-sizes", nargs="+", default=["375x500"], help="height x width of the drawn scenes")
    parser.add_argument("--points-per-side", type=int, default=32)
    parser.add_argument(
        "--thresholds", type=float, nargs=3, default=(0.88, 0.95, 0.7), metavar=("IOU", "STABLE", "NMS")
    )
    parser.add_argument(
        "--precisions", nargs="+", help="of fp32, fp16, bf16; all that the device is made for by default"
    )
    parser.add_argument("--compiled", action="store_true", help="have PyTorch compile the encoder")
    parser.add_argument("--phases", action="store_true", help="also run each once to time its phases")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without-peer", action="store_true", help="only the engine")
    return parser.parse_args()


def make_model(name: str, checkpoint: str | None, image: np.ndarray, device: str) -> tuple[Sam, str]:
    """Returns the model and the origin of its weights, in words."""
    if checkpoint or name in SHIPPED:
        return load_sam(name, checkpoint, device=device), checkpoint or "bundled"
    torch.manual_seed(0)
    sam = build_sam(name).requires_grad_(False).to(device)
    return calibrate(sam, image), "random, calibrated"


def make_images(args: argparse.Namespace) -> list[np.ndarray]:
    """Returns images, each (H, W, 3) uint8."""
    if args.images:
        return [np.array(Image.open(file).convert("RGB")) for file in args.images]
    images = []
    for seed, size in enumerate(args.image_sizes, start=3):
        height, width = map(int, size.split("x"))
        images.append(draw_scene(seed, family="varied", size=(height, width)).image)
    return images


def run_peer(
    sam: Sam, image: np.ndarray, points: int, thresholds: Thresholds, clock: Clock | None = None
) -> list[dict]:
    """Runs `segment_anything` on one image, timed by phase when there is a clock."""
    generator = SamAutomaticMaskGenerator(
        sam,
        points,
        64,
        thresholds.predicted_iou,
        thresholds.stability,
        box_nms_thresh=thresholds.nms or 1.0,
        output_mode="coco_rle",
    )
    if clock is None:
        return generator.generate(image)
    generator.predictor.set_image = clock.timed("encode", generator.predictor.set_image)
    originals = sam.mask_decoder.forward, sam.postprocess_masks
    sam.mask_decoder.forward = clock.timed("decode and draw", originals[0])
    sam.postprocess_masks = clock.timed("upsample", originals[1])
    try:
        with clock.phase("total"):
            return generator.generate(image)
    finally:
        del sam.mask_decoder.forward, sam.postprocess_masks


@contextmanager
def by_phase(engine: SamEngine, clock: Clock) -> Iterator[None]:
    """Makes the clock time the phases of the engine inside the context."""
    backend, encoder = engine.backend, engine._encoder
    names = [field.name for field in fields(Backend) if callable(getattr(backend, field.name))]
    engine.backend = replace(backend, **{name: clock.timed(name, getattr(backend, name)) for name in names})
    originals = {name: getattr(engine_module, name) for name in ("decode_prompts", "nms_of_mask_boxes", "encode_masks")}
    for name, function in originals.items():
        setattr(engine_module, name, clock.timed(name, function))
    run, encoder._encode = encoder._encode, clock.timed("encode", encoder._encode)
    try:
        with clock.phase("total"):
            yield
    finally:
        engine.backend, encoder._encode = backend, run
        for name, function in originals.items():
            setattr(engine_module, name, function)


def survivors(engine: SamEngine, image: np.ndarray, thresholds: Thresholds) -> dict[str, int]:
    """Returns the number of masks of one image that are left after each filter."""
    encoded = engine.encode(image)
    steps = {
        "drawn": replace(thresholds, predicted_iou=0.0, stability=0.0, nms=None),
        "by_predicted_iou": replace(thresholds, stability=0.0, nms=None),
        "by_stability": replace(thresholds, nms=None),
        "after_suppression": thresholds,
    }
    return {name: len(engine.propose([encoded], **step.arguments())[0].boxes) for name, step in steps.items()}


class Bench:
    """All rows of one model."""

    def __init__(self, name: str, checkpoint: str | None, args: argparse.Namespace) -> None:
        self.name, self.args, self.device = name, args, torch.device(args.device)
        self.images, self.thresholds = make_images(args), Thresholds(*args.thresholds)
        self.sam, weights = make_model(name, checkpoint, self.images[0], args.device)
        self.rows: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {"model": name, "weights": weights, "rows": self.rows}

    def measure(self) -> dict[str, Any]:
        """Runs the peer and each precision."""
        points, expected = self.args.points_per_side, None
        if not self.args.without_peer:
            expected = self._row(
                PEER,
                lambda: [run_peer(self.sam, image, points, self.thresholds) for image in self.images],
                lambda clock: [run_peer(self.sam, image, points, self.thresholds, clock) for image in self.images],
            )
        whole = None
        usual = ["fp32", "bf16"] if self.device.type == "cpu" else ["fp32", "fp16", "bf16"]
        for precision in self.args.precisions or usual:
            engine, proposals = self._engine_row(precision)
            self._judge(self.rows[precision], proposals, expected if precision == "fp32" else None, whole)
            if precision == "fp32":
                whole, self.summary["survivors"] = proposals, survivors(engine, self.images[0], self.thresholds)
        return self.summary

    def _engine_row(self, precision: str) -> tuple[SamEngine, list[Proposals]]:
        settings = EngineSettings(
            self.args.points_per_side, precision=cast(Precision, precision), compiled=self.args.compiled
        )
        engine = SamEngine(self.sam, settings=settings)

        def run() -> list[Proposals]:
            return engine.propose(self.images, **self.thresholds.arguments(), return_masks=True)

        def phases(clock: Clock) -> None:
            with by_phase(engine, clock):
                run()

        return engine, self._row(precision, run, phases)

    def _row(self, label: str, run: Callable[[], Any], phases: Callable[[Clock], Any]) -> Any:
        """Measures a row; returns the result of the last run."""
        if self.device.type != "cpu":
            run()  # warm
        peak_memory(self.device)
        result, seconds = seconds_of(run, self.device, self.args.repeats)
        each = seconds / len(self.images)
        self.rows[label] = {
            "images_per_s": 1 / each,
            "s_per_image": each,
            "memory_mib": round(peak_memory(self.device)),
        }
        if self.args.phases:
            clock = Clock(self.device)
            phases(clock)
            shares = {name: round(spent / len(self.images), 4) for name, spent in clock.seconds.items()}
            self.rows[label]["phases_s"] = shares
        return result

    def _judge(
        self,
        row: dict[str, Any],
        proposals: list[Proposals],
        expected: list[list[dict]] | None,
        whole: list[Proposals] | None,
    ) -> None:
        """Adds the comparisons of a row: with the peer's seconds and masks, the arithmetic limit, the masks of fp32."""
        sizes = [(image.shape[0], image.shape[1]) for image in self.images]
        if PEER in self.rows:
            row["ratio"] = round(self.rows[PEER]["s_per_image"] / row["s_per_image"], 2)
        if "H200" in device_name(self.device) and self.args.points_per_side == 32 and self.name in LIMITS:
            row["of_the_limit"] = round(row["images_per_s"] / LIMITS[self.name], 3)
        if expected is not None:
            row["agreement"] = [compare(*three) for three in zip(proposals, expected, sizes, strict=True)]
        if whole is not None:
            row["matched"] = round(matched(proposals, whole, sizes), 4)
            row["masks"] = [sum(len(result.boxes) for result in many) for many in (proposals, whole)]


def device_name(device: torch.device) -> str:
    """Returns the name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Runs all models, prints one JSON object."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    checkpoints = args.checkpoints or [None] * len(args.models)
    report = {
        "device": device_name(torch.device(args.device)),
        "threads": args.threads,
        "points": args.points_per_side**2,
        "thresholds": args.thresholds,
        "sizes": [image.shape[:2] for image in make_images(args)],
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "models": [Bench(*pair, args).measure() for pair in zip(args.models, checkpoints, strict=True)],
    }
    print(json.dumps(report, indent=1))
    rows = [row for model in report["models"] for row in model["rows"].values()]
    return 0 if all(comparison["same"] for row in rows for comparison in row.get("agreement", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
