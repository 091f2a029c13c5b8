"""How far a step is: told in the log and in `progress.json` of its folder, by a thread of the driver.

The file is for whoever looks from elsewhere, with or without a cluster. Nothing is decided by it: a driver that is
killed leaves it as it was, and only its age tells.
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
FRESH = 120.0  # seconds since its last sign after which a step counts as stopped
TICK = 5.0  # seconds between looks at whether something is to be told
_TICKS_PER_WRITE = 2
_TICKS_PER_LINE = 12

State = Literal["running", "finished", "stopped"]


@dataclass(frozen=True)
class Progress:
    """What a look at a step's work found: how much is done, how much of that failed, and what else is to be told.

    `rate` is in units a second; None lets it be measured from look to look.
    """

    done: int
    failed: int = 0
    rate: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def report_progress(
    step: Step, *, total: int, unit: str, look: Callable[[], Progress], in_log: bool = True
) -> Iterator[None]:
    """Tells of a step while the block works on it: a file every ten seconds, a line after five and then every minute.

    Args:
        step: whose folder gets the file.
        total: what `done` will be in the end.
        unit: of both: images, steps, epochs.
        look: finds what is done; what it raises only costs the telling.
        in_log: False where the work has lines of its own.
    """
    teller = _Reporter(step, total, unit, look)
    ticks = itertools.count()

    def report() -> None:
        to_file, to_log = is_due(next(ticks))
        if to_file or (to_log and in_log):
            teller.tell("running", to_file=to_file, to_log=to_log and in_log)

    state: State = "stopped"
    try:
        with repeatedly(report, seconds=TICK, at_once=True, at_end=False):
            yield
        state = "finished"
    finally:
        teller.tell(state, to_log=False)


def is_due(tick: int) -> tuple[bool, bool]:
    """Whether the file is to be written and whether a line is to be logged at a tick; tick 0 is the start."""
    return tick % _TICKS_PER_WRITE == 0, tick % _TICKS_PER_LINE == 1


class _Reporter:
    def __init__(self, step: Step, total: int, unit: str, look: Callable[[], Progress]) -> None:
        self.step, self.total, self.unit, self.look = step, total, unit, look
        self.started, self.first = time.time(), None

    def tell(self, state: State, *, to_file: bool = True, to_log: bool = True) -> None:
        try:
            found = self.look()
            self.first = found.done if self.first is None else self.first
            now = time.time()
            rate = (found.done - self.first) / max(now - self.started, 1e-9) if found.rate is None else found.rate
            told = {"step": self.step.name, "stage": self.step.stage.name, "state": state}
            told |= count_up(found, self.total, self.unit, rate)
            told |= {"started": _iso(self.started), "updated": _iso(now)}
            if to_log:
                log.info("%s", "  ".join([self.step.name, *words_of(told)]))
            if to_file:
                storage.write_json(storage.join(self.step.folder, FILE), told)
        except Exception as error:  # of the storage or of what lies there: to tell of the work must never stop it
            log.debug("%s: progress not told: %s", self.step.name, error)


def count_up(found: Progress, total: int, unit: str, rate: float) -> dict[str, Any]:
    """The figures of `progress.json`; `eta_seconds` is None as long as nothing moves."""
    done = min(found.done, total)  # rows of overlapping parts are counted twice
    return {
        "done": done,
        "total": total,
        "unit": unit,
        "failed": found.failed,
        "rate": round(rate, 3),
        "eta_seconds": round((total - done) / rate, 1) if rate > 0 else None,
        **found.others,
    }


def words_of(told: Mapping[str, Any]) -> list[str]:
    """`120/400 images`, `3.1/s`, `eta 80 s`, `2 failed`, as far as known."""
    words = [f"{told['done']}/{told['total']} {told['unit']}"]
    if told["eta_seconds"] is not None:
        words += [f"{told['rate']:.3g}/s", f"eta {duration(told['eta_seconds'])}"]
    if "loss" in told:
        words.append(f"loss {told['loss']:.3g}")
    if told["failed"] or told["unit"] == "images":
        words.append(f"{told['failed']} failed")
    return words


def read_progress(folder: str) -> dict[str, Any] | None:
    """What `progress.json` of a step's folder says, and `seconds_ago` it was written; None when it says nothing."""
    try:
        told = storage.read_json(storage.join(folder, FILE))
        ago = time.time() - datetime.fromisoformat(told["updated"]).timestamp()
        words_of(told)
    except (FileNotFoundError, DamagedError, KeyError, TypeError, ValueError):
        return None  # a file that is missing or damaged tells nothing of the step itself
    return {**told, "seconds_ago": max(round(ago, 1), 0.0)}


def state_of(told: Mapping[str, Any]) -> Literal["running", "stopped"]:
    """What an unfinished step does, by what `read_progress` gave: a driver that was killed is silent."""
    return "stopped" if told["state"] == "stopped" or told["seconds_ago"] > FRESH else "running"


def part_counter(folder: str) -> Callable[[], Progress]:
    """A look at the parts of a step: rows by the listing, failed ones by the status of parts not seen before."""
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
    """Calls `report` every so many seconds while the block runs, if wanted also when it starts and when it ends.

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
    """`42 s`, `7 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
