"""SAM in an actor: builds the engine from the settings of a step, records telemetry, identifies the weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from weaksam.core import storage
from weaksam.core.cache import fetch
from weaksam.execution import telemetry
from weaksam.sam.shipped import SHIPPED
from weaksam.stages.proposal_settings import ProposalResources, SamSettings

if TYPE_CHECKING:
    import numpy as np

    from weaksam.sam.engine import EncodedImage, SamEngine


log = logging.getLogger(__name__)


def load_engine(sam: SamSettings, resources: ProposalResources, **settings: Any) -> SamEngine:
    """Returns the engine on the actor's device, with its threads; `settings` are further settings of the engine."""
    import torch

    from weaksam.sam.checkpoints import load_sam
    from weaksam.sam.engine import EngineSettings, SamEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and sam.precision == "fp16":
        log.warning("precision fp16 is slower than fp32 on a CPU: use bf16 where it has AMX, else leave it out")
    torch.set_num_threads(math.ceil(resources.actor_cpus))  # actors beside a GPU share its node's CPUs, too
    checkpoint = fetch(sam.checkpoint, sha256=sam.sha256) if sam.checkpoint else None
    model = load_sam(sam.model, checkpoint, device=device)
    if sam.precision is not None:
        settings["precision"] = sam.precision
    return SamEngine(
        model,
        settings=EngineSettings(
            points_per_chunk=resources.points_per_chunk, compiled=resources.compile_encoder, **settings
        ),
    )


@dataclass(frozen=True)
class Watched:
    """An encoded image, and the start and end of its encoding: seconds, or CUDA events."""

    image: EncodedImage
    start: Any
    end: Any


class SamWatch:
    """Runs SAM on images and records telemetry.

    A GPU runs asynchronously: times are measured by CUDA events and read only at the end, when the results have arrived
    anyway.
    """

    def __init__(self, engine: SamEngine) -> None:
        self.engine = engine

    def encode(self, image: np.ndarray) -> Watched:
        """Encodes an image."""
        start = self._mark()
        encoded = self.engine.encode(image)
        return Watched(encoded, start, self._mark())

    @contextmanager
    def decoding(self, watched: Watched) -> Iterator[EncodedImage]:
        """Records telemetry of the block, which decodes the prompts of an image."""
        before, start = self._counts(), self._mark()
        try:
            yield watched.image
            telemetry.observe("weaksam_decoder_seconds", partial(_seconds, start, self._mark()))
        finally:
            prompts, backoffs = (now - then for now, then in zip(self._counts(), before, strict=True))
            telemetry.count("weaksam_prompts", prompts)
            telemetry.count("weaksam_oom_backoffs", backoffs)
            telemetry.observe("weaksam_encoder_seconds", partial(_seconds, watched.start, watched.end))

    def _counts(self) -> tuple[int, int]:
        return self.engine.prompts_decoded, self.engine.oom_backoffs

    def _mark(self) -> Any:
        if self.engine.sam.device.type != "cuda":
            return time.perf_counter()
        import torch

        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def identify_shipped(sam: SamSettings) -> dict[str, str]:
    """Returns the identity of the shipped weights as an outside file, if they are used."""
    if sam.checkpoint is not None:
        return {}
    return {f"sam.{sam.model}": storage.identity(str(SHIPPED[sam.model]))}
