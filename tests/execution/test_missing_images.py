"""Images that are not found: single ones are rows, all of them are a fault of the storage, and both are tried again."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from weaksam import pipeline
from weaksam.core import schemas, tables
from weaksam.core.config import StageConfig
from weaksam.core.step import Outcome, Stage, Step
from weaksam.errors import StorageError
from weaksam.execution import runtime
from weaksam.execution.rows import Fetch, common_folder, is_gone

SCHEMA = schemas.with_metadata(
    pa.schema([("image_id", pa.string()), ("status", pa.string()), ("message", pa.string()), ("uri", pa.string())]),
    fingerprint="f",
    class_names=["a"],
)


def rows(statuses: dict[str, str], folder: Path) -> pa.Table:
    return schemas.to_table(
        [
            {"image_id": name, "status": status, "message": "" if status == "ok" else "gone", "uri": str(folder / name)}
            for name, status in statuses.items()
        ],
        SCHEMA,
    )


def source_of(names: str, folder: Path) -> pa.Table:
    return pa.table({"image_id": list(names), "uri": [str(folder / name) for name in names]})


def a_step(folder: Path, run: Any = None, **inputs: Step) -> Step:
    stage = Stage("look", 1, StageConfig, run or (lambda step: Outcome(0)), writes="looks")
    return Step("look", stage, StageConfig(max_failed=0.5), inputs, {}, "f", str(folder / "look-00000000"))


def states(step: Step) -> dict[str, str]:
    found: dict[str, str] = {}
    for table in tables.read_parts(step.folder, tables.list_parts(step.folder)):
        found |= dict(zip(table.column("image_id").to_pylist(), table.column("status").to_pylist(), strict=True))
    return found


@pytest.mark.parametrize(
    ("uris", "folder"),
    [
        (["/data/a/1.jpg", "/data/b/2.jpg"], "/data"),
        (["/data/a/1.jpg"], "/data/a"),
        (["/data/ab/1.jpg", "/data/ac/1.jpg"], "/data"),
        (["s3://bucket/x/1.jpg", "s3://bucket/x/2.jpg"], "s3://bucket/x"),
        (["s3://bucket/1.jpg", "s3://bucket/2.jpg"], "s3://bucket"),
        (["s3://one/1.jpg", "s3://two/1.jpg"], None),
        (["https://host/x/1.jpg", "https://host/x/2.jpg"], None),  # has no listing to look at
    ],
)
def test_the_folder_of_all_images(uris: list[str], folder: str | None) -> None:
    assert common_folder(uris) == folder


def test_a_folder_is_gone_when_there_is_nothing_in_it(tmp_path: Path) -> None:
    assert is_gone(str(tmp_path / "absent"))
    assert is_gone(str(tmp_path))  # as a place where a file system is not mounted
    (tmp_path / "a").touch()
    assert not is_gone(str(tmp_path))
    assert is_gone(str(tmp_path / "a"))


def test_an_image_is_missing_only_while_others_are_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    fetch, batch = Fetch(folder=str(tmp_path)), source_of("ab", tmp_path)
    assert fetch(batch).column("status").to_pylist() == ["ok", "not_found"]
    (tmp_path / "a").unlink()
    assert fetch(batch).num_rows == 0
    with pytest.raises(StorageError, match="the folder of the images is gone or empty"):
        Fetch(folder=str(tmp_path), strict=True)(batch)


def test_rows_of_missing_images_are_removed_when_the_images_are_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step, images = a_step(tmp_path), tmp_path / "images"
    tables.write_part(step.folder, rows({"a": "ok", "b": "not_found", "c": "not_found"}, images))
    tables.write_part(step.folder, rows({"d": "not_found"}, images))
    tables.write_part(step.folder, rows({"e": "ok"}, images))
    images.mkdir()
    for name in "bd":
        (images / name).touch()
    with caplog.at_level(logging.INFO, "weaksam"):
        runtime._forget_missing(step, source_of("abcde", images))
    assert states(step) == {"a": "ok", "c": "not_found", "e": "ok"}
    assert "2 images that were missing are there now" in caplog.text


def test_when_not_one_image_is_found_it_is_not_the_images(tmp_path: Path) -> None:
    step, images = a_step(tmp_path), tmp_path / "images"
    source = source_of("abcd", images)
    tables.write_part(step.folder, rows({"a": "ok"}, images))
    tables.write_part(step.folder, rows({"b": "not_found", "c": "not_found", "d": "not_found"}, images))
    with pytest.raises(StorageError, match=f"step look: not one of 3 images is in {images}"):
        runtime._check_missing(step, source, source.slice(1))
    assert states(step) == {"a": "ok"}


@pytest.mark.parametrize("missing", ["d", "cd"])
def test_some_missing_images_stay_rows(missing: str, tmp_path: Path) -> None:
    step, images = a_step(tmp_path), tmp_path / "images"
    source = source_of("abcd", images)
    found = {name: "not_found" if name in missing else "ok" for name in "abcd"}
    tables.write_part(step.folder, rows(found, images))
    runtime._check_missing(step, source, source)  # some were found
    runtime._check_missing(step, source, source.slice(4 - len(missing)))  # the last ones of an interrupted step
    assert states(step) == found


def test_a_finished_step_works_again_on_images_that_are_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in "abc":
        (images / name).touch()
    worked: list[str] = []

    def run(step: Step) -> Outcome:
        runtime._forget_missing(step, source_of("abc", images))
        for name in set("abc") - states(step).keys():
            worked.append(name)
            there = "ok" if (images / name).exists() else "not_found"
            tables.write_part(step.folder, rows({name: there}, images))
        failed = [f"{name}: {status}: gone" for name, status in states(step).items() if status != "ok"]
        return Outcome(3, failed=len(failed), failures=failed, parts=tables.list_parts(step.folder))

    def list_images(step: Step) -> Outcome:
        return Outcome(3, parts=[tables.write_part(step.folder, rows(dict.fromkeys("abc", "ok"), images))])

    index = Stage("index", 1, StageConfig, list_images, writes="images")
    listed = Step("images", index, StageConfig(), {}, {}, "e", str(tmp_path / "images-00000000"))
    step = a_step(tmp_path, run, images=listed)
    os.rename(images / "b", tmp_path / "b")
    with caplog.at_level(logging.INFO, "weaksam"):
        pipeline.run_steps([listed, step])
    assert states(step)["b"] == "not_found"
    assert "look: 1 of 3 rows failed: b: not_found: gone" in caplog.text
    caplog.clear()
    worked.clear()
    with caplog.at_level(logging.INFO, "weaksam"):
        pipeline.run_steps([listed, step])  # it is still missing
    assert worked == []
    assert "look: finished, skipped" in caplog.text
    assert "look: 1 of 3 rows failed: b: not_found: gone" in caplog.text
    os.rename(tmp_path / "b", images / "b")
    with caplog.at_level(logging.INFO, "weaksam"):
        pipeline.run_steps([listed, step])
    assert worked == ["b"]
    assert states(step) == dict.fromkeys("abc", "ok")
    assert "look: 1 images that were missing are there now, e.g. b" in caplog.text
    assert (step.manifest() or {})["failed"] == 0
