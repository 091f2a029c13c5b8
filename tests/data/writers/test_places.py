"""Names and numbers of images and splits in exports."""

from __future__ import annotations

import pytest

from weaksam.data.writers.places import place_images
from weaksam.data.writers.yolo import name_splits


@pytest.mark.parametrize(
    ("splits", "named"),
    [
        (["train2017", "val2017"], {"train": ["train2017"], "val": ["val2017"]}),
        (["trainval", "test"], {"train": ["trainval"], "val": ["test"], "test": ["test"]}),
        (["a", "b"], {"train": ["a", "b"], "val": ["a", "b"]}),
    ],
)
def test_splits_are_named_for_trainers(splits: list[str], named: dict) -> None:
    assert name_splits(splits) == named


def rows(*uris: str, ids: list[str] | None = None) -> list[dict]:
    ids = ids or [f"i{n}" for n in range(len(uris))]
    return [
        {"image_id": i, "uri": uri, "split": "train", "height": 1, "width": 1} for i, uri in zip(ids, uris, strict=True)
    ]


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (["000000000139", "000000000285"], [139, 285]),
        (["7", "12"], [7, 12]),
        (["b", "a"], [2, 1]),
        (["1", "01"], [2, 1]),  # not unique as numbers
        (["2007_000027", "2008_000003"], [1, 2]),
    ],
)
def test_numbers_of_images(ids: list[str], numbers: list[int]) -> None:
    places, _ = place_images(rows("r/a.jpg", "r/b.jpg", ids=ids), ids)
    assert [places[image_id].number for image_id in ids] == numbers
    [(only, place)] = place_images(rows("r/a.jpg", "r/b.jpg", ids=ids), ids[:1])[0].items()
    assert (only, place.number) == (ids[0], numbers[0])  # whatever else is exported


def test_names_of_images() -> None:
    places, root = place_images(rows("s3://b/r/x/my cat.v1.JPG", "s3://b/r/y/noextension"), {"i0", "i1"})
    assert root == "s3://b/r"
    assert [(p.file_name, p.name, p.picture) for p in places.values()] == [
        ("x/my cat.v1.JPG", "my cat.v1", "my cat.v1.JPG"),
        ("y/noextension", "noextension", "noextension"),
    ]
    places, _ = place_images(rows("r/x/my cat.jpg", "r/y/my cat.jpg"), {"i0", "i1"}, keep_spaces=False)
    assert [place.picture for place in places.values()] == ["x_my_cat.jpg", "y_my_cat.jpg"]
    uris = ["r/a.jpg", "r/a.png", "r/a_png.gif", "r/x/b.jpg"]
    places, _ = place_images(rows(*uris), {f"i{n}" for n in range(4)})
    assert [place.picture for place in places.values()] == ["a_jpg.jpg", "a_png.png", "a_png_2.gif", "b.jpg"]
    assert [place.file_name for place in places.values()] == ["a.jpg", "a.png", "a_png.gif", "x/b.jpg"]
    places, _ = place_images(rows("r/a b.jpg", "r/a_b.jpg"), {"i0", "i1"}, keep_spaces=False)
    assert [place.picture for place in places.values()] == ["a_b_jpg.jpg", "a_b_jpg_2.jpg"]
    long = "\u732b" * 83
    places, _ = place_images(rows(f"r/{long}.jpg", f"r/{long[:-1]}.jpg", f"r/{long}.png"), {"i0", "i1", "i2"})
    names = [place.name for place in places.values()]
    assert len(set(names)) == 3
    assert max(len(place.picture.encode()) for place in places.values()) <= 250
    assert all(name.startswith("\u732b" * 70) for name in names)
    assert place_images(rows("a.jpg"), {"i0"})[1] == ""


def test_characters_that_xml_and_lists_cannot_hold_are_replaced() -> None:
    uris = ["/d/a\x01b.jpg", "/d/c\nd.jpg", "/d/e\x85.jpg", "/d/\ufffe.jpg", "/d/..f.g.jpg"]
    for keep_spaces in (True, False):
        places, _ = place_images(rows(*uris), {f"i{n}" for n in range(5)}, keep_spaces=keep_spaces)
        assert [place.picture for place in places.values()] == ["a_b.jpg", "c_d.jpg", "e_.jpg", "_.jpg", "_f.g.jpg"]
        assert [place.file_name for place in places.values()] == [uri[3:] for uri in uris]


def test_ids_are_written_as_the_dataset_has_them() -> None:
    ids = ["12345678901234567", "7", "-1"]
    some = rows("r/a.jpg", "r/b.jpg", "r/c.jpg", ids=ids)
    for are_numbers in (True, None):
        places, _ = place_images(some, ids, ids_are_numbers=are_numbers)
        assert [(places[i].number, places[i].own_id) for i in ids] == [(int(i), int(i)) for i in ids]
    places, _ = place_images(some, ids, ids_are_numbers=False)
    assert [places[i].own_id for i in ids] == ids
    assert place_images(rows("r/a.jpg", ids=["12"]), {"12"}, ids_are_numbers=False)[0]["12"].own_id == "12"
    assert place_images(rows("r/a.jpg", ids=["007"]), {"007"})[0]["007"].own_id == "007"


def test_names_of_splits_are_unique_and_safe() -> None:
    splits = ["a/b", "a_b", "../z", "x\ny", "train", None]
    some = [row | {"split": split} for row, split in zip(rows(*"abcdef"), splits, strict=True)]
    places, _ = place_images(some, {row["image_id"] for row in some})
    assert [p.split_name for p in places.values()] == ["a_b_2", "a_b", "__z", "x_y", "train", "all"]
    assert [p.split for p in places.values()] == [*splits[:5], "all"]
