"""Reads run files and cluster files: safe YAML that rejects duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from weaksam.errors import ConfigError

_MOST_VALUES = 100_000  # a run file has some hundreds


class _Loader(yaml.SafeLoader):
    """Safe YAML loader with merge keys that reads `2e-5` as a number and rejects duplicate keys."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.values = 0
        self.sizes: dict[int, int] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before merge keys are resolved: merged keys may be repeated
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith((":null", ":timestamp", ":binary")):
                raise yaml.MarkedYAMLError(problem="this cannot be a key", problem_mark=key.start_mark)
            if (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            keys.add((key.tag, key.value))
        return node

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        """Counts values with aliases expanded: a few lines can expand to billions of values."""
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
    """Parses a value as in a run file, with 1e-3 as a number; raises yaml.YAMLError or ValueError if it is invalid."""
    return yaml.load(text, Loader=_Loader)


def load_run_file(path: str) -> dict[str, Any]:
    """Returns the raw content of a run file.

    Raises:
        ConfigError: the file is missing or not YAML.
    """
    try:
        content = _unshared(yaml.load(Path(path).read_text(), Loader=_Loader))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    # ValueError: an invalid date, or bytes that are not text. RecursionError: an anchor inside itself.
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys 'run' and 'steps'")
    return content


def with_overrides(content: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of a run file's raw content with `key.path=value` overrides applied; values are YAML.

    Raises:
        ConfigError: an override has another form.
    """
    copied = _unshared(content)
    faults = [fault for text in overrides if (fault := _apply_override(copied, text))]
    if faults:
        raise ConfigError(*faults)
    return copied


def _unshared(content: Any) -> Any:
    """Returns a deep copy without values shared by YAML anchors, so that an override changes one step only."""
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
