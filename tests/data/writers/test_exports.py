"""Exports without a cluster: polygons hold whole pixels, files are read by others, names and numbers are stable."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from weaksam.core import storage
from weaksam.data.categories import COCO_NAMES, complete_category_ids, default_category_ids
from weaksam.data.readers.voc import read_voc
from weaksam.data.writers.coco import CocoDataset
from weaksam.data.writers.coco_results import CocoResults
from weaksam.data.writers.common import ExportImage, ExportTotals, ReadBack, compare
from weaksam.data.writers.json_arrays import elements
from weaksam.data.writers.label_studio import LabelStudioTasks
from weaksam.data.writers.places import Place, place_images
from weaksam.data.writers.polygons import draw_polygons, join_polygons, outlines, signed_area, simplify, to_polygons
from weaksam.data.writers.voc import VocDevkit, palette, to_corners
from weaksam.data.writers.yolo import YoloLabels, name_splits
from weaksam.errors import DataError

NAMES = ["red kite", "blue & <tit>", "grün"]


def encode(mask: np.ndarray) -> bytes:
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"]


def blob(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A mask with bays, holes and loose parts, never empty."""
    noise = ndimage.gaussian_filter(rng.normal(size=(height, width)), rng.uniform(0.5, 4))
    mask = noise > np.quantile(noise, rng.uniform(0.3, 0.9))
    mask[rng.integers(height), rng.integers(width)] = True
    return mask


def make_image(
    image_id: str, rng: np.random.Generator, *, num: int = 3, split: str = "train", masks: bool = True, **place: object
) -> ExportImage:
    height, width = (int(side) for side in rng.integers(20, 70, 2))
    corners = np.sort(rng.uniform(0, 1, (num, 2, 2)), axis=1) * [width, height]
    boxes = np.concatenate([corners[:, 0], np.minimum(corners[:, 1] + 0.01, [width, height])], axis=1)
    scores = -np.sort(-rng.uniform(1e-9, 1, num))
    fixed = {
        "number": 7,
        "own_id": image_id,
        "split": split,
        "split_name": split,
        "uri": f"s3://b/i/{image_id}.jpg",
        "file_name": f"{image_id}.jpg",
    }
    where = Place(**fixed | {"name": image_id, "height": None, "width": None} | place)  # type: ignore[arg-type]
    found = [encode(blob(rng, height, width)) if masks and i != 1 else None for i in range(num)]
    classes = rng.integers(0, len(NAMES), num)
    return ExportImage(image_id, where, height, width, boxes.astype("f4"), classes, scores.astype("f4"), found)


@pytest.fixture
def images() -> list[ExportImage]:
    """Four images: one with a space and umlauts, one without boxes, one of another split."""
    rng = np.random.default_rng(0)
    return [
        make_image("a", rng, number=1),
        make_image("ä b", rng, number=2, name="ä_b"),
        make_image("c", rng, num=0, number=3),
        make_image("d", rng, number=4, split="val"),
    ]


def round_trip(exporter: object, images: list[ExportImage]) -> ExportTotals:
    """Writes, reads back in two pieces, compares."""
    tally = ExportTotals()
    exporter.write(images[:2])  # type: ignore[attr-defined]
    exporter.write(images[2:])  # type: ignore[attr-defined]
    exporter.finish()  # type: ignore[attr-defined]
    for piece in (images[:3], images[3:]):
        for image, found in zip(piece, exporter.read(piece), strict=True):  # type: ignore[attr-defined]
            compare(image, found, exporter, tally)  # type: ignore[arg-type]
    exporter.check_rest()  # type: ignore[attr-defined]
    assert tally.images == len(images)
    assert tally.boxes == sum(len(image.boxes) for image in images)
    return tally


# --- polygons


def test_an_outline_follows_the_sides_of_pixels() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    [ring] = outlines(mask)
    assert sorted(map(tuple, ring.tolist())) == [(1, 1), (1, 3), (4, 1), (4, 3)]
    assert signed_area(ring) == 6
    assert outlines(np.zeros((3, 3), bool)) == []


