"""The training loop: what it learns depends on the settings alone, not on workers, micro-batches or interruptions."""

from __future__ import annotations

import json
import logging
import os
import signal
import struct
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from torch import Tensor, nn

from weaksam.core import storage
from weaksam.errors import ConfigError
from weaksam.training import log as training_log
from weaksam.training import loop
from weaksam.training.log import TrainingLog
from weaksam.training.loop import TrainResources, TrainSettings, check_workers, share_of, train
from weaksam.training.settings import cpus_of_worker
from weaksam.training.state import TrainState, draw_batch, lr_factor, usable_precision

POOL = ThreadPoolExecutor(2)


def test_a_processor_that_imitates_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, wanted in (("AVX2", "fp32"), ("DEFAULT", "fp32"), ("AVX512", "bf16"), ("SVE256", "bf16")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert usable_precision("bf16", torch.device("cpu")) == wanted
        assert usable_precision("bf16", torch.device("cuda")) == "bf16"
        assert usable_precision("fp32", torch.device("cpu")) == "fp32"


@dataclass(frozen=True)
class LineTask:
    """Fits y = 3 x with noise that hangs on each sample's seed; at `die_at` a worker kills itself, once."""

    num_samples: int = 10
    die_at: int | None = None
    flag: str = ""

    def name_of(self, index: int) -> str:
        return f"point {index}"

    def build_model(self) -> nn.Module:
        return nn.Linear(2, 1)

    def build_optimizer(self, model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)

    def load_batch(self, indices: np.ndarray, seeds: np.ndarray, pool: Executor) -> dict[str, Tensor]:
        noise = [np.random.default_rng(seed).normal(0, 0.1) for seed in seeds]
        x = torch.tensor(np.stack([indices / 10, noise], 1), dtype=torch.float32)
        if self.die_at is not None and seeds[0][1] >= self.die_at and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": x, "y": 3 * x[:, :1]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        error = (model(batch["x"]) - batch["y"]) ** 2
        return error.sum(), {"count": torch.tensor(float(len(error)))}

    def validate(self, model: nn.Module, pool: Executor) -> dict[str, float]:
        logging.getLogger("weaksam.models").warning("mind the slope")
        return {"slope": model.weight[0, 0].item(), "threads": torch.get_num_threads()}


def _settings(**changes) -> TrainSettings:
    return TrainSettings(
        **{"steps": 12, "batch_size": 5, "lr": 0.05, "warmup": 3, "log_every": 4, "checkpoint_every": 3} | changes
    )


def _run_alone(task: LineTask, settings: TrainSettings, until: int, trainee: TrainState | None = None) -> TrainState:
    """The loop of a single worker, without Ray."""
    trainee = trainee or TrainState(task, settings, torch.device("cpu"))
    parts = share_of(settings, 0)
    while trainee.step < until:
        indices, seeds = draw_batch(0, trainee.step, batch_size=settings.batch_size, num_samples=task.num_samples)
        trainee.take_step(iter([task.load_batch(indices[part], seeds[part], POOL) for part in parts]), len(parts))
    return trainee


def test_every_sample_comes_once_before_any_comes_again():
    batches = [draw_batch(7, step, batch_size=4, num_samples=10) for step in range(5)]
    indices = np.concatenate([b[0] for b in batches])
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10].tolist() != indices[10:].tolist()
    seeds = np.concatenate([b[1] for b in batches])
    assert seeds[:, 0].tolist() == [7] * 20
    assert seeds[:, 1].tolist() == [0] * 10 + [1] * 10
    assert np.array_equal(seeds[:, 2], indices)


def test_a_batch_larger_than_the_dataset():
    indices, _ = draw_batch(0, 0, batch_size=5, num_samples=2)
    assert np.bincount(indices).tolist() in ([3, 2], [2, 3])


