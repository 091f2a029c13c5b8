"""Logs why a step has a new folder: the keys that differ from its earlier results."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from weaksam.core import storage
from weaksam.core.config import result_settings
from weaksam.core.fingerprints import describe
from weaksam.core.step import Step
from weaksam.errors import WeakSamError

log = logging.getLogger(__name__)


def log_changes(step: Step) -> None:
    """Logs which keys differ from each other result of the same step name."""
    run = step.folder.rsplit("/", 1)[0]
    others = [name for name in storage.list_folders(run) if name.rsplit("-", 1)[0] == step.name]
    if not others or storage.exists(storage.join(step.folder, "config.json")):
        return
    before = {}
    for name in others:
        try:
            before[name] = storage.read_json(storage.join(run, name, "config.json"))
        except (FileNotFoundError, WeakSamError):
            continue
    now = _flat(describe(step))
    left_out = {
        f"settings.{key}" for key in type(step.config).model_fields.keys() - result_settings(step.config).keys()
    }
    for name, config in before.items():
        old = _flat(config)
        keys = [k for k in sorted(now.keys() | old.keys()) if now.get(k) != old.get(k) and not _irrelevant(k, left_out)]
        changed = ", ".join(f"{key} {old.get(key)!r} -> {now.get(key)!r}" for key in keys)
        log.info("%s: a new folder beside %s, because of %s", step.name, name, changed or "another weaksam")


def _irrelevant(key: str, left_out: Collection[str]) -> bool:
    """Returns whether a key of config.json has no part in the folder's name; `left_out` are the settings to ignore."""
    return key == "fingerprint" or ".resources" in key or ".".join(key.split(".")[:2]) in left_out


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
