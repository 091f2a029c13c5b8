"""Catalogues: each member is declared in a file of its package, and named in a list of those files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, Protocol, TypeVar


class Named(Protocol):
    """A member of a catalogue."""

    @property
    def name(self) -> str:
        """The value of the setting that selects it."""
        ...


Member = TypeVar("Member", bound=Named)


def members(package: str, files: Sequence[str], attribute: str) -> tuple[Any, ...]:
    """Returns the members of a catalogue: `attribute` of each of the `files` in `package`."""
    return tuple(getattr(import_module(f"{package}.{name}"), attribute) for name in files)


def member(of: Iterable[Member], name: str, *, setting: str, others: str = "") -> Member:
    """Returns the member of a name.

    Args:
        of: the members.
        name: a value of the setting.
        setting: name of the setting, for the message.
        others: names the values that are not members, for the message.

    Raises:
        ValueError: no member has that name; lists the names.
    """
    of = tuple(of)
    for kind in of:
        if kind.name == name:
            return kind
    known = ", ".join(repr(kind.name) for kind in of)
    raise ValueError(f"{setting} must be one of {known}{others}, got {name!r}")
