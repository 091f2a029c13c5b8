"""Perceptual hash and thumbnail of an image, small enough to compare all images of a dataset.

They hardly change when an image is resized or compressed again.
"""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image

THUMBNAIL_SIDE = 16  # pixels


def perceptual_hash(image: np.ndarray) -> int:
    """Returns a 64-bit hash of the low frequencies of an image (H, W, 3) uint8: copies differ in few bits.

    It is `imagehash.phash` with its rows from the highest bit to the lowest.
    """
    bits = imagehash.phash(Image.fromarray(image)).hash
    return int(np.packbits(bits).view(">u8")[0])


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Returns (16, 16) uint8 grey means of an image (H, W, 3) uint8 of any aspect ratio."""
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))
