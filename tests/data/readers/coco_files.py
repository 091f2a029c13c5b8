"""Files of small datasets in COCO's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from testing.places import SHARED_DATA
from weaksam.core import storage

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]


def shared(*parts: str) -> Path:
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no data at {path}")
    return path


def image(number: object, name: str | None = None, height: int = 10, width: int = 20) -> dict[str, Any]:
    return {"id": number, "file_name": name or f"{number}.jpg", "height": height, "width": width}


def note(
    number: int, image_id: object = 1, category: int = 1, box: object = (1, 2, 3, 4), **more: Any
) -> dict[str, Any]:
    box = list(box) if isinstance(box, tuple) else box
    return {"id": number, "image_id": image_id, "category_id": category, "bbox": box, **more}


def write(
    root: Path, images: list[dict], notes: list[dict] | None, *, split: str = "train", form: str = "instances"
) -> str:
    content: dict[str, Any] = {"images": images, "categories": CATEGORIES}
    if notes is not None:
        content["annotations"] = notes
    storage.write_bytes(str(root / "annotations" / f"{form}_{split}.json"), json.dumps(content).encode())
    for entry in images:
        storage.write_bytes(str(root / split / entry["file_name"]), b"1234567")
    return str(root)
