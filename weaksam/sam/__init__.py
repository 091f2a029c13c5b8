"""SAM as a batch engine: encode an image once, decode thousands of prompts, keep few masks.

Public names are imported on first access, so settings of SAM can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weaksam.sam.checkpoints import load_sam
    from weaksam.sam.engine import EngineSettings, SamEngine
    from weaksam.sam.prompts import Prompts

__all__ = ["EngineSettings", "Prompts", "SamEngine", "load_sam"]

_MODULES = {"load_sam": "checkpoints", "EngineSettings": "engine", "SamEngine": "engine", "Prompts": "prompts"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
