"""Masks of one image on their way through the filters.

Axis legend: K masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Filter:
    """What a mask must reach, and which of a prompt's masks are looked at."""

    predicted_iou: float
    stability: float
    offset: float
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """Masks that passed by predicted IoU.

    Attributes:
        prompt: (K,) int64 row of the prompt among those decoded.
        predicted_iou: (K,) float32.
        logits: (K, low rows, low columns) float32.
    """

    prompt: Tensor
    predicted_iou: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Candidates:
    """Masks that passed by predicted IoU and stability; tensors of length K on the device.

    Attributes:
        boxes: (K, 4).
        stability, predicted_iou: (K,).
        prompt: (K,) number of the prompt.
        logits: (K, low rows, low columns), or K = 0 of them when no masks are asked for.
    """

    boxes: Tensor
    stability: Tensor
    predicted_iou: Tensor
    prompt: Tensor
    logits: Tensor

    @staticmethod
    def none(low_hw: tuple[int, int], device: torch.device) -> Candidates:
        """No candidates, with logits of the given size."""
        nothing = torch.zeros(0, device=device)
        return Candidates(nothing.view(0, 4), nothing, nothing, nothing.long(), torch.zeros(0, *low_hw, device=device))

    def take(self, which: Tensor) -> Candidates:
        """Some of them, by index or flag."""
        logits = self.logits[which] if len(self.logits) else self.logits
        return Candidates(
            self.boxes[which], self.stability[which], self.predicted_iou[which], self.prompt[which], logits
        )

    @staticmethod
    def join(parts: list[Candidates]) -> Candidates:
        """All parts, in the order of their prompts."""
        fields = ("boxes", "stability", "predicted_iou", "prompt", "logits")
        joined = Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))
        return joined.take(joined.prompt.argsort(stable=True))
