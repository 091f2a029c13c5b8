"""Procedural surfaces for drawn scenes: noise, patterns, cluttered backgrounds and camera effects.

Every function draws from its generator argument, so a scene is a pure function of its seed.
Axis legend: H W pixels. Colours and pictures are float32 RGB in 0..255 until `photograph` makes them uint8.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Rng = np.random.Generator


def resize_field(field: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarges a small (h, w) float32 grid smoothly to (height, width) float32."""
    picture = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32), mode="F")
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def noise(rng: Rng, height: int, width: int, *, coarsest: int = 2, octaves: int = 4) -> np.ndarray:
    """Returns value noise of several octaves and random roughness, (height, width) float32, about -1..1."""
    fall = rng.uniform(0.4, 0.9)
    total, amplitude, norm = np.zeros((height, width), np.float32), 1.0, 0.0
    for octave in range(octaves):
        cells = coarsest * 2**octave
        if cells >= 2 * max(height, width):
            break
        grid = rng.uniform(-1, 1, (max(2, cells * height // max(height, width)), cells)).astype(np.float32)
        total += amplitude * resize_field(grid, height, width)
        norm += amplitude
        amplitude *= fall
    return total / max(norm, 1e-6) * 1.6


def _stripes(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    wave = np.sin(u * rng.uniform(4, 26) + rng.uniform(0, 6) + rng.uniform(0, 1.5) * np.sin(v * rng.uniform(1, 6)))
    return np.clip(wave * rng.uniform(1, 6), -1, 1)


def _checks(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    step = rng.uniform(4, 18)
    return np.sign(np.sin(u * step) * np.sin(v * step * rng.uniform(0.5, 1.5)))


def _dots(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    step = rng.uniform(5, 20)
    return np.where(np.sin(u * step) * np.sin(v * step) > rng.uniform(0.3, 0.8), 1.0, -0.2)


def _rings(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = np.hypot(u - rng.uniform(-1, 1), v - rng.uniform(-1, 1))
    return np.clip(np.sin(radius * rng.uniform(6, 30)) * rng.uniform(1, 4), -1, 1)


def _ramp(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * rng.uniform(0.5, 1.2)


_PATTERNS = (_stripes, _checks, _dots, _rings, _ramp, _ramp)


def pattern(rng: Rng, height: int, width: int) -> np.ndarray:
    """Returns a random surface pattern (plain, noise, stripes, checks, dots, rings, ramp): (H, W) float32 in -1..1."""
    choice = rng.random()
    if choice < 0.25:
        return np.zeros((height, width), np.float32)
    if choice < 0.5:
        return noise(rng, height, width, coarsest=int(rng.integers(2, 7)), octaves=3)
    angle, unit = rng.uniform(0, np.pi), 2.0 / max(height, width, 8)
    ys = (np.arange(height, dtype=np.float32) - height / 2)[:, None] * unit
    xs = (np.arange(width, dtype=np.float32) - width / 2)[None, :] * unit
    u, v = xs * np.cos(angle) + ys * np.sin(angle), ys * np.cos(angle) - xs * np.sin(angle)
    return _PATTERNS[rng.integers(len(_PATTERNS))](rng, u, v).astype(np.float32)


def random_colour(rng: Rng) -> np.ndarray:
    """Returns (3,) float32 in 0..255; many colours are nearly grey, so that hue alone is not informative."""
    value, spread = rng.uniform(20, 240), rng.choice([8.0, 40.0, 90.0], p=[0.4, 0.35, 0.25])
    return np.clip(value + rng.normal(0, spread, 3), 0, 255).astype(np.float32)


def surface(rng: Rng, height: int, width: int, colour: np.ndarray, *, contrast: float) -> np.ndarray:
    """Returns a patterned, shaded surface around `colour`: (height, width, 3) float32, not clipped."""
    tint = rng.normal(0, 1, 3).astype(np.float32)
    tint = np.float32(contrast) * (0.7 + 0.3 * tint)
    field = pattern(rng, height, width)
    slope = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(rng.normal(0, 14))
    slope = slope + np.linspace(-1, 1, width, dtype=np.float32)[None, :] * np.float32(rng.normal(0, 14))
    return colour + field[..., None] * tint + slope[..., None]


def background(rng: Rng, height: int, width: int) -> np.ndarray:
    """Returns a cluttered scene without objects: (height, width, 3) float32."""
    picture = surface(rng, height, width, random_colour(rng), contrast=rng.uniform(5, 45))
    for _ in range(int(rng.integers(1, 3))):
        tint = rng.normal(0, 22, 3).astype(np.float32)
        picture = picture + noise(rng, height, width, octaves=int(rng.integers(3, 7)))[..., None] * tint
    if rng.random() < 0.4:  # a second surface behind a tilted edge: ground and wall, table and floor
        edge = rng.uniform(0.25, 0.75) * height + np.linspace(-1, 1, width) * rng.normal(0, 0.15) * height
        below = (np.arange(height)[:, None] > edge[None, :])[..., None]
        other = surface(rng, height, width, random_colour(rng), contrast=rng.uniform(5, 40))
        picture = np.where(below, other, picture)
    return _clutter(rng, picture) if rng.random() < 0.85 else picture


def _clutter(rng: Rng, picture: np.ndarray) -> np.ndarray:
    """Draws faint strokes, chips and blots over `picture`: edges that bound no object."""
    height, width = picture.shape[:2]
    layer = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(layer)
    strength, longest = rng.uniform(6, 40), rng.uniform(0.05, 0.35) * max(height, width)
    for _ in range(int(rng.integers(5, 60))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        under = picture[int(y), int(x)]
        ink = tuple(int(c) for c in np.clip(under + rng.normal(0, strength, 3), 0, 255))
        length, angle = rng.uniform(0.1, 1) * longest, rng.uniform(0, np.pi)
        dx, dy = length * np.cos(angle), length * np.sin(angle)
        kind = rng.integers(3)
        if kind == 0:
            pen.line([x - dx, y - dy, x + dx, y + dy], fill=ink, width=int(rng.integers(1, 4)))
        elif kind == 1:
            pen.polygon(
                [(x, y), (x + dx, y + dy), (x + dx * rng.uniform(-1, 1), y + dy * rng.uniform(-1, 1))], fill=ink
            )
        else:
            side = 0.3 * length + 1
            pen.ellipse([x - side, y - side * rng.uniform(0.3, 1), x + side, y + side * rng.uniform(0.3, 1)], fill=ink)
    if rng.random() < 0.6:
        layer = layer.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    return np.asarray(layer, dtype=np.float32)


def photograph(rng: Rng, picture: np.ndarray) -> np.ndarray:
    """Applies camera effects to `picture`: uneven light, tint, blur, sensor noise, at times JPEG. Returns uint8."""
    height, width = picture.shape[:2]
    light = 1 + rng.uniform(0.05, 0.3) * noise(rng, height, width, octaves=2)
    gain = (rng.uniform(0.75, 1.2) * rng.normal(1, 0.06, 3)).astype(np.float32)
    picture = picture * light[..., None] * gain + np.float32(rng.uniform(-12, 12))
    frame = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    if rng.random() < 0.6:
        frame = frame.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
    grain = rng.integers(-128, 128, (height, width, 3), dtype=np.int8).astype(np.float32)
    pixels = np.asarray(frame, dtype=np.float32) + grain * np.float32(rng.uniform(0.005, 0.08))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(45, 92)))
        pixels = np.array(Image.open(buffer))
    return pixels
