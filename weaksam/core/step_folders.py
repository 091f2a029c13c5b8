"""Checks the files in a step's folder: whether it is finished, and whether its config.json is right."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from weaksam.core import step_files, storage, tables
from weaksam.core.fingerprints import describe
from weaksam.core.step import Step
from weaksam.errors import DamagedError

log = logging.getLogger(__name__)

_SHOWN = 3
_LOOKS = 16  # at a time


def whole_manifest(step: Step) -> dict[str, Any] | None:
    """Returns the manifest of a finished step whose files are complete; None if the step has to run.

    A step that has lost files becomes unfinished: its intact files are kept, the others are computed again. The same
    happens to a step with missing images that exist now.
    """
    manifest = step.manifest()
    if manifest is None:
        return None
    if reappeared := _reappeared_ids(step, manifest):
        log.warning(
            "%s: %d images that were missing are there now, e.g. %s: working on them; trainings that are finished stay "
            "as they are",
            *(step.name, len(reappeared), reappeared[0]),
        )
        storage.delete(step.manifest_uri)
        return None
    lost = step_files.lost_files(step.folder, manifest)
    if not lost:
        return manifest
    log.warning("%s: %s in %s: making the missing rows or weights again", step.name, name_lost(lost), step.folder)
    storage.delete(step.manifest_uri)  # first: without it the step is unfinished even if the next calls fail
    for path in lost:
        storage.delete(storage.join(step.folder, path))
    return None


def _reappeared_ids(step: Step, manifest: Mapping[str, Any]) -> list[str]:
    """Returns the ids of rows with status `not_found` whose image exists now."""
    images = step.inputs.get("images")
    if not manifest["failed"] or not manifest.get("parts") or images is None:
        return []
    try:
        missing = tables.missing_ids(step.folder, manifest["parts"])
        listed = images.manifest() if missing else None
        if listed is None:
            return []
        table = tables.read_table(images.folder, listed, columns=["uri"])
    except DamagedError:  # reported by the step that reads those rows
        return []
    rows = table.select(["image_id", "uri"]).to_pylist()
    return existing_ids({row["image_id"]: row["uri"] for row in rows if row["image_id"] in missing})


def existing_ids(uris: Mapping[str, str]) -> list[str]:
    """Returns the image ids whose URI exists, sorted; `uris` are by image id."""
    with ThreadPoolExecutor(_LOOKS) as pool:
        flags = pool.map(storage.exists, uris.values())
        return sorted(image_id for image_id, exists in zip(uris, flags, strict=True) if exists)


def name_lost(lost: dict[str, str]) -> str:
    """Returns the text `2 files are lost: part-1.parquet is gone, ...`."""
    shown = ", ".join(f"{path} {what}" for path, what in list(lost.items())[:_SHOWN])
    rest = ", ..." if len(lost) > _SHOWN else ""
    return f"{len(lost)} file{' is' if len(lost) == 1 else 's are'} lost: {shown}{rest}"


def keep_config(step: Step) -> None:
    """Writes the step's config.json unless it exists and describes this step."""
    uri = storage.join(step.folder, "config.json")
    try:
        saved = storage.read_json(uri)
    except FileNotFoundError:
        saved = None
    except DamagedError as error:
        saved = None
        log.warning("%s: %s: it is written again", step.name, error)
    expected = json.loads(json.dumps(describe(step)))
    saved = saved if isinstance(saved, dict) else {}
    # settings of a finished step may name locations that no longer exist
    moved = bool(step.places) and saved.get("settings") != expected["settings"]
    if moved or saved.get("fingerprint") != step.fingerprint:
        storage.write_json(uri, expected)
