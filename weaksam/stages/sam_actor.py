"""SAM in an actor: the engine from the settings of a step, what is told of its work, the identity of its weights."""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from weaksam import metrics, storage
from weaksam.sam import SHIPPED
from weaksam.stages.proposal_settings import ProposalResources, SamSettings

if TYPE_CHECKING:
    from weaksam.sam.engine import SamEngine


def load_engine(sam: SamSettings, resources: ProposalResources, **settings: Any) -> SamEngine:
    """The engine on the actor's device, with its threads; `settings` are further ones of the engine."""
    import torch

    from weaksam.sam.checkpoints import load_sam
    from weaksam.sam.engine import EngineSettings, SamEngine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(math.ceil(resources.actor_cpus))
    checkpoint = storage.fetch(sam.checkpoint, sha256=sam.sha256) if sam.checkpoint else None
    model = load_sam(sam.model, checkpoint, device=device)
    return SamEngine(model, settings=EngineSettings(points_per_chunk=resources.points_per_chunk, **settings))


class SamWatch:
    """Tells of SAM's work on one image: `encoded` and `decoded` are called inside its block.

    A GPU runs behind the program: its own clock is read, and only at the end, when its results are here anyway.
    """

    def __init__(self, engine: SamEngine) -> None:
        self.engine = engine

    def __enter__(self) -> Self:
        self.before = self.engine.prompts_decoded, self.engine.oom_backoffs
        self.marks = [self._mark()]
        return self

    def encoded(self) -> None:
        """The image is encoded; what follows is the decoder's."""
        self.marks.append(self._mark())

    def decoded(self) -> None:
        """All of its prompts are decoded."""
        self.marks.append(self._mark())

    def __exit__(self, *_: object) -> None:
        metrics.count("weaksam_prompts", self.engine.prompts_decoded - self.before[0])
        metrics.count("weaksam_oom_backoffs", self.engine.oom_backoffs - self.before[1])
        # of an image that failed on the way only what was done
        for name, marks in zip(("encoder", "decoder"), pairwise(self.marks), strict=False):
            metrics.observe(f"weaksam_{name}_seconds", partial(_seconds, *marks))

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
    """The shipped weights as an outside file, where they are used."""
    if sam.checkpoint is not None:
        return {}
    return {f"sam.{sam.model}": storage.identity(str(SHIPPED[sam.model]))}
