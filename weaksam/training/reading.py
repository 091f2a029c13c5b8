"""Records unreadable samples of a training, and stops it when there are too many. Does not depend on Ray.

An unreadable sample has weight 0 in a step, so that one damaged file does not stop a training of days. But with a
missing disk, training would run to the end with loss 0.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch.distributed

from weaksam.core import storage
from weaksam.core.schemas import FAILED_STATUSES
from weaksam.errors import FailedRowsError, StageError
from weaksam.training.written import LEFT_OUT, read_left_out

log = logging.getLogger(__name__)

_MISSING = FAILED_STATUSES.index("not_found") + 1
_LEAST_RUN = 8  # samples: fewer missing in a row may be missing independently


class LeftOut:
    """The unreadable samples of one worker and, after `share`, of all workers.

    Args:
        folder: folder of the step.
        num_samples: number of training samples.
        max_failed: share of the samples, rounded up, that may be unreadable.
        in_batch: samples of a step that this worker reads.
        name_of: returns the name of a sample.
        step: step from which training resumes: samples left out later are read again.
    """

    def __init__(
        self,
        folder: str,
        *,
        num_samples: int,
        max_failed: float,
        in_batch: int,
        name_of: Callable[[int], str],
        step: int = 0,
    ) -> None:
        self._folder, self._num, self._name_of = folder, num_samples, name_of
        self._allowed = math.ceil(max_failed * num_samples)
        self._longest = min(max(in_batch, _LEAST_RUN), num_samples)
        self._left_out = {row["sample"]: row for row in read_left_out(folder) if row["step"] < step}
        self._new: dict[int, dict[str, Any]] = {}
        self._missing_in_a_row = 0

    def __len__(self) -> int:
        return len(self._left_out)

    def add(self, step: int, indices: np.ndarray, codes: np.ndarray) -> None:
        """Records samples (B,) read for a step, from 0, and their codes (B,), see `data.images.left_out_codes`.

        Raises:
            StageError: so many samples are missing that the dataset itself must be missing.
            FailedRowsError: more samples are unreadable than allowed.
        """
        for index, code in zip(indices.tolist(), codes.tolist(), strict=True):
            self._missing_in_a_row = self._missing_in_a_row + 1 if code == _MISSING else 0
            if code and index not in self._left_out:
                row = {"sample": index, "step": step, "name": self._name_of(index), "status": FAILED_STATUSES[code - 1]}
                self._left_out[index] = self._new[index] = row
        self._check()

    def share(self, *, is_writer: bool) -> None:
        """Exchanges new entries between workers; every worker calls it, only the writer writes the file."""
        new = list(self._new.values())
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, new)
            new = [row for rows in gathered for row in rows]
        self._new = {}
        for row in new:
            self._left_out.setdefault(row["sample"], row)
        if new and is_writer:
            rows = sorted(self._left_out.values(), key=lambda row: (row["step"], row["sample"]))
            content = "".join(json.dumps(row) + "\n" for row in rows)
            storage.write_bytes(storage.join(self._folder, LEFT_OUT), content.encode())
            log.warning("%s", describe_left_out(rows, self._num))
        self._check()

    def _check(self) -> None:
        rows = list(self._left_out.values())
        missing = [row for row in rows if row["status"] == "not_found"]
        if self._missing_in_a_row >= self._longest or (len(rows) > self._allowed and 2 * len(missing) >= len(rows)):
            raise StageError(
                f"{len(missing)} of {self._num} images are missing, e.g. {missing[-1]['name']}: make the dataset "
                "readable again, or raise max_failed if they are gone for good"
            )
        if len(rows) > self._allowed:
            raise FailedRowsError(
                f"{describe_left_out(rows, self._num)}; {self._allowed} may be: raise max_failed to train without them"
            )


def describe_left_out(rows: Sequence[dict[str, Any]], num_samples: int) -> str:
    """Returns one line about the unreadable samples; `rows` is not empty."""
    listed = ", ".join(f"{row['name']} ({row['status']})" for row in rows[:3])
    return f"{len(rows)} of {num_samples} images cannot be read and are left out of training, e.g. {listed}"
