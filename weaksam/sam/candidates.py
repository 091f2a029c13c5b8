"""Masks of one image before and after the filters.

Axis legend: K masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Filter:
    """Thresholds of a mask, and the mask slots of a prompt to use."""

    predicted_iou: float
    stability: float
    offset: float
    slots: tuple[int, ...]


@dataclass(frozen=True)
class MaskHeadOutput:
    """Mask logits of the masks that passed by predicted IoU.

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
        logits: (K, low rows, low columns), or K = 0 of them when no masks are requested.
    """

    boxes: Tensor
    stability: Tensor
    predicted_iou: Tensor
    prompt: Tensor
    logits: Tensor

    @staticmethod
    def none(low_hw: tuple[int, int], device: torch.device) -> Candidates:
        """Returns an empty set of candidates, with logits of size `low_hw`."""
        nothing = torch.zeros(0, device=device)
        return Candidates(nothing.view(0, 4), nothing, nothing, nothing.long(), torch.zeros(0, *low_hw, device=device))

    def take(self, which: Tensor) -> Candidates:
        """Returns a subset, by index or flag."""
        logits = self.logits[which] if len(self.logits) else self.logits
        return Candidates(
            self.boxes[which], self.stability[which], self.predicted_iou[which], self.prompt[which], logits
        )

    @staticmethod
    def join(parts: list[Candidates]) -> Candidates:
        """Concatenates all parts, in the order of their prompts."""
        fields = ("boxes", "stability", "predicted_iou", "prompt", "logits")
        joined = Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))
        return joined.take(joined.prompt.argsort(stable=True))
