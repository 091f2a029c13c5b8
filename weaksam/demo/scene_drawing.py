"""Draws one scene: textured clutter, then objects made of parts that occlude one another, then camera effects.

A scene is a pure function of (seed, family, size). Masks are the visible pixels; boxes are the boxes of those masks,
xyxy float32 pixels, right and bottom exclusive. Axis legend: H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from weaksam.demo.scene_shapes import DEMO_CLASSES, VARIED_KINDS, VARIED_WEIGHTS, Parts
from weaksam.demo.scene_textures import Rng, background, photograph, random_colour, surface

FAMILIES = {"demo": tuple(DEMO_CLASSES), "varied": tuple(VARIED_KINDS)}
CLASS_NAMES = FAMILIES["demo"]
COMPANIONS = {"mill": "cart", "cart": "mill", "lamp": "cup", "cup": "lamp", "tree": "house", "house": "tree"}

SCALE = (0.1, 0.8)  # longest side of an object over the shorter side of the scene: an eightfold range
MIN_AREA = 24  # minimum number of visible pixels of a labelled object
DIFFICULT_VISIBLE = 0.5  # an object less visible than this is difficult
DIFFICULT_AREA = 0.002  # ... and so is one smaller than this share of the scene


@dataclass(frozen=True)
class SceneObject:
    """One labelled object of a scene."""

    class_id: int  # index into FAMILIES[family]
    mask: np.ndarray  # (H, W) bool, visible pixels
    box: np.ndarray  # (4,) float32, of `mask`
    is_difficult: bool


@dataclass(frozen=True)
class Scene:
    """A drawn picture and its objects."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    objects: list[SceneObject]
    object_map: np.ndarray  # (H, W) uint8, 0 = background, k = objects[k - 1]
    part_map: np.ndarray  # (H, W) uint8, 0 = background, else a part, numbered through the scene


@dataclass
class _Canvas:
    picture: np.ndarray  # (H, W, 3) float32
    things: np.ndarray  # (H, W) uint8, painted instance
    parts: np.ndarray  # (H, W) uint8
    kinds: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)  # pixels before occlusion, by instance
    num_parts: int = 0


@dataclass(frozen=True)
class _Look:
    """Appearance shared by instances of a repeated object: their parts and the seed of their surfaces."""

    kind: int
    parts: Parts
    paint: int


def draw_scene(seed: int, *, family: str, size: tuple[int, int]) -> Scene:
    """Draws one scene. `family` is `demo` (classes of `CLASS_NAMES`) or `varied` (shapes outside the demo world).

    Args:
        seed: any non-negative integer; families draw unrelated scenes from the same one.
        size: (height, width) in pixels, each at least 64.

    Returns:
        a scene with at least one object, in painting order (later objects are in front).
    """
    rng = np.random.default_rng([seed, list(FAMILIES).index(family), *size])
    canvas = _Canvas(background(rng, *size), np.zeros(size, np.uint8), np.zeros(size, np.uint8))
    looks = _choose_looks(rng, family)
    low, high = np.log(SCALE)
    scales = np.exp(rng.uniform(low, high, len(looks))) * min(size)
    if rng.random() < 0.75:
        scales = np.sort(scales)[::-1]  # large things behind, as in most pictures
    elif rng.random() < 0.5:
        scales[:] = scales[0]
    places: list[np.ndarray] = []
    for look, scale in zip(looks, scales, strict=True):
        places.append(_choose_place(rng, places, scale, size))
        _paint(rng, canvas, look, _place_parts(rng, look.parts, scale, places[-1], upright=family == "demo"))
    image = photograph(rng, canvas.picture)
    return _label(image, canvas)


def _choose_looks(rng: Rng, family: str) -> list[_Look]:
    names, draw = FAMILIES[family], (DEMO_CLASSES if family == "demo" else VARIED_KINDS)
    count = int(rng.integers(1, 7) if family == "demo" else rng.integers(2, 12))
    weights = None if family == "demo" else VARIED_WEIGHTS
    looks: list[_Look] = []
    repeats = rng.random() < 0.25
    for _ in range(count):
        kind = int(rng.choice(len(names), p=weights))
        chance = rng.random()
        if looks and family == "demo" and chance < 0.75:  # classes co-occur: the same again, or its companion
            kind = looks[0].kind
            if chance > 0.4:
                kind = names.index(COMPANIONS.get(names[kind], names[kind]))
        if looks and repeats and (family == "varied" or kind == looks[0].kind):
            looks.append(looks[0])
            continue
        looks.append(_Look(kind, draw[names[kind]](rng), int(rng.integers(2**31))))
    return looks


def _choose_place(rng: Rng, places: list[np.ndarray], scale: float, size: tuple[int, int]) -> np.ndarray:
    """Returns the centre (x, y) of the next object: random, or touching or overlapping an earlier object."""
    if places and rng.random() < 0.4:
        angle = rng.uniform(0, 2 * np.pi)
        near = places[rng.integers(len(places))] + scale * rng.uniform(0.4, 1.1) * np.array(
            [np.cos(angle), np.sin(angle)]
        )
    else:
        near = rng.uniform(0, 1, 2) * [size[1], size[0]]
    margin = 0.35 * scale
    return np.clip(near, margin, np.maximum(np.array([size[1], size[0]]) - margin, margin))