def test_holes_run_the_other_way_and_pixels_at_a_corner_are_apart() -> None:
    mask = np.ones((5, 5), bool)
    mask[2, 2] = False
    assert sorted(signed_area(ring) for ring in outlines(mask)) == [-1, 25]
    assert [signed_area(ring) for ring in outlines(np.eye(3, dtype=bool))] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_the_mask_with_its_holes_filled(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = make_image("a", rng, num=0)
    mask = blob(rng, image.height, image.width)
    mask[2:9, 2:9] = True
    mask[3:8, 3:8] = False
    mask[5, 5] = True  # a part in a hole
    parts, holes = to_polygons(image, encode(mask))
    # Pixels are neighbours by their sides, those around by their corners too.
    filled = ndimage.binary_fill_holes(mask, np.ones((3, 3)))
    assert len(parts) == ndimage.label(filled)[1]
    assert holes == ndimage.label(~np.pad(mask, 1), np.ones((3, 3)))[1] - 1 >= 1
    assert signed_area(parts[0]) == max(signed_area(part) for part in parts)
    for polygons in (parts, [join_polygons(parts)]):
        assert (image.decode(draw_polygons(image, polygons)) == filled).all()


def test_a_tolerance_leaves_corners_out_and_little_else() -> None:
    picture = Image.new("1", (120, 100))
    ImageDraw.Draw(picture).ellipse((10, 10, 105, 80), fill=1)
    image = make_image("a", np.random.default_rng(0), num=0)
    image = ExportImage("a", image.place, 100, 120, image.boxes, image.classes, image.scores, [])
    counts = encode(np.array(picture))
    [exact], [rough] = to_polygons(image, counts)[0], to_polygons(image, counts, 1.0)[0]
    assert len(rough) < len(exact) / 4
    one, other = image.decode(counts), image.decode(draw_polygons(image, [rough]))
    assert (one & other).sum() / (one | other).sum() > 0.97
    assert len(simplify(np.array([[0, 0], [1, 0], [1, 1], [0, 1]]), 5.0)) == 4  # it would lose its area


# --- formats


@pytest.mark.parametrize("polygons", [None, 0.0])
def test_coco_is_read_by_pycocotools_and_scores_itself(images: list[ExportImage], polygons: float | None) -> None:
    to = f"memory://coco/{polygons}"
    exporter = CocoDataset(to, NAMES, polygons=polygons, image_root="s3://b/i", category_ids=None)
    tally = round_trip(exporter, images)
    assert tally.masks == 6
    assert (tally.worst_iou == 1.0) == (polygons is None or not exporter.lost["holes_filled"])
    coco = COCO()
    coco.dataset = storage.read_json(exporter.uri("train"))
    coco.createIndex()
    assert [(c["id"], c["name"]) for c in coco.loadCats(coco.getCatIds())] == list(enumerate(NAMES, start=1))
    assert coco.loadImgs([2])[0]["file_name"] == "ä b.jpg"
    assert coco.getAnnIds([3]) == []
    annotations = coco.dataset["annotations"]
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
    assert all(a["area"] > 0 and a["iscrowd"] == 0 for a in annotations)
    for annotation in annotations:
        annotation.setdefault("segmentation", [[0, 0, 1, 0, 1, 1]])  # pycocotools wants one for kind segm
    results = [{key: a[key] for key in ("image_id", "category_id", "bbox", "score")} for a in annotations]
    evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_only_cocos_own_names_have_cocos_ids() -> None:
    assert (len(COCO_NAMES), len(set(COCO_NAMES)), COCO_NAMES[11]) == (80, 80, "stop sign")
    ids = default_category_ids(COCO_NAMES)
    assert (ids[0], ids[11], ids[-1]) == (1, 13, 90)
    in_order = default_category_ids(sorted(COCO_NAMES))  # a folder's classes are sorted by name
    assert (in_order[0], in_order[-1]) == (5, 24)  # airplane, zebra
    assert default_category_ids([f"my {i}" for i in range(80)]) == list(range(1, 81))
    assert complete_category_ids([7, None, 0, None], {0, 7, 3}) == [7, 8, 0, 9]


def test_both_forms_have_the_datasets_own_category_ids(images: list[ExportImage]) -> None:
    own = [0, 7, 5]
    results = CocoResults("memory://own", NAMES, number_images=True, category_ids=own)
    dataset = CocoDataset("memory://own", NAMES, polygons=None, image_root="s3://b/i", category_ids=own)
    assert round_trip(results, images).boxes == round_trip(dataset, images).boxes > 0
    entries = json.loads(storage.read_bytes("memory://own/results.json"))
    assert [entry["category_id"] for entry in entries[:3]] == [own[label] for label in images[0].classes]
    content = json.loads(storage.read_bytes("memory://own/annotations/instances_train.json"))
    assert content["categories"] == [{"id": k, "name": name} for k, name in zip(own, NAMES, strict=True)]
    assert [a["category_id"] for a in content["annotations"][:3]] == [own[label] for label in images[0].classes]


@pytest.mark.parametrize("number_images", [True, False])
def test_coco_results_keep_ids_and_every_digit(images: list[ExportImage], number_images: bool) -> None:
    to = f"memory://results/{number_images}"
    exporter = CocoResults(to, NAMES, number_images=number_images, category_ids=None)
    assert round_trip(exporter, images).worst_iou == 1.0
    entries = json.loads(storage.read_bytes(f"{to}/results.json"))
    assert {entry["image_id"] for entry in entries} == ({1, 2, 4} if number_images else {"a", "ä b", "d"})
    assert np.float32(entries[0]["score"]) == images[0].scores[0]
    assert exporter.lost["images_without_boxes"] == 1


def test_voc_is_read_by_our_reader(images: list[ExportImage]) -> None:
    exporter = VocDevkit("memory://voc", NAMES)
    tally = round_trip(exporter, images)
    assert tally.mask_pixels_written < tally.mask_pixels  # they overlap
    with io.StringIO(storage.read_bytes("memory://voc/images.csv").decode()) as stream:
        listed = list(csv.DictReader(stream))
    assert {"file": "JPEGImages/ä_b.jpg", "uri": "s3://b/i/ä b.jpg"} in listed
    for row in listed:
        storage.write_bytes(f"memory://voc/{row['file']}", b"")  # listed by the reader, never opened
    dataset = read_voc("memory://voc", ["train", "val"], classes=NAMES)
    assert dataset.images["image_id"].to_pylist() == ["a", "c", "ä_b", "d"]
    truth = {row["image_id"]: row for row in dataset.ground_truth.to_pylist()}
    for image in images:
        row = truth[image.place.name]
        assert row["classes"] == image.classes.tolist()
        boxes = np.array(row["boxes"]).reshape(-1, 4)
        sides = image.boxes[:, 2:] - image.boxes[:, :2]
        moved = np.abs(boxes - image.boxes)[(sides >= 1).all(1)]
        assert moved.max(initial=0) <= 0.5
    best = truth["a"]["masks"][0]
    assert best == images[0].masks[0]  # nothing lies on top of it
    assert truth["a"]["masks"][1] is None
    assert storage.read_bytes("memory://voc/ImageSets/Segmentation/val.txt") == b"d\n"
    picture = Image.open(io.BytesIO(storage.read_bytes("memory://voc/SegmentationClass/a.png")))
    assert (picture.mode, np.array(picture).max()) == ("P", images[0].classes.max() + 1)


def test_voc_corners_are_whole_inclusive_and_inside() -> None:
    boxes = np.array([[0, 0, 10, 8], [1.4, 1.6, 5.5, 5.4], [9.6, 2, 9.9, 3], [9.5, 7.2, 10, 7.4]], np.float32)
    assert to_corners(boxes, 8, 10).tolist() == [[1, 1, 10, 8], [2, 3, 6, 5], [10, 3, 10, 3], [10, 8, 10, 8]]


def test_voc_colours() -> None:
    colours = np.frombuffer(palette(), np.uint8).reshape(-1, 3)
    assert colours[[0, 1, 2, 15, 255]].tolist() == [[0] * 3, [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192]]


def test_voc_has_room_for_254_classes_and_masks() -> None:
    with pytest.raises(DataError, match="room for 254 classes, there are 255: use coco"):
        VocDevkit("memory://x", [str(i) for i in range(255)])
    base = make_image("a", np.random.default_rng(1), num=0)
    num = 260
    masks = []
    for i in range(num):
        mask = np.zeros((20, 20), bool)
        mask[i // 20, i % 20] = True
        masks.append(encode(mask))
    boxes = np.tile(np.array([[0, 0, 20, 20]], np.float32), (num, 1))
    scores = np.linspace(1, 0.5, num, dtype=np.float32)
    image = ExportImage("a", base.place, 20, 20, boxes, np.zeros(num, int), scores, masks)
    exporter = VocDevkit("memory://voc254", NAMES)
    tally = round_trip(exporter, [image])
    assert (exporter.lost["masks_beyond_254"], tally.mask_pixels_written) == (6, 254)


def parse_yolo(text: str) -> list[tuple[int, list[float]]]:
    return [(int(line.split(" ")[0]), [float(v) for v in line.split(" ")[1:]]) for line in text.strip().split("\n")]


def test_yolo_boxes(images: list[ExportImage]) -> None:
    exporter = YoloLabels("memory://yolo", NAMES, polygons=None)
    round_trip(exporter, images)
    assert storage.read_bytes("memory://yolo/labels/train/c.txt") == b""
    for image in (images[0], images[3]):
        text = storage.read_bytes(f"memory://yolo/labels/{image.place.split}/{image.place.name}.txt").decode()
        for (label, (cx, cy, w, h)), wanted, box in zip(parse_yolo(text), image.classes, image.boxes, strict=True):
            got = [(cx - w / 2) * image.width, (cy - h / 2) * image.height]
            got += [(cx + w / 2) * image.width, (cy + h / 2) * image.height]
            assert label == wanted
            assert np.allclose(got, box, atol=1e-3)
    content = yaml.safe_load(storage.read_bytes("memory://yolo/data.yaml"))
    assert content == {"train": "images/train", "val": "images/val", "names": dict(enumerate(NAMES))}
    assert exporter.lost == Counter(scores=9, masks=6)


def test_yolo_boxes_of_a_panorama() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (200, 2, 2)), axis=1) * [30_000, 9_000]
    boxes = corners.reshape(-1, 4).astype("f4")
    image = make_image("a", rng, num=200, masks=False)
    image = replace(image, height=9_000, width=30_000, boxes=boxes)
    round_trip(YoloLabels("memory://yolo-wide", NAMES, polygons=None), [image])


