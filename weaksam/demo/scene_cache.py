"""Caches drawn scenes as memory-mapped arrays, for training that reads each scene many times.

Drawing a scene costs about as much CPU time as a training step on it; reading it is free.
Files of a cache: `images.npy` (N, S, S, 3), `objects.npy` and `parts.npy` (N, S, S), all uint8, and `cache.json`.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from weaksam.demo.scene_drawing import draw_scene

log = logging.getLogger(__name__)
_CHUNK = 64  # scenes per task of a worker


def cache_scenes(folder: str | Path, *, images: int, seed: int, family: str, size: int = 256) -> Path:
    """Draws `images` square scenes of side `size` into `folder`, unless they exist.

    Scene i is `draw_scene(seed * 1_000_000 + i)`. Uses all CPUs. An incomplete cache is drawn again.
    """
    folder = Path(folder)
    settings = {"images": images, "seed": seed, "family": family, "size": size}
    done = folder / "cache.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shape = (images, size, size)
    for name, full in (("images", (*shape, 3)), ("objects", shape), ("parts", shape)):
        open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=full).flush()
    draw = partial(_draw_chunk, folder, images=images, seed=seed, family=family, size=size)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for count, _ in enumerate(pool.imap_unordered(draw, range(0, images, _CHUNK)), start=1):
            if count % 20 == 0:
                log.info("drawn %d/%d scenes", min(count * _CHUNK, images), images)
    done.write_text(json.dumps(settings))
    return folder


def _draw_chunk(folder: Path, first: int, *, images: int, seed: int, family: str, size: int) -> None:
    maps = [np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("images", "objects", "parts")]
    for i in range(first, min(first + _CHUNK, images)):
        scene = draw_scene(seed * 1_000_000 + i, family=family, size=(size, size))
        for target, value in zip(maps, (scene.image, scene.object_map, scene.part_map), strict=True):
            target[i] = value
