"""Counters and histograms of a job for Prometheus: Ray serves them at the metrics port of every node.

A process without Ray counts nothing, and this module never imports Ray, so its callers can be used and tested without
it. A fault of a metric never reaches the caller.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

COUNTERS = {
    "weaksam_images_done": "Images that became a row with status ok.",
    "weaksam_images_failed": "Images that became a row with another status.",
    "weaksam_prompts": "Prompts that SAM decoded.",
    "weaksam_boxes_kept": "Boxes that went into rows.",
    "weaksam_oom_backoffs": "Times SAM ran out of device memory and went on with half as many prompts at a time.",
}
HISTOGRAMS = {
    "weaksam_encoder_seconds": "Seconds SAM's encoder took for an image.",
    "weaksam_decoder_seconds": "Seconds SAM took for all prompts of an image once it was encoded.",
    "weaksam_wait_seconds": "Seconds an actor waited between two batches.",
}
TAGS = ("step", "stage")

# Names of all series in Prometheus; Ray adds `ray_` and, to a counter, `_total`.
SERIES = (
    *(f"ray_{name}_total" for name in COUNTERS),
    *(f"ray_{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")),
)

# Ray computes the sum of a histogram from the midpoints of its buckets, so the buckets are narrow.
_BOUNDARIES = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0]
_tags: dict[str, str] = dict.fromkeys(TAGS, "")


def set_tags(*, step: str, stage: str) -> None:
    """Sets the tags of this process; a worker process of Ray works on one step."""
    _tags.update(step=step, stage=stage)


def count(name: str, number: int = 1) -> None:
    """Adds to a counter, a key of COUNTERS."""
    if number > 0:  # Ray refuses to add nothing
        _record(name, number)


def observe(name: str, measure: Callable[[], float]) -> None:
    """Adds the result of `measure` to a histogram, a key of HISTOGRAMS; `measure` is called only where Ray runs."""
    _record(name, measure)


def _record(name: str, value: int | Callable[[], float]) -> None:
    ray = sys.modules.get("ray")
    try:
        if ray is not None and ray.is_initialized():
            if callable(value):
                _make(name).observe(value(), tags=_tags)
            else:
                _make(name).inc(value, tags=_tags)
    except Exception as error:  # a fault of a metric must not stop the work
        log.debug("%s: not recorded: %s", name, error)


@functools.cache
def _make(name: str) -> Any:
    from ray.util.metrics import Counter, Histogram

    if name in COUNTERS:
        return Counter(name, COUNTERS[name], tag_keys=TAGS)
    return Histogram(name, HISTOGRAMS[name], boundaries=_BOUNDARIES, tag_keys=TAGS)
