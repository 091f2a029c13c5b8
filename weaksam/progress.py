"""Progress lines of work that goes on elsewhere: something that looks, called again and again by a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeatedly(report: Callable[[], None], *, seconds: float) -> Iterator[None]:
    """Calls `report` every so many seconds while the block runs, and once when it ends. `report` must not raise."""
    finished = threading.Event()

    def loop() -> None:
        while not finished.wait(seconds):
            report()
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
