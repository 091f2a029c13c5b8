"""pgt or detections -> files that other programs read.

Before the step is finished, another reader reads the files back and they are compared with the tables. For that the
tables are read twice, part by part: memory does not grow with the dataset, except for the text of the json formats and
the rows of the most uncertain images. The stage needs no cluster.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from weaksam.core import storage
from weaksam.core.step import Outcome, Stage, Step
from weaksam.data.datasets import first_ten
from weaksam.data.writers.common import Exporter, ExportImage, ExportTotals, compare
from weaksam.data.writers.format import ExportRequest
from weaksam.errors import ConfigError, DataError, StageError
from weaksam.execution.progress import repeatedly
from weaksam.stages.export_config import ExportConfig
from weaksam.stages.export_rows import Source
from weaksam.stages.export_source import read_source

log = logging.getLogger(__name__)

_REPORT_EVERY = 5.0  # seconds


def run(step: Step) -> Outcome:
    """Writes all images, then reads them back."""
    config: ExportConfig = step.config
    source = read_source(step)
    to = folder_of(step)
    if config.kind.needs_masks and not source.has_masks():
        hint = f": use format {config.kind.box_format}" if config.kind.box_format else ""
        raise DataError(f"steps.{step.name}: step {source.step.name} has no masks{hint}")
    exporter = make_exporter(source, to)
    _claim(step, to, exporter)
    renamed = _renamed(step, source)
    if renamed:
        log.warning("%s: %d images have another name in the export: %s", step.name, len(renamed), first_ten(renamed))
    totals, left_out = ExportTotals(), Counter[str]()
    with _progress(step, source, "written"):
        for images in source.batches(left_out):
            exporter.write(images)
    exporter.finish()
    with _progress(step, source, "read back"):
        for images in source.batches(Counter()):
            for image, result in zip(images, _read_back(step, exporter, images), strict=True):
                compare(image, result, exporter, totals)
    _check_rest(step, exporter)
    report = make_report(step, source, to, exporter, totals, left_out)
    storage.write_json(storage.join(step.folder, "export.json"), report)
    return Outcome(
        rows=len(source.places) + len(source.failures),
        failed=len(source.failures),
        failures=source.failures[:10],
        summary=summarise(report),
    )


def folder_of(step: Step) -> str:
    """Returns the folder a step exports to; a folder inside the run moves with the run."""
    to = step.config.to
    return storage.join(step.folder, "export") if to is None else storage.absolute(to)


def make_exporter(source: Source, to: str) -> Exporter:
    """Returns the exporter that writes the format into the folder `to`."""
    request = ExportRequest(
        to,
        source.class_names,
        category_ids=source.category_ids,
        image_root=source.image_root,
        model_version=f"{source.step.name}-{source.step.fingerprint}",
        options=source.config.options,
    )
    return source.config.kind.make(request)


def marker_uri(to: str, format: str) -> str:
    """Returns the URI of a file beside an export that identifies it."""
    return storage.join(to, f"weaksam_export_{format}.json")


def _claim(step: Step, to: str, exporter: Exporter) -> None:
    """Marks the folder as this export's.

    Raises:
        ConfigError: the folder has other files at paths this export writes to.
    """
    marker = marker_uri(to, step.config.format)
    try:
        is_ours = storage.read_json(marker).get("fingerprint") == step.fingerprint
    except FileNotFoundError:
        is_ours = False
    existing = [name for name in exporter.targets if storage.exists(storage.join(to, name))]
    if existing and not is_ours:
        raise ConfigError(
            f"steps.{step.name}.to: {to} holds {' and '.join(existing)} already, which this step did not write: name "
            "another folder, or remove them"
        )
    storage.write_json(marker, {"step": step.name, "fingerprint": step.fingerprint})


def _progress(step: Step, source: Source, what: str) -> Any:
    logged = -1

    def report() -> None:
        nonlocal logged
        if logged != source.done:
            logged = source.done
            log.info("%s  %d/%d images %s", step.name, logged, len(source.places), what)

    return repeatedly(report, seconds=_REPORT_EVERY)


# --- verification


def _read_back(step: Step, exporter: Exporter, images: list[ExportImage]) -> Iterator[Any]:
    """Yields the content of the files for each image.

    Raises:
        DataError: the files cannot be read back.
        StageError: files are gone; the same step writes them again.
    """
    what = f"step {step.name}: what was written for images {images[0].image_id} to {images[-1].image_id}"
    try:
        yield from exporter.read(images)
    except FileNotFoundError as error:
        raise StageError(f"{what} is gone ({error}): does another program remove files there?") from error
    except (ValueError, LookupError, TypeError, OSError, DataError) as error:
        raise DataError(
            f"{what} cannot be read back ({error!r}): if another program writes there, name another folder; if not, "
            "this format cannot hold it: take another one"
        ) from error


def _check_rest(step: Step, exporter: Exporter) -> None:
    try:
        exporter.check_rest()
    except FileNotFoundError as error:
        raise StageError(f"step {step.name}: {error}: does another program remove files there?") from error
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise DataError(f"step {step.name}: {error}: remove the export or name another folder") from error


def _renamed(step: Step, source: Source) -> list[str]:
    """Returns images with another file name in the export, as `a.png -> a_png.png`."""
    if step.config.kind.keeps_file_names:
        return []
    named = [(place.file_name.rpartition("/")[2], place.picture) for place in source.places.values()]
    return [f"{old} -> {new}" for old, new in named if old != new]


def make_report(
    step: Step, source: Source, to: str, exporter: Exporter, totals: ExportTotals, left_out: Counter[str]
) -> dict[str, Any]:
    """Returns the content of export.json."""
    lost = exporter.lost
    lost["boxes_cut_at_border"] = left_out.pop("boxes_cut_at_border", 0)
    if not step.config.kind.masks_overlap:
        lost["mask_pixels_covered"] = totals.mask_pixels - totals.mask_pixels_written
    lost["images_renamed"] = len(_renamed(step, source))
    report: dict[str, Any] = {
        "format": step.config.format,
        "to": to,
        "image_root": source.image_root,
        "contents": [name for name in exporter.targets if storage.exists(storage.join(to, name))],
        "files": exporter.files,
        "images": totals.images,
        "boxes": totals.boxes,
        "masks": totals.masks,
        "splits": dict(sorted(totals.splits.items())),
        "verified": exporter.verified,
        "left_out": {
            "failed_images": len(source.failures),
            **{k: n for k, n in (*source.passed_over.items(), *sorted(left_out.items())) if n},
        },
        "lost": {key: count for key, count in sorted(lost.items()) if count},
    }
    if totals.masks:
        mean = totals.iou_sum / totals.masks
        report["mask_iou"] = {"mean": mean, "worst": totals.worst_iou, "worst_image": totals.worst_image}
    return report


def summarise(report: Mapping[str, Any]) -> str:
    """Returns a report as one line."""
    texts = [f"{report[key]} {key}" for key in ("files", "images", "boxes", "masks")]
    texts[-1] += ", read back and compared"
    if "mask_iou" in report:
        texts.append(
            f"masks' IoU {report['mask_iou']['mean']:.4f} on average, {report['mask_iou']['worst']:.4f} at worst"
        )
    counts = {**report["left_out"], **report["lost"]}
    texts += [f"{count} {key.replace('_', ' ')}" for key, count in counts.items() if count]
    return f"{report['format']}: {', '.join(texts)} -> {report['to']}"


STAGE = Stage("export", 2, ExportConfig, run, writes="export")
