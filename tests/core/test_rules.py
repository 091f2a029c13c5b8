"""The fields of a dataclass of rules as settings: types, limits, defaults and sentences are those of the dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le, MinLen

from weaksam.core.config import Settings, StageConfig, parse_settings
from weaksam.core.rules import rules_of, sentences_of, values_of, with_rules


@dataclass(frozen=True)
class Base:
    """What is kept.

    Attributes:
        share: largest share, over
            two lines.
    """

    share: Annotated[float, Ge(0), Le(1)] = 0.5


@dataclass(frozen=True)
class Rules(Base):
    """More of it.

    Attributes:
        mode: `fast` or `slow`.
        sides: sides, pixels.
        most: most of them; None = no limit.
        classes: indices of classes.
    """

    mode: Literal["fast", "slow"] = "fast"
    sides: Annotated[tuple[int, ...], MinLen(1)] = (3, 4)
    most: Annotated[int | None, Ge(1)] = None
    classes: tuple[int, ...] = ()


class Config(with_rules(StageConfig, Rules)):
    """A stage."""

    name: str
    """A name."""
    classes: list[str] = []  # noqa: RUF012
    """Names of classes."""


class Optional(with_rules(Settings, Rules, optional=True)):
    """Another stage."""


def read(kind: type[Settings], **settings: Any) -> Any:
    config, faults = parse_settings(kind, settings, where="steps.s")
    return faults or config


def test_defaults_are_those_of_the_rules_and_values_become_rules() -> None:
    assert rules_of(read(Config, name="a"), Rules, classes=()) == Rules()
    config = read(Config, name="a", share=0.25, mode="slow", sides=[5], most=2, classes=["cat"])
    assert config.classes == ["cat"]
    assert rules_of(config, Rules, classes=(7,)) == Rules(0.25, "slow", (5,), 2, (7,))


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"share": 1.5}, "steps.s.share: input should be less than or equal to 1, got 1.5"),
        ({"share": "0.5"}, "steps.s.share: input should be a valid number, got '0.5'"),
        ({"mode": "fat"}, "steps.s.mode: input should be 'fast' or 'slow', got 'fat'"),
        ({"most": 0}, "steps.s.most: input should be greater than or equal to 1, got 0"),
        ({"shares": 0.5}, "steps.s.shares: unknown key: did you mean 'share'?"),
    ],
)
@pytest.mark.parametrize("kind", [Config, Optional])
def test_faults_name_the_key(kind: type[Settings], wrong: dict[str, Any], fault: str) -> None:
    name = {"name": "a"} if kind is Config else {}
    assert read(kind, **name, **wrong) == [fault]


def test_a_list_that_must_hold_something_is_refused_when_empty() -> None:
    (fault,) = read(Optional, sides=[])
    assert fault.startswith("steps.s.sides: ")


def test_optional_settings_are_none_unless_set() -> None:
    assert set(dict(read(Optional)).values()) == {None}
    assert values_of(read(Optional, share=None, sides=[9]), Rules)["sides"] == (9,)
    assert read(Config, name="a", share=None) == ["steps.s.share: input should be a valid number, got None"]


def test_sentences_are_those_of_the_docstrings() -> None:
    assert sentences_of(Rules) == {
        "share": "Largest share, over two lines.",
        "mode": "`fast` or `slow`.",
        "sides": "Sides, pixels.",
        "most": "Most of them; None = no limit.",
        "classes": "Indices of classes.",
    }
    described = {name: info.description for name, info in Config.model_fields.items()}
    described.pop("max_failed")
    assert described == sentences_of(Rules) | {"name": "A name.", "classes": "Names of classes."}
    assert str(Config.model_fields["sides"].annotation) == "list[int]"
    assert Config.__doc__ == "A stage."
