"""DINO: a DETR with mixed query selection, look forward twice and contrastive denoising (arXiv 2203.03605).

Axis legend: B images, S cells of all levels, Q queries, N noisy queries, C classes, D channels.
Boxes are normalised cxcywh; in `Targets` and `Detections` they are xyxy pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeformableDetrConfig

from weaksam.models.backbones.pyramids import Pyramid
from weaksam.models.detectors.base import Batch, Detections, Detector, Normaliser, Targets
from weaksam.models.detectors.dino_denoising import Noised, noise_objects
from weaksam.models.detectors.dino_layers import Cells, Decoder, Encoder, Levels, box_head, class_head
from weaksam.models.detectors.dino_loss import denoising_loss, matched_losses
from weaksam.models.detectors.normalized_boxes import best_detections, inverse_sigmoid, take, to_relative
from weaksam.ops.roi_drop import NO_DROP, RoiDropRules

_SURELY_NOT = -30.0  # logit of a padding query


@dataclass(frozen=True)
class DinoSize:
    """Sizes of a DINO; the defaults are the published values with ResNet-50 and 4 levels.

    Attributes:
        dim: D, a multiple of 4 and of `heads`.
        heads, points: attention heads, and points per head and level.
        encoder_layers, decoder_layers, ffn: numbers of layers, and width of their inner layer.
        levels: number of levels; levels beyond the pyramid's maps (at most 3 are used) are made from its last map.
        queries: Q.
        num_denoising: approximate number of noisy queries of each kind per image. 0 = no denoising.
        label_noise, box_noise: see `noise_objects`.
        detections: maximum number per image.
    """

    dim: int = 256
    heads: int = 8
    points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn: int = 2048
    levels: int = 4
    queries: int = 900
    num_denoising: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0
    detections: int = 300


class Chosen(NamedTuple):
    """The encoder's best cells: logits (B, Q, C) and boxes (B, Q, 4), as logits."""

    logits: Tensor
    boxes: Tensor


class Answers(NamedTuple):
    """Logits (B, Q + N, C) and boxes (B, Q + N, 4) of each decoder layer, and the encoder's best cells."""

    logits: list[Tensor]
    boxes: list[Tensor]
    chosen: Chosen


