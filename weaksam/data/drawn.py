"""Detects datasets of drawn scenes."""

from __future__ import annotations

from weaksam.core import storage

# Files of the folder: the finished dataset, written last; the plan, written first.
DRAWN, STARTED = "scenes.json", "scenes.partial.json"


def are_scenes(root: str) -> bool:
    """Whether `weaksam.demo.scenes.write_scenes` has written, or begun to write, the dataset at the URI `root`.

    Raises:
        StorageError: the folder cannot be read.
    """
    for name in (DRAWN, STARTED):
        try:
            content = storage.read_json(storage.join(storage.absolute(root), name))
        except FileNotFoundError:
            continue
        if isinstance(content, dict) and {"images", "seed", "format"} <= content.keys():
            return True
    return False
