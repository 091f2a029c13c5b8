"""Selects the rows of pgt or detections that an `export` step exports."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from weaksam.core import schemas, tables
from weaksam.core.step import AnyStep, Step
from weaksam.data.writers.places import place_images
from weaksam.errors import DataError
from weaksam.stages import export_rows
from weaksam.stages.export_config import ExportConfig
from weaksam.stages.export_rows import Source
from weaksam.stages.export_uncertain import keep_most_uncertain


def read_source(step: Step) -> Source:
    """Returns the images to export and the parts with their rows.

    Raises:
        DataError: an image has no row, or is of another dataset; there is nothing to export.
    """
    config: ExportConfig = step.config
    images = step.inputs["images"].read(["uri", "height", "width", "split", "labels"])
    source = step.inputs["pgt" if config.pgt is not None else "detections"]
    manifest = source.finished_manifest()
    read = tables.read_parts(source.folder, manifest["parts"], columns=["image_id", "status", "message", "trusted"])
    parts = dict(zip(manifest["parts"], read, strict=True))
    kept = [tables.without_ids(table, manifest["excluded"].get(part, [])) for part, table in parts.items()]
    rows = [row for table in kept for row in table.to_pylist()]
    names = step.inputs["images"].class_names()
    rows = _of_split(step, source, images, rows)
    _check_same(step, source, images, rows)
    failures = [f"{r['image_id']}: {r['status']}: {r['message']}" for r in rows if r["status"] != schemas.OK]
    chosen = {row["image_id"] for row in rows if row["status"] == schemas.OK}
    if not chosen:
        raise DataError(f"steps.{step.name}: step {source.name} has no image to export ({len(failures)} failed)")
    places, root = place_images(
        images.to_pylist(),
        chosen,
        keep_spaces=config.kind.keeps_spaces,
        ids_are_numbers=schemas.ids_are_numbers(images.schema),
    )
    # Parts are named by hashes: by their first ids, the order of the export is nearly that of the ids.
    ordered = sorted(parts, key=lambda part: min(parts[part].column("image_id").to_pylist(), default=""))
    numbers = schemas.category_ids_of(images.schema)
    exported = Source(source, config, names, places, root, failures, _group(ordered), manifest["excluded"], numbers)
    if config.most_uncertain is None:
        return exported
    trusted = {row["image_id"] for row in rows if row.get("trusted")}  # tables of detections have no such column
    return keep_most_uncertain(exported, images, trusted, config.most_uncertain)


def _of_split(step: Step, source: AnyStep[Any], images: pa.Table, rows: list[dict]) -> list[dict]:
    """Returns the rows of the configured split."""
    split = step.config.split
    if split is None:
        return rows
    required = set(tables.of_split(images, split, where=f"steps.{step.name}.split").column("image_id").to_pylist())
    rows = [row for row in rows if row["image_id"] in required]
    if missing := sorted(required - {row["image_id"] for row in rows}):
        raise DataError(
            f"steps.{step.name}: step {source.name} has no row for {len(missing)} of {len(required)} images of split "
            f"'{split}', e.g. {missing[0]}: let it run on this split too"
        )
    return rows


def _check_same(step: Step, source: AnyStep[Any], images: pa.Table, rows: list[dict]) -> None:
    """Raises DataError when the rows are of another dataset than the images."""
    strange = sorted({row["image_id"] for row in rows}.difference(images.column("image_id").to_pylist()))
    if strange or source.class_names() != step.inputs["images"].class_names():
        what = f"image {strange[0]}, which is" if strange else "classes that are"
        raise DataError(
            f"steps.{step.name}: step {source.name} has {what} not in step {step.inputs['images'].name}: "
            "name the images it was made from"
        )


def _group(parts: list[str]) -> list[list[str]]:
    """Returns groups of parts to read together, about `BATCH` rows each: parts can be small and storage slow."""
    groups: list[list[str]] = []
    rows = export_rows.BATCH
    for part in parts:
        if rows >= export_rows.BATCH:
            groups.append([])
            rows = 0
        groups[-1].append(part)
        rows += tables.rows_in(part)
    return groups
