"""Images that a training cannot read: counted, named, and too many of them stop it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.training.lines import left_out
from tests.training.test_training import _settings
from weaksam.core.step import Step
from weaksam.data.images import left_out_codes
from weaksam.errors import (
    FailedRowsError,
    ImageError,
    StageError,
)
from weaksam.stages import STAGES
from weaksam.stages.training_run import outcome_of, progress_of
from weaksam.training.log import progress_line
from weaksam.training.written import read_left_out

MISSING, DAMAGED = ImageError("not_found", ""), ImageError("unreadable", "")


def test_images_that_cannot_be_read_are_counted_named_and_written_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counted = left_out(tmp_path)
    counted.add(0, np.arange(4), left_out_codes([None, DAMAGED, None, MISSING]))
    counted.add(1, np.array([1, 5]), left_out_codes([DAMAGED, None]))
    assert len(counted) == 2
    with caplog.at_level(logging.WARNING):
        counted.share(is_writer=True)
        counted.share(is_writer=True)
    assert caplog.messages == [
        "2 of 100 images cannot be read and are left out of training, e.g. 1.png (unreadable), 3.png (not_found)"
    ]
    assert [(row["name"], row["step"], row["status"]) for row in read_left_out(str(tmp_path))] == [
        ("1.png", 0, "unreadable"), ("3.png", 0, "not_found"),
    ]  # fmt: skip
    assert len(left_out(tmp_path, step=1)) == 2
    assert len(left_out(tmp_path)) == 0  # from the start everything is read again


def test_what_a_training_left_out_counts_as_failed_rows(tmp_path: Path) -> None:
    step = Step("net", STAGES["train_detector"], None, {}, {}, "f", str(tmp_path))
    assert outcome_of(step, 100, "").failed == 0
    counted = left_out(tmp_path)
    counted.add(0, np.arange(4), left_out_codes([None, DAMAGED, None, MISSING]))
    counted.share(is_writer=True)
    outcome = outcome_of(step, 100, "loss 1")
    assert (outcome.rows, outcome.failed, outcome.summary) == (100, 2, "loss 1")
    assert outcome.failures[0] == "1.png: unreadable: left out of training"
    row = {"step": 4, "loss": None, "images_per_second": 10.0, "lr": 0.1, "left_out": 2}
    assert progress_of(row, _settings()).failed == 2
    assert "left_out 2" in progress_line(row, _settings())


def test_a_dataset_that_is_gone_stops_the_training_for_another_try(tmp_path: Path) -> None:
    counted = left_out(tmp_path, max_failed=1.0)
    counted.add(0, np.arange(4), left_out_codes([None] * 4))
    counted.add(1, np.arange(4, 8), left_out_codes([MISSING] * 4))
    with pytest.raises(
        StageError, match=r"8 of 100 images are missing, e\.g\. 11.png: make the dataset readable"
    ) as caught:
        counted.add(2, np.arange(8, 12), left_out_codes([MISSING] * 4))
    assert caught.value.exit_code == 4


def test_too_many_damaged_images_stop_the_training_but_a_few_do_not(tmp_path: Path) -> None:
    counted = left_out(tmp_path)  # 10 of 100 may be
    counted.add(0, np.arange(10), left_out_codes([DAMAGED] * 10))
    counted.add(1, np.arange(10), left_out_codes([DAMAGED] * 10))  # the same once more
    with pytest.raises(
        FailedRowsError, match=r"11 of 100 images cannot be read .*; 10 may be: raise max_failed"
    ) as caught:
        counted.add(2, np.array([20]), left_out_codes([DAMAGED]))
    assert caught.value.exit_code == 3
