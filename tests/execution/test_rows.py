"""Rows of fetched images: what is prepared ahead, and whose fault is whose."""

from __future__ import annotations

import pyarrow as pa

from tests.stages.test_proposals import jpeg
from weaksam.core import schemas
from weaksam.errors import ImageError
from weaksam.execution.mapping import ImageMapper, map_batch


def fetched(*names: str) -> pa.Table:
    """Images of 4 x 6 pixels; one named "gone" could not be fetched, one named "broken" is no image."""
    data = [None if name == "gone" else b"no image" if name == "broken" else jpeg(4, 6) for name in names]
    status = ["not_found" if name == "gone" else "ok" for name in names]
    return pa.table(
        {
            "image_id": list(names),
            "data": pa.array(data, pa.large_binary()),
            "status": status,
            "message": ["" for _ in names],
        }
    )


def run(*names: str) -> tuple[list[str], dict[str, str]]:
    """In which order images are prepared and made, and the status of each row."""
    order = []

    class Mapper(ImageMapper):
        def prepare(self, image, row):
            order.append(f"prepare {row['image_id']}")
            if row["image_id"] == "dark":
                raise ImageError("oom", "too dark")
            return row["image_id"].upper()

        def make(self, image, row, prepared):
            assert image.shape == (4, 6, 3)
            assert row["data"] == jpeg(4, 6)
            assert prepared == row["image_id"].upper()
            order.append(f"make {row['image_id']}")
            return {}

    rows = map_batch(Mapper(), fetched(*names), schema=schemas.HYGIENE, max_pixels=100).to_pylist()
    assert all((row["height"], row["width"]) == (4, 6) for row in rows if row["status"] == "ok")
    return order, {row["image_id"]: row["status"] for row in rows}


def test_the_next_image_is_prepared_before_one_is_made():
    order, status = run("a", "b", "c")
    assert order == ["prepare a", "prepare b", "make a", "prepare c", "make b", "make c"]
    assert status == {"a": "ok", "b": "ok", "c": "ok"}


def test_an_image_that_fails_costs_no_other():
    order, status = run("gone", "a", "broken", "dark", "b")
    assert order == ["prepare a", "make a", "prepare dark", "prepare b", "make b"]
    assert status == {"gone": "not_found", "a": "ok", "broken": "unreadable", "dark": "oom", "b": "ok"}
    assert run() == ([], {})
