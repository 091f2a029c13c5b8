"""How a dataset of drawn scenes is known."""

from __future__ import annotations

from weaksam.core import storage

# What the folder holds: what was drawn, written last; what will be.
DRAWN, STARTED = "scenes.json", "scenes.partial.json"


def are_scenes(root: str) -> bool:
    """Whether the folder of a dataset, any URI, is one that `weaksam.demo.scenes.write_scenes` drew or began to draw.

    Raises:
        StorageError: it cannot be read.
    """
    for name in (DRAWN, STARTED):
        try:
            content = storage.read_json(storage.join(storage.absolute(root), name))
        except FileNotFoundError:
            continue
        if isinstance(content, dict) and {"images", "seed", "format"} <= content.keys():
            return True
    return False