def test_the_learning_rate_rises_then_falls():
    def factors(*steps: int, **changes: object) -> list[float]:
        settings = TrainSettings(**{"steps": 10, "batch_size": 1, "lr": 1.0, "warmup": 2, "final_lr": 0.2} | changes)
        return [lr_factor(settings, step) for step in steps]

    assert factors(0, 1, 2) == [0.5, 1.0, 1.0]
    assert factors(6, 10) == pytest.approx([0.6, 0.2])
    assert factors(3, warmup=0, final_lr=1.0) == [1.0]
    assert factors(0, 1, warmup_from=0.5) == [0.75, 1.0]
    assert factors(2, 4, 5, 7, 9, milestones=[5, 8]) == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_a_window_of_the_steps_has_a_schedule_of_its_own():
    settings = TrainSettings(steps=12, batch_size=1, lr=1.0, warmup=2)
    alone = [lr_factor(settings.model_copy(update={"steps": 5}), step) for step in range(5)]
    assert [lr_factor(settings, step, (0, 5)) for step in range(6)] == [*alone, 0.0]
    later = [lr_factor(settings.model_copy(update={"steps": 7}), step) for step in range(7)]
    assert [lr_factor(settings, step, (5, None)) for step in range(4, 12)] == [0.0, *later]


def test_workers_share_a_batch_that_does_not_divide():
    resources = TrainResources(workers=3, micro_batch_size=2)
    parts = [share_of(_settings(batch_size=7, resources=resources), rank) for rank in range(3)]
    assert parts == [[slice(0, 2)], [slice(2, 4)], [slice(4, 6), slice(6, 7)]]


@pytest.mark.parametrize(
    ("nodes", "resources", "cpus"),
    [
        ([(2, 0)], {}, 2),
        ([(16, 0)], {"workers": 2}, 8),
        ([(16, 0)], {"workers": 3}, 5),
        ([(2, 0)], {"workers": 3}, 0.6666),
        ([(0, 0), (4, 0), (8, 0)], {"workers": 2}, 4),  # a head that takes no work
        ([(4, 0), (8, 0)], {"workers": 4}, 2),
        ([(4, 0), (64, 0)], {"workers": 2}, 32),  # both on the large node
        ([(4, 0), (64, 0)], {"workers": 2, "cpus_per_worker": 3}, 3),
        ([(32, 4), (64, 0)], {"gpus_per_worker": 1}, 8),  # whatever the number of workers
        ([(32, 4), (8, 2)], {"gpus_per_worker": 1, "workers": 6}, 4),
        ([(2, 2)], {"gpus_per_worker": 0.5, "workers": 4}, 0.5),
        ([], {"workers": 2, "grow": True}, 1),
        ([(0, 0)], {"workers": 2, "grow": True, "gpus_per_worker": 1}, 1),
        ([(4, 0)], {"workers": 8, "grow": True}, 1),
        ([(4, 0)], {"workers": 2, "grow": True}, 2),
    ],
)
def test_a_worker_has_its_share_of_the_node(nodes: list[tuple[float, float]], resources: dict, cpus: float):
    assert cpus_of_worker(TrainResources(**resources), [{"CPU": cpu, "GPU": gpu} for cpu, gpu in nodes]) == cpus


@given(st.lists(st.integers(0, 12), max_size=4), st.integers(1, 9))
def test_no_larger_share_of_the_cpus_would_do(counts: list[int], workers: int):
    resources, nodes = TrainResources(workers=workers), [{"CPU": float(count)} for count in counts]
    if not any(counts):
        with pytest.raises(ConfigError, match="the cluster has room for 0"):
            check_workers(resources, nodes)
        return
    check_workers(resources, nodes)
    cpus = cpus_of_worker(resources, nodes)
    larger = [cpus + 1] if cpus >= 1 else [1.0, *(round(cpus + part, 4) for part in (0.0002, 0.01, 0.1))]
    for one in larger:
        assert sum(int(count / one) for count in counts) < workers


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=4), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_cpus_last_for_all_gpus(counts: list[tuple[int, int]], gpus: float):
    nodes = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in counts]
    places = [int(gpu / gpus) if cpu else 0 for cpu, gpu in counts]
    resources = TrainResources(workers=max(1, sum(places)), gpus_per_worker=gpus)
    if sum(places):
        check_workers(resources, nodes)
        return
    with pytest.raises(ConfigError, match="the cluster has room for 0"):
        check_workers(resources, nodes)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValidationError, match="batch_size 2 leaves some of 3 workers without work"):
        _settings(batch_size=2, resources=TrainResources(workers=3))
    with pytest.raises(ValidationError, match="validate_every 6 is no multiple of log_every 4"):
        _settings(validate_every=6)
    with pytest.raises(ValidationError, match="fp16 needs gpus_per_worker > 0"):
        _settings(precision="fp16")


