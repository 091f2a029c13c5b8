"""Scores of a segmenter on unseen scenes: masks from one point, from a box, and the error of predicted IoU.

Runs the network with SAM's own forward, as users do, not with the optimised forward of training.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor

MIN_AREA = 50  # pixels of 256 x 256; smaller objects are left out
_LOOSE = 0.05  # standard deviation of a box's error, as a share of its size


@torch.inference_mode()
def score_segmenter(sam: Sam, scenes: str | Path, *, seed: int = 0, limit: int | None = None) -> dict[str, float]:
    """Returns means over the objects of cached scenes, each prompted by one random interior point and one loose box.

    Returns:
        `point_iou`: best of three masks; `point_iou_chosen`: the mask of the highest predicted IoU;
        `box_iou`; `iou_error`: mean absolute error of predicted IoU over all three masks of a point;
        `background_iou`: predicted IoU of the best mask at background points; `point_hit`: share of objects
        whose best mask of three reaches 0.5; `objects`: their number.
    """
    images, objects = (np.load(Path(scenes) / f"{name}.npy", mmap_mode="r") for name in ("images", "objects"))
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    background: list[float] = []
    for image, labels in zip(images[:limit], objects[:limit], strict=True):
        masks = [labels == k for k in range(1, int(labels.max()) + 1)]
        masks = [mask for mask in masks if mask.sum() >= MIN_AREA]
        if not masks:
            continue
        points = [_pick(rng, mask) for mask in masks] + [_pick(rng, labels == 0) for _ in range(2)]
        embedding = _embed(sam, image)
        reached, predicted_iou = _score_points(sam, embedding, points, masks)
        background += predicted_iou[len(masks) :].max(1).values.tolist()
        predicted_iou = predicted_iou[: len(masks)]
        box_iou = _score_boxes(sam, embedding, [_loose_box(rng, mask) for mask in masks], masks)
        chosen = reached.gather(1, predicted_iou.argmax(1, keepdim=True))[:, 0]
        error = (predicted_iou - reached).abs().mean(1)
        rows.append(torch.stack([reached.max(1).values, chosen, box_iou, error], 1).numpy())
    table = np.concatenate(rows)
    means = table.mean(0)
    scores = dict(zip(("point_iou", "point_iou_chosen", "box_iou", "iou_error"), means.tolist(), strict=True))
    scores |= {"point_hit": float((table[:, 0] >= 0.5).mean()), "background_iou": float(np.mean(background))}
    return {key: round(value, 4) for key, value in scores.items()} | {"objects": len(table)}


def _pick(rng: np.random.Generator, mask: np.ndarray) -> tuple[int, int]:
    inside = np.flatnonzero(mask)
    y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1]) if len(inside) else (0, 0)
    return x, y


def _loose_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    low, high = np.array([xs[0], ys[0]]), np.array([xs[-1] + 1, ys[-1] + 1])
    off = _LOOSE * rng.normal(0, 1, (2, 2)) * (high - low)
    return np.concatenate([low + off[0], high + off[1]])


def _embed(sam: Sam, image: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None]
    return sam.image_encoder((pixels - cast(Tensor, sam.pixel_mean)) / cast(Tensor, sam.pixel_std))


def _score_points(sam: Sam, embedding: Tensor, points: list, masks: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Returns reached IoU (objects, 3) and predicted IoU (points, 3)."""
    coords = torch.tensor(points, dtype=torch.float32)[:, None]
    prompts = sam.prompt_encoder(points=(coords, torch.ones(len(points), 1)), boxes=None, masks=None)
    logits, predicted = _decode(sam, embedding, prompts, multimask=True)
    return _ious(logits[: len(masks)], masks), predicted


def _score_boxes(sam: Sam, embedding: Tensor, boxes: list[np.ndarray], masks: list[np.ndarray]) -> Tensor:
    """Returns reached IoU (objects,)."""
    corners = torch.tensor(np.stack(boxes), dtype=torch.float32)
    prompts = sam.prompt_encoder(points=None, boxes=corners, masks=None)
    logits, _ = _decode(sam, embedding, prompts, multimask=False)
    return _ious(logits, masks)[:, 0]


def _decode(sam: Sam, embedding: Tensor, prompts: tuple[Tensor, Tensor], *, multimask: bool) -> tuple[Tensor, Tensor]:
    sparse, dense = prompts
    return sam.mask_decoder(
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


def _ious(logits: Tensor, masks: list[np.ndarray]) -> Tensor:
    """Returns IoU (N, M) of low-resolution logits (N, M, h, w), enlarged, with (H, W) masks."""
    truth = torch.from_numpy(np.stack(masks))[:, None]
    predicted = F.interpolate(logits.float(), truth.shape[-2:], mode="bilinear", align_corners=False) > 0
    both, either = (predicted & truth).sum((2, 3)), (predicted | truth).sum((2, 3))
    return both / either.clamp(min=1)