def test_yolo_polygons(images: list[ExportImage]) -> None:
    exporter = YoloLabels("memory://yolo-segment", NAMES, polygons=0.0)
    tally = round_trip(exporter, images)
    assert exporter.lost["boxes_as_polygons"] == 3
    assert exporter.lost["further_parts_joined"] > 0
    assert exporter.lost["holes_filled"] > 0
    assert 0.5 < tally.worst_iou < 1
    image = images[0]
    lines = parse_yolo(storage.read_bytes("memory://yolo-segment/labels/train/a.txt").decode())
    points = np.array(lines[1][1]).reshape(-1, 2) * [image.width, image.height]  # has no mask: its box
    assert np.allclose([*points.min(0), *points.max(0)], image.boxes[1], atol=1e-3)
    assert all(0 <= value <= 1 for _, values in lines for value in values)


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


def test_label_studio_tasks(images: list[ExportImage]) -> None:
    to = "memory://label-studio"
    settings = {"tolerance": 0.0, "model_version": "pgt-f", "image_prefix": "https://host/d/"}
    exporter = LabelStudioTasks(to, NAMES, **settings)  # type: ignore[arg-type]
    tally = round_trip(exporter, images)
    assert tally.masks == 6
    tasks = json.loads(storage.read_bytes(f"{to}/tasks.json"))
    assert [task["data"]["image"] for task in tasks][1:3] == ["https://host/d/%C3%A4%20b.jpg", "https://host/d/c.jpg"]
    [prediction] = tasks[0]["predictions"]
    assert (prediction["model_version"], np.float32(prediction["score"])) == ("pgt-f", images[0].scores[0])
    region = prediction["result"][0]
    value = region["value"]
    assert value["x"] == pytest.approx(100 * images[0].boxes[0, 0] / images[0].width, abs=1e-5)
    assert value["rectanglelabels"] == [NAMES[images[0].classes[0]]]
    assert (region["type"], region["to_name"], region["original_width"]) == (
        "rectanglelabels",
        "image",
        images[0].width,
    )
    parents = {r["parentID"] for r in prediction["result"] if r["type"] == "polygonlabels"}
    assert parents == {"box0", "box2"}
    assert tasks[2]["predictions"][0]["result"] == []
    config = storage.read_bytes(f"{to}/label_config.xml").decode()
    assert 'value="blue &amp; &lt;tit&gt;"' in config
    assert '<PolygonLabels name="mask" toName="image">' in config


