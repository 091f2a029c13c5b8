"""The demo world as files: drawn scenes as a VOC devkit or in COCO format, read by the ordinary readers.

Two thirds of the scenes are for training (`trainval`, `train2017`), one third for testing (`test`, `val2017`). The same
(images, seed, format) gives the same bytes, and a scene does not depend on how many others are drawn.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
from PIL import Image

from weaksam.data.drawn import DRAWN, STARTED
from weaksam.demo.scene_drawing import CLASS_NAMES, Scene, draw_scene, mask_box
from weaksam.errors import ConfigError

log = logging.getLogger(__name__)

__all__ = ["CLASS_NAMES", "COCO_IDS", "draw_scene", "write_scenes"]

SIZES = ((240, 320), (320, 240), (288, 288), (200, 300), (300, 225))  # (height, width) of scenes, drawn at random
COCO_IDS = tuple(3 * k + 2 for k in range(len(CLASS_NAMES)))  # with gaps, as COCO's are
_QUALITY = 90
_SPLITS = {"voc": ("trainval", "test"), "coco": ("train2017", "val2017")}


def write_scenes(folder: str | Path, *, images: int, seed: int, format: Literal["voc", "coco"] = "voc") -> None:
    """Draws a dataset, unless it exists.

    `voc` writes `folder/VOC2007/` with `JPEGImages`, `Annotations`, `ImageSets` and `SegmentationObject`; `coco` writes
    `folder/{train,val}2017/` and `folder/annotations/instances_{train,val}2017.json`. `folder/scenes.json`, written
    last, holds the settings; the same call completes an incomplete folder. Uses all CPUs.

    Raises:
        ConfigError: `images` is below 3, `format` unknown, or the folder holds something else.
    """
    folder = Path(folder)
    settings = {"images": images, "seed": seed, "format": format}
    if _check_folder(folder, settings):
        log.info("%s: all %d scenes are there", folder, images)
        return
    folder.mkdir(parents=True, exist_ok=True)
    started = folder / STARTED
    started.write_text(json.dumps(settings))
    draw = partial(_draw_voc if format == "voc" else _draw_coco, folder, seed=seed)
    records = []
    for record in _draw_all(draw, images):
        records.append(record)
        if len(records) % max(100, images // 10) == 0:
            log.info("%s: drawn %d/%d scenes", folder, len(records), images)
    _write_voc_lists(folder, images) if format == "voc" else _write_coco_json(folder, records)
    (folder / DRAWN).write_text(json.dumps(settings | {"classes": list(CLASS_NAMES)}, indent=2) + "\n")
    started.unlink()


def _draw_all(draw: Callable[[int], dict | None], images: int) -> Iterator[dict | None]:
    """Yields the results of `draw` for every scene, in order."""
    workers = min(os.cpu_count() or 1, images // 50)
    if workers < 2:  # for few scenes, starting processes costs more than it saves
        yield from map(draw, range(images))
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(draw, range(images), chunksize=10)


def _check_folder(folder: Path, settings: dict) -> bool:
    """Returns whether the scenes are complete; raises ConfigError for other contents of the folder."""
    if settings["images"] < 3 or settings["format"] not in _SPLITS:
        raise ConfigError(
            f"scenes: need at least 3 images as voc or coco, got {settings['images']} as {settings['format']!r}"
        )
    for name in (DRAWN, STARTED):
        if (folder / name).exists():
            stored = json.loads((folder / name).read_text())
            other = [f"{key} {stored.get(key)!r}" for key in settings if stored.get(key) != settings[key]]
            if other:
                raise ConfigError(
                    f"{folder} holds other scenes ({', '.join(other)}): choose another folder or remove it"
                )
            return name == DRAWN
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no scenes: choose another folder")
    return False


def split_of(index: int, format: str) -> str:
    """Returns the split of a scene: every third is for testing."""
    return _SPLITS[format][1 if index % 3 == 2 else 0]


def draw_dataset_scene(index: int, seed: int) -> Scene:
    """Draws scene `index` of the demo world from `seed`."""
    size = SIZES[np.random.default_rng([seed, index]).integers(len(SIZES))]
    return draw_scene(seed * 1_000_000 + index, family="demo", size=size)


def _save_jpeg(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY)
    path.write_bytes(buffer.getvalue())


# --- VOC -------------------------------------------------------------------------------------------------------------


def _voc_id(index: int) -> str:
    return f"{index + 1:06d}"


def _draw_voc(folder: Path, index: int, *, seed: int) -> None:
    root, scene = folder / "VOC2007", draw_dataset_scene(index, seed)
    _save_jpeg(root / "JPEGImages" / f"{_voc_id(index)}.jpg", scene.image)
    xml = root / "Annotations" / f"{_voc_id(index)}.xml"
    xml.parent.mkdir(parents=True, exist_ok=True)
    xml.write_text(_voc_xml(_voc_id(index), scene))
    png = root / "SegmentationObject" / f"{_voc_id(index)}.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(with_border(scene.object_map), mode="P")
    picture.putpalette(voc_palette())
    picture.save(png)


def _voc_xml(image_id: str, scene: Scene) -> str:
    height, width = scene.image.shape[:2]
    lines = ["<annotation>", "\t<folder>VOC2007</folder>", f"\t<filename>{image_id}.jpg</filename>"]
    lines += [f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    lines += ["\t<segmented>1</segmented>"]
    for thing in scene.objects:
        left, top, right, bottom = thing.box.astype(int).tolist()
        truncated = int(left == 0 or top == 0 or right == width or bottom == height)
        lines += ["\t<object>", f"\t\t<name>{CLASS_NAMES[thing.class_id]}</name>", "\t\t<pose>Unspecified</pose>"]
        lines += [f"\t\t<truncated>{truncated}</truncated>", f"\t\t<difficult>{int(thing.is_difficult)}</difficult>"]
        corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        lines += [f"\t\t<bndbox>{corners}</bndbox>", "\t</object>"]
    return "\n".join([*lines, "</annotation>", ""])


def with_border(labels: np.ndarray) -> np.ndarray:
    """Sets the outermost pixels of (H, W) uint8 labels to 255, VOC's void, for every object with further pixels."""
    edge = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for step in (1, -1):
            edge |= labels != np.roll(labels, step, axis)
    edge &= labels > 0
    edge[[0, -1]] = False
    edge[:, [0, -1]] = False
    inside = np.bincount(labels[~edge], minlength=256)
    out = labels.copy()
    out[edge & (inside[labels] > 0)] = 255
    return out


