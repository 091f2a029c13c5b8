"""The states of a run's steps, read off their folders."""

from __future__ import annotations

from pathlib import Path

from weaksam.core import storage
from weaksam.pipeline.states import read_states


def begin(run: Path, folder: str, reads: dict[str, str]) -> None:
    config = {"step": folder.rsplit("-", 1)[0], "stage": "pgt", "inputs": reads}
    storage.write_json(str(run / folder / "config.json"), config)


def test_a_step_stands_after_those_that_it_reads(tmp_path: Path) -> None:
    begin(tmp_path, "ap-0000000a", {"images": "pictures-0000000d", "detections": "boxes-0000000b"})
    begin(tmp_path, "boxes-0000000b", {"images": "pictures-0000000d", "detector": "mist-0000000c"})
    begin(tmp_path, "mist-0000000c", {"images": "pictures-0000000d"})
    begin(tmp_path, "pictures-0000000d", {})
    begin(tmp_path, "rest-0000000e", {"images": "gone-0000000f"})
    states = read_states(str(tmp_path))
    assert [state["step"] for state in states] == ["pictures", "mist", "boxes", "ap", "rest"]
    assert states[2]["reads"] == ["pictures-0000000d", "mist-0000000c"]


def test_a_damaged_description_hides_no_step(tmp_path: Path) -> None:
    begin(tmp_path, "b-0000000b", {})
    begin(tmp_path, "a-0000000a", {"images": "b-0000000b"})
    (tmp_path / "b-0000000b" / "config.json").write_text("[1")
    storage.write_json(str(tmp_path / "c-0000000c" / "config.json"), {"stage": "pgt", "inputs": ["a-0000000a"]})
    assert [state["step"] for state in read_states(str(tmp_path))] == ["b", "a", "c"]
