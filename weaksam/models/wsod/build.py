"""Weakly supervised detectors by name, with their starting or their trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from weaksam.core.cache import fetch
from weaksam.errors import WeightsError
from weaksam.models.backbones.catalogue import are_of_timm, kinds_in, wsod_backbones
from weaksam.models.backbones.crop_net import CropNet
from weaksam.models.backbones.roi_net import Pixels, RoiNet, load_imagenet
from weaksam.models.wsod.network import WsodNet, WsodRules
from weaksam.ops.choices import check_choices
from weaksam.sam.checkpoints import read_state


@dataclass(frozen=True)
class WsodSpec:
    """Specifies a network; picklable, and cheap to send.

    Attributes:
        backbone: one of `wsod_backbones` or a network of timm: a trained network, or the frozen features of a
            `CropNet`, joined by +.
        num_classes: C.
        rules: OICR's or MIST's.
        dropblock: whether it has a dropblock.
        pixels: pixel format the starting weights were trained on.
        last_relu, frozen_stages: options of vgg16 and resnet50.
        crop, margin: options of a `CropNet`.
        pretrained: start from published weights: torchvision's ImageNet weights, fetched by name, or the shipped
            weights of frozen features.
        weights: URI of ImageNet weights to start from instead.
    """

    backbone: str
    num_classes: int
    rules: WsodRules
    dropblock: bool = False
    pixels: Pixels = "torchvision"
    last_relu: bool = True
    frozen_stages: int = 2
    crop: int = 64
    margin: float = 0.15
    pretrained: bool = True
    weights: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.backbone not in wsod_backbones() and not are_of_timm(self.backbone):
            known = ", ".join(map(repr, wsod_backbones())) + ", or a network of timm"
            raise ValueError(f"WsodSpec: backbone must be one of {known}, got {self.backbone!r}")

    def untrained(self) -> WsodNet:
        """Returns the network with random weights."""
        return WsodNet(self._roi_net(), self.num_classes, self.rules, dropblock=self.dropblock)

    def _roi_net(self) -> RoiNet:
        kind = kinds_in(self.backbone)[0]
        if kind.roi_net is not None:
            return kind.roi_net(self.pixels, self.last_relu, self.frozen_stages)
        return CropNet(self.backbone.split("+"), crop=self.crop, margin=self.margin)

    def with_starting_weights(self) -> WsodNet:
        """Returns the network to train.

        Raises:
            WeightsError: the file lacks weights of the backbone, or they have other shapes.
        """
        network = self.untrained()
        if self.weights is not None:
            state = read_state(fetch(self.weights), wrappers=("model", "state_dict"))
            if isinstance(network.roi_net, CropNet):
                network.roi_net.load_weights(state, where=self.weights)
            else:
                _load(network.roi_net, state, self.weights)
        elif self.pretrained and isinstance(network.roi_net, CropNet):
            network.roi_net.load_pretrained()
        elif self.pretrained and (imagenet := kinds_in(self.backbone)[0].imagenet) is not None:
            state, where = imagenet()
            _load(network.roi_net, state, where)
        return network

    def trained(self, path: str | Path) -> WsodNet:
        """Returns the network of a finished `train_wsod` step, in eval mode."""
        network = self.untrained()
        network.load_state_dict(load_file(path))
        return network.eval()


def _load(network: RoiNet, state: Mapping[str, Tensor], where: str) -> None:
    try:
        missing = load_imagenet(network, state)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error
    if missing:
        raise WeightsError(f"{where}: has nothing for {len(missing)} weights of the backbone, e.g. {missing[0]}")
