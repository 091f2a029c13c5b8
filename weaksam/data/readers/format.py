"""Describes dataset formats for the catalogue and the stage `index`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from weaksam.core import storage
from weaksam.core.look import Look
from weaksam.data.datasets import Dataset
from weaksam.errors import DataError


@dataclass(frozen=True)
class DatasetSource:
    """A dataset to read, and how; a format uses some of the fields.

    Attributes:
        root: absolute URI of the dataset's folder.
        splits: splits to read; None: all.
        labels_file: file of labels, below `root` or a URI.
        annotations: split -> file of its annotations, below `root` or a URI.
        image_folders: split -> folder of its images, below `root` or a URI.
        classes: class names in the order of the class indices; None: the classes of the dataset.
        difficult_makes_label: whether an object flagged difficult makes an image-level label.
        crowd_makes_label: whether a crowd region makes an image-level label.
        masks: whether to read masks.
    """

    root: str
    splits: Sequence[str] | None = None
    labels_file: str = "labels.csv"
    annotations: Mapping[str, str] = field(default_factory=dict)
    image_folders: Mapping[str, str] = field(default_factory=dict)
    classes: Sequence[str] | None = None
    difficult_makes_label: bool = False
    crowd_makes_label: bool = False
    masks: bool = True

    def uri_of(self, path: str) -> str:
        """Returns the absolute URI of a path below `root`, or of `path` itself if it is a URI or absolute."""
        is_below = not storage.is_uri(path) and not path.startswith("/")
        return storage.absolute(storage.join(self.root, path) if is_below else path)


@dataclass(frozen=True)
class Listed:
    """A folder whose listing identifies a dataset: the paths below it, sizes and times of its files."""

    uri: str

    def identity(self) -> str:
        """Lists the folder and returns the identity of the listing."""
        return storage.listing_identity(storage.list_files(self.uri))


@dataclass(frozen=True)
class Whole:
    """A file whose content identifies a dataset."""

    uri: str

    def identity(self) -> str:
        """Reads the file and returns the identity of its content."""
        return storage.identity(self.uri)


@dataclass(frozen=True)
class DatasetFormat:
    """A dataset format of the catalogue.

    Attributes:
        name: value of `format` in a run file.
        description: describes the layout in a few words, for the help of `format`.
        read: reads the dataset.
        look: checks for `weaksam check` what is quick to read, and reads no image; may raise DataError.
        contents: name -> what identifies the dataset, in the order in which it is read. The names are part of the
            identity, the URIs are not: a dataset may move.
        places: name -> URI of the folders of images. The tables contain URIs of images, so a dataset that moved is read
            again.
        listed: URIs of all folders that `contents` may list, without an error if they are missing; None: those that it
            lists.
        settings: settings of the stage `index` that only some formats have: those of this format.
        needs_splits: whether the splits must be named.
    """

    name: str
    description: str
    read: Callable[[DatasetSource], Dataset]
    look: Callable[[DatasetSource], Look]
    contents: Callable[[DatasetSource], Mapping[str, Listed | Whole]] = lambda source: {"listing": Listed(source.root)}
    places: Callable[[DatasetSource], Mapping[str, str]] = lambda source: {"root": source.root}
    listed: Callable[[DatasetSource], Sequence[str]] | None = None
    settings: tuple[str, ...] = ()
    needs_splits: bool = False

    def listed_folders(self, source: DatasetSource) -> list[str]:
        """Returns the URIs of the folders in which another file would make another dataset."""
        if self.listed is not None:
            return list(self.listed(source))
        return [content.uri for content in self.contents(source).values() if isinstance(content, Listed)]


def look_by_reading(read: Callable[[DatasetSource], Dataset], source: DatasetSource, files: str) -> Look:
    """Checks a dataset by reading it whole; `files` names the files that this reads."""
    try:
        count = read(source).images.num_rows
    except DataError as error:
        return Look(files, "the images", error.faults)
    return Look(f"{files} and the names of {count} images", "the images themselves")
