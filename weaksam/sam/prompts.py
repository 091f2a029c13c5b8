"""Prompts for SAM, which are single points, joint points or boxes, and their embedding.

Axis legend: P points, J joint prompts, M boxes, B prompts of one kind, K points of a joint prompt, C channels.
Points are (x, y), boxes xyxy, both in pixels of the original image.
"""

# segment_anything declares no attribute types, so to a type checker each of its weights is "Tensor | Module".
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from segment_anything.modeling import PromptEncoder
from torch import Tensor

from weaksam.sam.frame import Frame
from weaksam.sam.inputs import as_coordinates

FOREGROUND = 1  # SAM's label of a point; 0 is background
_BOX_CORNERS = (2, 3)  # rows of SAM's point embeddings
_MOST_SOURCE = 255  # of uint8


@dataclass(frozen=True)
class Prompts:
    """Prompts on one image. Points are numbered first, then joint prompts, then boxes.

    Attributes:
        points: (P, 2) float, each a foreground point and a prompt of its own.
        joint: J arrays (K, 2) float, each with K >= 1 foreground points of one object.
        boxes: (M, 4) float.
        source: (P + J + M,) uint8 carried along to the proposals; zeros by default.

    Lists and tensors are converted to arrays.

    Raises:
        ValueError: a value has another shape or is not finite, a box is inside out, or a source is no uint8.
    """

    points: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.float32))
    joint: Sequence[np.ndarray] = ()
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.float32))
    source: np.ndarray | None = None

    def __post_init__(self) -> None:
        boxes = as_coordinates(self.boxes, "boxes", "(M, 4)")
        if (boxes[:, 2:] < boxes[:, :2]).any():
            row = int((boxes[:, 2:] < boxes[:, :2]).any(1).argmax())
            raise ValueError(f"boxes must be xyxy: right of box {row} is left of its left, or its bottom above its top")
        joint = [as_coordinates(points, "a joint prompt", "(K, 2)") for points in self.joint]
        if not all(len(points) for points in joint):
            raise ValueError("a joint prompt must be (K, 2) with K >= 1, got no point")
        object.__setattr__(self, "points", as_coordinates(self.points, "points", "(P, 2)"))
        object.__setattr__(self, "joint", joint)
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "source", self._sources())

    def _sources(self) -> np.ndarray:
        if self.source is None:
            return np.zeros(len(self), dtype=np.uint8)
        source = np.asarray(self.source)
        if source.shape != (len(self),):
            raise ValueError(f"source must have one value per prompt ({len(self)}), got {source.shape}")
        if not np.issubdtype(source.dtype, np.integer) and not (source == np.round(source)).all():
            raise ValueError(f"source must be whole numbers, got {source.tolist()[:3]}")
        if len(source) and not 0 <= source.min() <= source.max() <= _MOST_SOURCE:
            raise ValueError(f"source must be from 0 to {_MOST_SOURCE}, got {source.min()} to {source.max()}")
        return source.astype(np.uint8)

    def __len__(self) -> int:
        return len(self.points) + len(self.joint) + len(self.boxes)


def grid_points(height: int, width: int, points_per_side: int) -> np.ndarray:
    """Returns the centres of points_per_side x points_per_side equal cells of an image, rows outer.

    Returns:
        (points_per_side ** 2, 2) float64, x then y, in pixels.
    """
    offset = 1 / (2 * points_per_side)
    side = np.linspace(offset, 1 - offset, points_per_side)
    x, y = np.meshgrid(side, side)
    return np.stack([x, y], axis=-1).reshape(-1, 2) * np.array([width, height])


def embed_prompts(encoder: PromptEncoder, frame: Frame, prompts: Prompts) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yields embedded prompts in groups of equal token count, because joint points attend to each other.

    Padding a joint prompt to a common length would change its masks: SAM attends to padding tokens too.

    Yields:
        numbers: (B,) int64 numbers of the prompts.
        tokens: (B, tokens, C) float32 on the encoder's device.
    """
    points = [np.asarray(point)[None] for point in prompts.points] + [np.asarray(j) for j in prompts.joint]
    sizes = np.array([len(p) for p in points], dtype=np.int64)
    for size in np.unique(sizes):
        numbers = np.flatnonzero(sizes == size)
        yield numbers, embed_points(encoder, frame.to_input(np.stack([points[i] for i in numbers])))
    if len(prompts.boxes):
        numbers = np.arange(len(points), len(prompts))
        yield numbers, embed_boxes(encoder, frame.to_input(np.reshape(prompts.boxes, (-1, 2, 2))))


def embed_points(encoder: PromptEncoder, points: np.ndarray) -> Tensor:
    """Embeds foreground points and, as SAM does when there is no box, one padding token.

    Args:
        points: (B, K, 2) float64, pixels of the padded square.

    Returns:
        (B, K + 1, C) float32.
    """
    tokens = _encode_positions(encoder, points) + encoder.point_embeddings[FOREGROUND].weight
    padding = encoder.not_a_point_embed.weight.expand(len(tokens), 1, -1)
    return torch.cat([tokens, padding], dim=1)


def embed_boxes(encoder: PromptEncoder, corners: np.ndarray) -> Tensor:
    """Embeds boxes as two corner tokens.

    Args:
        corners: (B, 2, 2) float64, pixels of the padded square.

    Returns:
        (B, 2, C) float32.
    """
    kinds = torch.cat([encoder.point_embeddings[corner].weight for corner in _BOX_CORNERS])
    return _encode_positions(encoder, corners) + kinds


def _encode_positions(encoder: PromptEncoder, points: np.ndarray) -> Tensor:
    # Double precision up to the normalised coordinate: one float32 step at pixel 1000 already moves the encoding.
    device = encoder.not_a_point_embed.weight.device
    centres = torch.as_tensor(points, dtype=torch.float64, device=device) + 0.5
    return encoder.pe_layer.forward_with_coords(centres, encoder.input_image_size)
