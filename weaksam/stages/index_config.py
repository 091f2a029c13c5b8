"""Settings of the stage `index`, and the dataset and the paths that they name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from weaksam.core import storage
from weaksam.core.config import OutsideFolder, Place, StageConfig
from weaksam.data.datasets import Dataset
from weaksam.data.readers.coco import read_coco
from weaksam.data.readers.folder import read_folder, read_voc_xml_folder
from weaksam.data.readers.voc import read_voc

# Settings of single formats.
_ONLY_FOR = {
    "labels_file": ("folder",),
    "annotations": ("coco",),
    "image_folders": ("coco",),
    "difficult_makes_label": ("voc", "voc_folder"),
    "crowd_makes_label": ("coco",),
}


class IndexConfig(StageConfig):
    """Lists a dataset: one row per image with its image-level labels, and its ground truth in a folder beside it.

    Formats: `voc` (a devkit: ImageSets, Annotations, JPEGImages), `coco` (instances json and image folders),
    `folder` (images and a labels.csv) and `voc_folder` (images with VOC XML files beside them).
    """

    format: Literal["voc", "coco", "folder", "voc_folder"]
    """The layout of the dataset."""
    root: Annotated[str, OutsideFolder(), Place()]
    """URI of the dataset's folder. It may move: only the files count, by paths below it, sizes and times."""
    splits: list[str] | None = Field(default=None, min_length=1)
    """Splits to list; required for voc and coco, all splits of a folder when left out."""
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
        for key, formats in _ONLY_FOR.items():
            default = type(self).model_fields[key].get_default(call_default_factory=True)
            if self.format not in formats and getattr(self, key) != default:
                raise ValueError(f"{key} is for format {' and '.join(formats)}, not {self.format}")
        return self

    @model_validator(mode="after")
    def _splits_are_named(self) -> IndexConfig:
        if self.format in ("voc", "coco") and self.splits is None:
            raise ValueError(
                f"splits is required for format {self.format}, e.g. [trainval, test] or [train2017, val2017]"
            )
        return self


def read_dataset(config: IndexConfig) -> Dataset:
    """Reads the dataset from its files."""
    root, splits, classes, difficult = config.root, config.splits, config.classes, config.difficult_makes_label
    if config.format == "voc":
        return read_voc(root, splits or [], classes=classes, difficult_makes_label=difficult, masks=config.masks)
    if config.format == "coco":
        places = {split: coco_split(config, split) for split in splits or []}
        crowd = config.crowd_makes_label
        return read_coco(root, places, classes=classes, crowd_makes_label=crowd, masks=config.masks)
    if config.format == "folder":
        return read_folder(root, splits, table=below(root, config.labels_file), classes=classes)
    return read_voc_xml_folder(root, splits, classes=classes, difficult_makes_label=difficult)


def coco_split(config: IndexConfig, split: str) -> tuple[str, str]:
    """Returns the URIs of a split's annotations and of its image folder."""
    annotations = config.annotations.get(split, f"annotations/instances_{split}.json")
    return below(config.root, annotations), below(config.root, config.image_folders.get(split, split))


def below(root: str, path: str) -> str:
    """Returns `path` below `root`, or `path` itself if it is a URI or absolute."""
    return storage.absolute(
        path if storage.is_uri(path) or path.startswith("/") else storage.join(storage.absolute(root), path)
    )
