"""Detectors that learn from boxes, with random, starting or trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from weaksam.core.cache import fetch
from weaksam.errors import WeightsError
from weaksam.models.detectors.base import Detector
from weaksam.models.detectors.catalogue import kind_of
from weaksam.models.detectors.catalogue.kind import DetectorSpec
from weaksam.models.detectors.rules import DetectionFilter


def build_untrained(spec: DetectorSpec, rules: DetectionFilter | None = None) -> Detector:
    """Returns the network with random weights; `rules` select its detections, by default the published rules.

    Raises:
        ValueError: there is no such model, or it does not support the backbone.
    """
    kind = kind_of(spec.model)
    if not kind.supports(spec.backbone):
        known = ", ".join(map(repr, kind.supported_backbones))
        raise ValueError(f"{spec.model}: backbone must be one of {known}, got {spec.backbone!r}")
    return kind.build(spec, rules or DetectionFilter())


def build_to_train(spec: DetectorSpec) -> Detector:
    """Returns the network with its starting weights.

    Raises:
        WeightsError: a file lacks weights of the backbone, or has some that do not fit.
    """
    network = build_untrained(spec)
    if spec.start is not None:
        load_detector(network, load_file(fetch(spec.start)), where=spec.start)
    elif spec.pretrained or spec.weights is not None:
        network.load_pretrained(spec.weights)
    return network


def build_trained(spec: DetectorSpec, path: str | Path, rules: DetectionFilter | None = None) -> Detector:
    """Returns the network of a finished `train_detector` step, in eval mode; `path` is its weights file."""
    network = build_untrained(spec, rules)
    network.load_state_dict(load_file(path))
    return network.eval()


def load_detector(network: Detector, state: Mapping[str, Tensor], *, where: str) -> None:
    """Loads weights of a detector that is a part of `network`: Faster R-CNN's for Mask R-CNN, or the same model's.

    Further weights of `network` are unchanged.

    Raises:
        WeightsError: a weight is not in `network` or has another shape there; `where` names the file.
    """
    own = network.state_dict()
    for key, value in state.items():
        if key not in own or own[key].shape != value.shape:
            raise WeightsError(
                f"{where}: {key} {tuple(value.shape)} is no weight of this detector: start from the same model, or "
                "from Faster R-CNN for Mask R-CNN, with the same backbone and classes"
            )
    network.load_state_dict(own | dict(state))
