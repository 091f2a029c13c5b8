"""What is in a fingerprint: all that decides a result, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from tests.pipeline.made_steps import GOOD, fingerprints
from weaksam import pipeline
from weaksam.core import storage
from weaksam.core.config import Added, StageConfig, result_settings

pytestmark = pytest.mark.usefixtures("stages")


def test_secrets_of_urls_are_kept_nowhere_and_decide_nothing(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "identity", lambda uri: "4-abcd")
    one, two = (
        load({"a": {"stage": "make", "inner": {"weights": f"https://me:hidden@host/w.pth?sig=hidden{i}"}}})[0]
        for i in (1, 2)
    )
    assert one.folder == two.folder
    pipeline.run_steps([one])
    for name in ("config.json", "manifest.json"):
        text = storage.read_bytes(storage.join(one.folder, name)).decode()
        assert "hidden" not in text
    assert (
        storage.read_json(f"{one.folder}/config.json")["settings"]["inner"]["weights"] == "https://***@host/w.pth?***"
    )


def test_a_fingerprint_follows_what_decides_the_result_and_nothing_else(load: Callable, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"1")
    first = fingerprints(load(GOOD, f"steps.a.inner.weights={weights}"))
    assert all(len(value) == 8 for value in first.values())

    def same(*overrides: str) -> bool:
        return fingerprints(load(GOOD, f"steps.a.inner.weights={weights}", *overrides)) == first

    assert same("steps.a.resources.max_actors=3", "steps.a.max_failed=0.5", "steps.a.note=hello")
    moved = tmp_path / "elsewhere.pth"
    moved.write_bytes(b"1")
    assert fingerprints(load(GOOD, f"steps.a.inner.weights={moved}")) == first
    changed = fingerprints(load(GOOD, f"steps.a.inner.weights={weights}", "steps.a.size=2"))
    assert changed["a"] != first["a"]
    assert changed["b"] != first["b"]  # what is built on it changes with it
    weights.write_bytes(b"2")
    assert not same()


def test_a_setting_that_came_later_is_in_the_fingerprint_only_with_another_value() -> None:
    class Old(StageConfig):
        size: int = 1

    class New(Old):
        kinds: Annotated[list[str], Added()] = Field(default_factory=list)

    assert result_settings(New()) == result_settings(Old()) == {"size": 1}
    assert result_settings(New(kinds=["a"])) == {"size": 1, "kinds": ["a"]}


def test_files_of_this_machine_are_absolute_for_workers_and_change_no_fingerprint(
    load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"1")
    made = {}
    for weights in ("weights.pth", "./weights.pth", str(tmp_path / "weights.pth")):
        (step,) = load({"a": {"stage": "make", "inner": {"weights": weights}}})
        assert step.config.inner.weights == str(tmp_path / "weights.pth")
        made[weights] = step.fingerprint
    assert len(set(made.values())) == 1
