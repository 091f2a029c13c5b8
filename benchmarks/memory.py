"""Whether memory stays flat: peak resident memory of driver and actors over few and over many images.

python -m benchmarks.memory [--few 2000] [--many 20000]

Many small JPEG files pass through `proposals`; /proc is sampled every second. The shared object store is left out,
it has a fixed size. Exits 1 when a peak over many images is above 1.2 times the one over few.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.processes import actors_of, resident_bytes

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
"""
WANTED = 1.2


def main() -> int:
    """Runs both sizes and prints the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20000)
    args = parser.parse_args()
    peaks = []
    for count in (args.few, args.many):
        with tempfile.TemporaryDirectory(prefix="weaksam-bench-") as folder:
            write_images(Path(folder) / "images", count)
            peaks.append(peak_memory(Path(folder)))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "pyarrow"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    worst = 0.0
    for name, few, many in zip(("driver", "largest actor"), *peaks, strict=True):
        sizes = f"{args.few} images {few / 2**20:5.0f} MiB, {args.many} images {many / 2**20:5.0f} MiB"
        print(f"{name:14} {sizes}: {many / few:.2f}")
        worst = max(worst, many / few)
    print(f"growth {worst:.2f} (wanted: at most {WANTED})")
    return 0 if worst <= WANTED else 1


def write_images(folder: Path, count: int) -> None:
    """`count` JPEG files of 64 x 48 pixels and their labels.csv."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["file,labels"]
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(buffer, "JPEG")
        (folder / f"{index:06}.jpg").write_bytes(buffer.getvalue())
        lines.append(f"{index:06}.jpg,thing")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def peak_memory(folder: Path) -> tuple[int, int]:
    """Peaks of the driver and of its largest actor, in bytes, over a whole run."""
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder))
    driver = subprocess.Popen([sys.executable, "-m", "jobs.pipeline", str(config)])
    of_driver = of_actors = 0
    while driver.poll() is None:
        of_driver = max(of_driver, resident_bytes(driver.pid))
        of_actors = max([of_actors, *map(resident_bytes, actors_of(driver.pid))])
        time.sleep(1)
    if driver.returncode:
        sys.exit(f"the run ended with {driver.returncode}")
    return of_driver, of_actors


if __name__ == "__main__":
    sys.exit(main())
