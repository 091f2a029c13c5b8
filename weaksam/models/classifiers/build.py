"""Classifiers by the name of their backbone: WeakTr on a ViT or the small SAM, class activation maps on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weaksam.core.cache import fetch
from weaksam.errors import WeightsError
from weaksam.models.backbones.catalogue import backbone_kind, has_own_classifier
from weaksam.models.classifiers import weaktr_weights
from weaksam.models.classifiers.cam_classifier import CamClassifier
from weaksam.models.classifiers.weaktr import FineOf, WeakTr
from weaksam.sam.checkpoints import read_state

Classifier = WeakTr | CamClassifier


def pixels_of(backbone: str) -> tuple[Sequence[float], Sequence[float]]:
    """Returns mean and standard deviation, of pixels in [0, 1], that the classifier of a backbone expects."""
    if not has_own_classifier(backbone):
        return WeakTr.mean, WeakTr.std
    kind = backbone_kind(backbone)
    return [value / 255 for value in kind.mean], [value / 255 for value in kind.std]


def build_classifier(backbone: str, num_classes: int, *, gated: bool = False, fine_of: FineOf = "both") -> Classifier:
    """Returns a classifier with random weights, in train mode, on the CPU; `gated` and `fine_of` are WeakTr's."""
    if has_own_classifier(backbone) and (build := backbone_kind(backbone).classifier) is not None:
        return build(num_classes)
    return weaktr_weights.build_weaktr(backbone, num_classes, gated=gated, fine_of=fine_of)


def load_pretrained(model: Classifier, backbone: str) -> None:
    """Loads the published weights of the backbone into `model`."""
    if isinstance(model, CamClassifier):
        model.load_pretrained()
    else:
        weaktr_weights.load_pretrained(model, backbone)


def load_weights(model: Classifier, uri: str, *, class_rows: Sequence[int] | None = None) -> None:
    """Loads a file: weights of timm's network, or for WeakTr also a published checkpoint, with `class_rows` of it.

    Raises:
        WeightsError: it cannot be read, or does not fit.
    """
    path = fetch(uri)
    if isinstance(model, CamClassifier):
        model.network.load_state(read_state(path, wrappers=("model", "state_dict")), where=uri)
    else:
        weaktr_weights.load_file(model, path, class_rows=class_rows)


def load_trained(
    path: Path, backbone: str, num_classes: int, *, gated: bool = False, fine_of: FineOf = "both"
) -> Classifier:
    """Returns a finished classifier of `train_classifier`, float32, in eval mode, without gradients, on the CPU.

    Raises:
        WeightsError: the file cannot be read, or lacks weights.
    """
    if not has_own_classifier(backbone):
        return weaktr_weights.load_trained(path, backbone, num_classes, gated=gated, fine_of=fine_of)
    model, state = build_classifier(backbone, num_classes), read_state(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: no finished classifier of {num_classes} classes: run its step again ({error})"
        ) from error
    return model.float().eval().requires_grad_(False)


def depth_of(backbone: str) -> int:
    """Returns the number of transformer layers; 0 for a backbone without a transformer."""
    return CamClassifier.depth if has_own_classifier(backbone) else weaktr_weights.size_of(backbone).depth
