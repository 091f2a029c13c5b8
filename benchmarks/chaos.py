"""Kills each part of a run at random moments, and checks that its tables equal those of an undisturbed run.

python -m benchmarks.chaos [--seeds 10] [--images 400] [--first-seed 0]

Runs read images from and write tables to a real S3 server (Ceph), through a proxy at which one request in ten fails,
on a Ray cluster of two nodes in a separate process. In every run, at moments drawn from its seed, SIGKILL ends the
driver (twice), an actor or training worker, and a node (which a new node replaces), and the proxy is down for
seconds. When the driver ends, the same command runs again, until it exits with 0. Then every row and weight is
compared with those of the undisturbed run. Prints a line for each seed, exits 1 on any difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from testing.local_cluster import LocalCluster
from testing.places import ROOT
from testing.processes import actors_of
from testing.s3.proxy import Faults, FaultyProxy
from testing.s3.server import CephServer
from testing.s3.world import make_bucket, write_scenes_small
from weaksam import pipeline
from weaksam.core import storage, tables
from weaksam.core.step import Step
from weaksam.errors import WeakSamError

KINDS = ("driver", "driver", "actor", "node", "s3")
FAULTS = Faults(slow_down=50, error=20, drop=15, stall=5, lost=10)
MOST_RUNS = 12
_TIMEOUT_SECONDS = 900.0
_TRAINING = 20  # steps
_CONFIG = """
run: {bucket}/runs/{name}
steps:
  images: {{stage: index, format: folder, root: {bucket}/data}}
  proposals: {{stage: proposals, images: images, sam: {{model: vit_xs}}, grid: {{points_per_side: 2}},
    resources: {{max_actors: 2, batch_size: 2}}}}
  mist: {{stage: train_wsod, images: images, proposals: proposals, split: train, backbone: frozen_sam, dropblock: "off",
    scales: [48], min_side: 4, steps: {training}, batch_size: 4, lr: 1.0e-3, warmup: 0, checkpoint_every: 4,
    log_every: 2, resources: {{max_failures: 8}}}}
  found: {{stage: detect, images: images, proposals: proposals, detector: mist, scales: [48], flip: false,
    resources: {{max_actors: 2, batch_size: 2}}}}
  pgt: {{stage: pgt, images: images, detections: found, split: train}}
