"""Random SAM weights with a realistic share of masks that pass the filters, for tests and benchmarks.

Freshly initialised, a SAM rejects every mask: predicted IoU is within 0.1 of 0 and no logit reaches the stability
offset. `calibrate` makes image tokens change smoothly with position, so that masks are regions and not noise. It
subtracts the part of the mask heads that all prompts share, and scales the heads until the shares that pass the filters
are near those of the published weights on a photograph: 68 % by predicted IoU, 63 % of these by stability. Figures
measured with such weights show how long the work takes, nothing about quality.
"""

# segment_anything declares no attribute types, so to a type checker each of its weights is "Tensor | Module".
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn

from weaksam.sam.decoder import decode_prompts
from weaksam.sam.frame import make_frame, resize_image
from weaksam.sam.image_side import ImageSide, make_image_side
from weaksam.sam.mask_head import predict_mask_logits
from weaksam.sam.passes import Decoded
from weaksam.sam.prompts import Prompts, embed_prompts, grid_points

PASS_IOU, IOU_THRESHOLD = 0.68, 0.88
PASS_STABILITY, STABILITY_THRESHOLD = 0.63, 0.95
_AREAS = (0.03, 0.08, 0.2)  # share of the pixels in a mask, by slot
_WAVES = 1.0  # maximum number of waves of the position embedding along a side
_POSITION = 3.0  # size of the position embedding; image content is about 1
_MAX_SAMPLE = 2**22
_SLOTS = (1, 2, 3)


def noise_image(height: int, width: int, *, seed: int = 0, cells: int = 12) -> np.ndarray:
    """Returns a picture of random rectangles: (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    image = np.full((height, width, 3), generator.integers(0, 256, 3), dtype=np.uint8)
    for _ in range(cells):
        top, left = generator.integers(0, height), generator.integers(0, width)
        tall, wide = generator.integers(1, height // 2 + 2), generator.integers(1, width // 2 + 2)
        image[top : top + tall, left : left + wide] = generator.integers(0, 256, 3)
    return image


@torch.inference_mode()
def calibrate(sam: Sam, image: np.ndarray, *, points_per_side: int = 6) -> Sam:
    """Changes random weights, in place, so that realistic shares of an image's masks pass SAM's filters.

    Args:
        sam: freshly initialised.
        image: (H, W, 3) uint8 RGB; the shares hold for it, and roughly for images like it.
        points_per_side: side of the point grid that the shares are set on.
    """
    _embed_position(sam.image_encoder)
    points = grid_points(*image.shape[:2], points_per_side)
    side, decoded = _decode(sam, image, points)
    identity = torch.eye(decoded.hyper.shape[2], device=sam.device).expand(len(points), -1, -1)
    features = _mask_logits(sam, side, replace(decoded, hyper=identity))  # (P, channels, rows, columns)
    _fit_mask_heads(sam, features, decoded)
    _scale_iou_head(sam.mask_decoder.iou_prediction_head.layers[-1], decoded.predicted_iou)
    return sam


def _embed_position(encoder: nn.Module) -> None:
    """Sets the position embedding to slow waves, so that image tokens change smoothly and masks are connected."""
    _, rows, columns, channels = encoder.pos_embed.shape
    generator = torch.Generator().manual_seed(0)
    waves = torch.rand(2, channels, generator=generator) * 2 * _WAVES - _WAVES
    phase = torch.rand(channels, generator=generator)
    y = (torch.arange(rows) / rows)[:, None, None] * waves[0]
    x = (torch.arange(columns) / columns)[None, :, None] * waves[1]
    encoder.pos_embed.copy_(_POSITION * torch.sin(2 * torch.pi * (y + x + phase)))


def _fit_mask_heads(sam: Sam, features: Tensor, decoded: Decoded) -> None:
    """Fits the mask heads: masks differ between prompts, have the target areas and are stable in the target share."""
    mean = features.mean((0, 2, 3))
    direction = mean / mean.square().sum()
    for index, slot in enumerate(_SLOTS):
        head = sam.mask_decoder.output_hypernetworks_mlps[slot].layers[-1]
        # Only the part that differs between prompts, orthogonal to the mean feature so that masks have equal areas.
        common = decoded.hyper[:, index].mean(0)
        across = torch.eye(len(mean), device=mean.device) - torch.outer(direction, mean)
        hyper = (decoded.hyper[:, index] - common) @ across.T
        logits = torch.einsum("pc,pcyx->pyx", hyper, features).flatten(1)
        level = logits[:, ::7].flatten()[:_MAX_SAMPLE].quantile(1 - _AREAS[index])
        gain = _gain_for_stability(logits - level)
        head.bias.copy_(gain * (across @ (head.bias - common) - level * direction))
        head.weight.copy_(gain * across @ head.weight)


def _gain_for_stability(logits: Tensor) -> float:
    """Returns the smallest gain at which the target share of masks is stable."""
    gain = 1.0
    for _ in range(40):
        inner = (logits * gain > 1).float().sum(1)
        outer = (logits * gain > -1).float().sum(1)
        if (inner / outer >= STABILITY_THRESHOLD).float().mean() >= PASS_STABILITY:
            break
        gain *= 1.3
    return gain


def _scale_iou_head(head: nn.Linear, predicted_iou: Tensor) -> None:
    for index, slot in enumerate(_SLOTS):
        scores = predicted_iou[:, index]
        gain = 0.06 / scores.std().clamp(min=1e-6)
        head.weight[slot] *= gain
        head.bias[slot] = gain * head.bias[slot] + IOU_THRESHOLD - (gain * scores).quantile(1 - PASS_IOU)


def _decode(sam: Sam, image: np.ndarray, points: np.ndarray) -> tuple[ImageSide, Decoded]:
    frame = make_frame(sam, image.shape[:2])
    pixels = resize_image(image, *frame.input_hw).to(sam.device)
    side = make_image_side(sam, sam.image_encoder(sam.preprocess(pixels)[None])[0], frame.grid_hw)
    _, tokens = next(embed_prompts(sam.prompt_encoder, frame, Prompts(points=points)))
    return side, decode_prompts(sam, side, tokens, _SLOTS)


def _mask_logits(sam: Sam, side: ImageSide, decoded: Decoded) -> Tensor:
    chosen = torch.arange(len(decoded.hyper), device=sam.device)
    return predict_mask_logits(sam, side, decoded, chosen, tokens_at_once=4096)
