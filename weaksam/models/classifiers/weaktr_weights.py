"""Sizes and starting weights of WeakTr: any plain timm ViT, a published WeakTr checkpoint, or the demo's own.

A state dict is matched key by key. Missing and unused keys are logged; a key that does not fit raises an error that
names it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weaksam.errors import ConfigError, WeightsError
from weaksam.models.backbones.catalogue import find_backbone
from weaksam.models.backbones.frozen_sam import SamStem
from weaksam.models.backbones.timm_net import pretrained_state
from weaksam.models.classifiers.weaktr import FineOf, WeakTr, WeakTrSize
from weaksam.sam.checkpoints import read_state

log = logging.getLogger(__name__)

_NAMED = 5


def size_of(backbone: str) -> WeakTrSize:
    """Returns the size of a backbone.

    Args:
        backbone: `frozen_sam`, or the name of a plain timm ViT: one class token, no layer scale, no registers.

    Raises:
        ConfigError: there is no such model, or WeakTr cannot be built on it.
    """
    kind = find_backbone(backbone)
    if kind is not None and kind.weaktr_size is not None:
        return kind.weaktr_size()
    vit = _build_timm(backbone)
    block = vit.blocks[0]
    size = WeakTrSize(
        dim=vit.embed_dim,
        depth=len(vit.blocks),
        heads=block.attn.num_heads,
        patch=vit.patch_embed.patch_size[0],
        grid=vit.patch_embed.grid_size[0],
        eps=block.norm1.eps,
    )
    own = {key for key in WeakTr(1, size).state_dict() if key.startswith(("blocks.", "patch_embed."))}
    theirs = {key for key in vit.state_dict() if key.startswith(("blocks.", "patch_embed."))}
    if own != theirs:
        raise ConfigError(
            f"backbone {backbone!r} is no plain ViT: it has {_first_names(sorted(theirs - own))} and lacks "
            f"{_first_names(sorted(own - theirs))}: choose one such as deit_small_patch16_224"
        )
    return size


def build_weaktr(backbone: str, num_classes: int, *, gated: bool = False, fine_of: FineOf = "both") -> WeakTr:
    """Returns a WeakTr with random weights, in train mode, on the CPU."""
    return WeakTr(num_classes, size_of(backbone), gated=gated, fine_of=fine_of)


def load_trained(
    path: Path, backbone: str, num_classes: int, *, gated: bool = False, fine_of: FineOf = "both"
) -> WeakTr:
    """Returns a finished WeakTr of `train_classifier`, float32, in eval mode, without gradients, on the CPU.

    Raises:
        WeightsError: the file cannot be read, or lacks weights.
    """
    model = build_weaktr(backbone, num_classes, gated=gated, fine_of=fine_of)
    missing, _ = load_state(model, read_state(path), where=str(path))
    if missing:
        raise WeightsError(f"{path}: no finished classifier, it lacks {_first_names(missing)}: run its step again")
    return model.float().eval().requires_grad_(False)


def load_pretrained(model: WeakTr, backbone: str) -> None:
    """Loads the weights of the backbone into `model`: timm's, or for `frozen_sam` the shipped SAM's."""
    if isinstance(model.patch_embed, SamStem):
        model.patch_embed.load_pretrained()
    else:
        load_state(model, pretrained_state(backbone), where=backbone)


def load_file(model: WeakTr, path: Path, *, class_rows: Sequence[int] | None = None) -> None:
    """Loads a file into `model`: a WeakTr checkpoint or the state dict of a ViT.

    Raises:
        WeightsError: it cannot be read, or does not fit.
    """
    state = read_state(path, wrappers=("model", "state_dict"))  # as DeiT's and WeakTr's training scripts save it
    load_state(model, state, where=str(path), class_rows=class_rows)


def load_state(
    model: WeakTr, state: dict[str, Tensor], *, where: str, class_rows: Sequence[int] | None = None
) -> tuple[list[str], list[str]]:
    """Adapts a state dict to `model` and loads it.

    A ViT has one class token: each class starts as a copy of it. A checkpoint with more classes than `class_rows` names
    gives those rows (published COCO checkpoints have 90 classes, of which the dataset uses 80).

    Returns:
        missing keys, which keep their random values, and unexpected keys, which are not used; both are logged.

    Raises:
        WeightsError: a layer of the transformer is missing, a shape differs, or the classes do not match.
    """
    expected = model.state_dict()
    fitted = _fit_classes(dict(state), model, where, class_rows)
    missing = [key for key in expected if key not in fitted]
    unexpected = [key for key in fitted if key not in expected]
    misshaped = [
        f"{key} is {tuple(fitted[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in fitted and fitted[key].shape != expected[key].shape
    ]
    needed = [key for key in missing if key.startswith(("blocks.", "patch_embed.", "pos_embed", "cls_token"))]
    if needed or misshaped:
        faults = [f"missing {_first_names(needed)}"] * bool(needed) + [_first_names(misshaped)] * bool(misshaped)
        raise WeightsError(
            f"{where}: does not fit the classifier: {'; '.join(faults)}: set the backbone it was made for"
        )
    for what, keys in (("not in it, left at their start", missing), ("in it but not used", unexpected)):
        if keys:
            log.info("%s: %s: %s", where, what, _first_names(keys))
    model.load_state_dict({key: value for key, value in fitted.items() if key in expected}, strict=False)
    return missing, unexpected


def _fit_classes(
    state: dict[str, Tensor], model: WeakTr, where: str, class_rows: Sequence[int] | None
) -> dict[str, Tensor]:
    """Returns `state` with class tokens, their positions and the head for the classes of `model`."""
    classes = model.num_classes
    if state.get("head.weight", torch.zeros(0)).ndim != 4:  # a ViT's own classifier
        state = {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist.", "fc_norm."))}
    tokens = state.get("cls_token")
    if tokens is None or "pos_embed" not in state:
        return state
    file_classes = tokens.shape[1]
    if file_classes == 1 and classes != 1:
        rows = [0] * classes
    else:
        rows = list(class_rows) if class_rows is not None else list(range(file_classes))
    if len(rows) != classes or max(rows) >= file_classes:
        raise WeightsError(
            f"{where}: has {file_classes} classes, the dataset has {classes}: name the row of each class in class_rows"
        )
    positions = state["pos_embed"]
    state["cls_token"] = tokens[:, rows]
    state["pos_embed"] = torch.cat([positions[:, rows], positions[:, file_classes:]], 1)
    return state | {key: state[key][rows] for key in ("head.weight", "head.bias") if key in state}


def _build_timm(name: str) -> Any:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    try:
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0)
    except RuntimeError as error:
        raise ConfigError(f"backbone {name!r}: timm cannot build it ({error})") from error
    if not isinstance(vit, VisionTransformer) or vit.cls_token is None:
        raise ConfigError(f"backbone {name!r} is no ViT with a class token: choose one such as deit_small_patch16_224")
    return vit


def _first_names(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return (", ".join(names[:_NAMED]) or "nothing") + (f" and {rest} more" if rest > 0 else "")
