"""What the parts of the demo are worth, after `make demo` in the same folder: `python -m jobs.ablation KIND FOLDER`.

KIND `detectors` runs `configs/ablation_detectors.yaml`: means over three seeds, and the table of prompts;
`proposals` runs `configs/ablation_proposals.yaml`, one choice of the proposals changed at a time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.demo import detector_table, prepare
from weaksam import pipeline
from weaksam.cli import metrics, run_pipeline, set_up_logging

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = {"grid": "grid alone", "cam": "+ CAM peaks", "cross": "+ cross peaks"}


def main(kind: str, folder: str) -> None:
    """Runs every variant of a kind below `folder` and prints its table."""
    set_up_logging()
    config = str(CONFIGS / f"ablation_{kind}.yaml")
    overrides = prepare(folder)
    run_pipeline(config, overrides)
    if kind == "proposals":
        metrics(overrides[0].removeprefix("run="))
        return
    steps = {step.name: step for step in pipeline.load(config, overrides)}
    print("\nThree seeds, mean and standard deviation")
    print(detector_table({name.upper(): (steps[f"{name}_ap"], steps[f"{name}_corloc"]) for name in ("oicr", "mist")}))
    print("\nMIST by what prompted its proposals")
    print(detector_table({label: (steps[f"{name}_ap"], steps[f"{name}_corloc"]) for name, label in PROMPTS.items()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("detectors", "proposals"))
    parser.add_argument("folder", nargs="?", default="demo", help="where `make demo` ran")
    given = parser.parse_args()
    main(given.kind, given.folder)