class Dino(Detector):
    """The detector.

    The published code divides the losses of a batch by its number of objects, averaged over GPUs. This class divides
    the losses of each image by a constant, so that neither batch size nor number of workers changes a step.

    Args:
        pyramid: the backbone, kept as `pyramid`; its last three maps are used.
        num_classes: C.
        size: sizes of the network.
        boxes_per_image: mean number of objects of a training image, which divides the losses; losses of noisy queries
            are also divided by the groups of the image.
        drop: rule that drops losses of matched decoder queries; it compares the focal class loss and the L1 loss of
            normalised boxes.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        size: DinoSize = DinoSize(),
        *,
        boxes_per_image: float = 1.0,
        drop: RoiDropRules = NO_DROP,
    ) -> None:
        super().__init__()
        self.num_classes, self.size, self.boxes_per_image, self.drop = num_classes, size, boxes_per_image, drop
        self.normaliser, self.pyramid = Normaliser(pyramid), pyramid
        self.num_maps = min(3, size.levels, len(pyramid.strides))
        maps = slice(-self.num_maps, None)
        config = _attention_config(size)
        self.levels = Levels(pyramid.channels[maps], pyramid.strides[maps], size.dim, size.levels)
        self.encoder, self.decoder = Encoder(config), Decoder(config, num_classes)
        self.proposal = nn.Sequential(nn.Linear(size.dim, size.dim), nn.LayerNorm(size.dim))
        nn.init.xavier_uniform_(self.proposal[0].weight)  # pyright: ignore[reportArgumentType]
        self.proposal_class, self.proposal_box = class_head(size.dim, num_classes), box_head(size.dim)
        self.content = nn.Embedding(size.queries, size.dim)
        self.noisy_content = nn.Embedding(num_classes, size.dim) if size.num_denoising else None

    def forward(self, batch: Batch, noised: Noised | None = None) -> Answers:
        cells = self.levels(self.pyramid(batch.pixels)[-self.num_maps :], batch)
        memory = self.encoder(cells)
        chosen = self._choose(cells, memory)
        queries, references = self.content.weight.expand(len(memory), -1, -1), chosen.boxes.detach()
        visible = None
        if noised is not None and self.noisy_content is not None:
            queries = torch.cat([queries, self.noisy_content(noised.classes)], 1)
            references = torch.cat([references, noised.references], 1)
            visible = noised.visible(self.size.queries)
        logits, boxes = self.decoder(queries, references, memory, cells, visible)
        return Answers(logits, boxes, chosen)

    def _choose(self, cells: Cells, memory: Tensor) -> Chosen:
        """Returns the Q cells of the highest class scores, each with a box around it, twice as large per coarser level.

        Cells at the edge or in the padding are not chosen; missing cells are filled up with uninformative boxes.
        """
        sides = (0.05 * 2.0**cells.levels).clamp(max=0.9)[:, None].expand(len(memory), -1, 2)
        around = torch.cat([cells.centres, sides], 2)
        may_be = cells.inside & ((around > 0.01) & (around < 0.99)).all(2)
        projected = self.proposal(memory)
        logits = self.proposal_class(projected).float()
        surest = logits.detach().amax(2).masked_fill(~may_be, -torch.inf)
        surest = F.pad(surest, (0, max(self.size.queries - surest.shape[1], 0)), value=-torch.inf)
        best, rows = surest.topk(self.size.queries, dim=1)
        rows, is_none = rows.clamp(max=memory.shape[1] - 1), (best == -torch.inf)[..., None]
        boxes = self.proposal_box(take(projected, rows)) + inverse_sigmoid(take(around, rows))
        return Chosen(take(logits, rows).masked_fill(is_none, _SURELY_NOT), boxes.float().masked_fill(is_none, 0.0))

    def _losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets], step: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """See `Detector.losses`; classes count once, L1 of boxes 5 times, GIoU twice, on all layers and the encoder.

        Returns:
            `loss_class`, `loss_box`, `loss_giou` of the last layer; `loss_aux` of the other layers, `loss_encoder`,
            `loss_denoising`; with RoI drop `dropped_class` and `dropped_box`, the dropped terms of all layers.
        """
        batch, size = self.normaliser(images), self.size
        known = [to_relative(image_targets, hw) for image_targets, hw in zip(targets, batch.sizes, strict=True)]
        noised = None
        if size.num_denoising:
            noise = {"label_noise": size.label_noise, "box_noise": size.box_noise}
            noised = noise_objects(known, generators, self.num_classes, queries=size.num_denoising, **noise)
        answers, num = self(batch, noised), size.queries
        layers = list(zip(answers.logits, answers.boxes, strict=True))
        parts = [matched_losses(logits[:, :num], boxes[:, :num], known, self.drop, step) for logits, boxes in layers]
        chosen = answers.chosen
        encoder = matched_losses(chosen.logits, chosen.boxes.sigmoid(), known, NO_DROP, step)
        zero = encoder.total.new_zeros(())
        denoising = zero if self.noisy_content is None else self.noisy_content.weight.sum() * 0  # always takes part
        if noised is not None:
            pairs = [denoising_loss(logits[:, num:], boxes[:, num:], noised, known) for logits, boxes in layers]
            denoising = denoising + torch.stack(pairs).sum()
        losses = {
            "loss_class": parts[-1].classes,
            "loss_box": parts[-1].boxes,
            "loss_giou": parts[-1].giou,
            "loss_aux": sum((part.total for part in parts[:-1]), zero),
            "loss_encoder": encoder.total,
            "loss_denoising": denoising,
        }
        result = {name: loss / self.boxes_per_image for name, loss in losses.items()}
        if self.drop.gate != "off":
            result["dropped_class"] = torch.stack([part.dropped_classes for part in parts]).sum()
            result["dropped_box"] = torch.stack([part.dropped_boxes for part in parts]).sum()
        return result

    @torch.no_grad()
    def detect(self, images: Sequence[Tensor], mask_sizes: Sequence[tuple[int, int]] | None = None) -> list[Detections]:
        batch = self.normaliser(images)
        answers = self(batch)
        return best_detections(answers.logits[-1], answers.boxes[-1], batch.sizes, self.size.detections)


def _attention_config(size: DinoSize) -> DeformableDetrConfig:
    return DeformableDetrConfig(
        d_model=size.dim,
        encoder_layers=size.encoder_layers,
        decoder_layers=size.decoder_layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=size.ffn,
        decoder_ffn_dim=size.ffn,
        num_feature_levels=size.levels,
        encoder_n_points=size.points,
        decoder_n_points=size.points,
        dropout=0.0,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
