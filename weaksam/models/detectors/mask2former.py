"""Mask2Former of transformers (arXiv 2112.01527) on our backbones: queries that each predict a class and a mask.

As published, padding is not masked: it affects features, positions and normalisation. So outputs of an image depend a
little on its padding, and only in a batch of images of one size do they equal those of a single image. While training,
only images of one padded size share a batch.
Axis legend: B images, Q queries, C classes, G objects of an image, K detections, H W pixels, h w cells of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerTransformerModule,
)

from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.detectors.base import Batch, Detections, Detector, Normaliser, Targets
from weaksam.models.detectors.deformable import start_attention
from weaksam.models.detectors.mask2former_loss import matched_losses
from weaksam.ops.masks import masks_to_boxes

_MAPS = 4  # masks use the finest map, attention the others


@dataclass(frozen=True)
class Mask2FormerSize:
    """Sizes of a Mask2Former; the defaults are the published values with ResNet-50.

    Attributes:
        dim: channels, a multiple of 32 and of `heads`.
        heads: attention heads.
        encoder_layers, encoder_ffn: layers of the pixel decoder, and width of their inner layer.
        decoder_layers, decoder_ffn: the same of the query decoder; queries also predict before its first layer.
        queries: Q.
        points: points of a mask in the loss.
        detections: maximum number per image.
    """

    dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    encoder_ffn: int = 1024
    decoder_layers: int = 9
    decoder_ffn: int = 2048
    queries: int = 100
    points: int = 12544
    detections: int = 100


class Answers(NamedTuple):
    """Class logits (B, Q, C + 1) and mask logits (B, Q, h, w), before the first decoder layer and after each.

    The last class is "no object".
    """

    logits: list[Tensor]
    masks: list[Tensor]


class Mask2Former(Detector):
    """The detector.

    Args:
        pyramid: the backbone, kept as `pyramid`; its last four maps are used, each half as large as the one before.
            A fourth map is subsampled from the last if there are three.
        num_classes: C.
        size: sizes of the network.
        masks_per_image: mean number of objects of a training image, which divides the losses, see `matched_losses`.
    """

    learns_masks = True

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        size: Mask2FormerSize = Mask2FormerSize(),
        *,
        masks_per_image: float = 1.0,
    ) -> None:
        super().__init__()
        if len(pyramid.channels) < _MAPS - 1:
            raise ValueError(f"pyramid must have {_MAPS - 1} maps or more, got {len(pyramid.channels)}")
        self.num_classes, self.size, self.masks_per_image = num_classes, size, masks_per_image
        self.normaliser, self.pyramid = Normaliser(pyramid), pyramid
        channels = pyramid.channels[-_MAPS:]
        channels += channels[-1:] * (_MAPS - len(channels))
        self.network = _Network(_config(num_classes, size), channels, num_classes)

    def forward(self, batch: Batch) -> Answers:
        # in float32, since positions are computed in the dtype of the maps
        maps = [level.float() for level in self.pyramid(batch.pixels)[-_MAPS:]]
        if len(maps) < _MAPS:
            maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return self.network(maps)

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets], step: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """See `Detector.losses`; classes count twice, cross-entropy and dice of masks 5 times each.

        Returns:
            `loss_class`, `loss_mask`, `loss_dice` of the last layer; `loss_aux` of the other layers and of the queries
            before the first layer.
        """
        batch = self.normaliser(images)
        height, width = batch.pixels.shape[2:]
        known = [_pad(image_targets, height, width) for image_targets in targets]
        answers = self(batch)
        layers = list(zip(answers.logits, answers.masks, strict=True))
        layers = layers[-1:] + layers[:-1]  # points are drawn for the last first, as transformers does
        with torch.autocast(batch.pixels.device.type, enabled=False):
            config = self.network.config
            parts = [
                matched_losses(a.float(), b.float(), known, generators, config, self.masks_per_image) for a, b in layers
            ]
        last, *others = parts
        aux = torch.stack([part.total for part in others]).sum()
        return {"loss_class": last.classes, "loss_mask": last.masks, "loss_dice": last.dice, "loss_aux": aux}

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        batch = self.normaliser(images)
        answers, (height, width) = self(batch), batch.pixels.shape[2:]
        parts = zip(answers.logits[-1], answers.masks[-1], batch.sizes, mask_sizes or batch.sizes, strict=True)
        return [
            select_instances(logits, masks, (height, width), hw, self.size.detections, drawn_hw)
            for logits, masks, hw, drawn_hw in parts
        ]


class _Network(nn.Module):
    """The layers above the backbone: parts of transformers' model, built without its backbone."""

    def __init__(self, config: Mask2FormerConfig, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.pixel_decoder = Mask2FormerPixelDecoder(config, list(channels))
        self.transformer = Mask2FormerTransformerModule(config.feature_size, config)
        self.class_predictor = nn.Linear(config.hidden_dim, num_classes + 1)
        _start(self)

    def forward(self, maps: list[Tensor]) -> Answers:
        features = self.pixel_decoder(maps)
        decoded: Any = self.transformer(features.multi_scale_features, features.mask_features)
        logits = [self.class_predictor(hidden.transpose(0, 1)) for hidden in decoded.intermediate_hidden_states]
        return Answers(logits, list(decoded.masks_queries_logits))


def select_instances(
    logits: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    size: tuple[int, int],
    limit: int,
    drawn: tuple[int, int] | None = None,
) -> Detections:
    """Returns the best pairs of query and class of an image; a query may have several classes.

    A score is the probability of the class times the mean probability inside the mask. Boxes are tight. Differs from
    the published code: sorted by the final score, and empty masks are left out.

    Args:
        logits: (Q, C + 1); the last class is "no object".
        masks: (Q, h, w) logits.
        padded: height and width of the network's input, which the masks cover; pixels.
        size: height and width of the image in its upper left corner.
        limit: maximum K.
        drawn: height and width of the returned masks, by default the image's.
    """
    height, width = size
    drawn = drawn or size
    chances = logits.float().softmax(1)[:, :-1]
    scores, best = chances.flatten().topk(min(limit, chances.numel()))
    query, classes = best // chances.shape[1], best % chances.shape[1]
    large = F.interpolate(masks[None].float(), padded, mode="bilinear", align_corners=False)[:, :, :height, :width]
    if drawn != size:
        large = F.interpolate(large, drawn, mode="bilinear", align_corners=False)
    large = large[0]
    is_inside = large > 0
    areas = is_inside.sum((1, 2))
    scores = scores * ((large.sigmoid() * is_inside).sum((1, 2)) / areas.clamp(min=1))[query]
    order = scores.argsort(descending=True, stable=True)
    order = order[areas[query[order]] > 0]
    chosen = query[order]
    boxes = masks_to_boxes(is_inside) * masks.new_tensor([width / drawn[1], height / drawn[0]] * 2)
    return Detections(boxes[chosen], classes[order], scores[order], is_inside[chosen])


def _pad(targets: Targets, height: int, width: int) -> Targets:
    """Returns targets with masks padded to (G, height, width) float."""
    masks = targets.known_masks()
    right, below = width - masks.shape[2], height - masks.shape[1]
    return targets._replace(masks=F.pad(masks.float(), (0, right, 0, below)))


def _config(num_classes: int, size: Mask2FormerSize) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        num_labels=num_classes,  # pyright: ignore[reportCallIssue]
        feature_size=size.dim,
        mask_feature_size=size.dim,
        hidden_dim=size.dim,
        num_attention_heads=size.heads,
        encoder_layers=size.encoder_layers,
        encoder_feedforward_dim=size.encoder_ffn,
        decoder_layers=size.decoder_layers + 1,  # transformers counts predictions
        dim_feedforward=size.decoder_ffn,
        num_queries=size.queries,
        train_num_points=size.points,
    )


def _start(network: _Network) -> None:
    """Initialises weights as published; transformers does so only for some weights, depending on its version."""
    pixels, queries = network.pixel_decoder, network.transformer.decoder
    for weight in (*pixels.parameters(), *queries.layers.parameters()):
        if weight.dim() > 1:
            nn.init.xavier_uniform_(weight)
    nn.init.normal_(pixels.level_embed)
    for layer in pixels.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if isinstance(layer, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
            start_attention(layer)
