"""Run files: every fault at once, fingerprints that follow results, steps that resume, skip and never go stale."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.pipeline.made_steps import CALLS, GOOD
from weaksam import pipeline
from weaksam.core import schemas, storage, tables
from weaksam.core.step import Outcome, Step
from weaksam.errors import ConfigError, DeniedError, FailedRowsError, MissingFileError, StageError, StorageError
from weaksam.pipeline import run_file, running

pytestmark = pytest.mark.usefixtures("stages")


def test_every_fault_is_reported_at_once_with_its_key(load: Callable) -> None:
    bad = {
        "a": {"stage": "make", "siez": 3, "inner": {"lr": -1.0}},
        "b": {"stage": "mkae"},
        "c": {"stage": "use"},
        "d": {"stage": "use", "things": "aa"},
        "e": {"stage": "use", "things": "c"},
        "f": {"stage": "make", "size": "big"},
    }
    with pytest.raises(ConfigError) as caught:
        load(bad, extra=1)
    assert caught.value.faults == [
        "extra: unknown key: a run file has run, endpoint, addressing, steps",
        "steps.a.inner.lr: input should be greater than 0, got -1.0",
        "steps.a.siez: unknown key: did you mean 'size'?",
        "steps.b.stage: there is no stage 'mkae': did you mean 'make'?",
        "steps.c.things: required: set it in the file or on the command line as steps.c.things=...",
        "steps.f.size: input should be a valid integer, got 'big'",
        "steps.d.things: there is no step 'aa': did you mean 'a'?",
        "steps.e.things: needs a step that writes things, 'c' writes results",
    ]


def test_warnings_are_those_of_each_step_in_order_and_a_storage_fault_is_none(
    load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(step: Step) -> list[str]:
        if step.name == "b":
            raise StorageError("s3://data/marker: could not read after 4 tries")
        return [f"steps.{step.name}.size: {step.config.size} is few"]

    make = dataclasses.replace(run_file.STAGES["make"], warnings=warn)
    monkeypatch.setitem(run_file.STAGES, "make", make)
    steps = load({name: {"stage": "make", "size": size} for name, size in (("a", 1), ("b", 2), ("c", 3))})
    texts = ["steps.a.size: 1 is few", "steps.c.size: 3 is few"]
    assert pipeline.warnings_of(steps) == texts
    assert pipeline.warnings_of(load(GOOD)[1:]) == []  # a stage without any
    assert CALLS == []


def test_a_circle_of_steps_is_named(load: Callable) -> None:
    with pytest.raises(ConfigError, match=r"(a -> b -> a|b -> a -> b): the steps wait for each other"):
        load({"a": {"stage": "use", "things": "b"}, "b": {"stage": "use", "things": "a"}})


def test_a_missing_weights_file_is_found_before_anything_starts(load: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps\.a: .*nowhere\.pth: no such file"):
        load({"a": {"stage": "make", "inner": {"weights": str(tmp_path / "nowhere.pth")}}})


@pytest.mark.parametrize("fault", [StorageError("s3://b/w: could not look up"), DeniedError("s3://b/w: not allowed")])
def test_a_store_that_fails_while_fingerprints_are_made_can_be_tried_again(
    load: Callable, monkeypatch: pytest.MonkeyPatch, fault: StorageError
) -> None:
    def look(uri: str) -> str:
        raise fault

    monkeypatch.setattr(storage, "identity", look)
    steps = {name: {"stage": "make", "inner": {"weights": f"s3://b/{name}"}} for name in ("a", "b")}
    with pytest.raises(StorageError, match=rf"^steps\.a: {fault}$") as caught:
        load(steps)
    assert caught.value.exit_code == 4

    def missing(uri: str) -> str:
        raise fault if uri.endswith("b") else MissingFileError(f"{uri}: no such file")

    monkeypatch.setattr(storage, "identity", missing)
    with pytest.raises(ConfigError, match=r"steps\.a: s3://b/a: no such file\nsteps\.b: ") as wrong:
        load(steps)
    assert wrong.value.exit_code == 2


def test_a_store_that_knows_sizes_alone_is_a_warning(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = dataclasses.replace(
        run_file.STAGES["make"], outside=lambda config: {"listing": "3 files ab (sizes alone)"}
    )
    monkeypatch.setitem(run_file.STAGES, "make", listed)
    (text,) = pipeline.warnings_of(load({"a": {"stage": "make"}}))
    assert text.startswith("steps.a: listing: the store knows neither when a file was written nor an ETag")


@pytest.mark.parametrize("run", ["s3://KEY:SECRET@bucket/run", "file://server/run"])
def test_places_that_cannot_be_used_are_named_by_their_keys(load: Callable, run: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"a": {"stage": "make", "inner": {"weights": run}}}, run=run)
    assert [fault.split(": ")[0] for fault in caught.value.faults] == ["run", "steps.a.inner.weights"]
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("step", ["  k: &l0 {v: 1}\n", "  k: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_few_lines_that_stand_for_billions_of_values_are_refused(tmp_path: Path, step: str, merge: bool) -> None:
    use = "{{<<: [{}]}}" if merge and "{" in step else "[{}]"
    lines = [step, *(f"  k{i}: &l{i} {use.format(', '.join([f'*l{i - 1}'] * 10))}\n" for i in range(1, 12))]
    (tmp_path / "run.yaml").write_text("run: r\nsteps:\n" + "".join(lines))
    with pytest.raises(ConfigError, match=r"run\.yaml: .* with its aliases it holds more than 100000 values"):
        pipeline.load(str(tmp_path / "run.yaml"))


def test_config_json_is_made_anew_where_it_was_lost_or_cut(load: Callable) -> None:
    (step,) = load({"a": {"stage": "make", "size": 1}})
    pipeline.run_steps([step])
    uri = storage.join(step.folder, "config.json")
    whole = storage.read_bytes(uri)
    for content in (None, whole[:40], b"[]"):
        storage.delete(uri) if content is None else storage.write_bytes(uri, content)
        pipeline.run_steps([step])
        assert storage.read_bytes(uri) == whole
    assert CALLS == ["a"]


def test_overrides_are_yaml_and_checked_like_the_file(load: Callable) -> None:
    (step,) = load({"a": {"stage": "make"}}, "steps.a.inner.lr=2e-5", "steps.a.size=7")
    assert (step.config.inner.lr, step.config.size) == (2e-5, 7)
    with pytest.raises(ConfigError, match=r"steps\.a\.size: input should be a valid integer, got 'x'"):
        load({"a": {"stage": "make"}}, "steps.a.size=x")
    with pytest.raises(ConfigError, match=r"steps\.a\.inner\.lr: input should be a finite number, got inf"):
        load({"a": {"stage": "make"}}, "steps.a.inner.lr=.inf")
    with pytest.raises(ConfigError, match=r"steps\.zz\.size=1: there is no step 'zz'"):
        load({"a": {"stage": "make"}}, "steps.zz.size=1")
    with pytest.raises(ConfigError, match="an override has the form"):
        load({"a": {"stage": "make"}}, "steps.a.size")


def test_steps_can_be_written_as_changes_of_another(tmp_path: Path, load: Callable) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: /r\nsteps:\n  a: &a {stage: make, size: 3, inner: &inner {lr: 0.5}}\n"
        "  b: {<<: *a, size: 4, inner: {<<: *inner}}\n  c: {<<: *a}\n"
    )
    a, b, c = pipeline.load(str(path), ["steps.a.inner.lr=0.25"])
    assert [step.config.size for step in (a, b, c)] == [3, 4, 3]
    assert [step.config.inner.lr for step in (a, b, c)] == [0.25, 0.5, 0.5]
    path.write_text("run: &r [*r]\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        pipeline.load(str(path))


def test_broken_yaml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: x\nsteps: {a: [}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read as YAML.*line 2"):
        pipeline.load(str(path))
    path.write_text("run: x\nrun: y\n")
    with pytest.raises(ConfigError, match="key 'run' is given twice"):
        pipeline.load(str(path))
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        pipeline.load(str(tmp_path / "nothing.yaml"))


def test_the_same_command_again_skips_what_is_finished(load: Callable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="weaksam"):
        pipeline.run_steps(load(GOOD))
        pipeline.run_steps(load(GOOD))
    assert CALLS == ["a", "b"]
    assert "a: finished, skipped" in caplog.text


def test_a_changed_setting_makes_a_new_folder_beside_the_old_and_says_which_key(
    load: Callable, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    pipeline.run_steps(load(GOOD))
    with caplog.at_level(logging.INFO, logger="weaksam"):
        pipeline.run_steps(load(GOOD, "steps.a.inner.lr=0.5", "steps.a.resources.max_actors=2"))
    assert "because of settings.inner.lr 0.1 -> 0.5\n" in caplog.text
    assert len(storage.list_folders(str(tmp_path / "run"))) == 4
    pipeline.run_steps(load(GOOD))
    assert CALLS == ["a", "b", "a", "b"]  # the first results are still there


def test_a_step_without_a_manifest_runs_again(load: Callable) -> None:
    steps = load(GOOD)
    pipeline.run_steps(steps)
    storage.local_path(steps[1].manifest_uri).unlink()
    pipeline.run_steps(load(GOOD))
    assert CALLS == ["a", "b", "b"]


def test_too_many_failed_rows_end_the_run_and_name_the_first(load: Callable) -> None:
    pipeline.run_steps(load({"a": {"stage": "make", "size": 1}}))  # one of a thousand may fail
    for _ in range(2):  # again on the second run, without computing again
        with pytest.raises(StageError, match=r"2 of 1000 rows failed, 1 may(?s:.*)a\.jpg: unreadable"):
            pipeline.run_steps(load({"a": {"stage": "make", "size": 2}}))
    assert CALLS == ["a", "a"]
    pipeline.run_steps(load({"a": {"stage": "make", "size": 2}}, "steps.a.max_failed=0.01"))
    assert CALLS == ["a", "a"]


def test_a_step_whose_input_may_fail_in_more_rows_says_which_setting_accepts_as_many(load: Callable) -> None:
    steps = load(
        {"made": {"stage": "make", "size": 100, "max_failed": 0.2}, "used": {"stage": "use", "things": "made"}}
    )
    manifest = {"rows": 1000, "failed": 150, "failures": []}
    with pytest.raises(FailedRowsError) as caught:
        running._check_failed(steps[1], manifest)
    assert "Step made, which it reads, may fail in more (steps.made.max_failed=0.2)" in str(caught.value)
    assert "steps.used.max_failed=0.2 accepts as many" in str(caught.value)
    with pytest.raises(FailedRowsError) as caught:
        running._check_failed(steps[0], {"rows": 1000, "failed": 500, "failures": []})
    assert "which it reads" not in str(caught.value)


def test_only_needs_its_inputs_finished(load: Callable) -> None:
    steps = load(GOOD)
    with pytest.raises(ConfigError, match=r"steps\.b\.things: step 'a' is not finished"):
        pipeline.select(steps, ["b"])
    with pytest.raises(ConfigError, match=r"--only x: there is no step 'x'"):
        pipeline.select(steps, ["x"])
    pipeline.run_steps(pipeline.select(steps, ["a"]))
    pipeline.run_steps(pipeline.select(steps, ["b"]))
    assert CALLS == ["a", "b"]


def test_the_manifest_says_what_it_is_made_of(load: Callable) -> None:
    (step,) = load({"a": {"stage": "make", "size": 1}})
    pipeline.run_steps([step])
    manifest = step.manifest()
    assert manifest is not None
    assert (manifest["fingerprint"], manifest["rows"], manifest["ok"], manifest["failed"]) == (
        step.fingerprint,
        1000,
        999,
        1,
    )
    assert manifest["versions"]["ray"]
    config = storage.read_json(storage.join(step.folder, "config.json"))
    assert config["settings"]["inner"]["lr"] == 0.1


def test_the_manifest_says_the_class_names_that_the_parts_carry(
    load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(step: Step) -> Outcome:
        schema = schemas.with_metadata(schemas.IMAGES, fingerprint=step.fingerprint, class_names=["cat", "dog"])
        part = tables.write_part(step.folder, schemas.to_table([{"image_id": "a"}], schema))
        return Outcome(rows=1, parts=[part])

    make = dataclasses.replace(run_file.STAGES["make"], run=write)
    monkeypatch.setitem(run_file.STAGES, "make", make)
    made, used = load(GOOD)[:2]
    pipeline.run_steps([made])
    assert (made.manifest() or {})["class_names"] == made.class_names() == ["cat", "dog"]
    pipeline.run_steps([used])
    assert "class_names" not in (used.manifest() or {})  # it has no table


@pytest.mark.parametrize("run", ["file", "file/run", "file/deep/run"])
def test_a_run_at_or_below_a_file_is_a_fault(run: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run": f"{tmp_path}/{run}", "steps": GOOD}))
    with pytest.raises(ConfigError) as caught:
        pipeline.parse(str(path))
    assert str(caught.value) == f"run: {tmp_path}/{run}: {tmp_path}/file is a file: name a folder"


def test_names_that_no_file_system_takes_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    steps = {"a" * 201: {"stage": "make"}, "b" * 200: {"stage": "make"}}
    path.write_text(yaml.safe_dump({"run": f"{tmp_path}/{'r' * 256}/run", "steps": steps}))
    with pytest.raises(ConfigError) as caught:
        pipeline.parse(str(path))
    run, name = caught.value.faults
    assert run.startswith("run: rrrr")
    assert run.endswith("... has 256 bytes, a name of a file or folder 255 at most")
    assert name.endswith(": a step's name has 200 letters at most, it is the name of a folder")
