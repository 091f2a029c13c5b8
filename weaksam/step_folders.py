"""What the files in a step's folder say of it: finished, cut, or without its config.json."""

from __future__ import annotations

import logging
from typing import Any

from weaksam import storage, tables
from weaksam.errors import DamagedError
from weaksam.stage import Step, describe

log = logging.getLogger(__name__)

_SHOWN = 3


def whole_manifest(step: Step) -> dict[str, Any] | None:
    """The manifest of a finished step whose files are all there; None where there is something to do.

    A step that has lost some of its files is made an unfinished one: what is whole is kept, the rest is made again.
    """
    manifest = step.manifest()
    if manifest is None:
        return None
    lost = tables.lost_files(step.folder, manifest)
    if not lost:
        return manifest
    log.warning("%s: %s in %s: making the missing rows or weights again", step.name, name_lost(lost), step.folder)
    storage.delete(step.manifest_uri)  # first: without it the step counts as unfinished, whatever happens now
    for path in lost:
        storage.delete(storage.join(step.folder, path))
    return None


def name_lost(lost: dict[str, str]) -> str:
    """`2 files are lost: part-1.parquet is gone, ...`."""
    shown = ", ".join(f"{path} {what}" for path, what in list(lost.items())[:_SHOWN])
    rest = ", ..." if len(lost) > _SHOWN else ""
    return f"{len(lost)} file{' is' if len(lost) == 1 else 's are'} lost: {shown}{rest}"


def keep_config(step: Step) -> None:
    """Writes the step's config.json where there is none, or one that does not describe this step."""
    uri = storage.join(step.folder, "config.json")
    try:
        found = storage.read_json(uri)
    except FileNotFoundError:
        found = None
    except DamagedError as error:
        found = None
        log.warning("%s: %s: it is written again", step.name, error)
    if not isinstance(found, dict) or found.get("fingerprint") != step.fingerprint:
        storage.write_json(uri, describe(step))
