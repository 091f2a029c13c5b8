"""Work on parts of a batch, each on a processor core of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def map_on_cores(function: Callable[[Tensor], T], parts: Sequence[Tensor]) -> list[T]:
    """`function` of each part, in order, without gradients.

    On a CPU the parts are computed side by side, each by one of this thread's `torch.get_num_threads()`: convolutions
    on small maps are too little work to be shared among threads. `function` must not depend on an autocast.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1 or parts[0].device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        with torch.no_grad():
            return [function(part) for part in parts]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(torch.no_grad()(function), parts))
        finally:
            torch.set_num_threads(threads)  # threads that start later have what was set last, by whichever thread
