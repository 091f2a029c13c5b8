"""Writes YOLO labels: one text file per image, one line per object, and data.yaml.

Detection: `class cx cy w h`; segmentation: `class x1 y1 x2 y2 ...`; in shares of width and height with six decimals,
or more where a side has 10,000 pixels. A line has a single polygon: parts of a mask are joined by lines
traversed in both directions, holes are filled. Boxes of segmentation labels are those of the polygons; the polygon of
an object without a mask is its box.
Trainers expect labels/x/name.txt for images/x/name.jpg: images.csv lists the path of each image file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import yaml

from weaksam.core import storage
from weaksam.data.datasets import map_in_threads
from weaksam.data.writers.common import ExportImage, ReadBack
from weaksam.data.writers.format import ExportFormat
from weaksam.data.writers.places import picture_list
from weaksam.data.writers.polygons import draw_polygons, join_polygons, to_polygons


def to_lines(classes: np.ndarray, shapes: Sequence[np.ndarray], *, decimals: int = 6) -> bytes:
    """Returns the label file of an image: one line per object, its class and numbers."""
    lines = [
        " ".join([str(label), *(f"{value:.{decimals}f}" for value in shape)])
        for label, shape in zip(classes.tolist(), shapes, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def parse_lines(data: bytes) -> list[tuple[int, np.ndarray]]:
    """Parses class and numbers of each line of a label file."""
    lines = (line.split() for line in data.decode().splitlines())
    return [(int(words[0]), np.array([float(word) for word in words[1:]])) for words in lines if words]


def box_polygon(box: np.ndarray) -> np.ndarray:
    """Returns the (4, 2) corners of a box."""
    left, top, right, bottom = box
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


def name_splits(splits: Sequence[str]) -> dict[str, list[str]]:
    """Assigns splits to `train`, `val` and `test` of data.yaml by the start of their names; any other is `val`.

    Trainers need both train and val: if one is missing, the other is used for both.
    """
    train = [split for split in splits if split.startswith("train")]
    test = [split for split in splits if split.startswith("test")]
    val = [split for split in splits if split not in (*train, *test)]
    named = {"train": train or val or test, "val": val or test or train}
    return named | {"test": test} if test else named


class YoloLabels:
    """Writes labels/<split>/<name>.txt, data.yaml and images.csv.

    Args:
        to: URI of the folder.
        class_names: by 0-based class.
        polygons: tolerance of polygons in pixels; None: boxes.
    """

    targets = ("labels", "data.yaml", "images.csv")
    box_tolerance = 0.01

    def __init__(self, to: str, class_names: Sequence[str], *, polygons: float | None) -> None:
        self.to, self.class_names, self.polygons = to, list(class_names), polygons
        what = "classes and boxes" if polygons is None else "classes and polygons, drawn by pycocotools"
        self.verified = f"{what}, read line by line"
        self.files = 0
        self.lost: Counter[str] = Counter()
        self._splits: set[str] = set()
        self._pictures: list[tuple[str, str]] = []

    def _uri(self, image: ExportImage) -> str:
        return storage.join(self.to, "labels", image.place.split_name, f"{image.place.name}.txt")

    def write(self, images: Sequence[ExportImage]) -> None:
        """Writes a file for each image, which is empty without objects."""
        for lost in map_in_threads(self._write_image, images):
            self.lost += lost
        self.files += len(images)
        for image in images:
            self._splits.add(image.place.split_name)
            self._pictures.append((f"images/{image.place.split_name}/{image.place.picture}", image.place.uri))

    def _write_image(self, image: ExportImage) -> Counter[str]:
        lost = Counter(scores=len(image.scores))
        if self.polygons is None:
            boxes = image.boxes.astype(np.float64) / np.tile([image.width, image.height], 2)
            middle, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            shapes = list(np.concatenate([middle, size], axis=1))
            lost["masks"] = sum(mask is not None for mask in image.masks)
        else:
            shapes = []
            for position, mask in enumerate(image.masks):
                polygon = box_polygon(image.boxes[position])
                if mask is None:
                    lost["boxes_as_polygons"] += 1
                else:
                    parts, holes = to_polygons(image, mask, self.polygons)
                    polygon = join_polygons(parts)
                    lost += Counter(holes_filled=holes, further_parts_joined=len(parts) - 1)
                shapes.append((polygon / [image.width, image.height]).reshape(-1))
        decimals = max(6, len(str(max(image.height, image.width))) + 2)  # so that rounding stays below a pixel / 100
        storage.write_bytes(self._uri(image), to_lines(image.classes, shapes, decimals=decimals))
        return lost

    def finish(self) -> None:
        """Writes data.yaml and images.csv."""
        named = name_splits(sorted(self._splits))
        paths = {key: [f"images/{split}" for split in splits] for key, splits in named.items()}
        content = {key: folders[0] if len(folders) == 1 else folders for key, folders in paths.items()}
        content |= {"names": dict(enumerate(self.class_names))}
        text = "# Paths are below the folder of this file; images.csv says which image belongs where.\n"
        text += yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        storage.write_bytes(storage.join(self.to, "data.yaml"), text.encode())
        storage.write_bytes(storage.join(self.to, "images.csv"), picture_list(sorted(self._pictures)))
        self.files += 2

    def read(self, images: Sequence[ExportImage]) -> Iterable[ReadBack]:
        """Reads each image's file."""
        return list(map_in_threads(self._read_image, images))

    def _read_image(self, image: ExportImage) -> ReadBack:
        lines = parse_lines(storage.read_bytes(self._uri(image)))
        classes = [label for label, _ in lines]
        scale = np.array([image.width, image.height])
        if self.polygons is None:
            shapes = np.array([shape for _, shape in lines]).reshape(-1, 2, 2) * scale
            middle, half = shapes[:, 0], shapes[:, 1] / 2
            return ReadBack(np.concatenate([middle - half, middle + half], axis=1), classes)
        shapes = [shape.reshape(-1, 2) * scale for _, shape in lines]
        boxes = np.array([[*shape.min(0), *shape.max(0)] for shape in shapes]).reshape(-1, 4)
        masks: list[bytes | None] = [draw_polygons(image, [shape]) for shape in shapes]
        for position, mask in enumerate(image.masks[: len(masks)]):
            if mask is None:
                masks[position] = None
            else:
                boxes[position] = np.nan  # the box of the mask, not the exported box
        return ReadBack(boxes, classes, None, masks)

    def expected_masks(self, image: ExportImage) -> list[bytes | None]:
        """Returns the masks of their joined polygons."""
        tolerance = self.polygons or 0.0
        return [
            None if mask is None else draw_polygons(image, [join_polygons(to_polygons(image, mask, tolerance)[0])])
            for mask in image.masks
        ]

    def check_rest(self) -> None:
        """Raises ValueError if there are other files or names than were written."""
        uri = storage.join(self.to, "data.yaml")
        if yaml.safe_load(storage.read_bytes(uri))["names"] != dict(enumerate(self.class_names)):
            raise ValueError(f"{uri} has other names than were written")
        files = storage.list_files(storage.join(self.to, "labels"))
        if len(files) != len(self._pictures):
            raise ValueError(f"{self.to}/labels has {len(files)} files, {len(self._pictures)} were written")


FORMAT = ExportFormat(
    "yolo",
    "text files of boxes",
    lambda request: YoloLabels(request.to, request.class_names, polygons=None),
    keeps_file_names=False,
)
