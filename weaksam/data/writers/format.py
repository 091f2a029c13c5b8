"""Describes export formats for the catalogue and the stage `export`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weaksam.data.writers.common import Exporter


@dataclass(frozen=True)
class ExportOptions:
    """Settings of single formats; a format uses some of them.

    Attributes:
        polygons: masks as polygons, where the format has another form too.
        polygon_tolerance: pixels that a polygon may deviate; None: the format's own default.
        number_images: images have the numbers of `Place` as ids, not their own ids.
        image_prefix: prefix of the file names in URLs; None: the images' own URIs.
    """

    polygons: bool = False
    polygon_tolerance: float | None = None
    number_images: bool = False
    image_prefix: str | None = None


@dataclass(frozen=True)
class ExportRequest:
    """An export to make.

    Attributes:
        to: URI of the folder to write to.
        class_names: by 0-based class.
        category_ids: the dataset's own ids, by class; None: `default_category_ids`.
        image_root: URI of the common folder of all exported images.
        model_version: name of the step whose boxes are exported, with its fingerprint.
        options: settings of single formats.
    """

    to: str
    class_names: Sequence[str]
    category_ids: Sequence[int] | None = None
    image_root: str = ""
    model_version: str = ""
    options: ExportOptions = ExportOptions()


@dataclass(frozen=True)
class ExportFormat:
    """An export format of the catalogue.

    Attributes:
        name: value of `format` in a run file.
        description: describes the files in a few words, for the help of `format`.
        make: returns the exporter that writes the format.
        settings: settings of the stage `export` that only some formats have: those of this format.
        fault: returns a fault of settings that do not go together; None if they do.
        needs_masks: whether it consists of masks, and is refused without any.
        box_format: name of the format to use for boxes without masks, for messages of a format that needs masks.
        needs_sizes: whether it needs the size of an image without masks.
        keeps_file_names: whether it refers to images by their own file names; otherwise by `Place.picture`.
        keeps_spaces: whether names of files may have spaces.
        masks_overlap: whether masks keep the pixels that they share; otherwise the best mask covers the others.
    """

    name: str
    description: str
    make: Callable[[ExportRequest], Exporter]
    settings: tuple[str, ...] = ()
    fault: Callable[[ExportOptions], str | None] = lambda options: None
    needs_masks: bool = False
    box_format: str | None = None
    needs_sizes: bool = True
    keeps_file_names: bool = True
    keeps_spaces: bool = True
    masks_overlap: bool = True
