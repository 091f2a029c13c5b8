"""RoI drop against brute force, on arrays of two libraries; before its start nothing is dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weaksam.ops.roi_drop import RoiDropRules, select_drops

GATES = ("off", "and", "independent", "independent_all", "cls", "reg")


def plain(cls: float, reg: float, foreground: bool, rules: RoiDropRules, step: int) -> tuple[bool, bool]:
    """One region, case by case."""
    if step < rules.start or rules.gate == "off":
        return False, False
    large_cls, large_reg = cls > rules.cls_threshold, reg > rules.reg_threshold
    if rules.gate == "independent_all":
        return large_cls, large_reg and foreground
    if not foreground:
        return False, False
    if rules.gate == "and":
        return (True, True) if large_cls and large_reg else (False, False)
    return large_cls and rules.gate in ("independent", "cls"), large_reg and rules.gate in ("independent", "reg")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("step", [0, 99, 100, 5000])
def test_equals_brute_force(gate: str, step: int) -> None:
    rng = np.random.default_rng(step)
    rules = RoiDropRules(gate, cls_threshold=1.0, reg_threshold=2.0, start=100)  # type: ignore[arg-type]
    cls, reg = rng.exponential(1.5, 200), rng.exponential(2.5, 200)
    foreground = rng.random(200) < 0.6
    wanted = [plain(*one, rules, step) for one in zip(cls, reg, foreground, strict=True)]
    for convert in (np.asarray, torch.from_numpy):
        got = select_drops(convert(cls), convert(reg), convert(foreground), rules, step)
        assert np.array_equal(np.stack([np.asarray(mask) for mask in got], 1), np.array(wanted))
        assert all(mask.dtype in (np.bool_, torch.bool) for mask in got)
    some = np.array(wanted).any()
    assert some == (gate != "off" and step >= 100)  # the case is not empty


def test_a_loss_at_its_threshold_is_kept_and_no_region_is_no_fault() -> None:
    rules = RoiDropRules("independent", cls_threshold=1.0, reg_threshold=2.0, start=0)
    cls, reg, there = torch.tensor([1.0, 1.1]), torch.tensor([2.0, 2.1]), torch.tensor([True, True])
    drop_cls, drop_reg = select_drops(cls, reg, there, rules, 0)
    assert drop_cls.tolist() == drop_reg.tolist() == [False, True]
    assert [len(mask) for mask in select_drops(cls[:0], reg[:0], there[:0], rules, 0)] == [0, 0]
