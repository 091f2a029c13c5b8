"""Compares the sizes that a dataset states with those of its pictures, to detect boxes of other pictures."""

from __future__ import annotations

from collections.abc import Iterable

from weaksam.data.datasets import warn_of

Size = tuple[int | None, int | None]  # height, width; None: unknown


def differing_sizes(sizes: Iterable[tuple[str, Size, Size]]) -> tuple[list[str], list[str]]:
    """Returns the images whose size differs from the dataset.

    Args:
        sizes: id, stated size and size of the upright picture of each image.

    Returns:
        turned: height and width are swapped, as before EXIF orientation is applied.
        other: any other difference, as `a.jpg (stated 30 x 40, is 60 x 80)`.
    """
    turned, other = [], []
    for image_id, stated, real in sizes:
        if None in (*stated, *real) or stated == real:
            continue
        if stated == real[::-1]:
            turned.append(image_id)
        else:
            other.append(f"{image_id} (stated {stated[0]} x {stated[1]}, is {real[0]} x {real[1]})")
    return turned, other


def warn_of_sizes(where: str, sizes: Iterable[tuple[str, Size, Size]]) -> None:
    """Logs `differing_sizes` with counts and a fix; logs nothing if all agree."""
    turned, other = differing_sizes(sizes)
    problem = (
        "images lie turned by a quarter against the size that the dataset states: boxes drawn on unturned pictures are "
        "wrong here, orientation: stored of the index step turns them"
    )
    warn_of(where, problem, turned)
    problem = "images (height x width) have another size than the dataset states: are its boxes of other pictures?"
    warn_of(where, problem, other)
