"""The shapes of drawn scenes, as parts: polygons in an object's own frame.

Two families that share no shape: `DEMO_CLASSES`, the objects of the demo world, which differ in the arrangement of
their parts; and `VARIED_KINDS`, the training shapes of the small segmenter, which is so tested on unseen shapes.
Object frame: x right, y down, everything within about -1..1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Outline = np.ndarray  # (N, 2) float64, x then y, object frame
Parts = list[Outline]  # drawn in order, later ones on top; the object is their union


def ellipse(x: float, y: float, rx: float, ry: float, *, count: int = 28) -> Outline:
    """Returns an ellipse around (x, y)."""
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)


def quad(*corners: float) -> Outline:
    """Returns a polygon from flat x, y, x, y, ... coordinates."""
    return np.array(corners, dtype=np.float64).reshape(-1, 2)


def bar(x0: float, y0: float, x1: float, y1: float, thickness: float) -> Outline:
    """Returns a straight bar between two points; `thickness` is its half width."""
    start, stop = np.array([x0, y0]), np.array([x1, y1])
    along = stop - start
    side = np.array([-along[1], along[0]]) / max(np.hypot(*along), 1e-6) * thickness
    return np.array([start + side, stop + side, stop - side, start - side])


def arc(x: float, y: float, radius: float, thickness: float, start: float, stop: float) -> Outline:
    """Returns a bent band around (x, y) from angle `start` to `stop` (radians); `thickness` is its half width."""
    turn = np.linspace(start, stop, 24)
    ray = np.stack([np.cos(turn), np.sin(turn)], 1)
    return np.array([x, y]) + np.concatenate([ray * (radius + thickness), ray[::-1] * (radius - thickness)])


# --- the demo world: bodies are shared between classes on purpose, a smaller part identifies the class --------------


def _mill(rng: Rng) -> Parts:
    top = rng.uniform(0.18, 0.3)
    tilt, reach, count = rng.uniform(0, np.pi), rng.uniform(0.55, 0.75), 4
    blades = []
    for k in range(count):
        a = tilt + k * 2 * np.pi / count
        blades.append(
            bar(0.06 * np.cos(a), -0.4 + 0.06 * np.sin(a), reach * np.cos(a), -0.4 + reach * np.sin(a), 0.075)
        )
    return [quad(-top, -0.4, top, -0.4, 0.42, 1, -0.42, 1), *blades, ellipse(0, -0.4, 0.1, 0.1)]


def _cart(rng: Rng) -> Parts:
    height, wheel = rng.uniform(0.35, 0.6), rng.uniform(0.22, 0.3)
    body = quad(-0.95, 0.3 - height, 0.95, 0.3 - height, 0.8, 0.35, -0.8, 0.35)
    wheels = [ellipse(x, 0.42, wheel, wheel) for x in (-0.5, 0.5)]
    return [body, *wheels, *(ellipse(x, 0.42, wheel * 0.35, wheel * 0.35) for x in (-0.5, 0.5))]


def _fish(rng: Rng) -> Parts:
    deep, spread = rng.uniform(0.3, 0.48), rng.uniform(0.3, 0.5)
    tail = quad(0.5, 0, 1, -spread, 0.86, 0, 1, spread)
    fin = quad(-0.15, -deep * 0.8, 0.3, -deep * 1.6, 0.35, -deep * 0.6)
    return [tail, fin, ellipse(-0.15, 0, 0.78, deep), ellipse(-0.6, -0.1, 0.07, 0.07)]


def _lamp(rng: Rng) -> Parts:
    wide, low = rng.uniform(0.4, 0.6), rng.uniform(-0.35, -0.15)
    shade = quad(-wide * 0.45, -1, wide * 0.45, -1, wide, low, -wide, low)
    return [bar(0, low - 0.1, 0, 0.9, rng.uniform(0.05, 0.08)), ellipse(0, 0.88, rng.uniform(0.3, 0.45), 0.12), shade]


def _tree(rng: Rng) -> Parts:
    trunk = quad(-0.1, 0, 0.1, 0, 0.16, 1, -0.16, 1)
    crowns = [
        ellipse(rng.uniform(-0.4, 0.4), rng.uniform(-0.6, -0.1), rng.uniform(0.32, 0.5), rng.uniform(0.3, 0.42))
        for _ in range(3)
    ]
    return [trunk, *crowns, ellipse(0, -0.35, 0.45, 0.5)]


def _cup(rng: Rng) -> Parts:
    narrow, side = rng.uniform(0.3, 0.5), rng.choice([-1.0, 1.0])
    body = quad(-0.58, -0.7, 0.58, -0.7, narrow, 0.8, -narrow, 0.8)
    handle = arc(side * 0.5, 0, 0.4, 0.08, -np.pi / 2, np.pi / 2) * [1.0, 1.0]
    if side < 0:
        handle = arc(-0.5, 0, 0.4, 0.08, np.pi / 2, 1.5 * np.pi)
    return [handle, body, ellipse(0, -0.7, 0.58, 0.13)]


def _bug(rng: Rng) -> Parts:
    long = rng.uniform(0.5, 0.65)
    legs = []
    for x in (-0.3, 0.0, 0.3):
        bend = rng.uniform(-0.15, 0.15)
        legs += [bar(x, 0, x + bend, side * rng.uniform(0.65, 0.85), 0.045) for side in (-1, 1)]
    return [*legs, ellipse(0.1, 0, long, 0.36), ellipse(-long - 0.02, 0, 0.24, 0.22)]


def _house(rng: Rng) -> Parts:
    eave, peak = rng.uniform(-0.25, 0.0), rng.uniform(-0.95, -0.7)
    door = rng.uniform(-0.35, 0.35)
    walls = quad(-0.7, eave, 0.7, eave, 0.7, 0.9, -0.7, 0.9)
    roof = quad(-0.95, eave, 0, peak, 0.95, eave)
    return [walls, roof, quad(door - 0.14, 0.35, door + 0.14, 0.35, door + 0.14, 0.9, door - 0.14, 0.9)]


DEMO_CLASSES: dict[str, Callable[[Rng], Parts]] = {
    "mill": _mill,
    "cart": _cart,
    "fish": _fish,
    "lamp": _lamp,
    "tree": _tree,
    "cup": _cup,
    "bug": _bug,
    "house": _house,
}


# --- the varied family: training shapes of the segmenter ------------------------------------------------------------


def _blob(rng: Rng) -> Parts:
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radius = np.ones_like(turn)
    for k in range(2, 7):
        radius += rng.normal(0, 0.32 / k) * np.cos(k * turn + rng.uniform(0, 6.3))
    radius = np.clip(radius, 0.25, None)
    radius /= radius.max()
    return [np.stack([radius * np.cos(turn), radius * np.sin(turn) * rng.uniform(0.35, 1)], 1)]


def _polygon(rng: Rng) -> Parts:
    count = int(rng.integers(3, 9))
    turn = np.sort(np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(-0.35, 0.35, count))
    radius = rng.uniform(0.55, 1, count)
    return [np.stack([radius * np.cos(turn), radius * np.sin(turn) * rng.uniform(0.4, 1)], 1)]


def _superellipse(rng: Rng) -> Parts:
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    power = rng.uniform(0.25, 2.2)
    x = np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** power
    y = np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** power
    return [np.stack([x, y * rng.uniform(0.25, 1)], 1)]


def _star(rng: Rng) -> Parts:
    spikes = int(rng.integers(5, 10))
    radius = np.where(np.arange(2 * spikes) % 2, rng.uniform(0.35, 0.7), 1.0)
    turn = np.arange(2 * spikes) * np.pi / spikes
    return [np.stack([radius * np.cos(turn), radius * np.sin(turn)], 1)]


def _card(rng: Rng) -> Parts:
    """A rigid sheet or box with inner markings: a card, book, sign, screen or parcel."""
    half = rng.uniform(0.45, 1.0)
    sheet = quad(-half, -1, half, -1, half, 1, -half, 1)
    marks: Parts = []
    columns, rows = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    shape = rng.integers(4)
    if rng.random() < 0.3:
        marks.append(sheet * rng.uniform(0.75, 0.9))
    for i in range(columns):
        for j in range(rows):
            if rng.random() < 0.2:
                continue
            x, y = half * (2 * (i + 1) / (columns + 1) - 1) * 1.1, (2 * (j + 1) / (rows + 1) - 1) * 1.1
            rx, ry = half * rng.uniform(0.15, 0.3) * 2 / (columns + 1), rng.uniform(0.3, 0.5) / (rows + 1)
            if shape == 0:
                marks.append(ellipse(x, y, rx, ry, count=12))
            elif shape == 1:
                marks.append(quad(x - rx, y, x, y - ry, x + rx, y, x, y + ry))
            elif shape == 2:
                marks.append(quad(x - rx, y - ry, x + rx, y - ry, x + rx, y + ry, x - rx, y + ry))
            else:
                marks.append(quad(x - rx, y + ry, x, y - ry, x + rx, y + ry))
    return [sheet, *marks]


def _stroke(rng: Rng) -> Parts:
    """A bent band: pipe, rope, worm."""
    if rng.random() < 0.5:
        start = rng.uniform(0, 6.3)
        return [arc(0, 0, 0.8, rng.uniform(0.06, 0.3), start, start + rng.uniform(1.5, 6.1))]
    xs = np.linspace(-0.95, 0.95, 24)
    ys = rng.uniform(0.1, 0.5) * np.sin(xs * rng.uniform(1, 5) + rng.uniform(0, 6))
    thick = rng.uniform(0.06, 0.2)
    return [np.concatenate([np.stack([xs, ys - thick], 1), np.stack([xs, ys + thick], 1)[::-1]])]


_SIMPLE = (_blob, _polygon, _superellipse, _star)


def _compound(rng: Rng) -> Parts:
    """Two to six different pieces joined to a core, so that whole and part differ."""
    parts = [_SIMPLE[rng.integers(len(_SIMPLE))](rng)[0] * rng.uniform(0.35, 0.7)]
    for _ in range(int(rng.integers(1, 6))):
        host = parts[0] if rng.random() < 0.7 else parts[rng.integers(len(parts))]
        anchor = host[rng.integers(len(host))] * rng.uniform(0.7, 1)
        angle, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.12, 0.5)
        if rng.random() < 0.4:
            tip = anchor + 1.6 * size * np.array([np.cos(angle), np.sin(angle)])
            piece = bar(anchor[0], anchor[1], tip[0], tip[1], rng.uniform(0.03, 0.14))
        else:
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            piece = _SIMPLE[rng.integers(len(_SIMPLE))](rng)[0] @ turn * size + anchor
        parts.insert(0 if rng.random() < 0.3 else len(parts), piece)
    return _fit(parts)


def _crawler(rng: Rng) -> Parts:
    """A core with thin limbs all around, an odd number of them."""
    core = _blob(rng)[0] * rng.uniform(0.3, 0.6)
    limbs, count = [], int(rng.choice([3, 5, 7, 9]))
    for k in range(count):
        a, reach = 2 * np.pi * k / count + rng.uniform(-0.2, 0.2), rng.uniform(0.7, 1)
        limbs.append(bar(0, 0, reach * np.cos(a), reach * np.sin(a), rng.uniform(0.03, 0.1)))
    tips = [limb[1:3].mean(0) for limb in limbs if rng.random() < 0.3]
    knobs = [ellipse(tip[0], tip[1], 0.1, 0.1, count=10) for tip in tips]
    return [*limbs, *knobs, core]


def _stack(rng: Rng) -> Parts:
    """Slabs above one another, of unequal width: bottle, tower, vase, pile."""
    count = int(rng.integers(2, 6))
    edges = np.concatenate([[-1.0], np.sort(rng.uniform(-0.9, 0.9, count - 1)), [1.0]])
    widths = rng.uniform(0.08, 0.8, count + 1)
    slabs = []
    for k in range(count):
        lower = widths[k + 1] if rng.random() < 0.6 else widths[k]
        slabs.append(quad(-widths[k], edges[k], widths[k], edges[k], lower, edges[k + 1], -lower, edges[k + 1]))
    return slabs


def _fit(parts: Parts) -> Parts:
    """Shifts and scales parts so that the longer side spans -1..1."""
    points = np.concatenate(parts)
    low, high = points.min(0), points.max(0)
    return [(part - (low + high) / 2) * (2 / (high - low).max()) for part in parts]


VARIED_KINDS: dict[str, Callable[[Rng], Parts]] = {
    "blob": _blob,
    "polygon": _polygon,
    "superellipse": _superellipse,
    "star": _star,
    "card": _card,
    "stroke": _stroke,
    "compound": _compound,
    "crawler": _crawler,
    "stack": _stack,
}
VARIED_WEIGHTS = (0.10, 0.08, 0.08, 0.05, 0.17, 0.06, 0.28, 0.08, 0.10)  # of VARIED_KINDS, in order