# --- what is wrong is named


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"classes": [9, 9, 9]}, "classes are"),
        ({"boxes": np.zeros((3, 4))}, "boxes are"),
        ({"scores": np.zeros(3)}, "scores are"),
        ({"masks": [None, None, None]}, "pixels of mask 1 are"),
        ({"size": (1, 2)}, "height and width are"),
    ],
)
def test_a_difference_names_the_image(images: list[ExportImage], change: dict, what: str) -> None:
    image = images[0]
    exporter = CocoDataset("memory://x", NAMES, polygons=None, image_root="", category_ids=None)
    right = {"boxes": image.boxes, "classes": image.classes.tolist(), "scores": image.scores, "masks": image.masks}
    compare(image, ReadBack(**right), exporter, ExportTotals())
    with pytest.raises(DataError, match=f"image a: read back, its {what}"):
        compare(image, ReadBack(**right | change), exporter, ExportTotals())


def test_more_in_a_file_than_was_written_is_noticed(images: list[ExportImage]) -> None:
    exporter = CocoResults("memory://more", NAMES, number_images=False, category_ids=None)
    exporter.write(images)
    exporter.finish()
    list(exporter.read(images[:3]))
    with pytest.raises(ValueError, match=r"results\.json holds more than was written"):
        exporter.check_rest()


