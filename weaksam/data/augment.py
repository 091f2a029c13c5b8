"""Inputs of a classifier: the training augmentation of DeiT and WeakTr, and the plain view for evaluation.

The input is (H, W, 3) uint8 RGB, the output (3, size, size) float32, normalised. All random numbers come from a
generator argument: timm's and torchvision's transforms use the generators of the process, but a batch here must be a
pure function of its seeds, independent of the thread that prepares it.
RandAugment: Cubuk et al. 2019, arXiv 1909.13719, here as "rand-m9-mstd0.5-inc1": two of fifteen operations, all of
them stronger with a higher level. Random erasing: Zhong et al. 2017, arXiv 1708.04896.
Differs from timm: geometric operations are always bilinear, not randomly bilinear or bicubic; Posterize keeps at least
one bit, while timm's may blacken the image; crops are not rounded to whole pixels.
Axis legend: H W pixels; in (3, H, W) the first axis is red, green, blue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Range = tuple[float, float]  # lowest, highest
Box = tuple[float, float, float, float]  # left, top, width, height
Operation = Callable[[Image.Image, float, int], Image.Image]  # image, level in [0, 1], sign 1 or -1: same size

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, of pixels in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)

_CROP_RATIO = (3 / 4, 4 / 3)
_ERASE_SHARE = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 1 / 0.3)
_TRIES = 10
_FILL = tuple(round(255 * value) for value in IMAGE_MEAN)


def augment_for_classification(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    size: int,
    min_scale: float = 0.08,
    rand_augment: float = 9.0,
    erase: float = 0.25,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
) -> np.ndarray:
    """Returns a random view for training: crop, resize, flip, RandAugment, normalise, erase.

    Args:
        image: (H, W, 3) uint8 RGB, of any size; not changed.
        rng: source of all random numbers.
        size: side of the view, in pixels.
        min_scale: smallest share of the image's area that a crop may have, in (0, 1].
        rand_augment: mean magnitude of RandAugment, in [0, 10]; 0 = none.
        erase: probability that a rectangle becomes noise; 0 = never.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].

    Returns:
        (3, size, size) float32, C-contiguous.
    """
    height, width = image.shape[:2]
    view = _resize(image, draw_crop(rng, height, width, min_scale), size)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rand_augment > 0:
        view = _rand_augment(view, rng, rand_augment)
    pixels = normalise(np.asarray(view), mean=mean, std=std)
    if rng.random() < erase:
        _erase_rectangle(pixels, rng)
    return pixels


def resize_for_classification(
    image: np.ndarray, *, size: int, mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD
) -> np.ndarray:
    """Returns the view for evaluation: the centre crop after scaling the shorter side to `size` * 256 / 224 pixels.

    Args:
        image: (H, W, 3) uint8 RGB, of any size.
        size: side of the view, in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].

    Returns:
        (3, size, size) float32, C-contiguous.
    """
    height, width = image.shape[:2]
    # The crop is done by the resize: an image of 1 x 16,000 pixels resized as a whole would take 1.4 GB at size 160.
    side = min(height, width) * size / round(size * 256 / 224)
    view = _resize(image, ((width - side) / 2, (height - side) / 2, side, side), size)
    return normalise(np.asarray(view), mean=mean, std=std)


def normalise(image: np.ndarray, *, mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD) -> np.ndarray:
    """Converts (H, W, 3) uint8 to (3, H, W) float32, C-contiguous: (image / 255 - `mean`) / `std`."""
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    pixels -= np.float32(255) * np.asarray(mean, np.float32)[:, None, None]
    pixels /= np.float32(255) * np.asarray(std, np.float32)[:, None, None]
    return pixels


def draw_crop(rng: np.random.Generator, height: int, width: int, min_scale: float) -> Box:
    """Draws a random crop: share of the area uniform in [`min_scale`, 1], aspect ratio in [3:4, 4:3].

    If ten draws do not fit into the image, returns the largest centred crop of an allowed aspect ratio.

    Returns:
        left, top, width, height: in pixels, not rounded.
    """
    low, high = _CROP_RATIO
    for _ in range(_TRIES):
        w, h = _draw_sides(rng, height * width, (min_scale, 1.0), _CROP_RATIO)
        if w <= width and h <= height:
            return rng.uniform(0, width - w), rng.uniform(0, height - h), w, h
    w, h = min(width, height * high), min(height, width / low)
    return (width - w) / 2, (height - h) / 2, w, h


def _draw_sides(rng: np.random.Generator, area: float, share: Range, ratio: Range) -> tuple[float, float]:
    """Draws width and height of a rectangle: share of `area` uniform, ratio of width to height log-uniform."""
    area, shape = area * rng.uniform(*share), math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return math.sqrt(area * shape), math.sqrt(area / shape)


def _resize(image: np.ndarray, box: Box, size: int) -> Image.Image:
    """Resizes the crop `box` (left, top, width, height) of an image to `size` x `size`."""
    left, top, width, height = box
    # Pillow copies its input, so it gets only the crop and the two (source) pixels that the bicubic filter reaches.
    reach_x, reach_y = (math.ceil(2 * max(side / size, 1)) + 1 for side in (width, height))
    x, y = max(math.floor(left) - reach_x, 0), max(math.floor(top) - reach_y, 0)
    part = image[y : math.ceil(top + height) + reach_y, x : math.ceil(left + width) + reach_x]
    inside = (left - x, top - y, left - x + width, top - y + height)
    return Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC, box=inside)


def _rand_augment(image: Image.Image, rng: np.random.Generator, magnitude: float) -> Image.Image:
    operations = list(OPERATIONS.values())
    for index in rng.integers(len(operations), size=2):
        if rng.random() < 0.5:
            level = min(max(rng.normal(magnitude, 0.5), 0.0), 10.0) / 10
            image = operations[index](image, level, 1 if rng.random() < 0.5 else -1)
    return image


def _erase_rectangle(pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Replaces a random rectangle of `pixels` (3, H, W) by noise, in place; nothing if ten draws do not fit."""
    height, width = pixels.shape[1:]
    for _ in range(_TRIES):
        w, h = (round(side) for side in _draw_sides(rng, height * width, _ERASE_SHARE, _ERASE_RATIO))
        if 0 < w <= width and 0 < h <= height:
            x, y = rng.integers(width - w + 1), rng.integers(height - h + 1)
            pixels[:, y : y + h, x : x + w] = rng.standard_normal((3, h, w), dtype=np.float32)
            return


