"""RoI drop: ignores the losses of regions whose loss is large late in training, because their label is probably wrong.

A network fits consistent labels first; if the loss of a region is still large later, its pseudo label is often wrong.
From some step on, the losses of such regions are therefore dropped.
Source: WeakSAM, arXiv 2402.14812. Its figure shows two independent gates, which an earlier version of its code had for
all regions (`independent_all`); the last version drops foreground regions if both gates are open (gate `and`). That
code has an indexing error and loses a divisor; here the divisors of the losses are unchanged, so the remaining losses
keep their weight.
Axis legend: R regions: RoIs of a detector with proposals, matched queries of a DETR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge

from weaksam.ops.choices import STRICT, check_rules

Gate = Literal["off", "and", "independent", "independent_all", "cls", "reg"]
Array = TypeVar("Array", bound=Any)  # an array of numpy, torch or jax, with >, & and |


@dataclass(frozen=True)
class RoiDropRules:
    """Rules that decide which losses of a region are dropped.

    Attributes:
        gate: `and`: drops both losses of a region if both are too large; `independent`: drops each loss that is too
            large; `independent_all`: the same, including the classification loss of background; `cls`: drops only
            classification losses; `reg`: drops only regression losses; `off`: drops nothing.
        cls_threshold: classification losses above this are too large. A cross-entropy of 4 is a probability of 0.018.
        reg_threshold: regression losses above this are too large. An L1 of 4, summed over the four deltas of a box, is
            a mean error of 1.0 each.
        start: training step from which losses are dropped; before, losses say little about labels.
    """

    __pydantic_config__ = STRICT

    gate: Gate = "off"
    cls_threshold: Annotated[float, Ge(0)] = 4.0
    reg_threshold: Annotated[float, Ge(0)] = 4.0
    start: Annotated[int, Ge(0)] = 2000

    def __post_init__(self) -> None:
        check_rules(self)


NO_DROP = RoiDropRules()


def select_drops(
    cls_losses: Array, reg_losses: Array, is_foreground: Array, rules: RoiDropRules, step: int
) -> tuple[Array, Array]:
    """Selects the classification and regression losses to drop; those of background only with `independent_all`.

    Args:
        cls_losses: (R,) float, classification loss of each region, detached.
        reg_losses: (R,) float, regression loss of each region, detached; ignored for background.
        is_foreground: (R,) bool, whether a region has an assigned object.
        rules: gate, thresholds and start.
        step: training step, from 0.

    Returns:
        two masks (R,) bool, of the same array type: classification losses and regression losses to drop.
    """
    nothing = is_foreground & ~is_foreground
    if rules.gate == "off" or step < rules.start:
        return nothing, nothing
    bad_cls = is_foreground & (cls_losses > rules.cls_threshold)
    bad_reg = is_foreground & (reg_losses > rules.reg_threshold)
    both = bad_cls & bad_reg
    return {
        "and": (both, both),
        "independent": (bad_cls, bad_reg),
        "independent_all": (cls_losses > rules.cls_threshold, bad_reg),
        "cls": (bad_cls, nothing),
        "reg": (nothing, bad_reg),
    }[rules.gate]
