"""Reports the progress of a step to the log and to `progress.json` of its folder, from a thread of the driver.

Other programs can read the file, with or without a cluster. No decision depends on it: a killed driver leaves the file
as it was, and only the age of the file shows that the driver is gone.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from weaksam.core import schemas, storage, tables
from weaksam.core.step import Step
from weaksam.errors import DamagedError

log = logging.getLogger(__name__)

FILE = "progress.json"
FRESH = 120.0  # seconds since the last update after which a step counts as stopped
TICK = 5.0  # seconds between checks whether an update is due
_TICKS_PER_WRITE = 2
_TICKS_PER_LINE = 12

State = Literal["running", "finished", "stopped"]


@dataclass(frozen=True)
class Progress:
    """The progress of a step: how much is done, how much of that failed, and other figures to report.

    `rate` is in units per second; with None it is measured from the first call of `look` on.
    """

    done: int
    failed: int = 0
    rate: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def report_progress(
    step: Step, *, total: int, unit: str, look: Callable[[], Progress], in_log: bool = True
) -> Iterator[None]:
    """Reports the progress of a step while the block works on it.

    The file is written every ten seconds; a log line is written after five seconds and then every minute.

    Args:
        step: the step; its folder receives the file.
        total: the value of `done` at the end.
        unit: the unit of `done` and `total`: images, steps, epochs.
        look: returns the progress; exceptions are logged and that update is skipped.
        in_log: False if the work logs lines of its own.
    """
    reporter = _Reporter(step, total, unit, look)
    ticks = itertools.count()

    def report() -> None:
        to_file, to_log = is_due(next(ticks))
        if to_file or (to_log and in_log):
            reporter.report("running", to_file=to_file, to_log=to_log and in_log)

    state: State = "stopped"
    try:
        with repeatedly(report, seconds=TICK, at_once=True, at_end=False):
            yield
        state = "finished"
    finally:
        reporter.report(state, to_log=False)


def is_due(tick: int) -> tuple[bool, bool]:
    """Returns whether to write the file and whether to log a line at a tick; tick 0 is the start."""
    return tick % _TICKS_PER_WRITE == 0, tick % _TICKS_PER_LINE == 1


class _Reporter:
    def __init__(self, step: Step, total: int, unit: str, look: Callable[[], Progress]) -> None:
        self.step, self.total, self.unit, self.look = step, total, unit, look
        self.started, self.first = time.time(), None

    def report(self, state: State, *, to_file: bool = True, to_log: bool = True) -> None:
        try:
            progress = self.look()
            self.first = progress.done if self.first is None else self.first
            now = time.time()
            elapsed = max(now - self.started, 1e-9)
            rate = (progress.done - self.first) / elapsed if progress.rate is None else progress.rate
            record = {"step": self.step.name, "stage": self.step.stage.name, "state": state}
            record |= count_up(progress, self.total, self.unit, rate)
            record |= {"started": _iso(self.started), "updated": _iso(now)}
            if to_log:
                log.info("%s", "  ".join([self.step.name, *words_of(record)]))
            if to_file:
                storage.write_json(storage.join(self.step.folder, FILE), record)
        except Exception as error:  # a fault of the storage or of a file in it must never stop the work
            log.debug("%s: progress not reported: %s", self.step.name, error)


def count_up(progress: Progress, total: int, unit: str, rate: float) -> dict[str, Any]:
    """Returns the figures of `progress.json`; `eta_seconds` is None while the rate is 0."""
    done = min(progress.done, total)  # rows of overlapping parts are counted twice
    return {
        "done": done,
        "total": total,
        "unit": unit,
        "failed": progress.failed,
        "rate": round(rate, 3),
        "eta_seconds": round((total - done) / rate, 1) if rate > 0 else None,
        **progress.others,
    }


def words_of(record: Mapping[str, Any]) -> list[str]:
    """Returns `120/400 images`, `3.1/s`, `eta 80 s`, `2 failed`, as far as known."""
    words = [f"{record['done']}/{record['total']} {record['unit']}"]
    if record["eta_seconds"] is not None:
        words += [f"{record['rate']:.3g}/s", f"eta {duration(record['eta_seconds'])}"]
    if "loss" in record:
        words.append(f"loss {record['loss']:.3g}")
    if record["failed"] or record["unit"] == "images":
        words.append(f"{record['failed']} failed")
    return words


def read_progress(folder: str) -> dict[str, Any] | None:
    """Returns `progress.json` of a step's folder with its age as `seconds_ago`; None if it is missing or damaged."""
    try:
        record = storage.read_json(storage.join(folder, FILE))
        ago = time.time() - datetime.fromisoformat(record["updated"]).timestamp()
        words_of(record)
    except (FileNotFoundError, DamagedError, KeyError, TypeError, ValueError):
        return None  # a missing or damaged file says nothing about the step itself
    return {**record, "seconds_ago": max(round(ago, 1), 0.0)}


def state_of(record: Mapping[str, Any]) -> Literal["running", "stopped"]:
    """Returns the state of an unfinished step from the result of `read_progress`: a killed driver writes no updates."""
    return "stopped" if record["state"] == "stopped" or record["seconds_ago"] > FRESH else "running"


def part_counter(folder: str) -> Callable[[], Progress]:
    """Returns a function that counts the rows of a step's parts by the listing, and the failed rows by their status.

    Each part is read once for its status.
    """
    failed: dict[str, int] = {}

    def look() -> Progress:
        parts = tables.list_parts(folder)
        new = [part for part in parts if part not in failed]
        for part, table in zip(new, tables.read_parts(folder, new, columns=["status"]), strict=True):
            failed[part] = sum(status != schemas.OK for status in table.column("status").to_pylist())
        return Progress(sum(map(tables.rows_in, parts)), sum(failed[part] for part in parts))

    return look


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@contextmanager
def repeatedly(
    report: Callable[[], None], *, seconds: float, at_once: bool = False, at_end: bool = True
) -> Iterator[None]:
    """Calls `report` every `seconds` while the block runs, with `at_once` also at its start, with `at_end` at its end.

    `report` must not raise.
    """
    finished = threading.Event()

    def loop() -> None:
        if at_once:
            report()
        while not finished.wait(seconds):
            report()
        if at_end:
            report()

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def duration(seconds: float) -> str:
    """Returns seconds as text: `42 s`, `7 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
