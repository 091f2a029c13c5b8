"""Runs as many images as COCO through the pipeline on one machine: speed, memory over time, parts, and resuming.

python -m benchmarks.scale FOLDER [--images 120000] [--minutes 60]

Draws small JPEGs in FOLDER, runs index, proposals, a short training and detect over them, and samples driver and
actors every ten seconds. After `--minutes` SIGKILL ends the driver; the same command resumes it. The driver is also
killed once at half of the proposals. When all is done, the command prints the table, and exits 1 if memory grew.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.overhead import bare_loop
from testing.processes import actors_of, resident_bytes
from weaksam import pipeline
from weaksam.core import tables
from weaksam.core.step import Step
from weaksam.demo.scenes import draw_scene
from weaksam.stages.proposal_settings import GridSettings

CONFIG = """
run: {folder}/run
steps:
  images: {{stage: index, format: folder, root: {folder}/images}}
  proposals:
    stage: proposals
    images: images
    sam: {{model: vit_xs}}
    grid: {{points_per_side: 2}}
    resources: {{actor_cpus: 0.75}}
  oicr:
    stage: train_wsod
    images: images
    proposals: proposals
    split: train
    method: oicr
    backbone: resnet50
    pretrained: false
    dropblock: 'off'
    scales: [72]
    min_side: 4
    steps: 8
    warmup: 2
  detections:
    stage: detect
    images: images
    proposals: proposals
    detector: oicr
    scales: [72]
    flip: false
    resources: {{actor_cpus: 0.75}}
"""
MAPPING = ("proposals", "detections")
SIZE, SCENES, TRAINED_ON = (96, 72), 200, 64
SAMPLE_SECONDS = 10.0
BARE_IMAGES = 1000
LARGEST_GROWTH = (
    1.2  # peak of the last fifth of a step over that of its second fifth: in the first fifth the step warms up
)


@dataclass(frozen=True)
class Sample:
    """A sample of a run: seconds since its slice began, images done of a step, resident bytes."""

    slice: int
    step: str
    seconds: float
    done: int
    driver: int
    actor: int


def main() -> int:
    """Draws, measures the bare engine, runs a slice; prints the table when all steps are finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=120_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which the driver is killed")
    args = parser.parse_args()
    folder = args.folder.resolve()
    draw_images(folder / "images", args.images)
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder))
    bare = _once(folder / "bare.json", lambda: bare_rate(folder / "images"))
    end = time.monotonic() + 60 * args.minutes
    while not (ended := run_slice(config, args.images, end)) and time.monotonic() < end:
        pass  # killed at half of the proposals: resume at once
    if not ended:
        print("not at the end yet: the same command goes on")
        return 0
    return report(config, folder, bare, args.images)


def draw_images(folder: Path, count: int) -> None:
    """Draws `count` JPEGs of `SIZE` from crops of drawn scenes, and writes their labels.csv last."""
    if (folder / "labels.csv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [np.asarray(draw_scene(index, family="demo", size=(240, 320)).image) for index in range(SCENES)]
    with multiprocessing.Pool(initializer=_share, initargs=(scenes,)) as pool:
        for _ in pool.imap_unordered(partial(_draw, folder), range(count), chunksize=500):
            pass
    lines = [f"{index:06}.jpg,thing;{'other' if index % 2 else ''},{_split(index)}" for index in range(count)]
    (folder / "labels.csv").write_text("\n".join(["file,labels,split", *lines]) + "\n")


def _split(index: int) -> str:
    return "train" if index < TRAINED_ON else "many"


_scenes: list[np.ndarray] = []


def _share(scenes: list[np.ndarray]) -> None:
    _scenes.extend(scenes)


def _draw(folder: Path, index: int) -> None:
    rng = np.random.default_rng(index)
    scene = Image.fromarray(_scenes[index % len(_scenes)])
    left, top = rng.uniform(0, 0.3, 2) * scene.size
    right, bottom = rng.uniform(0.7, 1.0, 2) * scene.size
    buffer = io.BytesIO()
    scene.resize(SIZE, Image.Resampling.BILINEAR, box=(left, top, right, bottom)).save(buffer, "JPEG", quality=90)
    (folder / f"{index:06}.jpg").write_bytes(buffer.getvalue())


def bare_rate(images: Path) -> float:
    """Returns images per second of the engine alone: one process per core, each a loop over its share."""
    files = [str(images / f"{index:06}.jpg") for index in range(BARE_IMAGES)]
    cores = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.map(_bare_loop, [files[start::cores] for start in range(cores)]))


def _bare_loop(files: list[str]) -> float:
    return len(files) / bare_loop(files, GridSettings(points_per_side=2))


