"""Functions of all stages that train: derive the loop settings from a step's settings, and run the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from weaksam.core.step import Outcome, Step
from weaksam.execution.connection import check_cluster, connect
from weaksam.execution.progress import Progress, report_progress
from weaksam.models.backbones.catalogue import kinds_in, listed_in
from weaksam.training.settings import Course, LoopSettings, TrainSettings
from weaksam.training.written import read_left_out, read_metrics

if TYPE_CHECKING:
    from weaksam.training.state import TrainTask


def loop_settings(config: LoopSettings, **others: Any) -> TrainSettings:
    """Returns the settings of the loop from the fields of `config`; `others` add fields or override them."""
    shared = type(config).model_fields.keys() & TrainSettings.model_fields.keys()
    return TrainSettings(**{name: getattr(config, name) for name in shared} | others)


def make_course(
    settings: TrainSettings,
    images: int,
    *,
    views: int | None,
    phases: tuple[int, ...] = (0,),
    held_out: int = 0,
) -> Course:
    """Returns the course of a training with these settings of the loop."""
    return Course(
        images=images,
        steps=settings.steps,
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=settings.resources.workers,
        phases=phases,
        views=views,
        held_out=held_out,
        validate_every=settings.validate_every,
        checkpoint_every=settings.checkpoint_every,
    )


def train_task(step: Step, task: TrainTask[Any], settings: TrainSettings) -> dict[str, float]:
    """Trains, continuing an earlier call; returns the last row of metrics."""
    check_cluster()
    task.build_model()  # reports a fault of the weights at once, in this process, rather than from every worker
    # the loop logs each row of metrics itself
    with report_progress(step, total=settings.steps, unit="steps", look=lambda: _look(step, settings), in_log=False):
        connect()
        from weaksam.training import loop  # imports Ray

        loop.train(task, settings, step.folder)
    return _last_metrics(step.folder, warns=True)


def outcome_of(step: Step, rows: int, summary: str) -> Outcome:
    """Returns the outcome of a finished training: images that it could not read are failed rows."""
    left_out = read_left_out(step.folder)
    failures = [f"{row['name']}: {row['status']}: left out of training" for row in left_out[:10]]
    return Outcome(rows=rows, failed=len(left_out), failures=failures, summary=summary)


def _last_metrics(folder: str, *, warns: bool = False) -> dict[str, float]:
    """Returns the last readable row of metrics; empty if there is none."""
    return next(iter(read_metrics(folder, warns=warns)[-1:]), {})


def describe_loss(row: Mapping[str, float]) -> str:
    """Returns the loss of a row of metrics as text; empty if the row has no loss."""
    return f"loss {row['loss']:.3g}" if row.get("loss") is not None else ""


def _look(step: Step, settings: TrainSettings) -> Progress:
    """Returns the progress of a training from its last row of metrics in storage: workers may run on any node."""
    last = _last_metrics(step.folder)
    return progress_of(last, settings) if last else Progress(0)


def progress_of(row: Mapping[str, float], settings: TrainSettings) -> Progress:
    """Returns the progress that a row of metrics shows."""
    loss = {"loss": row["loss"]} if row.get("loss") is not None else {}
    rate = row["images_per_second"] / settings.batch_size
    return Progress(int(row["step"]), failed=int(row.get("left_out", 0)), rate=rate, others=loss)


def is_frozen(backbone: str) -> bool:
    """Returns whether OICR and MIST do not train a backbone at all, so that its features of a view are cached."""
    kinds = kinds_in(backbone)
    return bool(kinds) and all(kind.crops is not None for kind in kinds)


def identify_shipped(backbone: str) -> dict[str, str]:
    """Returns the identities of the shipped weights that the backbones use, as outside files."""
    return {name: identity for kind in listed_in(backbone) for name, identity in kind.shipped().items()}
