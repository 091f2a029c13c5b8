"""RoI drop: regions whose loss is large late in training were probably given a wrong label, and are not learnt from.

A network fits what is consistent first; what it still gets very wrong after a while is more often the pseudo label's
fault than its own. So from some step on, the losses of such regions count nothing.
Source: WeakSAM, arXiv 2402.14812. Its figure draws two independent gates, which its code once had for all regions
(`independent_all`); its last state drops where both are open and foreground (gate `and`). That code indexes wrongly and
loses a divisor; here the divisors of the losses stay what they were, so that what is not dropped weighs as before.
Axis legend: R regions: RoIs of a detector with proposals, matched queries of a DETR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from weaksam.ops.checks import check_number, check_whole
from weaksam.ops.choices import STRICT, check_choices

Gate = Literal["off", "and", "independent", "independent_all", "cls", "reg"]
Array = TypeVar("Array", bound=Any)  # of numpy, torch, jax: whatever has >, & and |


@dataclass(frozen=True)
class RoiDropRules:
    """When a region is taken to be wrongly labelled, and its losses are dropped.

    Attributes:
        gate: `and`: both losses of a region where both are too large; `independent`: each loss where it itself is;
            `independent_all`: the same, background's classification loss too; `cls`: the classification's alone;
            `reg`: the regression's alone; `off`: nothing ever.
        cls_threshold: classification losses above this are too large. Cross-entropy of 4 is a probability of 0.018.
        reg_threshold: regression losses above this are too large. L1 of 4, summed over the four deltas of a box, is a
            mean error of 1.0 each.
        start: step of the training from which on regions are dropped; before, their losses say little.
    """

    __pydantic_config__ = STRICT

    gate: Gate = "off"
    cls_threshold: float = 4.0
    reg_threshold: float = 4.0
    start: int = 2000

    def __post_init__(self) -> None:
        check_choices(self)
        check_number("cls_threshold", self.cls_threshold, least=0.0)
        check_number("reg_threshold", self.reg_threshold, least=0.0)
        check_whole("start", self.start, least=0, or_none=False)


NO_DROP = RoiDropRules()


def select_drops(
    cls_losses: Array, reg_losses: Array, is_foreground: Array, rules: RoiDropRules, step: int
) -> tuple[Array, Array]:
    """Which regions' classification and regression losses are to count nothing; background's never, but for
    `independent_all`.

    Args:
        cls_losses: (R,) float, classification loss of each region, detached.
        reg_losses: (R,) float, regression loss of each region, detached; of background it is not looked at.
        is_foreground: (R,) bool, whether a region was given an object.
        rules: gate, thresholds and start.
        step: of the training, from 0.

    Returns:
        two masks (R,) bool, of the same kind of array: classification losses and regression losses to drop.
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
