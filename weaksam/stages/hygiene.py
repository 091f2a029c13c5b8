"""images -> hygiene: faults of a dataset, before a training uses it.

Copies of images in both training and test splits make every figure too good; classes without images cannot be learnt.
The stage reads only image-level labels, never boxes that people drew.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from weaksam.core import schemas, storage, tables
from weaksam.core.config import NotInFingerprint, Reads, StageConfig
from weaksam.core.parquet_files import write_parquet
from weaksam.core.step import Outcome, Stage, Step
from weaksam.execution.mapping import ImageMapper, Row
from weaksam.execution.pools import CpuPoolResources
from weaksam.stages.labels import describe_everywhere
from weaksam.stages.step_images import read_images

log = logging.getLogger(__name__)

DUPLICATES = pa.schema(
    [
        ("image_id", pa.string()),
        ("group", pa.int32()),
        ("kind", pa.string()),  # kind of the group: exact (all have the same bytes) or near
        ("split", pa.string()),
        ("uri", pa.string()),
        ("sha256", pa.string()),
    ]
)


class HygieneConfig(StageConfig):
    """Checks a dataset: duplicates, also across splits, broken images, missing labels, counts of classes.

    Writes a row per image with its size, the SHA-256 of its bytes, a perceptual hash and a thumbnail. Also writes
    hygiene.json and duplicates.parquet.
    """

    max_failed: Annotated[float, NotInFingerprint()] = Field(default=1.0, ge=0, le=1)
    """Share of images, rounded up, that may be broken before the step counts as failed; by default all, because the
    report counts them."""
    images: Annotated[str, Reads("images")]
    """The `index` step with the images and their labels."""
    # Measured on copies of 382 photos: the limits detect all copies compressed to JPEG quality 50, shrunk to a quarter,
    # doubled, squeezed to a square, blurred, darkened or turned grey, 98 % of the copies made 30 % brighter, and 100,
    # 95, 61 and 10 % of the copies cut by 1, 2, 3 and 5 % at every side. Of 158,203 pairs of 563 photos they match six,
    # each of an object photographed twice from the same place (the next pair has 6 bits and 0.415), and of 404,550
    # pairs of drawn scenes none.
    max_bits: int = Field(default=8, ge=0, le=16)
    """Near duplicates differ in at most this number of the 64 bits of their perceptual hashes."""
    max_difference: float = Field(default=0.35, ge=0, le=2)
    """The thumbnails of near duplicates, normalised to mean 0 and standard deviation 1, also differ by at most this
    (root mean square)."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Larger images are refused with status `too_large`."""
    resources: CpuPoolResources = CpuPoolResources()
    """Resources of the workers."""


class LookAtImages(ImageMapper):
    """Makes rows of `schemas.HYGIENE`."""

    def make(self, image: np.ndarray, row: Row, prepared: None) -> Row:
        """Returns the hashes and the thumbnail of an image."""
        from weaksam.data.likeness import perceptual_hash, thumbnail

        return {
            "sha256": hashlib.sha256(row["data"]).hexdigest(),
            "perceptual_hash": perceptual_hash(image),
            "thumbnail": thumbnail(image).tobytes(),
        }


def run(step: Step) -> Outcome:
    """Maps all images to rows, lists duplicates and writes the report."""
    from weaksam.execution import runtime

    config: HygieneConfig = step.config
    images = read_images(step, "labels", "height", "width")
    outcome = runtime.map_images(
        step,
        images.select(["image_id", "uri"]),
        LookAtImages,
        schema=schemas.HYGIENE,
        max_pixels=config.max_pixels,
        resources=config.resources,
    )
    rows = tables.read_table(step.folder, {"parts": outcome.parts, "excluded": outcome.excluded})
    names = step.inputs["images"].class_names()
    listed = list_duplicates(images, rows, config)
    metadata = schemas.with_metadata(DUPLICATES, fingerprint=step.fingerprint, class_names=names).metadata
    write_parquet(storage.join(step.folder, "duplicates.parquet"), listed.replace_schema_metadata(metadata))
    report = count_images(images, rows, names) | describe_groups(images, listed) | compare_sizes(images, rows)
    storage.write_json(storage.join(step.folder, "hygiene.json"), report)
    for split, counted in report["splits"].items():
        known = counted["images"] - counted["labels_unknown"]
        counts = {name: by_split[split] for name, by_split in report["classes"].items()}
        for text in describe_everywhere(f"{step.name}: split '{split}'", counts, known) if known else []:
            log.warning("warning: %s", text)
    return replace(outcome, summary=summarise(report))


