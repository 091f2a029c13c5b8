"""Runs `configs/demo_ablation.yaml` on the demo's scenes and prints its table: `python -m jobs.ablation FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.demo import prepare
from weaksam.cli import metrics, run_pipeline, set_up_logging

CONFIG = str(Path(__file__).parents[1] / "configs" / "demo_ablation.yaml")


def main(folder: str) -> None:
    """Runs every variant below `folder`."""
    set_up_logging()
    overrides = prepare(folder)
    run_pipeline(CONFIG, overrides)
    metrics(overrides[0].removeprefix("run="))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
