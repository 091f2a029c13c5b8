"""What ends a training, and with which exit code: values that are not finite, unreadable images, bugs, storage.

And what does not: a damaged checkpoint.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training.lines import CPU, left_out
from tests.training.test_training import LineTask, _run_alone, _settings
from weaksam.core.step import Step
from weaksam.errors import (
    ConfigError,
    DataError,
    DivergedError,
    FailedRowsError,
    StageError,
    StorageError,
    TaskError,
    WeakSamError,
)
from weaksam.ops.classification import mean_average_precision
from weaksam.stages import STAGES, training_run
from weaksam.training import loop, written
from weaksam.training.failures import TrainingPolicy, explain, is_lasting
from weaksam.training.log import TrainingLog, follow, progress_line
from weaksam.training.loop import TrainResources, train
from weaksam.training.state import TrainState
from weaksam.training.watch import Watch, check_finite
from weaksam.training.written import read_left_out


@dataclass(frozen=True)
class SpoiltTask(LineTask):
    """LineTask whose loss or gradient is spoilt from the sixth step on; each start of a worker is noted in a file."""

    how: str = "loss"
    starts: str = ""

    def build_model(self) -> nn.Module:
        if self.starts:
            with open(self.starts, "a") as file:
                file.write("started\n")
        return super().build_model()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().loss(model, batch)
        if int(batch["step"]) >= 5:
            if self.how == "raise":
                raise RuntimeError(f"matrix contains invalid numeric entries\n{torch.full((99,), math.nan)}")
            zero = 0 * loss  # the square root of 0 has an infinite slope, and that times 0 is NaN
            loss = loss * math.nan if self.how == "loss" else loss + (zero * zero).sqrt()
        return loss, metrics


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize(("how", "said"), [("loss", "the loss is nan"), ("gradient", "the gradient has the norm nan")])
def test_a_training_stops_at_the_first_step_that_is_not_finite(
    how: str, said: str, clip: float | None, micro_batch: int | None
) -> None:
    settings = _settings(clip=clip, resources=TrainResources(micro_batch_size=micro_batch))
    task = SpoiltTask(how=how)
    trainee = TrainState(task, settings, CPU)
    _run_alone(task, settings, 5, trainee)
    advice = "set clip, e.g. 1.0" if clip is None else "lower clip \\(now 0.5\\)"
    with pytest.raises(DivergedError, match=rf"step 6 of 12: {said}.*: lower lr \(now 0.05\), or {advice}") as caught:
        _run_alone(task, settings, 6, trainee)
    assert caught.value.exit_code == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_learning_rate_beyond_reason_hands_nothing_on(tmp_path: Path) -> None:
    trainee = TrainState(LineTask(), _settings(lr=1e30, warmup=0), CPU)
    with pytest.raises(DivergedError, match=r"step \d of 12: the (loss|gradient) .*lower lr \(now 1e\+30\)"):
        _run_alone(LineTask(), trainee.settings, 12, trainee)
    trainee = TrainState(LineTask(), _settings(), CPU)
    with torch.no_grad():
        trainee.model.weight[0, 0] = math.inf
    with pytest.raises(DivergedError, match=r"step 0 of 12: model\.weight, one of 1 tensors"):
        trainee.save(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_looked_at_everywhere() -> None:
    state: dict[str, Any] = {
        "a": torch.ones(2),
        "b": {"c": [torch.zeros(0), {"d": torch.tensor([1.0, math.nan])}]},
        "e": 3,
    }
    with pytest.raises(DivergedError, match=r"b\.c\.1\.d, one of 1 tensors"):
        check_finite(_settings(), 4, state)
    check_finite(_settings(), 4, {"a": torch.ones(2), "n": torch.tensor([3]), "none": None})


def test_the_first_bad_step_is_named_however_late_it_is_looked_for() -> None:
    watch = Watch(_settings(), CPU)
    watch.look = lambda *, wait: None  # type: ignore[method-assign]  # as on a GPU, where the answer comes later
    for step, loss in enumerate([1.0, math.inf, math.nan, 2.0]):
        watch.note(step, torch.tensor(loss), torch.tensor(1.0))
    with pytest.raises(DivergedError, match="step 2 of 12: the loss is inf"):
        Watch.look(watch, wait=True)


def test_steps_that_fp16_skips_are_counted_until_no_scale_helps() -> None:
    task = SpoiltTask(how="gradient")
    trainee = TrainState(task, _settings(steps=100), CPU)
    trainee.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=True)
    _run_alone(task, trainee.settings, 7, trainee)
    assert trainee.skipped == 2
    with pytest.raises(DivergedError, match="step 8 of 100: the gradient, whatever the loss is scaled by"):
        _run_alone(task, trainee.settings, 100, trainee)


def test_an_error_of_a_tasks_own_loss_is_a_bug_and_not_tried_again() -> None:
    with pytest.raises(TaskError, match="loss: RuntimeError: matrix contains invalid numeric entries"):
        _run_alone(SpoiltTask(how="raise"), _settings(), 12)


def test_an_error_of_the_loss_of_weights_that_exploded_is_no_bug() -> None:
    task, settings = SpoiltTask(how="raise"), _settings()
    for weight in (1e30, math.inf):
        trainee = _run_alone(task, settings, 5)
        with torch.no_grad():
            trainee.model.weight[0, 0] = weight
        with pytest.raises(
            DivergedError, match=r"step 6 of 12: there is no loss \(loss: RuntimeError: .*: lower lr"
        ) as caught:
            _run_alone(task, settings, 12, trainee)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def failed(*causes: BaseException) -> ray.train.WorkerGroupError:
    return ray.train.WorkerGroupError("", dict(enumerate(causes)))  # type: ignore[arg-type]


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
ENDS = [
    ((LOST, DivergedError("step 3: the loss is nan")), DivergedError, 2, False),
    ((DataError("a.png: row 0"),), DataError, 2, False),
    ((ConfigError("min_side: no proposal"),), ConfigError, 2, False),
    ((FailedRowsError("9 of 10 images"),), FailedRowsError, 3, False),
    ((TaskError("loss: ValueError: x"), LOST), ray.train.WorkerGroupError, 1, False),
    ((KeyError("x"),), ray.train.WorkerGroupError, 1, False),
    ((LOST, ActorDiedError()), StageError, 4, True),
    ((StorageError("s3://b: could not read"),), StageError, 4, True),
    ((StageError("9 of 10 images are missing"),), StageError, 4, True),
    ((OSError(28, "No space left on device"),), StageError, 4, True),
    ((torch.OutOfMemoryError("CUDA out of memory"),), ConfigError, 2, True),
]


@pytest.mark.parametrize(("causes", "kind", "code", "is_tried_again"), ENDS)
def test_the_cause_decides_exit_code_and_whether_workers_start_again(
    causes: tuple[BaseException, ...], kind: type[Exception], code: int, is_tried_again: bool
) -> None:
    error = failed(*causes)
    told = explain("/run/net", error)
    assert type(told) is kind
    assert (told.exit_code if isinstance(told, WeakSamError) else 1) == code
    policy = TrainingPolicy(ray.train.FailureConfig(max_failures=1))
    assert policy.make_decision(error) is (FailureDecision.RETRY if is_tried_again else FailureDecision.RAISE)
    if code == 4:
        assert "the same command goes on from its checkpoint" in str(told)
    if isinstance(told, WeakSamError):
        assert str(told).startswith("/run/net: ")


def test_ray_train_asks_our_policy_whether_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(loop.TorchTrainer, "_initialize_and_run_controller", lambda _, **given: asked.update(given))
    trainer = loop._make_trainer(LineTask(), _settings(), str(tmp_path), cpus=1)
    trainer._initialize_and_run_controller(failure_policy="Ray Train's own")
    assert type(asked["failure_policy"]) is TrainingPolicy


def test_an_ended_controller_is_the_clusters_fault() -> None:
    told = explain("/run/net", ray.train.ControllerError(OSError("disk full")))
    assert isinstance(told, StageError)
    assert not is_lasting(OSError("disk full"))


def test_metrics_are_json_without_nan(tmp_path: Path) -> None:
    journal = TrainingLog(str(tmp_path), _settings(), 0)
    journal.write(4, {"loss": 1.0, "held_out_mAP": math.nan, "peak": math.inf}, lr=0.1)
    TrainingLog(str(tmp_path), _settings(), 4).write(8, {"loss": 2.0}, lr=0.1)  # an earlier null is read again

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = (tmp_path / "training_log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert (rows[0]["held_out_mAP"], rows[0]["peak"], rows[1]["loss"]) == (None, None, 2.0)
    assert "mAP" not in progress_line(rows[0], _settings())


def test_lines_that_cannot_be_read_do_not_end_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"step": 1, "loss": 2.0, "lr": 0.1, "images_per_second": 5.0}
    lines = [
        json.dumps(row | {"peak": math.nan}),
        "[]",
        "{}",
        json.dumps(row | {"loss": "x"}),
        '{"step": 2, "lr": 0.1, "seco',
    ]
    (tmp_path / "training_log.jsonl").write_text("\n".join(lines))
    assert written.read_metrics(str(tmp_path)) == [row | {"peak": None}]
    uri = tmp_path / "training_log.jsonl"
    assert caplog.messages == [f"warning: {uri}: 4 lines cannot be read and are left out, e.g. line 2"]
    with follow(str(tmp_path), _settings()):
        TrainingLog(str(tmp_path), _settings(), 5).write(8, {"loss": 1.0}, lr=0.1)
    assert [one["step"] for one in written.read_metrics(str(tmp_path))] == [1, 8]
    step = Step("net", STAGES["train_detector"], None, {}, {}, "f", str(tmp_path))
    assert training_run._look(step, _settings()).done == 8
    (tmp_path / "training_log.jsonl").write_text("{}\n")
    assert training_run._look(step, _settings()).done == 0

    good = {"sample": 1, "step": 0, "name": "1.png", "status": "unreadable"}
    (tmp_path / "left_out.jsonl").write_text(f'{json.dumps(good)}\n{{"sample": 2, "st')
    assert read_left_out(str(tmp_path)) == [good]
    assert len(left_out(tmp_path, step=1)) == 1


def test_the_map_of_scores_that_are_nan_is_no_number() -> None:
    labels = np.array([[True, False], [False, True]])
    assert math.isnan(mean_average_precision(np.full((2, 2), np.nan), labels))
    assert math.isnan(mean_average_precision(np.array([[0.9, np.nan], [0.1, 0.2]]), labels))
    assert mean_average_precision(np.array([[0.9, 0.1], [0.1, 0.2]]), labels) == 1
    assert math.isnan(mean_average_precision(np.zeros((2, 2)), np.zeros((2, 2), bool)))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_stop_at_once_and_another_task_goes_on_from_their_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resources, starts, folder = TrainResources(workers=2, max_failures=3), tmp_path / "starts", tmp_path / "run"
    with pytest.raises(DivergedError, match=r"run: step 6 of 12: the loss is nan"):
        train(SpoiltTask(starts=str(starts)), _settings(resources=resources), str(folder))
    assert len(starts.read_text().splitlines()) == 2  # no worker was started again
    assert not (folder / "checkpoint" / "model.safetensors").exists()
    assert json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])["step"] == 4
    snapshot = folder / "checkpoint" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:-9])
    uri = train(LineTask(), _settings(resources=resources), str(folder))
    for key, value in load_file(uri).items():
        torch.testing.assert_close(value, _run_alone(LineTask(), _settings(), 12).weights()[key], rtol=1e-4, atol=1e-5)
    assert "cannot be read" in caplog.text
