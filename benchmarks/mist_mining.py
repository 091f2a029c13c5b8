"""Compares MIST's mining, `mine_mist`, with a loop over its definition, which gives the same pseudo boxes.

python -m benchmarks.mist_mining [--threads 1] [--repeats 20]

Random boxes and scores, three classes present, as many proposals as WeakSAM (213) and selective search (2000) give.
Both receive the overlaps of the proposals. Exits 1 when the results differ or the ratio at 213 is below 5.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from weaksam.ops.boxes import box_iou
from weaksam.ops.mil import PseudoBoxes, mine_mist

SIZES = (213, 2000)
CLASSES, PRESENT = 20, torch.tensor([2, 7, 14])
LEAST_RATIO = 5


def mine_in_a_loop(iou: Tensor, scores: Tensor, present: Tensor) -> PseudoBoxes:
    """Mines one candidate after the other, one class after the other, as the published code does."""
    rois, classes, values = [], [], []
    count = max(1, int(0.15 * len(scores)))
    for label in present.tolist():
        order = scores[:, label].argsort(descending=True, stable=True)[:count]
        for rank in range(count):
            if rank == 0 or (iou[order[rank], order[:rank]] < 0.2).all():
                rois.append(order[rank])
                classes.append(label)
                values.append(scores[order[rank], label])
    return PseudoBoxes(torch.stack(rois), torch.tensor(classes), torch.stack(values))


def seconds(call: Callable[[], PseudoBoxes], repeats: int) -> float:
    """Returns the median seconds of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def compare(num: int, repeats: int) -> float:
    """Prints a line; returns the ratio, or 0 when the results differ."""
    random = torch.Generator().manual_seed(num)
    corners = torch.rand(num, 2, generator=random) * 400
    boxes = torch.cat([corners, corners + 20 + torch.rand(num, 2, generator=random) * 300], 1)
    scores = torch.rand(num, CLASSES, generator=random)
    iou = box_iou(boxes, boxes)
    ours, theirs = mine_mist(iou, scores, PRESENT), mine_in_a_loop(iou, scores, PRESENT)
    if not (torch.equal(ours.rois, theirs.rois) and torch.equal(ours.classes, theirs.classes)):
        print(f"{num} proposals: the pseudo boxes differ")
        return 0.0
    fast = seconds(lambda: mine_mist(iou, scores, PRESENT), repeats)
    slow = seconds(lambda: mine_in_a_loop(iou, scores, PRESENT), repeats)
    print(
        f"{num:5} proposals, {len(PRESENT)} classes, {len(ours.rois)} pseudo boxes: loop {1000 * slow:.2f} ms, "
        f"vectorised {1000 * fast:.2f} ms, {slow / fast:.1f}x"
    )
    return slow / fast


def main() -> None:
    """Compares at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.machine()}, {options.threads} thread(s), {versions}")
    ratios = [compare(num, options.repeats) for num in SIZES]
    sys.exit(int(min(ratios) == 0 or ratios[0] < LEAST_RATIO))


if __name__ == "__main__":
    main()
