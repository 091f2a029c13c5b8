"""Detectors that learn from boxes by name, with their starting or their trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from weaksam.core import storage
from weaksam.errors import WeightsError
from weaksam.models.backbones.pyramids import Lite0Pyramid, Pyramid, ResNet50, SamPyramid
from weaksam.models.detectors.base import Detector
from weaksam.models.detectors.cut_out_mask_rcnn import CutOutMaskRcnn, CutOutMaskRcnnSize
from weaksam.models.detectors.cut_out_rcnn import CutOutRcnn, CutOutRcnnSize
from weaksam.models.detectors.dino import Dino, DinoSize
from weaksam.models.detectors.faster_rcnn import PUBLISHED, BoxLoss, FasterRcnn, FasterRcnnSize, FoundRules
from weaksam.models.detectors.mask2former import Mask2Former, Mask2FormerSize
from weaksam.models.detectors.mask_rcnn import MaskRcnn, MaskRcnnSize
from weaksam.models.detectors.rt_detr_v2 import RtDetrV2, RtDetrV2Size
from weaksam.ops.choices import check_choices
from weaksam.ops.roi_drop import NO_DROP, RoiDropRules

Model = Literal["faster_rcnn", "dino", "rt_detr_v2", "mask_rcnn", "mask2former"]
LEARN_MASKS = ("mask_rcnn", "mask2former")
Backbone = Literal["resnet50", "small", "efficientnet_lite0"]
_SMALL_DINO = DinoSize(
    dim=128, heads=4, points=4, encoder_layers=2, decoder_layers=3, ffn=256, queries=100, num_denoising=50,
    detections=100, levels=2,
)  # fmt: skip
_SMALL_MASK2FORMER = Mask2FormerSize(
    dim=64, heads=4, encoder_layers=2, encoder_ffn=128, decoder_layers=3, decoder_ffn=256, queries=40, points=1024,
    detections=40,
)  # fmt: skip
_LITE0_RCNN = FasterRcnnSize(
    dim=96, hidden=512, anchors=(32, 72, 168, 384), roi_samples=64, proposals=300, pre_nms=(600, 300)
)
_LITE0_MASK_RCNN = MaskRcnnSize(**vars(_LITE0_RCNN), mask_dim=64, mask_layers=2)
_SMALL_RT_DETR = RtDetrV2Size(image=256, dim=128, decoder_layers=3, queries=100, num_denoising=50, detections=100)


@dataclass(frozen=True)
class DetectorSpec:
    """Which network; picklable, and cheap to send.

    Attributes:
        model: which one.
        backbone: `resnet50`; `efficientnet_lite0`, a smaller network on weights that need no download; or `small`, a
            smaller network on what the small SAM sees.
        num_classes: C.
        frozen_stages: of resnet50 and efficientnet_lite0.
        box_loss: of Faster and Mask R-CNN.
        drop: RoI drop.
        boxes_per_image: mean of the training images, what the losses of the DETRs and Mask2Former are divided by.
        first_steps: of the small Faster and Mask R-CNN: steps for its first stage alone.
        pretrained: start from the weights the backbone is known with: torchvision's of ImageNet, fetched by name, or
            those that come with the installation.
        weights: URI of ImageNet weights to start from instead.
        start: URI of the weights of a whole detector to start from instead, see `load_detector`.
    """

    model: Model
    backbone: Backbone
    num_classes: int
    frozen_stages: int = 1
    box_loss: BoxLoss = "l1"
    drop: RoiDropRules = NO_DROP
    boxes_per_image: float = 1.0
    first_steps: int = 0
    pretrained: bool = True
    weights: str | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)

    def untrained(self, found: FoundRules = PUBLISHED) -> Detector:
        """The network with random weights."""
        is_small = self.backbone == "small"
        finest = {"mask2former": 4, "dino": 16}.get(self.model, 8)
        pyramid: Pyramid = SamPyramid(finest=finest) if is_small else ResNet50(self.frozen_stages)
        is_lite = self.backbone == "efficientnet_lite0"
        if is_lite:
            pyramid = Lite0Pyramid(self.frozen_stages)
        more: dict[str, Any] = {"box_loss": self.box_loss, "drop": self.drop, "found": found}
        if self.model == "faster_rcnn":
            if is_small:
                return CutOutRcnn(pyramid, self.num_classes, CutOutRcnnSize(first_steps=self.first_steps), **more)
            return FasterRcnn(pyramid, self.num_classes, _LITE0_RCNN if is_lite else FasterRcnnSize(), **more)
        if self.model == "mask_rcnn":
            if is_small:
                size = CutOutMaskRcnnSize(first_steps=self.first_steps)
                return CutOutMaskRcnn(pyramid, self.num_classes, size, **more)
            return MaskRcnn(pyramid, self.num_classes, _LITE0_MASK_RCNN if is_lite else MaskRcnnSize(), **more)
        if self.model == "mask2former":
            size = _SMALL_MASK2FORMER if is_small else Mask2FormerSize()
            return Mask2Former(pyramid, self.num_classes, size, masks_per_image=self.boxes_per_image)
        if self.model == "rt_detr_v2":
            size = _SMALL_RT_DETR if is_small else RtDetrV2Size()
            return RtDetrV2(pyramid, self.num_classes, size, boxes_per_image=self.boxes_per_image)
        size = _SMALL_DINO if is_small else DinoSize()
        return Dino(pyramid, self.num_classes, size, boxes_per_image=self.boxes_per_image, drop=self.drop)

    def with_starting_weights(self) -> Detector:
        """The network to train.

        Raises:
            WeightsError: a file lacks weights of the backbone, or has some of no place or shape here.
        """
        network = self.untrained()
        if self.start is not None:
            load_detector(network, load_file(storage.fetch(self.start)), where=self.start)
        elif self.pretrained or self.weights is not None:
            network.load_pretrained(self.weights)
        return network

    def trained(self, path: str | Path, found: FoundRules = PUBLISHED) -> Detector:
        """The network of a finished `train_detector` step, in eval mode."""
        network = self.untrained(found)
        network.load_state_dict(load_file(path))
        return network.eval()


def load_detector(network: Detector, state: Mapping[str, Tensor], *, where: str) -> None:
    """Takes the weights of a detector that is a part of `network`: Faster R-CNN's for Mask R-CNN, or all of the same.

    What `network` has beyond it stays as it is.

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
