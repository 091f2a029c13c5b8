"""Validation of the engine's inputs: invalid inputs raise ValueError before any work.

Axis legend: H W pixels.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import Sam
from torch import Tensor

from weaksam.data.images import pixels_of

# Other devices of PyTorch are refused by name: parts of the engine need float64 and views as `out`, which mps does not
# have or has had bugs in, and no test has ever compared such a device with the masks of `segment_anything`.
DEVICES = ("cpu", "cuda")


def check_device(device: torch.device | str) -> torch.device:
    """Returns the device; raises ValueError where the engine does not run."""
    kind = torch.device(device).type
    if kind not in DEVICES:
        raise ValueError(f"device {kind}: the SAM engine runs on {' and '.join(DEVICES)} alone: choose one of them")
    return torch.device(device)


def mark_of(sam: Sam) -> str:
    """Returns a hash of a SAM's device, image size and a few weights; equal for two copies of a file."""
    encoder = sam.image_encoder
    few = (
        sam.mask_decoder.iou_token.weight,
        sam.mask_decoder.mask_tokens.weight,
        sam.prompt_encoder.no_mask_embed.weight,
        sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix,
        next(encoder.parameters()).flatten()[:4096],
        list(encoder.parameters())[-1],
    )
    digest = hashlib.sha256(f"{encoder.img_size} {sam.device}".encode())
    for weight in few:
        digest.update(weight.detach().float().cpu().numpy().tobytes())  # pyright: ignore[reportCallIssue]
    return digest.hexdigest()


def check_image(image: Any) -> None:
    """Raises ValueError unless `to_pixels` accepts `image`; checks type, shape and dtype, decodes nothing."""
    if isinstance(image, Image.Image):
        return
    if isinstance(image, (np.ndarray, Tensor)):
        shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
        if len(shape) == 3 and shape[2] == 3 and dtype == "uint8" and math.prod(shape) > 0:
            return
        hint = ": for a (3, H, W) tensor give image.permute(1, 2, 0)" if len(shape) == 3 and shape[0] == 3 else ""
        raise ValueError(f"image must be (H, W, 3) uint8, got {shape} {dtype}{hint}")
    raise ValueError(f"image must be (H, W, 3) uint8 or an image of Pillow, got {type(image).__name__}")


def to_pixels(image: Any) -> np.ndarray:
    """Converts an array, a tensor or a Pillow image to (H, W, 3) uint8 RGB; applies Pillow's EXIF orientation."""
    if isinstance(image, Image.Image):
        return pixels_of(image)
    return image.cpu().numpy() if isinstance(image, Tensor) else image


def as_coordinates(values: Any, what: str, shape: str) -> np.ndarray:
    """Returns an (N, K) array of numbers; K is the last number of `shape`, such as "(M, 4)"; an empty list has N = 0.

    Raises:
        ValueError: `values` has another shape, or holds a value that is no finite number.
    """
    columns = int(shape.rstrip(")").rpartition(" ")[2])
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        array = array.reshape(0, columns) if array.shape == (0,) else array
        is_numeric = np.issubdtype(array.dtype, np.number) and not np.iscomplexobj(array)
    except (ValueError, TypeError):  # rows of different lengths
        raise ValueError(f"{what} must be {shape}, got rows of different lengths") from None
    if array.ndim != 2 or array.shape[1] != columns:
        raise ValueError(f"{what} must be {shape}, got {array.shape}")
    if not is_numeric or not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite numbers, got {array.tolist()[:3]}")
    return array
