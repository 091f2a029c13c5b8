"""Classifiers by the name of their backbone: WeakTr on a ViT or the small SAM, class activation maps on others."""

from __future__ import annotations

from pathlib import Path

from weaksam.errors import WeightsError
from weaksam.models.backbones.catalogue import find_backbone
from weaksam.models.classifiers import weaktr_weights
from weaksam.models.classifiers.cam_classifier import CamClassifier
from weaksam.models.classifiers.weaktr import FineOf, WeakTr
from weaksam.sam.checkpoints import read_state

Classifier = WeakTr | CamClassifier


def kind_of(backbone: str) -> type[Classifier]:
    """Returns the classifier class of a backbone."""
    return CamClassifier if has_own_classifier(backbone) else WeakTr


def has_own_classifier(backbone: str) -> bool:
    """Returns whether the catalogue has a classifier of a backbone that is not WeakTr."""
    kind = find_backbone(backbone)
    return kind is not None and kind.classifier is not None


def build_classifier(backbone: str, num_classes: int, *, gated: bool = False, fine_of: FineOf = "both") -> Classifier:
    """Returns a classifier with random weights, in train mode, on the CPU; `gated` and `fine_of` are WeakTr's."""
    kind = find_backbone(backbone)
    if kind is not None and kind.classifier is not None:
        return kind.classifier(num_classes)
    return weaktr_weights.build_weaktr(backbone, num_classes, gated=gated, fine_of=fine_of)


def load_pretrained(model: Classifier, backbone: str) -> None:
    """Loads the published weights of the backbone into `model`."""
    if isinstance(model, CamClassifier):
        model.load_pretrained()
    else:
        weaktr_weights.load_pretrained(model, backbone)


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
