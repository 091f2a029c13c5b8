"""Measures the effect of each part of the demo, after `make demo` in a folder: `python -m jobs.ablation KIND FOLDER`.

KIND `detectors` runs part of `configs/demo_full.yaml` with three seeds and prints means: MIST and OICR, MIST by the
prompts of its proposals, and the detectors trained on MIST's pseudo ground truth;
`proposals` runs `configs/ablation_proposals.yaml`, which changes one choice of the proposals at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.demo import PROMPTS, STUDENTS, TEACHERS, detector_table, pgt_table, prepare, read_report
from weaksam import pipeline
from weaksam.cli.main import metrics
from weaksam.cli.run_command import run_pipeline
from weaksam.cli.terminal import end_on_sigterm, set_up_logging
from weaksam.core.step import Step
from weaksam.stages.evaluate import mean_and_std

CONFIGS = Path(__file__).parents[1] / "configs"
RETRAINED = ("faster_rcnn_top1", "faster_rcnn", "faster_rcnn_drop")


def main(kind: str, folder: str, seeds: int) -> None:
    """Runs every variant of a kind below `folder` and prints its table."""
    set_up_logging()
    overrides = prepare(folder)
    if kind == "detectors":
        detectors(overrides, seeds)
        return
    run_pipeline(str(CONFIGS / "ablation_proposals.yaml"), overrides)
    metrics(overrides[0].removeprefix("run="))


def detectors(overrides: list[str], seeds: int) -> None:
    """Runs every detector that learns from labels, and the detectors trained after MIST, once per seed."""
    config, trained = str(CONFIGS / "demo_full.yaml"), (*TEACHERS, *PROMPTS, *RETRAINED)
    chains: list[dict[str, Step]] = []
    for seed in range(seeds):
        own = [*overrides, *(f"steps.{name}.seed={seed}" for name in trained)]
        steps = {step.name: step for step in pipeline.load(config, own)}
        names = [name for name in steps if name.removesuffix("_corloc").removesuffix("_ap") in trained]
        run_pipeline(config, own, only=_with_inputs(steps, [*names, "pgt_top1_quality", "pgt_quality"]))
        chains.append(steps)

    def means(name: str) -> dict[str, Any]:
        reports = [read_report(chain[name]) for chain in chains]
        return reports[0] | {"metrics": mean_and_std([report["metrics"] for report in reports])}

    print(f"\nMeans and standard deviations of {seeds} seeds: detectors that learnt from image-level labels")
    print(detector_table({label: [means(f"{name}_ap"), means(f"{name}_corloc")] for name, label in TEACHERS.items()}))
    print("\nMIST by what prompted its proposals, the grid suppressed as published")
    print(detector_table({label: [means(f"{name}_ap"), means(f"{name}_corloc")] for name, label in PROMPTS.items()}))
    print("\nPseudo ground truth of MIST's detections")
    print(pgt_table({"best of a class": means("pgt_top1_quality"), "adaptive": means("pgt_quality")}))
    print("\nDetectors trained on it, on the adaptive one where nothing else is said")
    print(detector_table({STUDENTS[name]: [means(f"{name}_ap")] for name in RETRAINED}))


def _with_inputs(steps: Mapping[str, Step], names: list[str]) -> list[str]:
    """Returns these steps and their inputs, in an order in which they can run."""
    needed: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in needed:
            needed.add(name)
            waiting += [step.name for step in steps[name].inputs.values()]
    return [name for name in steps if name in needed]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("detectors", "proposals"))
    parser.add_argument("folder", nargs="?", default="demo", help="where `make demo` ran")
    parser.add_argument("--seeds", type=int, default=3, help="of `detectors`")
    args = parser.parse_args()
    end_on_sigterm()
    main(args.kind, args.folder, args.seeds)
