"""A text file of scores and corners, one line for each box."""

from collections import Counter

import numpy as np

from weaksam.core import storage
from weaksam.data.writers.common import ReadBack
from weaksam.data.writers.format import ExportFormat


class Lines:
    targets = ("boxes.txt",)
    box_tolerance = 0.0
    verified = "everything but masks, line by line"

    def __init__(self, request):
        self.uri = storage.join(request.to, "boxes.txt")
        self.files, self.lost, self.lines = 0, Counter(), []

    def write(self, images):
        for image in images:
            columns = (image.classes.tolist(), image.scores.tolist(), image.boxes.tolist())
            for label, score, box in zip(*columns, strict=True):
                self.lines.append(f"{label} {score} {' '.join(map(str, box))}\n")

    def finish(self):
        storage.write_bytes(self.uri, "".join(self.lines).encode())
        self.files = 1
        self.rest = storage.read_bytes(self.uri).decode().splitlines()

    def read(self, images):
        for image in images:
            count = len(image.boxes)
            rows = np.array([line.split() for line in self.rest[:count]], float).reshape(-1, 6)
            self.rest = self.rest[count:]
            yield ReadBack(rows[:, 2:], rows[:, 0].astype(int).tolist(), rows[:, 1])

    def expected_masks(self, image):
        return image.masks

    def check_rest(self):
        if self.rest:
            raise ValueError(f"{self.uri} has more lines")


FORMAT = ExportFormat("lines", "a text file of boxes", Lines)
