"""RT-DETRv2 of transformers (arXiv 2407.17140) as a detector: a real-time DETR, trained from scratch.

It has no mask for padding, so images of any shape are resized to one square.
Axis legend: B images, D channels, Q queries.
Boxes are normalised cxcywh; in `Targets` and `Detections` they are xyxy pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection
from transformers.loss.loss_rt_detr import RTDetrLoss

from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.detectors.base import Detections, Detector, Normaliser, Targets
from weaksam.models.detectors.normalized_boxes import best_detections, to_relative
from weaksam.models.noise import drawn_from


@dataclass(frozen=True)
class RtDetrV2Size:
    """Sizes of an RT-DETRv2; the defaults are the published values with ResNet-50.

    Attributes:
        image: side of the square input, pixels; a multiple of the pyramid's last stride.
        dim: D, a multiple of 8; inner layers are four times as wide.
        decoder_layers: number of decoder layers; the encoder has one.
        queries: Q, at most the number of cells.
        num_denoising: approximate number of noisy queries of each kind per image. 0 = no denoising.
        detections: maximum number per image.
    """

    image: int = 640
    dim: int = 256
    decoder_layers: int = 6
    queries: int = 300
    num_denoising: int = 100
    detections: int = 300


class RtDetrV2(Detector):
    """The detector. Its BatchNorms use the statistics of a worker's micro-batch, which should have 4 images or more.

    Unlike for the other detectors, numbers of workers and micro-batches change the training. BatchNorms normalise over
    the micro-batch; the number of noisy queries depends on its image with most objects; and transformers draws the
    noise of all images at once, here from the generator of the first. An interruption changes nothing. Losses are
    divided by a constant, as in `Dino`.

    Args:
        pyramid: the backbone; its last three maps are used, each half as large as the one before.
        num_classes: number of classes.
        size: sizes of the network.
        boxes_per_image: mean number of objects of a training image, which divides the losses.
    """

    def __init__(
        self, pyramid: Pyramid, num_classes: int, size: RtDetrV2Size = RtDetrV2Size(), *, boxes_per_image: float = 1.0
    ) -> None:
        super().__init__()
        self.num_classes, self.size, self.boxes_per_image = num_classes, size, boxes_per_image
        self.normaliser = Normaliser(pyramid, pyramid.strides[-1])
        # only the inner model, which has the heads, too: shared weights cannot be saved twice
        model: Any = RTDetrV2ForObjectDetection(_config(pyramid, num_classes, size)).model
        self.network = model
        model.backbone = _LastMaps(pyramid)
        model.encoder_input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(depth, size.dim, 1, bias=False), nn.BatchNorm2d(size.dim))
            for depth in pyramid.channels[-3:]
        )
        _restart(self.network)

    def _padded_size(self, image: Tensor) -> tuple[int, int]:
        """Returns the size of the square."""
        return self.size.image, self.size.image

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets], step: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """See `Detector.losses`; varifocal losses of classes count once, L1 of boxes 5 times, GIoU twice.

        Returns:
            `loss_class`, `loss_box`, `loss_giou` of the last layer; `loss_aux` of the other layers, `loss_encoder`,
            `loss_denoising`.
        """
        known = [to_relative(image_targets, hw) for image_targets, hw in zip(targets, _sizes(images), strict=True)]
        labels = [{"class_labels": image_targets.classes, "boxes": image_targets.boxes} for image_targets in known]
        with drawn_from(generators[0]):
            outputs = self._predict(images, labels)
        raw_losses = RTDetrLoss(self.network.config)(_loss_inputs(outputs, self.size.queries), labels)
        share = max(sum(len(t.classes) for t in targets), 1) / self.boxes_per_image  # cancels the loss's own divisor
        kinds = ("class", "box", "giou", "aux", "encoder", "denoising")
        losses = {f"loss_{kind}": outputs.enc_topk_logits.new_zeros(()) for kind in kinds}
        for name, loss in raw_losses.items():
            losses[_kind(name, self.size.decoder_layers)] += loss * share
        if self.size.num_denoising:  # takes part without objects, too
            losses["loss_denoising"] += self.network.denoising_class_embed.weight.sum() * 0
        return losses

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        outputs = self._predict(images)
        logits, boxes = outputs.intermediate_logits[:, -1], outputs.intermediate_reference_points[:, -1]
        return best_detections(logits, boxes, _sizes(images), self.size.detections)

    def _predict(self, images: Sequence[Tensor], labels: list[dict[str, Tensor]] | None = None) -> Any:
        """Returns the model's outputs for images resized to the square."""
        square = (self.size.image, self.size.image)
        resized = [F.interpolate(image[None].float(), square, mode="bilinear", antialias=True)[0] for image in images]
        return self.network(self.normaliser(resized).pixels, labels=labels)


