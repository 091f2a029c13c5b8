"""Settings of the stage `index`, and the dataset that they name."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from weaksam.core import storage
from weaksam.core.config import Choice, OutsideFolder, Place, StageConfig
from weaksam.data.readers import DATASET_FORMATS, dataset_format
from weaksam.data.readers.format import DatasetFormat, DatasetSource

_NAMES = tuple(kind.name for kind in DATASET_FORMATS)


class IndexConfig(StageConfig):
    """Lists a dataset: one row per image with its image-level labels, and its ground truth in a folder beside it."""

    format: Annotated[str, Choice(_NAMES)] = Field(
        description=f"The layout of the dataset: {', '.join(f'`{k.name}` ({k.description})' for k in DATASET_FORMATS)}."
    )
    root: Annotated[str, OutsideFolder(), Place()]
    """URI of the dataset's folder. It may move: only the files count, by paths below it, sizes and times."""
    splits: list[str] | None = Field(default=None, min_length=1)
    """Splits to list; required for formats that have a file for each split, such as voc and coco; all splits of a
    folder when left out."""
    labels_file: Annotated[str, Place()] = "labels.csv"
    """Format folder: the CSV file with the columns file and labels, below root or a URI."""
    annotations: Annotated[dict[str, str], Place()] = Field(default_factory=dict)
    """Format coco: split -> annotation json, below root or a URI; annotations/instances_<split>.json when left out."""
    image_folders: Annotated[dict[str, str], Place()] = Field(default_factory=dict)
    """Format coco: split -> folder of its images, below root or a URI; the split's name when left out."""
    classes: list[str] | None = Field(default=None, min_length=1)
    """Class names, in the order of the class indices; the classes of the dataset when left out."""
    difficult_makes_label: bool = False
    """VOC: whether an object flagged difficult makes an image-level label."""
    crowd_makes_label: bool = False
    """COCO: whether a crowd region makes an image-level label."""
    orientation: Literal["upright", "stored"] = "upright"
    """The frame of the dataset's sizes, boxes and masks: `upright` is the image turned upright by its EXIF orientation,
    as viewers show it and all stages read it; `stored` is the image as the file stores it. Stored sizes, boxes and
    masks are converted to upright."""
    masks: bool = True
    """Whether to read the masks of the ground truth if the dataset has masks."""
    sample: int | None = Field(default=None, ge=1)
    """Number of images of each split, for a first try, with an image of each class if possible; all when left out."""

    @field_validator("annotations", "image_folders")
    @classmethod
    def _names_splits(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        splits = info.data.get("splits") or list(value)  # missing splits are a fault of their own
        if unknown := [split for split in value if split not in splits]:
            raise ValueError(f"{', '.join(unknown)}: no such split: splits are {', '.join(splits)}")
        return value

    @model_validator(mode="after")
    def _fits_the_format(self) -> IndexConfig:
        for key, info in type(self).model_fields.items():
            formats = [kind.name for kind in DATASET_FORMATS if key in kind.settings]
            default = info.get_default(call_default_factory=True)
            if formats and self.format not in formats and getattr(self, key) != default:
                raise ValueError(f"{key} is for format {' and '.join(formats)}, not {self.format}")
        return self

    @model_validator(mode="after")
    def _splits_are_named(self) -> IndexConfig:
        if self.kind.needs_splits and self.splits is None:
            raise ValueError(
                f"splits is required for format {self.format}, e.g. [trainval, test] or [train2017, val2017]"
            )
        return self

    @property
    def kind(self) -> DatasetFormat:
        """The format of the dataset."""
        return dataset_format(self.format)

    @property
    def source(self) -> DatasetSource:
        """The dataset to read."""
        values = {field.name: getattr(self, field.name) for field in fields(DatasetSource)}
        values["root"] = storage.absolute(self.root)
        return DatasetSource(**values)
