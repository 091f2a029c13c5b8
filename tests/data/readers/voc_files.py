"""Files of small devkits in VOC's form."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from testing.places import SHARED_DATA
from weaksam.core import storage


def shared(*parts: str) -> Path:
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no data at {path}")
    return path


def xml(*objects: str, width: object = 100, height: object = 80) -> bytes:
    size = f"<size><width>{width}</width><height>{height}</height><depth/></size>"
    return f"<annotation><filename>wrong.jpg</filename>{size}{''.join(objects)}</annotation>".encode()


def thing(name: str, *box: object, difficult: object = None, more: str = "") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{flag}{more}<bndbox>{corners}</bndbox></object>"


def picture(height: int = 80, width: int = 100) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(stream, "JPEG")
    return stream.getvalue()


def write_devkit(root: str, splits: dict[str, Sequence[str]], annotations: dict[str, bytes]) -> str:
    for split, ids in splits.items():
        storage.write_bytes(f"{root}/ImageSets/Main/{split}.txt", "\n".join(ids).encode())
        for image_id in ids:
            storage.write_bytes(f"{root}/JPEGImages/{image_id}.jpg", picture())
    for image_id, data in annotations.items():
        storage.write_bytes(f"{root}/Annotations/{image_id}.xml", data)
    return root


def index_png(values: np.ndarray) -> bytes:
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([i * k % 256 for i in range(256) for k in (7, 5, 3)])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
