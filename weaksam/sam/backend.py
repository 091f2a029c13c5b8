"""Interchangeable implementations of the decoder's expensive functions: plain PyTorch or Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from weaksam.sam import mask_head, passes, postprocess
from weaksam.sam.passes import Gathered, PromptSide


@dataclass(frozen=True)
class Backend:
    """Functions that can be replaced one for one; the plain versions document them.

    The `PromptSide` of `first_pass` is valid only for `second_pass` and `predict_mask_logits` of the same backend.
    """

    read_unchanged: Callable[..., Tensor] = passes.read_unchanged
    first_pass: Callable[..., tuple[PromptSide, Gathered]] = passes.first_pass
    second_pass: Callable[..., tuple[PromptSide, Gathered]] = passes.second_pass
    predict_mask_logits: Callable[..., Tensor] = mask_head.predict_mask_logits
    measure_masks: Callable[..., postprocess.MaskStats] = postprocess.measure_masks
    is_memory_lean: bool = False  # stores little per prompt between the functions


PLAIN = Backend()
