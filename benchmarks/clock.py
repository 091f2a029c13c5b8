"""Measures seconds, by phase, and memory on a CPU or a GPU."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Clock:
    """Seconds by phase."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        """Returns the CPU seconds of the process, or wall-clock seconds after the GPU has finished."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        """Returns `function` with its time added to `name`."""

        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[Any, float]:
    """Returns the result of the last run, and the seconds of the fastest run."""
    clock, times, result = Clock(device), [], None
    for _ in range(repeats):
        start = clock.now()
        result = run()
        times.append(clock.now() - start)
    return result, min(times)


def peak_memory(device: torch.device) -> float:
    """Returns the peak memory in MiB: of the GPU since the last call, or of the process so far."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return peak
