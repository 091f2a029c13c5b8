"""Exporting as a stage: what it reads, what it tells, which faults it names, and that a broken export is noticed."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from tests.stages.test_train_wsod import finished
from weaksam.core import schemas, storage, tables
from weaksam.core.step import Step
from weaksam.data.readers.coco import read_coco
from weaksam.data.readers.coco_results import read_results
from weaksam.data.writers import EXPORT_FORMATS, yolo
from weaksam.data.writers.format import ExportOptions
from weaksam.errors import ConfigError, DataError
from weaksam.stages import export, export_rows
from weaksam.stages.export_config import ExportConfig


def encode(*window: int, hole: bool = False) -> bytes:
    mask = np.zeros((60, 100), np.uint8, order="F")
    left, top, right, bottom = window
    mask[top:bottom, left:right] = 1
    if hole:
        mask[top + 5 : top + 10, left + 5 : left + 10] = 0
    return coco_mask.encode(mask)["counts"]


IMAGES = [
    {"image_id": "a", "uri": "s3://b/i/train/a 1.jpg", "split": "train", "height": 60, "width": 100},
    {"image_id": "b", "uri": "s3://b/i/train/ö.jpg", "split": "train"},
    {"image_id": "c", "uri": "s3://b/i/train/c.jpg", "split": "train", "height": 60, "width": 100},
    {"image_id": "d", "uri": "s3://b/i/train/d.jpg", "split": "train"},
    {"image_id": "t", "uri": "s3://b/i/test/t.jpg", "split": "test", "height": 60, "width": 100},
]
FOUND = [
    # Worst first; sizes are those of the images table. One box reaches beyond the image, one is all outside.
    {
        "image_id": "a",
        "boxes": [[10, 10, 40, 40], [20.5, 20.25, 110, 50], [120, 0, 130, 10], [1, 1, 5, 5]],
        "classes": [0, 1, 0, 0],
        "scores": [0.5, 0.9, 0.8, 0.1],
        "masks": [encode(10, 10, 40, 40, hole=True), encode(30, 20, 90, 50), None, encode(0, 0, 0, 0)],
    },
    {"image_id": "b", "boxes": [], "classes": [], "scores": [], "masks": None, "height": 60, "width": 100},
    {"image_id": "c", "boxes": [[0, 0, 9, 9]], "classes": [1], "scores": [0.7], "masks": None},
]
FORMATS = ["coco", "coco_results", "voc", "yolo", "yolo_segment", "label_studio"]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Step]:
    """Pseudo ground truth in two parts; one image failed, one part holds an image again."""
    images = finished(tmp_path, "images", IMAGES, schemas.IMAGES, {})
    rows = [{"status": "ok", "message": ""} | row for row in FOUND]
    rows.append({"image_id": "d", "status": "unreadable", "message": "cut off"})
    pgt = finished(tmp_path, "pgt", rows[2:], schemas.DETECTIONS, {"images": images})
    schema = schemas.with_metadata(schemas.DETECTIONS, fingerprint="f", class_names=["red", "blue"])
    again = {**rows[2], "boxes": [], "classes": [], "scores": []}
    parts = [tables.write_part(pgt.folder, schemas.to_table(some, schema)) for some in (rows[2:], [*rows[:2], again])]
    storage.write_json(pgt.manifest_uri, {"parts": parts, "excluded": {parts[1]: ["c"]}})
    return {"images": images, "pgt": pgt}


def make_step(folder: Path, inputs: dict[str, Step], **changes: object) -> Step:
    config = ExportConfig.model_validate({"images": "images", "pgt": "pgt", "format": "coco"} | changes)
    return Step("export", export.STAGE, config, inputs, {}, "x", str(folder / "export-x"))


def report_of(step: Step) -> dict:
    return json.loads(Path(step.folder, "export.json").read_text())


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_written_and_read_back(tmp_path: Path, inputs: dict[str, Step], format: str) -> None:
    step = make_step(tmp_path, inputs, format=format, to=f"memory://export/{tmp_path.name}/{format}")
    outcome = export.run(step)
    assert (outcome.rows, outcome.failed, outcome.failures) == (4, 1, ["d: unreadable: cut off"])
    report = report_of(step)
    assert report["left_out"]["failed_images"] == 1
    assert (report["images"], report["splits"], report["image_root"]) == (3, {"train": 3}, "s3://b/i/train")
    assert report["boxes"] == 4
    assert report["masks"] == (0 if format == "yolo" else 2)
    assert report["left_out"]["boxes_without_area"] == report["lost"]["boxes_cut_at_border"] == 1
    files = storage.list_files(step.config.to)
    assert len(files) == report["files"] + 1  # the mark that the folder is this step's
    assert outcome.summary.startswith(f"{format}: {report['files']} files, 3 images")
    assert outcome.summary.endswith(step.config.to)


def test_best_first_in_a_coco_dataset_beside_the_step(tmp_path: Path, inputs: dict[str, Step]) -> None:
    step = make_step(tmp_path, inputs, min_score=0.2)
    export.run(step)
    content = json.loads(Path(step.folder, "export", "annotations", "instances_train.json").read_text())
    assert [(i["id"], i["file_name"], i["original_id"]) for i in content["images"]] == [
        (1, "a 1.jpg", "a"),
        (2, "ö.jpg", "b"),
        (3, "c.jpg", "c"),
    ]
    first, second, third = content["annotations"]
    assert (first["bbox"], first["category_id"], first["image_id"]) == ([20.5, 20.25, 79.5, 29.75], 2, 1)
    assert (first["area"], first["segmentation"]["size"]) == (60 * 30, [60, 100])
    assert (second["bbox"], second["area"]) == ([10, 10, 30, 30], 30 * 30 - 25)
    assert (third["area"], "segmentation" in third) == (81, False)
    report = report_of(step)
    assert report["left_out"] == {"failed_images": 1, "boxes_below_min_score": 1, "boxes_without_area": 1}
    assert report["mask_iou"] == {"mean": 1.0, "worst": 1.0, "worst_image": None}


def test_what_polygons_lose_is_told(tmp_path: Path, inputs: dict[str, Step]) -> None:
    step = make_step(tmp_path, inputs, polygons=True)
    outcome = export.run(step)
    report = report_of(step)
    assert report["lost"]["holes_filled"] == 1
    assert report["mask_iou"] == {
        "mean": pytest.approx((1 + 875 / 900) / 2),
        "worst": pytest.approx(875 / 900),
        "worst_image": "a",
    }
    assert "masks' IoU 0.9861 on average, 0.9722 at worst" in outcome.summary


def test_results_are_accepted_by_the_reader_of_results(tmp_path: Path, inputs: dict[str, Step]) -> None:
    step = make_step(tmp_path, inputs, format="coco_results", max_per_image=2)
    export.run(step)
    table = read_results(f"{step.folder}/export/results.json", ["a", "b", "c"], ["red", "blue"], category_ids=None)
    rows = table.to_pylist()
    assert [row["boxes"] for row in rows] == [[[20.5, 20.25, 100, 50], [10, 10, 40, 40]], [], [[0, 0, 9, 9]]]
    assert np.allclose(rows[0]["scores"], [0.9, 0.5])
    assert report_of(step)["left_out"]["boxes_beyond_max_per_image"] == 1


def test_masks_that_cover_each_other_are_counted(tmp_path: Path, inputs: dict[str, Step]) -> None:
    step = make_step(tmp_path, inputs, format="voc")
    export.run(step)
    assert report_of(step)["lost"]["mask_pixels_covered"] == 10 * 20
    assert report_of(step)["lost"]["images_renamed"] == 1
    text = Path(step.folder, "export", "ImageSets", "Main", "train.txt").read_text()
    assert text == "a_1\nc\nö\n"
    again = make_step(tmp_path, inputs, format="voc", masks=False, to=str(tmp_path / "boxes"))
    export.run(again)
    assert not (tmp_path / "boxes" / "SegmentationObject").exists()


def test_detections_can_be_exported(tmp_path: Path, inputs: dict[str, Step]) -> None:
    found = {"images": inputs["images"], "detections": inputs["pgt"]}
    step = make_step(tmp_path, found, pgt=None, detections="found", format="label_studio")
    export.run(step)
    [task, *_] = json.loads(Path(step.folder, "export", "tasks.json").read_text())
    assert task["data"]["image"] == "s3://b/i/train/a 1.jpg"
    assert task["predictions"][0]["model_version"] == "pgt-f"


@pytest.mark.parametrize("format", FORMATS)
def test_files_of_one_stem_do_not_hinder_an_export(
    tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    named = [{"image_id": f"a.{kind}", "uri": f"/d/a.{kind}", "split": "train"} for kind in ("jpg", "png")]
    images = finished(tmp_path, "images", named, schemas.IMAGES, {})
    row = {"status": "ok", "message": "", "boxes": [[0, 0, 9, 9]], "classes": [0], "scores": [0.5]}
    row |= {"height": 60, "width": 100, "masks": [encode(0, 0, 9, 9)]}
    rows = [row | {"image_id": one["image_id"]} for one in named]
    pgt = finished(tmp_path, "pgt", rows, schemas.DETECTIONS, {"images": images})
    step = make_step(tmp_path, {"images": images, "pgt": pgt}, format=format)
    assert export.run(step).rows == 2
    is_renamed = format in ("voc", "yolo", "yolo_segment")
    warned = "export: 2 images have another name in the export: a.jpg -> a_jpg.jpg, a.png -> a_png.png"
    assert (warned in caplog.text) == is_renamed
    assert report_of(step)["lost"].get("images_renamed") == (2 if is_renamed else None)
    if format == "coco":
        content = json.loads(Path(step.folder, "export", "annotations", "instances_train.json").read_text())
        assert [one["file_name"] for one in content["images"]] == ["a.jpg", "a.png"]


def test_the_same_step_goes_on_and_another_is_refused(tmp_path: Path, inputs: dict[str, Step]) -> None:
    to = str(tmp_path / "out")
    step = make_step(tmp_path, inputs, format="yolo", to=to)
    first, second = export.run(step), export.run(step)
    assert first.summary == second.summary
    (tmp_path / "out" / "weaksam_export_yolo.json").unlink()
    with pytest.raises(ConfigError, match=r"steps.export.to: .*/out holds labels and data.yaml and images.csv already"):
        export.run(step)


def test_what_another_program_spoils_is_noticed(
    tmp_path: Path, inputs: dict[str, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(tmp_path, inputs, format="yolo")
    right = yolo.to_lines
    monkeypatch.setattr(yolo, "to_lines", lambda classes, shapes, **_: right(classes, [s * 0.9 for s in shapes]))
    with pytest.raises(DataError, match="image a: read back, its boxes are"):
        export.run(step)
    monkeypatch.setattr(yolo, "to_lines", lambda classes, shapes, **_: b"red 1 2 3 4\n")
    with pytest.raises(DataError, match=r"what was written for images a to c cannot be read back \(ValueError"):
        export.run(step)
    monkeypatch.undo()
    Path(step.folder, "export", "labels", "train", "more.txt").write_text("")
    with pytest.raises(DataError, match="labels has 4 files, 3 were written"):
        export.run(step)
    assert not Path(step.folder, "export.json").exists()


def test_sizes_that_no_table_has_are_read_from_the_files_or_named(
    tmp_path: Path, inputs: dict[str, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_rows, "read_sizes", lambda uris: [None])
    rows = [{"image_id": "b", "status": "ok", "boxes": [[0, 0, 5, 5]], "classes": [0], "scores": [0.5]}]
    source = finished(tmp_path, "sizeless", rows, schemas.DETECTIONS, {})
    with pytest.raises(DataError, match=r"image b: neither its row nor .* width, and s3://b/i/train/ö\.jpg cannot be"):
        export.run(make_step(tmp_path, inputs | {"pgt": source}))
    export.run(make_step(tmp_path / "results", inputs | {"pgt": source}, format="coco_results"))  # needs none
    monkeypatch.setattr(export_rows, "read_sizes", lambda uris: [(60, 100)])
    step = make_step(tmp_path / "sized", inputs | {"pgt": source})
    export.run(step)
    [entry] = json.loads(Path(step.folder, "export", "annotations", "instances_train.json").read_text())["images"]
    assert (entry["height"], entry["width"]) == (60, 100)


def test_faults_are_named(tmp_path: Path, inputs: dict[str, Step]) -> None:
    with pytest.raises(DataError, match=r"step pgt has no row for 1 of 1 images of split 'test', e\.g\. t"):
        export.run(make_step(tmp_path, inputs, split="test"))
    with pytest.raises(ConfigError, match=r"steps.export.split: no image has split 'x'"):
        export.run(make_step(tmp_path, inputs, split="x"))
    ok = {"status": "ok", "boxes": [], "classes": [], "scores": [], "height": 60, "width": 100}
    strange = finished(tmp_path, "strange", [ok | {"image_id": "z"}], schemas.DETECTIONS, {})
    with pytest.raises(DataError, match="step strange has image z, which is not in step images"):
        export.run(make_step(tmp_path, inputs | {"pgt": strange}))
    box = {"image_id": "c", "boxes": [[0, 0, 5, 5]], "classes": [0], "scores": [0.5]}
    plain = finished(tmp_path, "plain", [ok | box], schemas.DETECTIONS, {})
    with pytest.raises(DataError, match="step plain has no masks: use format yolo"):
        export.run(make_step(tmp_path / "plain_export", inputs | {"pgt": plain}, format="yolo_segment"))
    assert not (tmp_path / "plain_export").exists()  # refused before anything is written
    masked = ok | box | {"height": 30, "masks": [encode(0, 0, 100, 60)]}
    other = finished(tmp_path, "other", [masked], schemas.DETECTIONS, {})
    with pytest.raises(DataError, match="image c: mask 1 is not of the image's size, 30 x 100"):
        export.run(make_step(tmp_path / "other", inputs | {"pgt": other}))
    failed = finished(tmp_path, "failed", [{"image_id": "c", "status": "oom"}], schemas.DETECTIONS, {})
    with pytest.raises(DataError, match=r"step failed has no image to export \(1 failed\)"):
        export.run(make_step(tmp_path, inputs | {"pgt": failed}))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"pgt": None}, "exactly one of pgt and detections must be set"),
        ({"detections": "found"}, "exactly one of pgt and detections must be set"),
        ({"format": "voc", "polygons": True}, "polygons is for format coco, not voc"),
        ({"polygon_tolerance": 1.0}, "polygon_tolerance goes with polygons: true"),
        ({"number_images": True}, "number_images is for format coco_results, not coco"),
        ({"format": "yolo_segment", "masks": False}, "yolo_segment is made of masks"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ExportConfig.model_validate({"images": "images", "pgt": "pgt", "format": "coco"} | settings)


@pytest.mark.parametrize("format", ["coco", "coco_results", "label_studio"])
def test_boxes_without_a_finite_score_are_left_out(tmp_path: Path, inputs: dict[str, Step], format: str) -> None:
    row = {"image_id": "a", "status": "ok", "message": "", "boxes": [[0, 0, 9, 9]] * 3, "classes": [0] * 3}
    row |= {"scores": [float("inf"), float("nan"), 0.5]}
    found = finished(tmp_path, "spoilt", [row], schemas.DETECTIONS, {"images": inputs["images"]})
    step = make_step(tmp_path, inputs | {"pgt": found}, format=format)
    export.run(step)
    report = report_of(step)
    assert (report["boxes"], report["left_out"]) == (1, {"failed_images": 0, "boxes_without_finite_score": 2})


def test_results_fit_the_json_of_the_dataset(tmp_path: Path) -> None:
    ids = [12345678901234567, 7, -1]
    content = {"images": [{"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 100} for i in ids]}
    content |= {"annotations": [], "categories": [{"id": 3, "name": "red"}, {"id": 9, "name": "blue"}]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    for i in ids:
        storage.write_bytes(str(tmp_path / "t" / f"{i}.jpg"), b"")
    dataset = read_coco(str(tmp_path), {"t": ("t.json", "t")})
    images = finished(tmp_path, "images", dataset.images.to_pylist(), schemas.IMAGES, {})
    metadata = schemas.with_metadata(
        schemas.IMAGES, fingerprint="f", class_names=["red", "blue"], category_ids=[3, 9], ids_are_numbers=True
    )
    table = dataset.images.replace_schema_metadata(metadata.metadata)
    storage.write_json(images.manifest_uri, {"parts": [tables.write_part(images.folder, table)], "excluded": {}})
    row = {"status": "ok", "message": "", "boxes": [[0, 0, 9, 9]], "classes": [1], "scores": [0.5]}
    rows = [{"image_id": str(i)} | row for i in ids]
    found = finished(tmp_path, "found", rows, schemas.DETECTIONS, {"images": images})
    step = make_step(tmp_path, {"images": images, "pgt": found}, format="coco_results")
    export.run(step)
    with contextlib.redirect_stdout(io.StringIO()):
        results = COCO(str(tmp_path / "t.json")).loadRes(f"{step.folder}/export/results.json")
    assert sorted((a["image_id"], a["category_id"]) for a in results.anns.values()) == [(i, 9) for i in sorted(ids)]
    step = make_step(tmp_path / "coco", {"images": images, "pgt": found})
    export.run(step)
    content = storage.read_json(f"{step.folder}/export/annotations/instances_t.json")
    assert [entry["id"] for entry in content["images"]] == [-1, 12345678901234567, 7]


def test_an_unknown_format_is_a_fault_that_lists_the_known_formats() -> None:
    with pytest.raises(ValueError, match=f"must be one of {', '.join(FORMATS)}, got 'yolos': did you mean 'yolo'"):
        ExportConfig.model_validate({"images": "images", "pgt": "pgt", "format": "yolos"})


def test_what_formats_write_by_are_settings_of_the_stage() -> None:
    assert [kind.name for kind in EXPORT_FORMATS] == FORMATS
    options = {field.name for field in fields(ExportOptions)}
    assert options <= {name for kind in EXPORT_FORMATS for name in kind.settings} <= {*ExportConfig.model_fields}