def run_slice(config: Path, images: int, end: float) -> bool:
    """Runs until all is done (True), or until a kill (False): once at half of the proposals, and at `end`."""
    steps = {step.name: step for step in pipeline.load(str(config))}
    folder = config.parent
    number = len(list(folder.glob("samples-*.jsonl")))
    at_half = folder / "killed-at-half.json"
    with open(folder / f"samples-{number:03}.jsonl", "w") as file, open(folder / "log", "ab") as log:
        driver = subprocess.Popen([sys.executable, "-m", "jobs.pipeline", str(config)], stderr=log)
        started = time.monotonic()
        while driver.poll() is None:
            name = next((name for name in MAPPING if steps[name].manifest() is None), MAPPING[-1])
            sample = _look(number, steps[name], time.monotonic() - started, driver.pid)
            print(json.dumps(asdict(sample)), file=file, flush=True)
            half = name == "proposals" and sample.done >= images / 2 and not at_half.exists()
            if half or time.monotonic() > end:
                driver.kill()
                driver.wait()
                if half:
                    at_half.write_text(json.dumps({"done": sample.done}))
                return False
            time.sleep(SAMPLE_SECONDS)
    if driver.returncode:
        sys.exit(f"the run ended with {driver.returncode}: see {folder / 'log'}")
    return True


def _look(number: int, step: Step, seconds: float, driver: int) -> Sample:
    done = sum(tables.rows_in(part) for part in tables.list_parts(step.folder))
    actor = max(map(resident_bytes, actors_of(driver)), default=0)
    return Sample(number, step.name, round(seconds, 1), done, resident_bytes(driver), actor)


def report(config: Path, folder: Path, bare: float, images: int) -> int:
    """Prints the table; returns 1 when memory grew."""
    steps = {step.name: step for step in pipeline.load(str(config))}
    samples = _samples(folder)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "pyarrow"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    slices = f"{samples[-1].slice + 1} slices, all but the last ended by SIGKILL"
    print(f"{images} images of {SIZE[0]} x {SIZE[1]} pixels, {slices}")
    print(f"bare engine, a process a core: {bare:.1f} images/s")
    worst = 0.0
    for name in MAPPING:
        own = [sample for sample in samples if sample.step == name]
        rate, parts = rate_of(own), tables.list_parts(steps[name].folder)
        sizes = [path.stat().st_size for path in Path(steps[name].folder).glob("part-*.parquet")]
        share = f", {rate / bare:.2f} of the bare engine" if name == "proposals" else ""
        print(f"{name}: {rate:.1f} images/s{share}; {len(parts)} parts of {statistics.median(sizes) / 1024:.0f} KiB")
        for who in ("driver", "actor"):
            peaks = [
                peak / 2**20 for peak in peaks_of(own, who, images) if peak
            ]  # a fifth that is short may have no sample
            print(f"  {who:6} peak in each fifth, MiB: {' '.join(f'{peak:.0f}' for peak in peaks)}")
            worst = max(worst, peaks[-1] / peaks[1])
    half = json.loads((folder / "killed-at-half.json").read_text())["done"]
    print(f"killed at {half} images: {resume_seconds(samples, half):.0f} s from the command to the first new part")
    print(f"growth {worst:.2f} (wanted: at most {LARGEST_GROWTH})")
    return 0 if worst <= LARGEST_GROWTH else 1


def _samples(folder: Path) -> list[Sample]:
    lines = [line for path in sorted(folder.glob("samples-*.jsonl")) for line in path.read_text().splitlines()]
    return [Sample(**json.loads(line)) for line in lines]


def rate_of(samples: list[Sample]) -> float:
    """Returns images per second between the first and the last new image of each slice, over all slices."""
    done = seconds = 0.0
    for number in {sample.slice for sample in samples}:
        own = [sample for sample in samples if sample.slice == number]
        moving = [sample for before, sample in pairwise(own) if sample.done > before.done]
        if len(moving) > 1:
            done += moving[-1].done - moving[0].done
            seconds += moving[-1].seconds - moving[0].seconds
    return done / max(seconds, 1e-9)


def peaks_of(samples: list[Sample], who: str, images: int) -> list[int]:
    """Returns the largest memory in each fifth of the images."""
    fifths: list[list[int]] = [[0] for _ in range(5)]
    for sample in samples:
        fifths[min(4, 5 * sample.done // images)].append(getattr(sample, who))
    return [max(fifth) for fifth in fifths]


def resume_seconds(samples: list[Sample], done: int) -> float:
    """Returns the seconds until the first new image in the first slice that began with `done` images."""
    for number in {sample.slice for sample in samples}:
        own = [sample for sample in samples if sample.slice == number and sample.step == "proposals"]
        if own and own[0].done >= done:
            return next((sample.seconds for sample in own if sample.done > own[0].done), float("nan"))
    return float("nan")


def _once(path: Path, measure: Callable[[], float]) -> float:
    if not path.exists():
        path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
