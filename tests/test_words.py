"""Names and docstrings are plain technical English: the words that CONTRIBUTING.md lists do not occur in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.places import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
FILES = sorted(path for folder in ("weaksam", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TERMS = {"held_out", "one_of", "one_to_one", "plus_one", "not_found"}  # terms of the field, or of another library


def listed(title: str) -> list[str]:
    """The words of a bullet of CONTRIBUTING.md: `- <title>: `word`, `word`, ...`."""
    (line,) = re.findall(rf"^- {title}: (.*(?:\n  .*)*)", CONTRIBUTING, re.MULTILINE)
    return re.findall(r"`([^`]+)`", line)


NOT_IN_NAMES = frozenset(listed("Not in names"))
NOT_IN_DOCSTRINGS = re.compile(rf"\b({'|'.join(listed('Not in docstrings'))})\b", re.IGNORECASE)


def parts_of(name: str) -> set[str]:
    """The words of a name in snake, camel or upper case, terms of the field left out."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    for term in TERMS:
        snake = re.sub(rf"(?<![a-z]){term}(?![a-z])", "", snake)
    return set(re.findall(r"[a-z]+", snake))


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name


def docstrings_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def faults_in(source: str) -> list[str]:
    tree = ast.parse(source)
    names = [f"{line}: {name}" for line, name in names_in(tree) if parts_of(name) & NOT_IN_NAMES]
    texts = [f"{line}: {found[0]!r} in a docstring" for line, text in docstrings_in(tree)
             if (found := NOT_IN_DOCSTRINGS.search(text))]  # fmt: skip
    return names + texts


def test_the_lists_are_read_and_a_listed_word_is_found() -> None:
    assert {"told", "found", "one", "wanted"} <= NOT_IN_NAMES
    assert faults_in("told = 1") == ["1: told"]
    assert faults_in("def f(a, all_found): ...") == ["1: all_found"]
    assert faults_in("class SeenViews: ...") == ["1: SeenViews"]
    assert faults_in('def f():\n    """Tells how."""') == ["1: 'Tells' in a docstring"]
    assert faults_in("held_out = foundation = one_of = max_held_out = NOT_FOUND = 1") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_name_or_docstring_holds_a_listed_word(path: Path) -> None:
    assert faults_in(path.read_text()) == []
