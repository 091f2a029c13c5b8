"""Kills a run in the middle, again and again, and shows that its table equals that of a run left alone.

python -m benchmarks.kill_and_resume [--images 60] [--driver-kills 3] [--worker-kills 2]

Draws a small world, runs its proposals undisturbed; then runs them in another folder where the driver gets SIGKILL
after some parts are written, several times, and actors get SIGKILL while they work. Exits 1 if any row differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.processes import actors_of
from weaksam import pipeline, tables
from weaksam.data.scenes import write_scenes
from weaksam.stage import Step

CONFIG = """
run: {run}
steps:
  images: {{stage: index, format: voc, root: {scenes}, splits: [trainval, test]}}
  proposals:
    stage: proposals
    images: images
    sam: {{model: vit_xs}}
    grid: {{points_per_side: 8}}
    masks: true
    resources: {{actor_cpus: 0.75, batch_size: 2}}
"""


def main() -> int:
    """Runs both and compares; 0 when the tables are equal row for row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--driver-kills", type=int, default=3)
    parser.add_argument("--worker-kills", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weaksam-kill-") as folder:
        base = Path(folder)
        write_scenes(str(base / "scenes"), images=args.images, seed=11, format="voc")
        calm, rough = (_config(base, name) for name in ("calm", "rough"))
        subprocess.run(_command(calm), check=True, stderr=subprocess.DEVNULL)
        kills = [_run_and_kill(rough, after=1 + turn, worker=False) for turn in range(args.driver_kills)]
        kills += [
            _run_and_kill(rough, after=args.driver_kills + turn, worker=True) for turn in range(args.worker_kills)
        ]
        print(f"kills that hit: {sum(kills)} of {len(kills)}")
        subprocess.run(_command(rough), check=True, stderr=subprocess.DEVNULL)
        return _compare(calm, rough, args.images)


def _config(base: Path, name: str) -> Path:
    path = base / f"{name}.yaml"
    path.write_text(CONFIG.format(run=base / name, scenes=base / "scenes"))
    return path


def _command(config: Path) -> list[str]:
    return [sys.executable, "-m", "jobs.pipeline", str(config)]


def _proposals(config: Path) -> Step:
    return pipeline.load(str(config))[-1]


def _run_and_kill(config: Path, *, after: int, worker: bool) -> bool:
    """Starts the run and kills it once `after` parts more are there; False when it ended before."""
    step = _proposals(config)
    parts = len(tables.list_parts(step.folder)) + (1 if worker else after)
    driver = subprocess.Popen(_command(config), stderr=subprocess.DEVNULL)
    while driver.poll() is None and len(tables.list_parts(step.folder)) < parts:
        time.sleep(0.05)
    if driver.poll() is not None:
        return False
    time.sleep(random.uniform(0, 0.5))  # anywhere inside a part
    victims = actors_of(driver.pid) if worker else [driver.pid]
    for pid in victims[:1]:
        os.kill(pid, signal.SIGKILL)
        print(f"killed {'an actor' if worker else 'the driver'} at {len(tables.list_parts(step.folder))} parts")
    driver.wait()
    return bool(victims)


def _compare(calm: Path, rough: Path, images: int) -> int:
    one, other = (tables.read_step(_proposals(config)) for config in (calm, rough))
    same = one.num_rows == images and one.equals(other)
    boxes = sum(map(len, one.column("boxes").to_pylist()))
    print(f"{one.num_rows} and {other.num_rows} rows, {boxes} boxes: {'equal row for row' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