def _solarize_add(image: Image.Image, level: float, sign: int) -> Image.Image:
    added = int(level * 110)
    return image.point([value + added if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, sign: kind(image).enhance(max(1 + sign * 0.9 * level, 0.1))


def _rotate(image: Image.Image, level: float, sign: int) -> Image.Image:
    return image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=_FILL)


def _affine(shear_x: float = 0.0, shear_y: float = 0.0, shift_x: float = 0.0, shift_y: float = 0.0) -> Operation:
    """Returns an operation that moves content right and down for sign 1; shifts are shares of the side."""

    def operation(image: Image.Image, level: float, sign: int) -> Image.Image:
        by = -sign * level  # Pillow maps output pixels to input pixels
        source = (1, shear_x * by, shift_x * by * image.width, shear_y * by, 1, shift_y * by * image.height)
        bilinear = Image.Resampling.BILINEAR
        return image.transform(image.size, Image.Transform.AFFINE, source, bilinear, fillcolor=_FILL)

    return operation


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": lambda image, level, sign: ImageOps.posterize(image, max(4 - int(level * 4), 1)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(level * 256)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _affine(shear_x=0.3),
    "shear_y": _affine(shear_y=0.3),
    "translate_x": _affine(shift_x=0.45),
    "translate_y": _affine(shift_y=0.45),
}