def test_arrays_are_decoded_one_element_at_a_time() -> None:
    text = json.dumps({"a": {"b": [1, "]"]}, "b": [{"x": [1, 2]}, [], "s,]", 3.5], "c": 1}, indent=1)
    assert list(elements(text, "b")) == [{"x": [1, 2]}, [], "s,]", 3.5]
    assert list(elements("[]")) == []
    assert list(elements(" [ 1 ,2 ]\n")) == [1, 2]
    with pytest.raises(ValueError, match="an array was expected"):
        list(elements("{}"))


# --- names and numbers


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


@pytest.mark.parametrize("format", ["coco", "voc", "yolo"])
def test_splits_of_like_names_stay_apart(format: str) -> None:
    to, rng = f"memory://splits/{format}", np.random.default_rng(0)
    exporter = {
        "coco": CocoDataset(to, NAMES, polygons=None, image_root="", category_ids=None),
        "voc": VocDevkit(to, NAMES),
        "yolo": YoloLabels(to, NAMES, polygons=None),
    }[format]
    found = [
        make_image("a", rng, split="a/b", number=1, split_name="a_b_2"),
        make_image("b", rng, split="a_b", number=2),
    ]
    exporter.write(found)
    exporter.finish()
    tally = ExportTotals()
    for image, one in zip(found, exporter.read(found), strict=True):
        compare(image, one, exporter, tally)
    exporter.check_rest()
    assert tally.splits == {"a/b": 1, "a_b": 1}
