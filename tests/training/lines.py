"""A training on lines, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from weaksam.training.reading import LeftOut

CPU = torch.device("cpu")


def left_out(folder: Path, *, max_failed: float = 0.1, in_batch: int = 4, samples: int = 100, step: int = 0) -> LeftOut:
    return LeftOut(
        str(folder), num_samples=samples, max_failed=max_failed, in_batch=in_batch, name_of="{}.png".format, step=step
    )
