"""a dataset on storage -> images, and ground_truth beside it where the dataset has boxes.

Everything later reads the `images` table, so a dataset's own conventions end here. Image files are listed, not read.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from weaksam import schemas, storage, tables
from weaksam.config import OutsideFolder, StageConfig
from weaksam.data.coco import read_coco
from weaksam.data.datasets import Dataset, sample_dataset
from weaksam.data.folder import read_folder, read_voc_xml_folder
from weaksam.data.voc import find_devkit, read_voc
from weaksam.errors import ConfigError
from weaksam.stage import Outcome, Stage, Step

_ROWS_PER_PART = 20_000
_VOC_FOLDERS = ("ImageSets", "Annotations", "JPEGImages", "SegmentationObject")


class IndexConfig(StageConfig):
    """Lists a dataset: one row per image with its image-level labels, its ground truth in a folder beside it.

    Formats: `voc` (a devkit: ImageSets, Annotations, JPEGImages), `coco` (instances json and image folders),
    `folder` (images and a labels.csv) and `voc_folder` (images with VOC XML files beside them).
    """

    format: Literal["voc", "coco", "folder", "voc_folder"]
    """How the dataset is laid out."""
    root: Annotated[str, OutsideFolder()]
    """URI of the dataset's folder."""
    splits: list[str] | None = Field(default=None, min_length=1)
    """Splits to list; required for voc and coco, for folders all that are there when left out."""
    labels_file: str = "labels.csv"
    """Format folder: the CSV file with the columns file and labels, below root or a URI."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Format coco: split -> annotation json, below root or a URI; annotations/instances_<split>.json when left out."""
    image_folders: dict[str, str] = Field(default_factory=dict)
    """Format coco: split -> folder of its images, below root or a URI; the split's name when left out."""
    classes: list[str] | None = Field(default=None, min_length=1)
    """Class names in the order wanted; what the dataset holds, when left out."""
    difficult_makes_label: bool = False
    """VOC: whether an object flagged difficult makes an image-level label."""
    crowd_makes_label: bool = False
    """COCO: whether a crowd region makes an image-level label."""
    masks: bool = True
    """Whether to read the masks of the ground truth where the dataset has some."""
    sample: int | None = Field(default=None, ge=1)
    """Only so many images of each split, to try things out, with one of each class as far as that goes; all when left
    out."""

    @model_validator(mode="after")
    def _splits_are_named(self) -> IndexConfig:
        if self.format in ("voc", "coco") and self.splits is None:
            raise ValueError(
                f"splits is required for format {self.format}, e.g. [trainval, test] or [train2017, val2017]"
            )
        return self


def run(step: Step) -> Outcome:
    """Reads the annotations and writes both tables."""
    config: IndexConfig = step.config
    dataset = _read(config)
    if config.sample is not None:
        dataset = sample_dataset(dataset, config.sample)
    names = dataset.class_names
    schema = schemas.with_metadata(
        schemas.IMAGES, fingerprint=step.fingerprint, class_names=names, category_ids=dataset.category_ids
    )
    images = dataset.images.replace_schema_metadata(schema.metadata)
    if dataset.ground_truth is not None:
        tables.write_ground_truth(step.folder, dataset.ground_truth.replace_schema_metadata(schema.metadata))
    parts = [
        tables.write_part(step.folder, images.slice(start, _ROWS_PER_PART))
        for start in range(0, images.num_rows, _ROWS_PER_PART)
    ]
    splits = images.column("split").value_counts().to_pylist()
    counts = ", ".join(f"{row['counts']} {row['values']}" for row in splits)
    truth = "with boxes" if dataset.ground_truth is not None else "no boxes"
    return Outcome(rows=images.num_rows, parts=parts, summary=f"{counts}; {len(names)} classes, {truth}")


def _read(config: IndexConfig) -> Dataset:
    root, splits, classes, difficult = config.root, config.splits, config.classes, config.difficult_makes_label
    if config.format == "voc":
        return read_voc(root, splits or [], classes=classes, difficult_makes_label=difficult, masks=config.masks)
    if config.format == "coco":
        places = {split: _coco_split(config, split) for split in splits or []}
        crowd = config.crowd_makes_label
        return read_coco(root, places, classes=classes, crowd_makes_label=crowd, masks=config.masks)
    if config.format == "folder":
        return read_folder(root, splits, table=_below(root, config.labels_file), classes=classes)
    return read_voc_xml_folder(root, splits, classes=classes, difficult_makes_label=difficult)


def _coco_split(config: IndexConfig, split: str) -> tuple[str, str]:
    """URIs of a split's annotations and of its image folder."""
    annotations = config.annotations.get(split, f"annotations/instances_{split}.json")
    return _below(config.root, annotations), _below(config.root, config.image_folders.get(split, split))


def _below(root: str, path: str) -> str:
    """`path` below `root`, or itself when it is a URI or absolute."""
    return path if storage.is_uri(path) or path.startswith("/") else storage.join(storage.absolute(root), path)


def _identify(config: IndexConfig) -> dict[str, str]:
    """Listings of everything that is read: a file added, removed or rewritten makes another dataset."""
    root = storage.absolute(config.root)
    if not storage.exists(root):
        raise ConfigError(f"root: there is no folder {root}")
    found = {"root": root}  # rows hold absolute URIs: a dataset that moved is another one
    if config.format == "coco":
        for split in config.splits or []:
            annotations, folder = _coco_split(config, split)
            found |= {annotations: storage.identity(annotations), folder: _list_identity(folder)}
    elif config.format == "voc":
        found |= {folder: _list_identity(storage.join(find_devkit(root), folder)) for folder in _VOC_FOLDERS}
    else:
        found["listing"] = _list_identity(root)
    if config.format == "folder":
        found["labels"] = storage.identity(_below(root, config.labels_file))
    return found


def _list_identity(folder: str) -> str:
    return storage.listing_identity(storage.list_files(folder))


STAGE = Stage("index", 3, IndexConfig, run, writes="images", outside=_identify)
