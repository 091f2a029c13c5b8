"""Settings of the stage `export`: the format, the images and the boxes."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pydantic import Field, model_validator

from weaksam.core.config import Choice, OutsideFolder, Place, Reads, StageConfig, one_of
from weaksam.data.writers import EXPORT_FORMATS, export_format
from weaksam.data.writers.format import ExportFormat, ExportOptions

_NAMES = tuple(kind.name for kind in EXPORT_FORMATS)


class ExportConfig(StageConfig):
    """Writes pseudo ground truth or detections in a format that other programs read, and checks the files.

    Images are not copied; voc and yolo come with images.csv, which lists the path that each image belongs at. Images
    with a failed row are left out. Also writes export.json: the written files, the checks, and the data that the format
    cannot hold.
    """

    images: Annotated[str, Reads("images")]
    """The `index` step with the images."""
    pgt: Annotated[str | None, Reads("pgt")] = None
    """The step whose pseudo ground truth is exported."""
    detections: Annotated[str | None, Reads("detections")] = None
    """The step whose detections are exported instead."""
    format: Annotated[str, Choice(_NAMES)] = Field(
        description=f"The format of the files: {', '.join(f'`{k.name}` ({k.description})' for k in EXPORT_FORMATS)}."
    )
    to: Annotated[str | None, OutsideFolder(), Place(is_written=True)] = None
    """URI of the folder to write to; the folder `export` of the step when left out. The files of an earlier export in
    it are never overwritten."""
    split: str | None = None
    """Only images of this split; all images that have a row when left out."""
    min_score: float = Field(default=0.0, ge=0)
    """Boxes with a lower score are left out. Detectors find many unlikely boxes: set a limit to make a dataset from
    detections."""
    max_per_image: int | None = Field(default=None, ge=1)
    """Most boxes of an image, the best first; unset = no limit."""
    masks: bool = True
    """Whether to export masks if the step has masks; yolo cannot hold masks."""
    polygons: bool = False
    """Format coco: masks as polygons, which some programs require, rather than RLE. Polygons lose holes."""
    polygon_tolerance: float | None = Field(default=None, ge=0)
    """Pixels that a polygon may deviate to have fewer corners. When left out, 1 for label_studio and 0 for others, so
    that polygons follow every pixel."""
    number_images: bool = False
    """Format coco_results: images have the numbers that format coco gives them, so that both files fit together.
    Otherwise they have the dataset's own ids, as `import_detections` reads them. For COCO both are the same."""
    image_prefix: str | None = None
    """Format label_studio: the prefix of the file names in URLs, e.g. https://host/images/ or
    /data/local-files/?d=images/. The images' own URIs when left out."""
    most_uncertain: int | None = Field(default=None, ge=1)
    """Format label_studio: export only this number of images, the images that the detector is least sure of first, for
    people to review. Reviewed images are left out. The corrected tasks are `reviewed` of the stage pgt."""

    @model_validator(mode="after")
    def _fits_together(self) -> ExportConfig:
        one_of(self, "pgt", "detections")
        for key in type(self).model_fields:
            formats = [kind.name for kind in EXPORT_FORMATS if key in kind.settings]
            if formats and self.format not in formats and getattr(self, key) not in (None, False):
                raise ValueError(f"{key} is for format {' and '.join(formats)}, not {self.format}")
        if (fault := self.kind.fault(self.options)) is not None:
            raise ValueError(fault)
        if self.kind.needs_masks and not self.masks:
            hint = f": use {self.kind.box_format} for boxes" if self.kind.box_format else ""
            raise ValueError(f"format {self.format} is made of masks{hint}")
        return self

    @property
    def kind(self) -> ExportFormat:
        """The format of the files."""
        return export_format(self.format)

    @property
    def options(self) -> ExportOptions:
        """The settings of single formats."""
        return ExportOptions(**{field.name: getattr(self, field.name) for field in fields(ExportOptions)})
