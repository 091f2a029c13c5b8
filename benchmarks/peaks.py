"""Compares `find_peaks` on one image with the same function on the plain `max_pool2d` of the published code.

python -m benchmarks.peaks [--threads 1] [--repeats 3]

A 375 x 500 image with three positive classes: 3 coarse and 3 fine maps with windows of 17 pixels, 36 cross maps with
windows of 129. The maps are random maps of patches, enlarged by `fuse_views`. Only the window maximum differs, and the
peaks are compared. Times are CPU seconds, which other programs on the machine disturb least. Exits 1 when the peaks
differ or the ratio is below 10.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from weaksam.ops import peaks as peaks_module
from weaksam.ops.cams import fuse_views, snap_to_patches
from weaksam.ops.peaks import Peaks, find_peaks

IMAGE_HW = (375, 500)
KINDS = {"coarse": (3, 17), "fine": (3, 17), "cross": (36, 129)}  # maps and kernel
LEAST_RATIO = 10


def plain_window_max(maps: Tensor, kernel: int) -> Tensor:
    """Returns the window maximum as published: compares every pixel of every window."""
    return F.max_pool2d(maps, kernel, stride=1, padding=kernel // 2)


@contextmanager
def plain_maximum() -> Iterator[None]:
    """Makes `find_peaks` take its window maximum from `max_pool2d` inside the context."""
    original = peaks_module.window_max
    peaks_module.window_max = plain_window_max
    try:
        yield
    finally:
        peaks_module.window_max = original


def draw_heatmaps(num_maps: int, generator: torch.Generator) -> Tensor:
    """Returns (K, H, W) smooth heatmaps: the same random 6 x 8 maps, with noise, fused from three views."""
    scene = torch.rand(num_maps, 6, 8, generator=generator)
    views = []
    for scale in (1.0, 0.8, 1.2):
        height, width = snap_to_patches(IMAGE_HW, scale=scale, patch=16)
        view = F.interpolate(scene[None], (height // 16, width // 16), mode="bicubic", align_corners=False)[0]
        views.append(view + 0.05 * torch.rand(view.shape, generator=generator))
    return fuse_views(views, IMAGE_HW)


def measure(heatmaps: Tensor, kernel: int, repeats: int) -> tuple[Peaks, float]:
    """Returns the peaks, and CPU seconds: the median of the repeats, after one map to warm up."""
    peaks, seconds = find_peaks(heatmaps[:1], kernel=kernel, threshold=0.9), []
    for _ in range(repeats):
        start = time.process_time()
        peaks = find_peaks(heatmaps, kernel=kernel, threshold=0.9)
        seconds.append(time.process_time() - start)
    return peaks, statistics.median(seconds)


def compare(heatmaps: Tensor, kernel: int, repeats: int) -> tuple[float, float, int]:
    """Returns CPU seconds of the plain maximum and of ours, and the number of peaks; -1 when the peaks differ."""
    ours, ours_s = measure(heatmaps, kernel, repeats)
    with plain_maximum():
        plain, plain_s = measure(heatmaps, kernel, repeats)
    same = all(np.array_equal(getattr(ours, name), getattr(plain, name)) for name in ("points", "scores", "maps"))
    return plain_s, ours_s, len(ours.points) if same else -1


def main() -> int:
    """Runs both on every kind of map, prints a table and the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    rows = {}
    print(f"{'maps':<18}{'max_pool2d CPU s':>18}{'find_peaks CPU s':>18}{'ratio':>8}{'peaks':>7}")
    for kind, (num_maps, kernel) in KINDS.items():
        plain_s, ours_s, num_peaks = compare(draw_heatmaps(num_maps, generator), kernel, args.repeats)
        rows[kind] = (plain_s, ours_s, num_peaks)
        name = f"{num_maps} {kind}, {kernel}"
        print(f"{name:<18}{plain_s:>18.4f}{ours_s:>18.4f}{plain_s / ours_s:>8.1f}{num_peaks:>7}", flush=True)
    plain_s, ours_s, _ = (sum(column) for column in zip(*rows.values(), strict=True))
    same = all(num_peaks >= 0 for _, _, num_peaks in rows.values())
    print(f"{'image':<18}{plain_s:>18.4f}{ours_s:>18.4f}{plain_s / ours_s:>8.1f}")
    print("the same peaks" if same else "THE PEAKS DIFFER")
    print(
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {args.threads} "
        f"threads used, Python {platform.python_version()}, torch {torch.__version__}, scipy {scipy.__version__}"
    )
    return 0 if same and plain_s / ours_s >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