def _place_parts(rng: Rng, parts: Parts, scale: float, place: np.ndarray, *, upright: bool) -> Parts:
    """Transforms parts to picture coordinates: mirrored, stretched, rotated, with slight perspective."""
    turn = rng.normal(0, 0.25) if upright and rng.random() < 0.8 else rng.uniform(0, 2 * np.pi)
    stretch = np.exp(rng.normal(0, 0.12))
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.diag(
        [stretch * rng.choice([-1, 1]), 1 / stretch]
    )
    skew = rng.normal(0, 0.12, 2)
    placed = []
    for part in parts:
        projected = part / np.maximum(1 + part @ skew, 0.4)[:, None]
        placed.append(projected @ matrix.T * (scale / 2) + place)
    return placed


def _paint(rng: Rng, canvas: _Canvas, look: _Look, parts: Parts) -> None:
    """Paints one instance, its shadow first, and records its pixels."""
    covers = [_rasterise(part, canvas.things.shape) for part in parts]
    if rng.random() < 0.4:
        _cast_shadow(rng, canvas, covers)
    paint = np.random.default_rng(look.paint)  # the same for every instance that shares the look
    colours = _choose_colours(paint, len(parts), canvas.picture[covers[0][0]].mean((0, 1)))
    contrast = paint.uniform(0, 40)
    canvas.kinds.append(look.kind)
    union = np.zeros(canvas.things.shape, bool)
    for (window, cover), colour in zip(covers, colours, strict=True):
        patch = canvas.picture[window]
        patch += cover[..., None] * (surface(paint, cover.shape[0], cover.shape[1], colour, contrast=contrast) - patch)
        canvas.num_parts = min(canvas.num_parts + 1, 255)
        canvas.parts[window][cover >= 0.5] = canvas.num_parts
        union[window] |= cover >= 0.5
    canvas.things[union] = len(canvas.kinds)
    canvas.areas.append(int(union.sum()))


def _rasterise(outline: np.ndarray, size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """Returns a window of the picture around a polygon and the coverage of its pixels, (h, w) float32 in 0..1."""
    height, width = size
    left, top = np.clip(np.floor(outline.min(0)).astype(int) - 1, 0, [width - 4, height - 4])
    right, bottom = np.clip(np.ceil(outline.max(0)).astype(int) + 2, [left + 4, top + 4], [width, height])
    sheet = Image.new("L", (2 * int(right - left), 2 * int(bottom - top)))
    points = 2 * (outline - [left, top]) - 0.5
    ImageDraw.Draw(sheet).polygon([(x, y) for x, y in points.tolist()], fill=255)
    return (slice(top, bottom), slice(left, right)), np.asarray(sheet.reduce(2), dtype=np.float32) / 255


def _cast_shadow(rng: Rng, canvas: _Canvas, covers: list) -> None:
    """Darkens pixels beside an object; they still belong to the surface below the shadow."""
    height, width = canvas.things.shape
    shade = np.zeros((height, width), np.float32)
    for window, cover in covers:
        shade[window] = np.maximum(shade[window], cover)
    reach = max(2, int(0.1 * np.sqrt(shade.sum())))
    dx, dy = (int(v) for v in rng.integers(-reach, reach + 1, 2))
    sheet = Image.new("L", (width // 2, height // 2))  # soft anyway: half the size costs a quarter
    small = Image.fromarray((shade * 255).astype(np.uint8)).resize(sheet.size)
    sheet.paste(small, (dx // 2, dy // 2))
    dark = np.asarray(sheet.filter(ImageFilter.BoxBlur(max(1, reach / 3))).resize((width, height)), dtype=np.float32)
    canvas.picture *= 1 - np.float32(rng.uniform(0.15, 0.55) / 255) * dark[..., None]


def _choose_colours(rng: Rng, count: int, around: np.ndarray) -> list[np.ndarray]:
    """Returns one colour per part: equal, similar or unrelated, but always different from the colour `around`."""
    base = random_colour(rng)
    if rng.random() < 0.12:  # camouflage
        base = (around + rng.normal(0, 25, 3)).astype(np.float32)
    if np.abs(base - around).max() < 22:
        base = base + np.float32(28 if around.mean() < 128 else -28)
    choice = rng.random()
    if choice < 0.3:
        return [base + rng.normal(0, 5, 3).astype(np.float32) for _ in range(count)]
    if choice < 0.55:
        return [base + rng.normal(0, 30, 3).astype(np.float32) for _ in range(count)]
    inks = [base, random_colour(rng), random_colour(rng)]
    return (
        [inks[0], *(inks[rng.integers(3)] for _ in range(count - 1))]
        if choice < 0.85
        else [base, *(random_colour(rng) for _ in range(count - 1))]
    )


def mask_box(mask: np.ndarray) -> np.ndarray:
    """Returns the tight box of a non-empty (H, W) bool mask: (4,) float32 xyxy, right and bottom exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], dtype=np.float32)


def _label(image: np.ndarray, canvas: _Canvas) -> Scene:
    """Keeps sufficiently visible objects, renumbered without gaps."""
    objects: list[SceneObject] = []
    object_map, part_map = np.zeros_like(canvas.things), canvas.parts.copy()
    for k, (kind, area) in enumerate(zip(canvas.kinds, canvas.areas, strict=True), start=1):
        mask = canvas.things == k
        visible = int(mask.sum())
        if visible < MIN_AREA:
            part_map[mask] = 0
            continue
        hard = visible < DIFFICULT_VISIBLE * area or visible < DIFFICULT_AREA * mask.size
        objects.append(SceneObject(kind, mask, mask_box(mask), bool(hard)))
        object_map[mask] = len(objects)
    return Scene(image, objects, object_map, part_map)