def voc_palette() -> list[int]:
    """Returns VOC's colour map: 256 RGB triples, flat."""
    palette = []
    for value in range(256):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= ((value >> channel) & 1) << (7 - bit)
            value >>= 3
        palette += colour
    return palette


def _write_voc_lists(folder: Path, images: int) -> None:
    for kind in ("Main", "Segmentation"):
        target = folder / "VOC2007" / "ImageSets" / kind
        target.mkdir(parents=True, exist_ok=True)
        for split in _SPLITS["voc"]:
            ids = [_voc_id(i) for i in range(images) if split_of(i, "voc") == split]
            (target / f"{split}.txt").write_text("\n".join(ids) + "\n")


# --- COCO ------------------------------------------------------------------------------------------------------------


def _draw_coco(folder: Path, index: int, *, seed: int) -> dict:
    from pycocotools import mask as coco_mask

    scene, split = draw_dataset_scene(index, seed), split_of(index, "coco")
    name = f"{index + 1:012d}.jpg"
    _save_jpeg(folder / split / name, scene.image)
    height, width = scene.image.shape[:2]
    annotations = []
    for number, thing in enumerate(scene.objects):
        rle = coco_mask.encode(np.asfortranarray(thing.mask.astype(np.uint8)))
        left, top, right, bottom = mask_box(thing.mask).tolist()
        annotations.append(
            {
                "id": (index + 1) * 100 + number,
                "image_id": index + 1,
                "category_id": COCO_IDS[thing.class_id],
                "bbox": [left, top, right - left, bottom - top],
                "area": float(thing.mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": cast(bytes, rle["counts"]).decode()},
            }
        )
    image = {"id": index + 1, "file_name": name, "height": height, "width": width}
    return {"split": split, "image": image, "annotations": annotations}


def _write_coco_json(folder: Path, records: list[dict]) -> None:
    categories = [{"id": k, "name": n, "supercategory": "thing"} for k, n in zip(COCO_IDS, CLASS_NAMES, strict=True)]
    target = folder / "annotations"
    target.mkdir(parents=True, exist_ok=True)
    for split in _SPLITS["coco"]:
        mine = [record for record in records if record["split"] == split]
        content = {
            "info": {"description": "weaksam demo scenes"},
            "images": [record["image"] for record in mine],
            "annotations": [a for record in mine for a in record["annotations"]],
            "categories": categories,
        }
        (target / f"instances_{split}.json").write_text(json.dumps(content))