def list_duplicates(images: pa.Table, rows: pa.Table, config: HygieneConfig) -> pa.Table:
    """Returns the images that are copies of others, as a table of `DUPLICATES`, group after group.

    Args:
        images: (image_id, uri, split).
        rows: rows of `schemas.HYGIENE`, for the same images in the same order.
        config: the limits for near duplicates.
    """
    from weaksam.data.likeness import THUMBNAIL_SIDE
    from weaksam.ops.duplicates import DuplicateRules, group_duplicates

    rows = tables.with_status_ok(rows)
    images = tables.rows_for(images, rows.column("image_id").to_pylist())
    pixels = np.frombuffer(b"".join(rows.column("thumbnail").to_pylist()), np.uint8)
    thumbnails = pixels.reshape(-1, THUMBNAIL_SIDE**2)
    rules = DuplicateRules(config.max_bits, config.max_difference)
    contents, hashes = rows.column("sha256"), rows.column("perceptual_hash").to_numpy()
    groups = group_duplicates(contents.to_pylist(), hashes, thumbnails, rules)
    members = np.flatnonzero(groups.group >= 0)
    members = members[np.argsort(groups.group[members], kind="stable")]
    group, copies = groups.group[members], images.take(pa.array(members, pa.int64()))
    columns = {name: copies.column(name).to_pylist() for name in ("image_id", "split", "uri")}
    columns |= {"group": group, "kind": np.where(groups.exact[group], "exact", "near").tolist()}
    columns["sha256"] = contents.take(pa.array(members, pa.int64())).to_pylist()
    return pa.table({name: columns[name] for name in DUPLICATES.names}, schema=DUPLICATES)


def describe_groups(images: pa.Table, listed: pa.Table) -> dict[str, Any]:
    """Returns `duplicates`, group after group, and `leaks`, the numbers of the groups in more than one split.

    Args:
        images: (image_id, labels).
        listed: a table of `DUPLICATES`.
    """
    labels = dict(zip(images.column("image_id").to_pylist(), images.column("labels").to_pylist(), strict=True))
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in listed.to_pylist():
        groups.setdefault(row["group"], []).append(row)
    duplicates = []
    for number, members in groups.items():
        ids = [row["image_id"] for row in members]
        known = {tuple(labels[image_id]) for image_id in ids if labels[image_id] is not None}
        splits = sorted({row["split"] for row in members})
        group = {"group": number, "kind": members[0]["kind"], "splits": splits, "labels_differ": len(known) > 1}
        duplicates.append(group | {"image_ids": ids})
    return {"duplicates": duplicates, "leaks": [entry["group"] for entry in duplicates if len(entry["splits"]) > 1]}


def compare_sizes(images: pa.Table, rows: pa.Table) -> dict[str, Any]:
    """Returns the ids of images whose size is not the stated size.

    `sizes_turned` are turned by a quarter, `sizes_differ` are all others.

    Args:
        images: (image_id, height, width) as stated; null if not stated.
        rows: (height, width) as decoded, for the same images in the same order.
    """
    from weaksam.data.stated_sizes import differing_sizes

    stated, decoded = (
        list(zip(*(table.column(key).to_pylist() for key in ("height", "width")), strict=True))
        for table in (images, rows)
    )
    turned, other = differing_sizes(zip(images.column("image_id").to_pylist(), stated, decoded, strict=True))
    return {"sizes_turned": turned, "sizes_differ": other}


def count_images(images: pa.Table, rows: pa.Table, names: list[str]) -> dict[str, Any]:
    """Counts images, labels and sizes.

    Args:
        images: (split, labels).
        rows: (status, height, width) of the same images.
        names: the class names.

    Returns:
        `images`, `failed` by status, `splits` (for each: images, images whose labels are unknown, images labelled with
        no class, classes without an image where labels are known), `classes` (images by split), and `sizes` in pixels.
    """
    splits, labels = images.column("split").to_pylist(), images.column("labels").to_pylist()
    known = {split: [] for split in sorted(set(splits))}
    for split, present in zip(splits, labels, strict=True):
        known[split] += [] if present is None else [present]
    counts = {split: Counter(label for present in lists for label in present) for split, lists in known.items()}
    total = Counter(splits)
    status = Counter(rows.column("status").to_pylist())
    return {
        "images": rows.num_rows,
        "failed": {reason: status[reason] for reason in schemas.FAILED_STATUSES if status[reason]},
        "splits": {
            split: {
                "images": total[split],
                "labels_unknown": total[split] - len(lists),
                "labels_empty": sum(not present for present in lists),
                "classes_absent": [name for i, name in enumerate(names) if lists and not counts[split][i]],
            }
            for split, lists in known.items()
        },
        "classes": {name: {split: counts[split][i] for split in known} for i, name in enumerate(names)},
        "sizes": {key: _spread(rows.column(key)) for key in ("height", "width")},
    }


def _spread(column: pa.ChunkedArray) -> dict[str, float] | None:
    """Returns smallest, median and largest value; None for a column without values."""
    values = column.drop_null().to_numpy()
    spread = {"min": np.min, "median": np.median, "max": np.max}
    return {name: float(function(values)) for name, function in spread.items()} if len(values) else None


def summarise(report: dict[str, Any]) -> str:
    """Returns the content of `hygiene.json` as one line."""
    kinds = Counter(group["kind"] for group in report["duplicates"])
    without = sum(split["labels_unknown"] + split["labels_empty"] for split in report["splits"].values())
    totals = [sum(by_split.values()) for by_split in report["classes"].values()]
    classes = f"classes have {min(totals)} to {max(totals)} images" if totals else "no classes"
    strange = len(report["sizes_turned"]) + len(report["sizes_differ"])
    sizes = f", {strange} images of another size than the dataset states" if strange else ""
    return (
        f"{kinds['exact']} exact and {kinds['near']} near groups of duplicates, {len(report['leaks'])} of them across "
        f"splits, {without} images without labels, {classes}{sizes}"
    )


STAGE = Stage("hygiene", 2, HygieneConfig, run, writes="hygiene")
