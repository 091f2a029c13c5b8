"""What the parts of the demo are worth, after `make demo` in the same folder: `python -m jobs.ablation KIND FOLDER`.

KIND `detectors` runs `configs/ablation_detectors.yaml`: means over three seeds, and the table of prompts;
`retraining` runs part of `configs/demo_full.yaml` with three seeds: what the detectors trained on MIST's pseudo ground
truth make of it;
`proposals` runs `configs/ablation_proposals.yaml`, one choice of the proposals changed at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.demo import STUDENTS, TEACHERS, detector_table, pgt_table, prepare, read_report, reports_of
from weaksam import pipeline
from weaksam.cli import metrics, run_pipeline, set_up_logging
from weaksam.stage import Step
from weaksam.stages.evaluate import mean_and_std

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = {"grid": "grid alone", "cam": "+ CAM peaks", "cross": "+ cross peaks"}
SEEDS = (0, 1, 2)
RETRAINED = ("faster_rcnn", "faster_rcnn_top1", "faster_rcnn_drop")


def main(kind: str, folder: str) -> None:
    """Runs every variant of a kind below `folder` and prints its table."""
    set_up_logging()
    overrides = prepare(folder)
    if kind == "retraining":
        retraining(overrides)
        return
    config = str(CONFIGS / f"ablation_{kind}.yaml")
    run_pipeline(config, overrides)
    if kind == "proposals":
        metrics(overrides[0].removeprefix("run="))
        return
    steps = {step.name: step for step in pipeline.load(config, overrides)}
    print("\nThree seeds, mean and standard deviation")
    print(detector_table({label: reports_of(steps, name) for name, label in TEACHERS.items()}))
    print("\nMIST by what prompted its proposals")
    print(detector_table({label: reports_of(steps, name) for name, label in PROMPTS.items()}))


def retraining(overrides: list[str]) -> None:
    """MIST and what is trained after it, each seed a chain of its own."""
    config, names = str(CONFIGS / "demo_full.yaml"), ("mist", *RETRAINED)
    chains: list[dict[str, Step]] = []
    for seed in SEEDS:
        own = [*overrides, *(f"steps.{name}.seed={seed}" for name in names)]
        wanted = [f"{name}_ap" for name in names] + ["mist_corloc", "pgt_top1_quality", "pgt_quality"]
        steps = {step.name: step for step in pipeline.load(config, own)}
        run_pipeline(config, own, only=_with_inputs(steps, wanted))
        chains.append(steps)
    print(f"\nMeans and standard deviations of {len(SEEDS)} seeds: pseudo ground truth of MIST's detections")
    quality = {"best of a class": "pgt_top1_quality", "adaptive": "pgt_quality"}
    print(pgt_table({label: _mean([read_report(chain[name]) for chain in chains]) for label, name in quality.items()}))
    print("\nMIST, and detectors trained on its pseudo ground truth")
    labels = {"mist": TEACHERS["mist"]} | {name: STUDENTS[name] for name in RETRAINED}
    print(
        detector_table(
            {label: [_mean([read_report(chain[f"{name}_ap"]) for chain in chains])] for name, label in labels.items()}
        )
    )


def _with_inputs(steps: Mapping[str, Step], names: list[str]) -> list[str]:
    """These steps and all that they need, in an order in which they can run."""
    wanted: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in wanted:
            wanted.add(name)
            waiting += [step.name for step in steps[name].inputs.values()]
    return [name for name in steps if name in wanted]


def _mean(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report with means and deviations."""
    return reports[0] | {"metrics": mean_and_std([report["metrics"] for report in reports])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("detectors", "retraining", "proposals"))
    parser.add_argument("folder", nargs="?", default="demo", help="where `make demo` ran")
    given = parser.parse_args()
    main(given.kind, given.folder)