class _LastMaps(nn.Module):
    """Adapts a pyramid to transformers' model: three maps, each with an unused mask."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, pixels: Tensor, mask: Tensor) -> list[tuple[Tensor, None]]:
        return [(level, None) for level in self.pyramid(pixels)[-3:]]


def _sizes(images: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(int(image.shape[1]), int(image.shape[2])) for image in images]


def _loss_inputs(outputs: Any, num: int) -> dict[str, Any]:
    """Returns the loss's inputs; transformers before 5.23 counts the last layer's noisy queries as ordinary."""
    layers = zip(
        outputs.intermediate_logits.float().unbind(1), outputs.intermediate_reference_points.unbind(1), strict=True
    )
    layers = [{"logits": logits, "pred_boxes": boxes.float()} for logits, boxes in layers]
    matched = [{key: value[:, -num:] for key, value in layer.items()} for layer in layers]
    chosen = {"logits": outputs.enc_topk_logits.float(), "pred_boxes": outputs.enc_topk_bboxes.float()}
    loss_inputs = {**matched[-1], "auxiliary_outputs": [*matched[:-1], chosen]}
    if outputs.denoising_meta_values is not None:
        loss_inputs["dn_auxiliary_outputs"] = [
            {key: value[:, :-num] for key, value in layer.items()} for layer in layers
        ]
        loss_inputs["denoising_meta_values"] = outputs.denoising_meta_values
    return loss_inputs


def _kind(name: str, layers: int) -> str:
    """Returns our name of a transformers loss: the last auxiliary loss is the encoder's."""
    if "_dn_" in name:
        return "loss_denoising"
    if "_aux_" in name:
        return "loss_encoder" if name.endswith(f"_aux_{layers - 1}") else "loss_aux"
    return {"loss_vfl": "loss_class", "loss_bbox": "loss_box", "loss_giou": "loss_giou"}[name]


def _config(pyramid: Pyramid, num_classes: int, size: RtDetrV2Size) -> RTDetrV2Config:
    channels, strides = list(pyramid.channels[-3:]), list(pyramid.strides[-3:])
    num, inner = len(channels), 4 * size.dim
    stand_in = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "out_indices": [2, 3, 4]}
    options = {"d_model": size.dim, "encoder_hidden_dim": size.dim, "decoder_in_channels": [size.dim] * num}
    options |= {"encoder_in_channels": channels, "feat_strides": strides, "encode_proj_layers": [num - 1]}
    options |= {"num_feature_levels": num, "decoder_n_levels": num, "encoder_ffn_dim": inner, "decoder_ffn_dim": inner}
    options |= {"decoder_layers": size.decoder_layers, "num_queries": size.queries, "num_labels": num_classes}
    options |= {"num_denoising": size.num_denoising, "initializer_bias_prior_prob": 0.01}
    return RTDetrV2Config(backbone_config=RTDetrResNetConfig(layer_type="basic", **stand_in), **options)


_STAYS = re.compile(r"\.encoder_attn\.|class_embed|enc_score_head|bbox_embed\.\d+\.layers\.2$|^backbone\.")


def _restart(network: nn.Module) -> None:
    """Initialises weights as published: transformers draws BatchNorm gains around 0, from which training is slow."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d) and not _STAYS.search(name):
            layer.reset_parameters()
        if name.endswith("enc_bbox_head"):
            nn.init.zeros_(layer.get_parameter("layers.2.weight"))
