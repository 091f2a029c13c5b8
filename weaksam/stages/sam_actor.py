"""SAM in an actor: the engine from the settings of a step, and the identity of its weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from weaksam import storage
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


def identify_shipped(sam: SamSettings) -> dict[str, str]:
    """The shipped weights as an outside file, where they are used."""
    if sam.checkpoint is not None:
        return {}
    return {f"sam.{sam.model}": storage.identity(str(SHIPPED[sam.model]))}
