"""What `weaksam check` makes of storage that does not answer, alone and beside other faults."""

from __future__ import annotations

import pytest

from weaksam.core.config import StageConfig
from weaksam.core.step import Look, Outcome, Stage, Step
from weaksam.errors import StorageError
from weaksam.pipeline.looking import look_at


def a_step(name: str, found: Look | StorageError) -> Step:
    def look(step: Step) -> Look:
        if isinstance(found, StorageError):
            raise found
        return found

    stage = Stage("toy", 1, StageConfig, lambda step: Outcome(0), writes="toys", look=look)
    return Step(name, stage, StageConfig(), {}, {}, "0", "memory://looking/" + name)


DOWN = StorageError("s3://bucket: no answer")


def test_storage_alone_at_fault_may_be_back_later() -> None:
    with pytest.raises(StorageError, match=r"steps\.a: s3://bucket: no answer"):
        look_at([a_step("a", DOWN), a_step("b", Look("the list", "pixels", []))])


def test_other_faults_are_shown_with_it() -> None:
    lines, faults = look_at([a_step("a", DOWN), a_step("b", Look("the list", "pixels", ["line 2: no label"]))])
    assert lines == ["b: looked at the list; not at pixels"]
    assert faults == ["steps.b: line 2: no label", "steps.a: s3://bucket: no answer"]
