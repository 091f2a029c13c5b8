"""SAM over whole images: our engine, in each precision, beside `segment_anything`'s mask generator, in one process.

    python -m benchmarks.sam_engine --models vit_b --points-per-side 32 --threads 1

Same images, points, thresholds and weights. Models without a checkpoint get random weights with calibrated heads
(`weaksam.sam.calibrate`), so that realistic shares of the masks pass the filters; these are printed. In fp32 the masks
must be those of `segment_anything`, but for logits within rounding of 0 and ties; of the others the share of fp32's
masks that they have too, at IoU 0.9, is told. Ratios are of seconds by the clock on a GPU, of CPU seconds elsewhere,
which other programs on the machine disturb least. Phases come from a run of their own, in which each waits for the GPU.
Exits with 1 when the masks of fp32 differ.
"""

# segment_anything declares no attribute types.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchvision
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from weaksam.data.scene_drawing import draw_scene
from weaksam.ops.masks import decode_rle
from weaksam.sam import SHIPPED
from weaksam.sam import engine as engine_module
from weaksam.sam.backend import Backend
from weaksam.sam.build import build_sam
from weaksam.sam.calibrate import calibrate
from weaksam.sam.checkpoints import load_sam
from weaksam.sam.engine import EngineSettings, Proposals, SamEngine
from weaksam.sam.settings import Precision

PEER = "segment_anything"
FEW_PIXELS = 1e-5  # share of mask pixels that may differ in fp32: logits within rounding of 0
TIE = 1e-4  # of predicted IoU
MATCH = 0.9  # IoU at which a mask is another's
# Images/s of one H200 if it did nothing but the multiplications of 1024 points at 790 TFLOP/s, restated as ours are.
LIMITS = {"vit_h": 97, "vit_l": 147, "vit_b": 229}


