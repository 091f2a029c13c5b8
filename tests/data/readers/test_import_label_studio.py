"""What people made of exported tasks comes back as it is, and whatever cannot be understood is named by its task."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.writers.export_images import NAMES, make_image
from weaksam.core import storage
from weaksam.data.readers.label_studio import Review, read_reviews
from weaksam.data.writers.common import ExportImage
from weaksam.data.writers.label_studio import LabelStudioTasks
from weaksam.errors import DataError
from weaksam.ops.rle import decode_rle


def annotation(result: Sequence[dict], *, updated: str = "2026-03-01T10:00:00.250000Z", **changes: object) -> dict:
    """An annotation as Label Studio exports it."""
    return {
        "id": 7,
        "completed_by": 1,
        "result": list(result),
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2026-03-01T09:00:00.000000Z",
        "updated_at": updated,
        "draft_created_at": None,
        "lead_time": 4.5,
        "prediction": {},
        "result_count": 0,
        "unique_id": "0b9d",
        "import_id": None,
        "last_action": None,
        "task": 1,
        "project": 3,
        "parent_prediction": None,
        "parent_annotation": None,
    } | changes


def as_exported(tasks: Sequence[dict]) -> list[dict]:
    """Exported tasks as a project gives them back after somebody submitted each prediction as it was."""
    found = []
    for number, task in enumerate(copy.deepcopy(list(tasks)), start=1):
        [prediction] = task["predictions"]
        result = [region | {"origin": "prediction"} for region in prediction["result"]]
        more = {"id": number, "drafts": [], "meta": {}, "inner_id": number, "total_annotations": 1, "project": 3}
        found.append(more | {"data": task["data"], "annotations": [annotation(result)], "predictions": []})
    return found


def box(x: float, y: float, width: float, height: float, *names: str, **changes: Any) -> dict:
    """A rectangle drawn by hand, places in percent of an image of 50 x 200 pixels."""
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": list(names)}
    value |= changes.pop("value", {})
    fixed = {"original_width": 200, "original_height": 50, "image_rotation": 0, "to_name": "image", "from_name": "box"}
    return fixed | {"id": "drawn", "type": "rectanglelabels", "origin": "manual", "value": value} | changes


def polygon(points: list, **changes: Any) -> dict:
    region = box(0, 0, 0, 0) | {"id": "p", "type": "polygonlabels", "from_name": "mask"}
    return region | {"value": {"points": points, "closed": True, "polygonlabels": [NAMES[0]]}} | changes


def task(image_id: object, *annotations: dict, number: int = 1) -> dict:
    return {"id": number, "data": {"image": "http://x", "image_id": image_id}, "annotations": list(annotations)}


def read(folder: Path, tasks: object, sizes: dict | None = None) -> dict[str, Review]:
    path = folder / "review.json"
    path.write_text(json.dumps(tasks))
    return read_reviews(str(path), {"a": (50, 200), "b": None} if sizes is None else sizes, NAMES)


@pytest.fixture
def images() -> list[ExportImage]:
    rng = np.random.default_rng(0)
    return [make_image("a", rng, num=6), make_image("b", rng, num=0), make_image("c", rng, masks=False)]


def test_submitted_predictions_come_back_as_they_were(tmp_path: Path, images: list[ExportImage]) -> None:
    to = str(tmp_path)
    exporter = LabelStudioTasks(to, NAMES, tolerance=0.0, model_version="f", image_prefix=None)
    exporter.write(images)
    exporter.finish()
    tasks = as_exported(json.loads(storage.read_bytes(f"{to}/tasks.json")))
    for sizes in ({i.image_id: (i.height, i.width) for i in images}, dict.fromkeys("abc")):
        reviews = read(tmp_path, tasks, sizes)
        assert list(reviews) == ["a", "b", "c"]
        for image in images:
            review = reviews[image.image_id]
            assert (review.boxes.dtype, review.boxes.shape) == (np.float32, image.boxes.shape)
            assert np.abs(review.boxes - image.boxes).max(initial=0) < 0.01
            assert review.classes.tolist() == image.classes.tolist()
            assert review.masks == exporter.expected_masks(image)
            assert review.size == ((image.height, image.width) if len(image.boxes) or sizes["b"] else None)


def test_percent_become_pixels_and_are_cut_at_the_border(tmp_path: Path) -> None:
    drawn = [
        box(10, 20, 30, 40, NAMES[1]),
        box(90, 90, 20, 20, NAMES[0], id="other"),
        box(5, 5, 0, 0, NAMES[0], id="n"),
    ]
    review = read(tmp_path, [task("a", annotation(drawn))])["a"]
    assert review.boxes.tolist() == [[20, 10, 80, 30], [180, 45, 200, 50]]
    assert (review.classes.tolist(), review.masks, review.size) == ([1, 0], [None, None], (50, 200))


def test_a_turned_rectangle_becomes_the_upright_box_around_it(tmp_path: Path) -> None:
    # In pixels 40 wide and 10 high, its corner at (100, 10), turned clockwise about that: a quarter, then 30 degrees.
    drawn = [
        box(50, 20, 20, 20, NAMES[0], value={"rotation": 90}),
        box(50, 20, 10, 20, NAMES[0], value={"rotation": 30}),
    ]
    review = read(tmp_path, [task("a", annotation(drawn))])["a"]
    assert np.allclose(review.boxes[0], [90, 10, 100, 50], atol=1e-4)
    half, root = 0.5, np.sqrt(3) / 2  # 20 wide, 10 high
    assert np.allclose(review.boxes[1], [100 - 10 * half, 10, 100 + 20 * root, 10 + 20 * half + 10 * root], atol=1e-4)


def test_polygons_under_a_box_are_its_mask_and_others_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    square, line = [[10, 20], [20, 20], [20, 40], [10, 40]], [[1, 1], [9, 9]]
    parts = [polygon(square, parentID="drawn"), polygon([[50, 0], [60, 0], [60, 20], [50, 20]], parentID="drawn")]
    other = [box(0, 0, 50, 50, NAMES[0], id="bare"), polygon(line, parentID="bare"), polygon(square, parentID="gone")]
    choice = {"id": "c", "type": "choices", "value": {"choices": ["bad photo"]}, "from_name": "x", "to_name": "image"}
    with caplog.at_level(logging.WARNING):
        review = read(tmp_path, [task("a", annotation([box(0, 0, 90, 90, NAMES[0]), *parts, *other, choice]))])["a"]
    assert review.masks[1] is None
    mask = np.zeros((50, 200), bool)
    mask[10:20, 20:40] = mask[0:10, 100:120] = True
    assert (decode_rle(review.masks[0] or b"", 50, 200) == mask).all()
    assert [message.split("review.json: ")[1] for message in caplog.messages] == [
        "1 regions have no place (choices, texts) and are left out: task 1 region c",
        "1 polygons have fewer than 3 corners and are left out: task 1 region p",
        "1 polygons are under no box and are left out: task 1 region p",
    ]


def test_which_annotation_counts(tmp_path: Path) -> None:
    def drawn(x: float, **changes: Any) -> dict:
        return annotation([box(x, 0, 10, 10, NAMES[0])], **changes)

    def left(*tasks: dict) -> dict[str, list[float]]:
        return {image_id: review.boxes[:, 0].tolist() for image_id, review in read(tmp_path, list(tasks)).items()}

    early, late = "2026-03-01T10:00:00Z", "2026-03-01T10:00:00.000001Z"  # as text, late would come first
    assert left(task("a", drawn(1, updated=late), drawn(2, updated=early))) == {"a": [2]}
    assert left(task("a", drawn(1, updated=late), drawn(2, updated=early, ground_truth=True))) == {"a": [4]}
    assert left(task("a", drawn(1, updated=early), drawn(2, updated=late, was_cancelled=True))) == {"a": [2]}
    assert left(task("a", drawn(1, updated=""), drawn(2, updated="2026-02-01T00:00:00Z"))) == {
        "a": [2]
    }  # created later
    twice = task("a", drawn(1, updated=late)), task("a", drawn(2, updated=early, ground_truth=True), number=2)
    assert left(*twice) == left(*twice[::-1]) == {"a": [2]}
    assert left(task("a"), task("b", drawn(1, was_cancelled=True)), {**task("b"), "annotations": None}) == {}


def test_an_annotation_without_regions_says_that_nothing_is_there(tmp_path: Path) -> None:
    reviews = read(tmp_path, [task("a", annotation([])), task("b", annotation([]) | {"result": None})])
    for image_id, size in (("a", (50, 200)), ("b", None)):
        review = reviews[image_id]
        assert (review.boxes.shape, review.classes.shape, review.masks, review.size) == ((0, 4), (0,), [], size)


def test_what_is_said_about_a_region_is_no_region(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    drawn = box(10, 20, 30, 40, NAMES[0])
    said = [{**drawn, "type": "choices", "value": {**drawn["value"], "choices": ["blurred"]}}]
    said.append({"type": "relation", "from_id": drawn["id"], "to_id": drawn["id"]})
    review = read(tmp_path, [task("a", annotation([drawn, *said]))])["a"]
    assert review.boxes.tolist() == [[20, 10, 80, 30]]
    assert "2 regions have no place (choices, texts) and are left out" in caplog.text


@pytest.mark.parametrize("points", [[[1, 1, 5], [20, 1, 5]], [1, 1, 20, 1, 20, 9], [[1, 1], [20]], None])
def test_points_of_a_polygon_are_pairs(tmp_path: Path, points: object) -> None:
    around, part = box(0, 0, 50, 50, NAMES[0]), polygon([[1, 1], [20, 1], [20, 9]])
    part["value"]["points"], part["parentID"] = points, around["id"]
    with pytest.raises(
        DataError, match=rf"task 1 \(image a\): region {part['id']}: .* are no pairs of x and y in percent"
    ):
        read(tmp_path, [task("a", annotation([around, part]))])


def test_polygons_need_one_box_of_their_id(tmp_path: Path) -> None:
    square = polygon([[10, 20], [20, 20], [20, 40]], parentID="drawn")
    twins = [box(0, 0, 50, 50, NAMES[0]), box(50, 50, 50, 50, NAMES[0])]
    assert len(read(tmp_path, [task("a", annotation(twins))])["a"].boxes) == 2
    with pytest.raises(DataError, match=r"task 1 \(image a\): region p is under 2 boxes, all with the id drawn"):
        read(tmp_path, [task("a", annotation([*twins, square]))])


def test_a_polygon_far_from_its_image_is_named(tmp_path: Path) -> None:
    far = polygon([[10, 20], [1e7, 20], [20, 40]], parentID="drawn")
    with pytest.raises(DataError, match=r"task 1 region p: its polygon has the coordinate 20000000, its image is 50 x"):
        read(tmp_path, [task("a", annotation([box(0, 0, 50, 50, NAMES[0]), far]))])


BRUSH = {"id": "r", "type": "brushlabels", "value": {"format": "rle", "rle": [1], "brushlabels": [NAMES[0]]}}
OF_TASK = r"task 1 \(image a\): "
TIMELESS = {"updated_at": "yesterday"}


@pytest.mark.parametrize(
    ("regions", "fault"),
    [
        ([box(1, 1, 9, 9, "dog")], OF_TASK + "box drawn has label 'dog': classes are red kite, blue & <tit>, grün"),
        ([box(1, 1, 9, 9)], OF_TASK + "box drawn has 0 labels: give it one"),
        ([box(1, 1, 9, 9, *NAMES[:2])], OF_TASK + "box drawn has 2 labels: give it one"),
        ([BRUSH], OF_TASK + r"region r is of type brushlabels: boxes \(RectangleLabels\) and polygons"),
        ([box(1, 1, 9, 9, NAMES[0], type="ellipselabels")], "is of type ellipselabels"),
        (
            [{"id": "r", "type": "bitmasklabels", "value": {"imageDataURL": "data:"}}],
            "region r is of type bitmasklabels",
        ),
        ([{"id": "r", "type": "vectorlabels", "value": {"vertices": []}}], "region r is of type vectorlabels"),
        ([polygon([[0, 0], [9, 9], [0, 9]])], OF_TASK + "there are 1 polygons but no box"),
        ([box(1, 1, 9, 9, NAMES[0], image_rotation=90)], "region drawn was drawn on a turned image"),
        (
            [box(1, 1, 9, 9, NAMES[0], original_height=200)],
            "an image of 200 x 200 pixels, in the dataset it has 50 x 200",
        ),
        ([box(1, 1, 9, 9, NAMES[0], value={"x": None})], OF_TASK + "region drawn: .* are no pairs of x and y"),
        ([box(1, 1, 9, 9, NAMES[0], value={"width": "x"})], OF_TASK + "region drawn: .* are no pairs of x and y"),
        ([{"id": "r"}], OF_TASK + r"its regions cannot be read \(KeyError\('type'\)\)"),
    ],
)
def test_what_is_wrong_with_a_task_is_told(tmp_path: Path, regions: list[dict], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read(tmp_path, [task("a", annotation(regions))])


def test_a_reduced_copy_of_an_image_may_have_been_shown(tmp_path: Path) -> None:
    small = box(50, 50, 50, 50, NAMES[0], original_width=67, original_height=17)
    assert read(tmp_path, [task("a", annotation([small]))])["a"].boxes.tolist() == [[100, 25, 200, 50]]


def test_sizes_of_regions_may_be_text(tmp_path: Path) -> None:
    region = box(50, 50, 50, 50, NAMES[0], original_width="200", original_height=50.0)
    for image_id in ("a", "b"):
        review = read(tmp_path, [task(image_id, annotation([region]))])[image_id]
        assert (review.boxes.tolist(), review.size) == ([[100, 25, 200, 50]], (50, 200))
    for wrong in (float("nan"), "wide", [200]):
        with pytest.raises(DataError, match="task 1 region drawn: its width must be a whole number of pixels up to"):
            read(tmp_path, [task("a", annotation([region | {"original_width": wrong}]))])


def test_the_size_must_be_known_to_somebody(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task 1 \(image b\): nobody knows the size of its image"):
        read(tmp_path, [task("b", annotation([box(1, 1, 9, 9, NAMES[0], original_width=None)]))])


FLAT = {"id": 1, "image": "http://x", "image_id": "a", "box": [{"x": 1, "y": 1, "width": 1, "height": 1}]}


def test_tasks_of_images_that_the_dataset_no_longer_has_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = task("z", annotation([]), number=5)
    assert list(read(tmp_path, [strange, task("a", annotation([]))])) == ["a"]
    assert "1 tasks are of images that are not in the dataset and are left out: task 5 (z)" in caplog.text
    (tmp_path / "other.json").write_text(json.dumps([strange]))
    assert read_reviews(str(tmp_path / "other.json"), {"a": None}, NAMES, is_sample=True) == {}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"images": []}, "is a list of tasks, this holds dict: in Label Studio export the project as JSON"),
        (
            [FLAT],
            "entry 0 is no task with data and annotations: in Label Studio export the project as JSON, not JSON-MIN",
        ),
        ([{"data": {"image_id": "a"}, "predictions": []}], "entry 0 is no task with data and annotations"),
        ([task("z", annotation([]), number=5)], "task 5 is of image 'z', which is not in the dataset"),
        ([task(None, annotation([]), number=5)], "task 5 has no image_id in its data: import the tasks.json"),
        ([task("a", annotation([], **TIMELESS))], r"task 1: its annotations cannot be read \(ValueError"),
    ],
)
def test_files_that_are_no_review_are_refused(tmp_path: Path, content: object, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        read(tmp_path, content)
    with pytest.raises(DataError, match=r"other\.json: cannot be read as a Label Studio export"):
        read_reviews(str(tmp_path / "other.json"), {}, NAMES)
