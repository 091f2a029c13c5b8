"""Who does the heavy work of the decoder: plain PyTorch, or kernels that do the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from weaksam.sam import drawing, passes, postprocess
from weaksam.sam.passes import Gathered, PromptSide


@dataclass(frozen=True)
class Backend:
    """Functions that may be exchanged one for one; what each does is said at the plain one.

    What `first_pass` puts into a `PromptSide` only `second_pass` and `draw_masks` of the same backend understand.
    """

    read_unchanged: Callable[..., Tensor] = passes.read_unchanged
    first_pass: Callable[..., tuple[PromptSide, Gathered]] = passes.first_pass
    second_pass: Callable[..., tuple[PromptSide, Gathered]] = passes.second_pass
    draw_masks: Callable[..., Tensor] = drawing.draw_masks
    measure_masks: Callable[..., postprocess.MaskStats] = postprocess.measure_masks
    keeps_little: bool = False  # of each prompt, between the functions


PLAIN = Backend()
