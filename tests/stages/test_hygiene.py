"""What `hygiene` tells of a dataset: copies, also across splits, broken images, labels and classes."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from testing.places import ROOT
from tests.stages.test_proposals import batch
from weaksam import pipeline
from weaksam.core import schemas
from weaksam.data.likeness import perceptual_hash, thumbnail
from weaksam.demo.scenes import draw_dataset_scene
from weaksam.execution.mapping import map_batch
from weaksam.execution.pools import fit_pool
from weaksam.ops.duplicates import DuplicateRules, group_duplicates
from weaksam.stages import hygiene
from weaksam.stages.hygiene import HygieneConfig, LookAtImages

TEXT = (ROOT / "docs" / "hygiene.md").read_text()
SCHEMA = schemas.with_metadata(schemas.HYGIENE, fingerprint="f", class_names=["red", "blue"])


def scene(index: int) -> Image.Image:
    return Image.fromarray(draw_dataset_scene(index, seed=0).image)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_each_image_has_a_row_whatever_became_of_it() -> None:
    picture = scene(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned clockwise
    data, turned = encode(picture), encode(picture.transpose(Image.Transpose.ROTATE_90), exif=exif)
    large = encode(Image.new("RGB", (500, 400)))
    images = batch(good=data, turned=turned, gone=None, junk=b"<html>", large=large)
    table = map_batch(LookAtImages(), images, schema=SCHEMA, max_pixels=150_000)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "not_found", "unreadable", "too_large"]
    good = rows["good"]
    assert good["sha256"] == hashlib.sha256(data).hexdigest() != rows["turned"]["sha256"]
    assert (good["height"], good["width"]) == (rows["turned"]["height"], rows["turned"]["width"]) == picture.size[::-1]
    apart = good["perceptual_hash"] ^ rows["turned"]["perceptual_hash"]
    assert apart.bit_count() <= 4
    assert len(good["thumbnail"]) == 256
    assert rows["junk"]["sha256"] is rows["gone"]["thumbnail"] is None


def test_no_rows_are_no_rows() -> None:
    table = map_batch(LookAtImages(), batch(a=None).slice(0, 0), schema=SCHEMA, max_pixels=1)
    assert table.schema.equals(SCHEMA)


def test_altered_copies_of_scenes_are_found_and_other_scenes_are_not() -> None:
    config = HygieneConfig(images="images")
    shown, wanted = [], []
    for index in range(12):
        picture = scene(index)
        width, height = picture.size
        edge = (width // 100, height // 100, width - width // 100, height - height // 100)
        small = picture.resize((width // 2, height // 2))
        dark = ImageEnhance.Brightness(picture).enhance(0.7)
        for copy in (picture, Image.open(io.BytesIO(encode(small, quality=50))), picture.crop(edge), dark):
            shown.append(np.asarray(copy.convert("RGB")))
            wanted.append(index)
    found = group_duplicates(
        [str(i) for i in range(len(shown))],
        np.array([perceptual_hash(one) for one in shown], np.uint64),
        np.stack([thumbnail(one).ravel() for one in shown]),
        DuplicateRules(config.max_bits, config.max_difference),
    )
    assert found.group.tolist() == wanted


def test_it_stays_off_gpus_whatever_else_is_set() -> None:
    config = HygieneConfig.model_validate({"images": "images", "resources": {"max_actors": 2}})
    assert fit_pool(config.resources, [{"CPU": 8.0, "GPU": 1.0}]).actor_gpus == 0


ROWS = [
    {"image_id": "a", "uri": "a.jpg", "split": "train", "labels": [0, 1]},
    {"image_id": "b", "uri": "b.jpg", "split": "train", "labels": []},
    {"image_id": "c", "uri": "c.jpg", "split": "test", "labels": [0]},
    {"image_id": "d", "uri": "d.jpg", "split": "unlabelled", "labels": None},
]
SEEN = [
    {"image_id": "a", "status": "ok", "height": 10, "width": 40},
    {"image_id": "b", "status": "ok", "height": 30, "width": 20},
    {"image_id": "c", "status": "ok", "height": 20, "width": 30},
    {"image_id": "d", "status": "unreadable"},
]


def test_images_labels_and_sizes_are_counted() -> None:
    names = ["red", "blue"]
    told = hygiene.count_images(schemas.to_table(ROWS, schemas.IMAGES), schemas.to_table(SEEN, SCHEMA), names)
    assert told == {
        "images": 4,
        "failed": {"unreadable": 1},
        "splits": {
            "test": {"images": 1, "labels_unknown": 0, "labels_empty": 0, "classes_absent": ["blue"]},
            "train": {"images": 2, "labels_unknown": 0, "labels_empty": 1, "classes_absent": []},
            "unlabelled": {"images": 1, "labels_unknown": 1, "labels_empty": 0, "classes_absent": []},
        },
        "classes": {
            "red": {"test": 1, "train": 1, "unlabelled": 0},
            "blue": {"test": 0, "train": 1, "unlabelled": 0},
        },
        "sizes": {
            "height": {"min": 10.0, "median": 20.0, "max": 30.0},
            "width": {"min": 20.0, "median": 30.0, "max": 40.0},
        },
    }


def test_a_dataset_of_which_nothing_can_be_read_is_told_too() -> None:
    rows = schemas.to_table([{"image_id": row["image_id"], "status": "not_found"} for row in ROWS], SCHEMA)
    images = schemas.to_table(ROWS, schemas.IMAGES)
    listed = hygiene.list_duplicates(images, rows, HygieneConfig(images="images"))
    assert (listed.num_rows, listed.schema) == (0, hygiene.DUPLICATES)
    told = hygiene.count_images(images, rows, []) | hygiene.describe_groups(images, listed)
    told |= hygiene.compare_sizes(images, rows)
    assert (told["sizes"], told["failed"]) == ({"height": None, "width": None}, {"not_found": 4})
    assert hygiene.summarise(told) == (
        "0 exact and 0 near groups of duplicates, 0 of them across splits, 2 images without labels, no classes"
    )


def test_groups_tell_where_they_are_and_whether_their_labels_agree() -> None:
    places = [("a", 0, "train"), ("c", 0, "test"), ("b", 1, "train"), ("d", 1, "train")]
    rows = [{"image_id": name, "group": number, "kind": "near", "split": split} for name, number, split in places]
    listed = schemas.to_table(rows, hygiene.DUPLICATES)
    told = hygiene.describe_groups(schemas.to_table(ROWS, schemas.IMAGES), listed)
    assert told["leaks"] == [0]
    first, second = told["duplicates"]
    assert (first["splits"], first["labels_differ"], first["image_ids"]) == (["test", "train"], True, ["a", "c"])
    assert (second["splits"], second["labels_differ"]) == (["train"], False)  # those of d are unknown


def write_dataset(folder: Path) -> None:
    """Three scenes in two splits, a copy of one across them, another as PNG, one blank and one broken file."""
    folder.mkdir()
    first, second = encode(scene(0)), encode(scene(1))
    files = {
        "a.jpg": (first, "train", "dog"),
        "a_again.jpg": (first, "test", "cat"),
        "b.jpg": (second, "train", "dog"),
        "b.png": (encode(Image.open(io.BytesIO(second)), "PNG"), "train", "dog"),
        "c.jpg": (encode(scene(2)), "test", ""),
        "blank.png": (encode(Image.new("RGB", (80, 60), (250, 250, 250)), "PNG"), "train", "cat"),
        "broken.jpg": (first[:200], "train", "cat"),
    }
    for name, (data, _, _) in files.items():
        (folder / name).write_bytes(data)
    lines = [f"{name},{labels},{split}" for name, (_, split, labels) in files.items()]
    (folder / "labels.csv").write_text("\n".join(["file,labels,split", *lines]) + "\n")


def test_images_of_another_size_than_the_dataset_states_are_listed() -> None:
    images = pa.table({"image_id": ["a", "b", "c", "d"], "height": [3, 3, 3, None], "width": [4, 4, 4, None]})
    rows = pa.table({"height": [3, 4, 6, 6], "width": [4, 3, 8, 8]})
    told = hygiene.compare_sizes(images, rows)
    assert told == {"sizes_turned": ["b"], "sizes_differ": ["c (stated 3 x 4, is 6 x 8)"]}
    empty = {"duplicates": [], "leaks": [], "splits": {}, "classes": {}}
    assert hygiene.summarise(empty | told).endswith(", 2 images of another size than the dataset states")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_is_looked_through(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data")
    config = tmp_path / "run.yaml"
    told_file, more = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    config.write_text(told_file.replace("runs/mine", f"{tmp_path}/run").replace("/data/mine", f"{tmp_path}/data"))
    steps = pipeline.load(str(config))
    pipeline.run_steps(steps)
    step = steps[1]
    manifest = step.manifest()
    assert manifest is not None
    assert (manifest["rows"], manifest["failed"]) == (7, 1)
    status = {row["image_id"]: row["status"] for row in step.read(["status"]).to_pylist()}
    assert [name for name, one in status.items() if one != "ok"] == ["broken.jpg"]
    told = json.loads(Path(step.folder, "hygiene.json").read_text())
    assert told["duplicates"] == [
        {"group": 0, "kind": "exact", "splits": ["test", "train"], "labels_differ": True,
         "image_ids": ["a.jpg", "a_again.jpg"]},
        {"group": 1, "kind": "near", "splits": ["train"], "labels_differ": False, "image_ids": ["b.jpg", "b.png"]},
    ]  # fmt: skip
    assert (told["leaks"], told["failed"]) == ([0], {"unreadable": 1})
    assert told["classes"] == {"cat": {"test": 1, "train": 2}, "dog": {"test": 0, "train": 3}}
    assert told["splits"]["test"]["classes_absent"] == ["dog"]
    assert hygiene.summarise(told) == (
        "1 exact and 1 near groups of duplicates, 1 of them across splits, 1 images without labels, "
        "classes have 3 to 3 images"
    )
    listed = pq.read_table(Path(step.folder, "duplicates.parquet")).to_pydict()
    assert listed["image_id"] == ["a.jpg", "a_again.jpg", "b.jpg", "b.png"]
    assert (listed["group"], listed["kind"]) == ([0, 0, 1, 1], ["exact", "exact", "near", "near"])
    assert listed["uri"] == [f"{tmp_path}/data/{name}" for name in listed["image_id"]]
    assert listed["sha256"][0] == listed["sha256"][1]
    assert len(set(listed["sha256"])) == 3

    (recipe,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(recipe.replace("runs/mine", f"{tmp_path}/run").replace("/data/mine", f"{tmp_path}/data"), {})
    config.write_text(f"run: {tmp_path}/run\nsteps:\n" + more.replace("/data/mine", f"{tmp_path}/data"))
    (images,) = pipeline.load(str(config))
    pipeline.run_steps([images])
    kept = images.read([]).column("image_id").to_pylist()
    assert kept == ["a_again.jpg", "b.jpg", "blank.png", "broken.jpg", "c.jpg"]
