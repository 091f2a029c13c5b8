"""Settings of `train_detector` by model, and of RoI drop."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from weaksam.core.config import Settings

# What a model is trained with where the step does not say: DINO's are those for VOC07, those with masks for VOC12.
RECIPES: dict[str, dict[str, Any]] = {
    "dino": {
        "scales": list(range(480, 801, 32)),
        "max_side": 1333,
        "crop_chance": 0.5,
        "steps": 13_160,  # 14 rounds of three times 5,011 images
        "milestones": [7_520, 9_400, 11_280],
        "warmup": 0,
        "optimizer": "adamw",
        "lr": 9e-5,
        "backbone_lr": 0.1,
        "clip": 0.1,
    },
}
RECIPES["rt_detr_v2"] = RECIPES["dino"] | {"lr": 1e-4}
RECIPES["mask_rcnn"] = {"scales": list(range(640, 801, 32)), "max_side": 1333}
RECIPES["mask2former"] = {
    "square": 1024,
    "steps": 33_069,  # 50 rounds of 10,582 images
    "milestones": [29_395, 31_844],
    "warmup": 0,
    "optimizer": "adamw",
    "lr": 1e-4,
    "backbone_lr": 0.1,
    "weight_decay": 0.05,
    "clip": 0.01,
    "frozen_stages": 0,
    "precision": "bf16",
}


class RoiDropSettings(Settings):
    """When a region that is hard to learn is held to be wrongly labelled, and not learnt from."""

    gate: Literal["off", "and", "independent", "independent_all", "cls", "reg"] = "off"
    """`and`: both losses of a region where both are too large; `independent`: each where it is; `independent_all`: the
    same, background's classification loss too; or one loss alone."""
    cls_threshold: float = Field(default=4.0, gt=0)
    """Classification losses above this are too large (4 = a probability below 0.018)."""
    reg_threshold: float = Field(default=4.0, gt=0)
    """Regression losses above this are too large (L1, summed over the four deltas of a box)."""
    start: int = Field(default=2000, ge=0)
    """Step from which on regions are dropped."""
