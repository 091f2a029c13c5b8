"""Run files and cluster files as YAML: safe, and strict about keys that are given twice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from weaksam.errors import ConfigError

_MOST_VALUES = 100_000  # a run file has some hundreds


class _Loader(yaml.SafeLoader):
    """Safe YAML, merge keys included, in which `2e-5` is a number and a key given twice is a fault."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.values = 0
        self.sizes: dict[int, int] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before merge keys are resolved: those may be given again
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith((":null", ":timestamp", ":binary")):
                raise yaml.MarkedYAMLError(problem="this cannot be a key", problem_mark=key.start_mark)
            if (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            keys.add((key.tag, key.value))
        return node

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """Counts values as they are once every alias is what it stands for: a few lines can stand for billions."""
        before, event = self.values, self.peek_event()
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            self.values += self.sizes.get(id(node), 1)
        else:
            self.values += 1
            self.sizes[id(node)] = self.values - before
        if self.values > _MOST_VALUES:
            problem = f"with its aliases it holds more than {_MOST_VALUES} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_value(text: str) -> Any:
    """A value as in a run file: YAML, in which 1e-3 is a number; yaml.YAMLError or ValueError when it is none."""
    return yaml.load(text, Loader=_Loader)


def load_run_file(path: str) -> dict[str, Any]:
    """The raw content of a run file.

    Raises:
        ConfigError: the file is missing or not YAML.
    """
    try:
        content = _unshared(yaml.load(Path(path).read_text(), Loader=_Loader))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    # ValueError: a date that is none, or bytes that are no text. RecursionError: an anchor inside itself.
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys 'run' and 'steps'")
    return content


def with_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a run file's raw content with `key.path=value` overrides laid over it; values are read as YAML.

    Raises:
        ConfigError: an override is not of that form.
    """
    copied = _unshared(content)
    faults = [fault for text in overrides if (fault := _apply_override(copied, text))]
    if faults:
        raise ConfigError(*faults)
    return copied


def _unshared(content: Any) -> Any:
    """A deep copy in which no two keys share a value, as YAML anchors do: an override changes one step."""
    if isinstance(content, Mapping):
        return {key: _unshared(value) for key, value in content.items()}
    return [_unshared(value) for value in content] if isinstance(content, list) else content


def _apply_override(content: dict[str, Any], text: str) -> str | None:
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return f"{text}: an override has the form steps.<step>.<key>=<value>"
    target = content
    for depth, part in enumerate(parts[:-1]):
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            return f"{text}: '{'.'.join(parts[: depth + 1])}' is not a mapping"
    if parts[0] == "steps" and len(parts) > 2 and "stage" not in content["steps"][parts[1]]:
        return f"{text}: there is no step '{parts[1]}'"
    try:
        target[parts[-1]] = read_value(value)
    except (yaml.YAMLError, ValueError) as error:
        return f"{text}: the value is not YAML: {' '.join(str(error).split())}"
    return None