@dataclass
class Clock:
    """Seconds by phase."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        """Of the process on a CPU, by the clock on a GPU once it is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, with its time added to `name`."""

        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call


@dataclass(frozen=True)
class Thresholds:
    """What a mask must reach."""

    predicted_iou: float
    stability: float
    nms: float | None

    def arguments(self) -> dict[str, Any]:
        """For `SamEngine.propose`."""
        names = ("pred_iou_threshold", "stability_threshold", "nms_threshold")
        return dict(zip(names, (self.predicted_iou, self.stability, self.nms), strict=True))


def parse_args() -> argparse.Namespace:
    """The command line."""
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
    """The model and in words where its weights come from."""
    if checkpoint or name in SHIPPED:
        return load_sam(name, checkpoint, device=device), checkpoint or "bundled"
    torch.manual_seed(0)
    sam = build_sam(name).requires_grad_(False).to(device)
    return calibrate(sam, image), "random, calibrated"


def make_images(args: argparse.Namespace) -> list[np.ndarray]:
    """(H, W, 3) uint8 each."""
    if args.images:
        return [np.array(Image.open(file).convert("RGB")) for file in args.images]
    images = []
    for seed, size in enumerate(args.image_sizes, start=3):
        height, width = map(int, size.split("x"))
        images.append(draw_scene(seed, family="varied", size=(height, width)).image)
    return images


def run_peer(sam: Sam, image: np.ndarray, points: int, wanted: Thresholds, clock: Clock | None = None) -> list[dict]:
    """One image through `segment_anything`, by phase when there is a clock."""
    generator = SamAutomaticMaskGenerator(
        sam,
        points,
        64,
        wanted.predicted_iou,
        wanted.stability,
        box_nms_thresh=wanted.nms or 1.0,
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
    """Inside, the clock times the phases of the engine."""
    backend, encoder = engine.backend, engine._encoder
    names = [one.name for one in fields(Backend) if callable(getattr(backend, one.name))]
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


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[Any, float]:
    """What the last run gives, and the seconds of the fastest."""
    clock, times, found = Clock(device), [], None
    for _ in range(repeats):
        start = clock.now()
        found = run()
        times.append(clock.now() - start)
    return found, min(times)


def compare(found: Proposals, expected: list[dict], image_hw: tuple[int, int]) -> dict[str, Any]:
    """How far two results are from the same. Masks whose predicted IoU ties may come in another order."""
    if len(found.boxes) != len(expected):
        return {"same": False, "masks": [len(found.boxes), len(expected)]}
    assert found.masks is not None
    theirs = [decode_rle(record["segmentation"]["counts"].encode(), *image_hw) for record in expected]
    scores = np.array([record["predicted_iou"] for record in expected])
    used: set[int] = set()
    different = 0
    for index, (rle, score) in enumerate(zip(found.masks, found.predicted_iou, strict=True)):
        mask = decode_rle(rle, *image_hw)
        tied = [i for i in np.flatnonzero(np.abs(scores - score) <= TIE).tolist() if i not in used]
        if not tied:
            return {"same": False, "masks": len(expected), "without_counterpart": index}
        best = min(tied, key=lambda i, mask=mask: int((mask != theirs[i]).sum()))
        used.add(best)
        different += int((mask != theirs[best]).sum())
    same = different <= FEW_PIXELS * max(1, len(expected)) * image_hw[0] * image_hw[1]
    return {"same": same, "masks": len(expected), "pixels": different}


def matched(found: list[Proposals], expected: list[Proposals], sizes: list[tuple[int, int]]) -> float:
    """Share of the expected masks that are found at IoU `MATCH`."""
    hits = total = 0
    for one, other, hw in zip(found, expected, sizes, strict=True):
        mine, theirs = (cast(Any, [{"size": hw, "counts": rle} for rle in p.masks or []]) for p in (one, other))
        total += len(theirs)
        if mine and theirs:
            hits += int((coco_mask.iou(mine, theirs, [0] * len(theirs)).max(0) >= MATCH).sum())
    return hits / max(1, total)


def survivors(engine: SamEngine, image: np.ndarray, wanted: Thresholds) -> dict[str, int]:
    """How many masks of one image are left after each filter."""
    encoded = engine.encode(image)
    steps = {
        "drawn": replace(wanted, predicted_iou=0.0, stability=0.0, nms=None),
        "by_predicted_iou": replace(wanted, stability=0.0, nms=None),
        "by_stability": replace(wanted, nms=None),
        "after_suppression": wanted,
    }
    return {name: len(engine.propose([encoded], **step.arguments())[0].boxes) for name, step in steps.items()}


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU since the last call, or of the process so far."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak


def measure(name: str, checkpoint: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """All rows of one model."""
    images, device = make_images(args), torch.device(args.device)
    wanted, sizes = Thresholds(*args.thresholds), [(image.shape[0], image.shape[1]) for image in images]
    sam, weights = make_model(name, checkpoint, images[0], args.device)
    told: dict[str, Any] = {"model": name, "weights": weights, "rows": {}}

    def row(label: str, run: Callable[[], Any], phases: Callable[[Clock], Any]) -> tuple[Any, dict[str, Any]]:
        if device.type != "cpu":
            run()  # warm
        peak_memory(device)
        found, seconds = seconds_of(run, device, args.repeats)
        values: dict[str, Any] = {"images_per_s": len(images) / seconds, "s_per_image": seconds / len(images)}
        values["memory_mib"] = round(peak_memory(device))
        if args.phases:
            clock = Clock(device)
            phases(clock)
            values["phases_s"] = {key: round(value / len(images), 4) for key, value in clock.seconds.items()}
        told["rows"][label] = values
        return found, values

    expected: list[list[dict]] = []
    points = args.points_per_side
    if not args.without_peer:
        expected, _ = row(
            PEER,
            lambda: [run_peer(sam, image, points, wanted) for image in images],
            lambda clock: [run_peer(sam, image, points, wanted, clock) for image in images],
        )
    whole: list[Proposals] = []
    for precision in args.precisions or (["fp32", "bf16"] if args.device == "cpu" else ["fp32", "fp16", "bf16"]):
        settings = EngineSettings(points, precision=cast(Precision, precision), compiled=args.compiled)
        engine = SamEngine(sam, settings=settings)

        def run(engine: SamEngine = engine) -> list[Proposals]:
            return engine.propose(images, **wanted.arguments(), return_masks=True)

        def phases(clock: Clock, engine: SamEngine = engine) -> None:
            with by_phase(engine, clock):
                engine.propose(images, **wanted.arguments(), return_masks=True)

        found, values = row(precision, run, phases)
        if PEER in told["rows"]:
            values["ratio"] = round(told["rows"][PEER]["s_per_image"] / values["s_per_image"], 2)
        if "H200" in told_device(device) and points == 32 and name in LIMITS:
            values["of_the_limit"] = round(values["images_per_s"] / LIMITS[name], 3)
        if precision == "fp32":
            whole = found
            told["survivors"] = survivors(engine, images[0], wanted)
            if expected:
                values["agreement"] = [compare(*three) for three in zip(found, expected, sizes, strict=True)]
        elif whole:
            values["matched"] = round(matched(found, whole, sizes), 4)
            values["masks"] = [sum(len(one.boxes) for one in many) for many in (found, whole)]
    return told


def told_device(device: torch.device) -> str:
    """In words."""
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
    told = {
        "device": told_device(torch.device(args.device)),
        "threads": args.threads,
        "points": args.points_per_side**2,
        "thresholds": args.thresholds,
        "sizes": [image.shape[:2] for image in make_images(args)],
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "models": [measure(*pair, args) for pair in zip(args.models, checkpoints, strict=True)],
    }
    print(json.dumps(told, indent=1))
    rows = [row for model in told["models"] for row in model["rows"].values()]
    return 0 if all(one["same"] for row in rows for one in row.get("agreement", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
