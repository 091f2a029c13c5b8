"""Measures the error of `weaksam plan`: plans the demo in FOLDER, then runs all of it, and compares.

python -m benchmarks.plan_accuracy FOLDER [--config configs/demo.yaml] [--images 64] [KEY=VALUE]...

Prints both times of each step and of the whole run, which is the wall-clock time of the command. Exits 1 when the error
of the whole is more than 20 %. Starting Ray is a separate line in the plan, and part of the first step that needs it in
the run. FOLDER must not hold a finished run. Takes about a quarter of an hour on two free cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs.demo import CONFIGS, prepare
from weaksam import pipeline
from weaksam.core import storage

ALLOWED = 0.2
_WEAKSAM = [sys.executable, "-c", "from weaksam.cli.main import main; main()"]


def main() -> int:
    """Plans, runs and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--config", default=str(CONFIGS / "demo.yaml"))
    parser.add_argument("--images", type=int, default=64)
    args, others = parser.parse_known_args()
    overrides = [*prepare(args.folder), *others]
    steps = pipeline.load(args.config, overrides)
    if done := [step.name for step in steps if step.manifest() is not None]:
        parser.error(f"{args.folder}: finished already: {', '.join(done)}: name an empty folder")
    began = time.monotonic()
    command = [*_WEAKSAM, "plan", args.config, *overrides, "--images", str(args.images), "--json"]
    plan = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    planned = time.monotonic()
    subprocess.run([*_WEAKSAM, "run", args.config, *overrides], check=True)
    took = time.monotonic() - planned
    manifests = {step.name: step.manifest() or {} for step in steps}
    sizes = {step.name: sum(file.size for file in storage.list_files(step.folder)) for step in steps}
    lines, error = compare(plan, {name: manifest["seconds"] for name, manifest in manifests.items()}, sizes, took)
    print("\n".join(lines))
    print(f"\nThe plan itself took {planned - began:.0f} s. Allowed: {100 * ALLOWED:.0f} % in total.")
    storage.write_json(storage.join(storage.absolute(args.folder), "plan.json"), plan)
    print(f"All figures of the plan: {Path(args.folder) / 'plan.json'}")
    return 0 if abs(error) <= ALLOWED else 1


def compare(
    plan: dict[str, Any], seconds: dict[str, float], sizes: dict[str, int], took: float
) -> tuple[list[str], float]:
    """Returns the lines of a table, and the relative error of the whole plan: positive when it is too long."""
    lines = [f"{'step':20} {'planned':>9} {'90 % interval':>19} {'took':>9} {'error':>8} {'planned':>9} {'MB':>9}"]
    for step in plan["steps"]:
        lines.append(_line(step["step"], step["seconds"], seconds[step["step"]], step["bytes"], sizes[step["step"]]))
    whole = plan["total"]
    lines.append(_line("total", whole["seconds"], took, whole["bytes"], sum(sizes.values())))
    return lines, whole["seconds"]["value"] / took - 1


def _line(name: str, planned: dict[str, float], took: float, planned_bytes: int, size: int) -> str:
    interval = f"{planned['low']:.1f} .. {planned['high']:.1f}"
    times = f"{name:20} {planned['value']:7.1f} s {interval:>19} {took:7.1f} s"
    return (
        f"{times} {100 * (planned['value'] / max(took, 0.01) - 1):+6.0f} % {planned_bytes / 1e6:9.2f} {size / 1e6:9.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