"""


@dataclass
class Site:
    """Server, proxy and cluster of all runs."""

    folder: Path
    bucket: str
    proxy: FaultyProxy
    cluster: LocalCluster

    def config(self, name: str) -> str:
        """Writes the run file of a run."""
        path = self.folder / f"{name}.yaml"
        path.write_text(_CONFIG.format(bucket=self.bucket, name=name, training=_TRAINING))
        return str(path)

    def start(self, config: str) -> subprocess.Popen[bytes]:
        """Starts a driver."""
        with open(f"{config}.log", "ab") as log:
            command = [sys.executable, "-m", "jobs.pipeline", config]
            return subprocess.Popen(
                command, cwd=ROOT, env=self.cluster.environment, stdout=log, stderr=log, start_new_session=True
            )

    def close(self) -> None:
        """Ends proxy and cluster."""
        self.cluster.stop()
        self.proxy.stop()


@dataclass
class Report:
    """The kills of a run, and its restarts."""

    runs: int = 1
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: float = 0.0


def plan(seed: int, kinds: tuple[str, ...] = KINDS) -> list[tuple[float, str]]:
    """Returns the kills in order: the share of the work done, drawn from the seed, and the kind of target."""
    draw = random.Random(seed)
    moments = sorted(draw.uniform(0.02, 0.9) for _ in kinds)
    return list(zip(moments, draw.sample(kinds, len(kinds)), strict=True))


def run_disturbed(site: Site, config: str, seed: int) -> Report:
    """Runs a run file to its end, with kills and restarts."""
    steps, todo, report, draw = pipeline.load(config), plan(seed), Report(), random.Random(seed)
    started, driver = time.monotonic(), site.start(config)
    try:
        while driver.poll() != 0:
            if time.monotonic() - started > _TIMEOUT_SECONDS or report.runs > MOST_RUNS:
                raise RuntimeError(f"no end after {report.runs} runs, {time.monotonic() - started:.0f} s: {config}.log")
            if driver.poll() is not None:
                report.runs += 1
                driver = site.start(config)
            elif todo and share_done(steps) >= todo[0][0] and hit(site, driver, todo[0][1], draw):
                report.hits[todo.pop(0)[1]] += 1
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    report.seconds = time.monotonic() - started
    return report


def share_done(steps: list[Step]) -> float:
    """Returns the finished share of proposals, training and detections."""
    images, proposals, mist, detections, _ = steps
    if (indexed := images.manifest()) is None:
        return 0.0
    rows = sum(tables.rows_in(part) for step in (proposals, detections) for part in tables.list_parts(step.folder))
    try:
        lines = storage.read_replaceable(storage.join(mist.folder, "training_log.jsonl")).decode().splitlines()
    except FileNotFoundError:
        lines = []
    trained = json.loads(lines[-1])["step"] / _TRAINING if lines else 0.0
    return (rows / indexed["rows"] + trained) / 3


def hit(site: Site, driver: subprocess.Popen[bytes], kind: str, draw: random.Random) -> bool:
    """Kills a target; returns False when there is none now."""
    if kind == "driver":
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        return True
    if kind == "s3":
        site.proxy.kill()
        time.sleep(draw.uniform(2, 6))
        site.proxy.start()
        return True
    working = {}  # actors by node: killing an idle node would test nothing
    for node, raylet in site.cluster.nodes.items():
        if workers := actors_of(raylet, "MapWorker") + actors_of(raylet, "RayTrainWorker"):
            working[node] = workers
    if not working:
        return False
    node = draw.choice(sorted(working))
    if kind == "actor":
        os.kill(draw.choice(working[node]), signal.SIGKILL)
    else:
        site.cluster.kill_node(node)
        site.cluster.add_node()
    return True


def differences(calm: str, rough: str) -> list[str]:
    """Returns the differences between the tables and weights of two runs; empty when there is none."""
    faults = []
    for step, other in zip(pipeline.load(calm), pipeline.load(rough), strict=True):
        before, after = step.manifest(), other.manifest()
        if before is None or after is None:
            faults.append(f"{step.name}: not finished")
        elif step.stage.name == "train_wsod":
            uris = [trained.weights_uri for trained in (step, other)]
            faults += [] if len(set(map(storage.read_bytes, uris))) == 1 else [f"{step.name}: other weights"]
        else:
            counts = [key for key in ("rows", "ok", "failed") if before[key] != after[key]]
            faults += [f"{step.name}: {key} {before[key]} and {after[key]}" for key in counts]
            table, again = step.read(), other.read()
            if not len(set(again.column("image_id").to_pylist())) == again.num_rows == after["rows"]:
                faults.append(f"{step.name}: an image with two rows, or a count of the manifest that is wrong")
            if set(tables.list_parts(other.folder)) != set(after["parts"]):
                faults.append(f"{step.name}: parts that the manifest does not list")
            if not table.equals(again):
                faults.append(f"{step.name}: other rows")
    return faults


def open_site(folder: Path, ceph: CephServer, bucket: str, images: int) -> Site:
    """Uploads images, starts proxy and cluster. The environment of this process names the server, not the proxy."""
    write_scenes_small(storage.join(bucket, "data"), images, seed=3)
    proxy = FaultyProxy(folder / "proxy", ceph.port, FAULTS)
    proxy.start()
    try:
        cluster = LocalCluster({**os.environ, "AWS_ENDPOINT_URL_S3": proxy.endpoint})
    except BaseException:
        proxy.stop()
        raise
    return Site(folder, bucket, proxy, cluster)


def try_seeds(site: Site, seeds: list[int]) -> bool:
    """Runs undisturbed, then once per seed; returns whether all tables are equal and every target was hit."""
    calm = site.config("calm")
    started = time.monotonic()
    if site.start(calm).wait(_TIMEOUT_SECONDS):
        raise RuntimeError(f"the undisturbed run failed: {Path(calm + '.log').read_text()[-3000:]}")
    print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
    good = True
    for seed in seeds:
        rough = site.config(f"seed-{seed}")
        try:
            report = run_disturbed(site, rough, seed)
            faults = differences(calm, rough)
        except (RuntimeError, WeakSamError) as error:
            print(f"seed {seed}: {error}", flush=True)
            good = False
            continue
        missed = [kind for kind in set(KINDS) if report.hits[kind] < KINDS.count(kind)]
        good = good and not faults and not missed
        hits = ", ".join(f"{kind} {count}" for kind, count in report.hits.items())
        outcome = f"DIFFERENT ({'; '.join(faults)})" if faults else "equal row for row"
        outcome += f", NOT HIT: {', '.join(missed)}" if missed else ""
        print(f"seed {seed}: killed {hits}; {report.runs} runs, {report.seconds:.0f} s: {outcome}", flush=True)
    return good


def main() -> int:
    """Returns 0 when every disturbed run ended with the tables of the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=400)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM also ends the server and the cluster
    folder = Path(tempfile.mkdtemp(prefix="wschaos", dir="/tmp"))  # a short path, for the sockets in it
    ceph = CephServer(folder / "ceph")
    site, good = None, False
    try:
        ceph.start()
        os.environ.update(ceph.environment)
        site = open_site(folder, ceph, make_bucket(ceph, "chaos"), args.images)
        seeds = list(range(args.first_seed, args.first_seed + args.seeds))
        good = try_seeds(site, seeds)
        print("all equal" if good else f"the logs of the drivers are in {folder}")
        return 0 if good else 1
    finally:
        if site is not None:
            site.close()
        ceph.stop()
        if good:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
