"""Checkpoints of a training: the newest whole one is continued from, by all workers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import ray.train
import torch

from tests.training.lines import CPU
from tests.training.test_training import LineTask, _run_alone, _settings
from weaksam.errors import (
    StageError,
)
from weaksam.training import loop
from weaksam.training.checkpoints import (
    BrokenCheckpointError,
    check_same_step,
    drop_broken_list,
    list_checkpoints,
    load_state,
)
from weaksam.training.failures import is_lasting
from weaksam.training.state import TrainState


@pytest.mark.parametrize(("steps", "is_refused"), [([4, 4], False), ([4, 2], True), ([4, 0], True)])
def test_workers_go_on_from_the_same_checkpoint(
    steps: list[int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(into: list[int], own: int) -> None:
        assert own == steps[0]
        into[:] = steps

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    if not is_refused:
        check_same_step(steps[0])
        return
    with pytest.raises(StageError, match=rf"worker 0 from step 4, worker 1 from step {steps[1]}\)") as found:
        check_same_step(steps[0])
    assert not is_lasting(found.value)  # the workers are started again


def checkpoints(folder: Path, *, newest: str) -> list[str]:
    """Two checkpoints of LineTask, after 2 and 4 steps, listed as Ray Train does; the newest is spoilt."""
    below = folder / "checkpoint"
    names = ["checkpoint_2026-01-01_00-00-00.000001", "checkpoint_2026-01-01_00-00-00.000002"]
    for name, steps in zip(names, (2, 4), strict=True):
        (below / name).mkdir(parents=True)
        _run_alone(LineTask(), _settings(), steps).save(str(below / name))
    results = [{"checkpoint_dir_name": name} for name in names]
    listed = {"ray_version": "2.60.0", "checkpoint_results": results, "latest_checkpoint_result": results[-1]}
    content = json.dumps(listed)
    (below / "checkpoint_manager_snapshot.json").write_text(content)
    state = below / names[1] / "state.pt"
    if newest == "missing":
        state.unlink()
        state.parent.rmdir()
    elif newest == "cut":
        state.write_bytes(state.read_bytes()[:-200])
    elif newest == "empty":
        state.write_bytes(b"")
    elif newest == "altered":
        data = bytearray(state.read_bytes())
        place = data.index(np.float32(_run_alone(LineTask(), _settings(), 4).model.bias.item()).tobytes())
        data[place] ^= 1
        state.write_bytes(bytes(data))
    return names


@pytest.mark.parametrize("newest", ["whole", "missing", "cut", "empty", "altered"])
def test_a_training_goes_on_from_the_newest_checkpoint_that_is_whole(
    tmp_path: Path, newest: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = checkpoints(tmp_path, newest=newest)
    trainee = TrainState(LineTask(), _settings(), CPU)
    snapshot = tmp_path / "checkpoint" / "checkpoint_manager_snapshot.json"
    with caplog.at_level(logging.INFO):
        drop_broken_list(str(tmp_path), version="2.60.0")
        loop._restore(trainee, str(tmp_path), None)
    assert trainee.step == (4 if newest == "whole" else 2)
    assert snapshot.exists() == (newest != "missing")
    assert torch.equal(trainee.model.weight, _run_alone(LineTask(), _settings(), trainee.step).model.weight)
    text = " ".join(caplog.messages)
    if newest == "missing":
        assert f"lists {names[1]}, which is gone: made anew" in text
    elif newest != "whole":
        assert f"{names[1]}: not whole (" in text
    assert f"goes on from step {trainee.step}" in text


@pytest.mark.parametrize("content", ["", '{"checkpoint_res', "[]", "{}", "\0\0"])
def test_a_damaged_list_of_checkpoints_is_made_anew(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints(tmp_path, newest="whole")
    snapshot = tmp_path / "checkpoint" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(content)
    drop_broken_list(str(tmp_path), version="2.60.0")
    assert not snapshot.exists()
    assert "cannot be read" in caplog.text
    assert len(list_checkpoints(str(tmp_path))) == 2


def test_a_list_of_another_ray_is_made_anew_and_the_latest_checkpoint_of_a_good_one_comes_first(tmp_path: Path) -> None:
    names = checkpoints(tmp_path, newest="whole")
    snapshot = tmp_path / "checkpoint" / "checkpoint_manager_snapshot.json"
    drop_broken_list(str(tmp_path), version="2.60.0")
    assert snapshot.exists()
    drop_broken_list(str(tmp_path), version="2.61.0")
    assert not snapshot.exists()
    trainee = TrainState(LineTask(), _settings(), CPU)
    older = tmp_path / "checkpoint" / names[0]  # the clock was put back in between, say
    loop._restore(trainee, str(tmp_path), ray.train.Checkpoint.from_directory(older))
    assert trainee.step == 2


def test_without_a_whole_checkpoint_a_training_starts_anew(tmp_path: Path) -> None:
    trainee = TrainState(LineTask(), _settings(), CPU)
    loop._restore(trainee, str(tmp_path), None)
    assert trainee.step == 0
    (tmp_path / "state.pt").write_bytes(b"junk")
    with pytest.raises(BrokenCheckpointError):
        load_state(tmp_path / "state.pt", CPU)
