"""What an image looks like, in so few bytes that those of a whole dataset can be compared.

Copies that were resized or compressed again keep almost all of it.
"""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image

THUMBNAIL_SIDE = 16  # pixels


def perceptual_hash(image: np.ndarray) -> int:
    """64 bits of the low frequencies of an image (H, W, 3) uint8: few of them differ between copies.

    `imagehash.phash`, its rows from the highest bit to the lowest.
    """
    bits = imagehash.phash(Image.fromarray(image)).hash
    return int(np.packbits(bits).view(">u8")[0])


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(16, 16) uint8 grey means of an image (H, W, 3) uint8, whatever its proportions."""
    grey = Image.fromarray(image).convert("L")
    return np.asarray(grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))