def test_accumulated_gradients_equal_the_big_batch():
    small = _settings(clip=0.5, ema=0.9, resources=TrainResources(micro_batch_size=2))
    whole = _run_alone(LineTask(), _settings(clip=0.5, ema=0.9), 12)
    parts = _run_alone(LineTask(), small, 12)
    for key, value in whole.weights().items():
        torch.testing.assert_close(parts.weights()[key], value)
    assert not torch.equal(whole.weights()["weight"], whole.model.weight)  # the running mean lags behind


def test_a_restored_run_ends_like_an_unbroken_one(tmp_path: Path):
    settings = _settings(ema=0.9, weight_decay=0.1)
    unbroken = _run_alone(LineTask(), settings, 12)
    _run_alone(LineTask(), settings, 5).save(str(tmp_path))
    restored = TrainState(LineTask(), settings, torch.device("cpu"))
    restored.restore(str(tmp_path))
    assert restored.step == 5
    _run_alone(LineTask(), settings, 12, restored)
    assert torch.equal(restored.model.weight, unbroken.model.weight)
    assert torch.equal(restored.weights()["weight"], unbroken.weights()["weight"])


def test_rows_after_the_checkpoint_are_written_again_not_twice(tmp_path: Path):
    first = TrainingLog(str(tmp_path), _settings(), 0)
    for step in (4, 8):
        first.write(step, {"loss": 1.0}, lr=0.1)
    resumed = TrainingLog(str(tmp_path), _settings(), 6)
    resumed.write(8, {"loss": 2.0}, lr=0.1)
    rows = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(4, 1.0), (8, 2.0)]
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = _events(file.read_bytes())
    scalars = [(event.step, value) for event in events for value in event.summary.value]
    assert [(step, value.simple_value) for step, value in scalars if value.tag == "loss"] == [(4, 1.0), (8, 2.0)]
    writer = RecordWriter(str(tmp_path / "by-tensorboardx"))
    for event in events:
        writer.write(event.SerializeToString())
    writer.close()
    assert file.read_bytes() == (tmp_path / "by-tensorboardx").read_bytes()  # checksums and all


def test_a_row_tells_what_its_steps_took_without_the_writing_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, write = [100.0], storage.write_bytes

    def write_slowly(uri: str, data: bytes) -> None:
        now[0] += 5
        write(uri, data)

    monkeypatch.setattr(training_log, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(storage, "write_bytes", write_slowly)
    journal = TrainingLog(str(tmp_path), _settings(), 0)
    for step in (4, 8):
        now[0] += 2
        journal.write(step, {"loss": 1.0}, lr=0.1)
    rows = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in rows] == [2, 2]
    assert [row["at"] for row in rows] == [2, 14]  # two files are written for each row


def _events(content: bytes) -> list[Event]:
    """What a TensorBoard file holds: records of length (8 bytes), its checksum (4), event, its checksum (4)."""
    found, place = [], 0
    while place < len(content):
        (size,) = struct.unpack_from("<Q", content, place)
        found.append(Event.FromString(content[place + 12 : place + 12 + size]))
        place += size + 16
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_one_of_them_killed_learn_what_one_does(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    task = LineTask(die_at=2, flag=str(tmp_path / "died"))  # the third time round the samples: step 4 of 12
    resources = TrainResources(workers=2, max_failures=1)
    uri = train(task, _settings(ema=0.9, validate_every=8, resources=resources), str(tmp_path / "run"))
    assert (tmp_path / "died").exists()
    alone = _run_alone(LineTask(), _settings(ema=0.9), 12)
    for key, value in load_file(uri).items():
        torch.testing.assert_close(value, alone.weights()[key], rtol=1e-4, atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "run/training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [("slope" in row) for row in rows] == [False, True, True]  # every 8 steps, and at the end
    share = max(1, (os.cpu_count() or 1) // 2)
    assert rows[-1]["threads"] == min(2, share)  # its share of the cluster's four CPUs, but no more than there are
    assert caplog.messages.count("mind the slope") == 1  # was logged twice by a worker, is read where the run is
    assert all(row["count"] == 1 for row in rows)  # each sample of the global batch counted once
    assert train(task, _settings(), str(tmp_path / "run")) == uri  # finished: nothing runs


def test_no_more_threads_compute_than_the_machine_has_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(loop.os, "cpu_count", lambda: 3)
    try:
        for cpus, workers, threads in ((8.0, "1", 3), (2.0, "1", 2), (0.5, "1", 1), (8.0, "2", 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", workers)
            loop._make_threads(cpus).shutdown()
            assert torch.get_num_threads() == threads, (cpus, workers)
    finally:
        torch.set_num_threads(before)
