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
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.data.writers.export_images import NAMES, encode, make_image, round_trip
from weaksam.core import storage
from weaksam.data.categories import COCO_NAMES, complete_category_ids, default_category_ids
from weaksam.data.readers.voc import read_voc
from weaksam.data.writers.coco import CocoDataset
from weaksam.data.writers.coco_results import CocoResults
from weaksam.data.writers.common import ExportImage, ExportTotals, ReadBack, compare
from weaksam.data.writers.json_arrays import elements
from weaksam.data.writers.label_studio import LabelStudioTasks
from weaksam.data.writers.voc import VocDevkit, palette, to_corners
from weaksam.data.writers.yolo import YoloLabels
from weaksam.errors import DataError

# --- polygons


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
