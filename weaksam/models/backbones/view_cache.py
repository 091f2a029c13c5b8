"""Cache of a frozen network's outputs, which are the same each time a view is computed.

A process has one memory budget for all caches. Views beyond it are computed again each time, with the same result: the
cache changes how long a training takes, never its result.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from weakref import WeakSet

from torch import Tensor

from weaksam.core.memory import available_memory

log = logging.getLogger(__name__)

_SHARE = 0.5  # of the available memory; batches, gradients and the node's other processes have the rest


class MemoryBudget:
    """Total bytes of several `ViewCache`s: a share of the memory available when the first view is stored.

    The training workers of a node have equal parts of it; Ray Train sets their number in the environment. Over time
    each worker processes all images, so more workers need more memory, on any node.

    Args:
        available: returns the bytes available on this machine.
    """

    def __init__(self, available: Callable[[], int] = available_memory) -> None:
        self._available = available
        self._total: int | None = None
        self._holders: WeakSet[ViewCache] = WeakSet()  # weak: a deleted network frees its part
        self._rejected: set[tuple[int, bytes]] = set()
        self._has_warned = False

    def admits(self, holder: ViewCache, size: int) -> bool:
        """Returns whether `holder` may store `size` more bytes."""
        if self._total is None:
            self._total = int(_SHARE * self._available()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._holders.add(holder)
        return sum(cache.num_bytes for cache in self._holders) + size <= self._total

    def reject(self, holder: ViewCache, key: bytes) -> None:
        """Records a view of `holder` that does not fit; warns once, when such a view is computed again.

        By then most views have been computed, so the number of views that do not fit is known.
        """
        if self._has_warned:
            return
        if (entry := (id(holder), key)) not in self._rejected:
            self._rejected.add(entry)
            return
        stored = sum(cache.num_bytes for cache in self._holders)
        log.warning(
            "the memory for views that a frozen network has seen is full: %.2f GiB are stored, %d views did not fit "
            "and are computed again each time: use fewer scales, a smaller crop, fewer workers on a node, or a machine "
            "with more memory",
            stored / 2**30,
            len(self._rejected),
        )
        self._has_warned = True
        self._rejected.clear()


_PROCESS_BUDGET = MemoryBudget()


class ViewCache:
    """Cached outputs of a frozen network by view. A copy is empty.

    Attributes:
        max_bytes: own limit, instead of a part of `budget`; further views are computed again each time.
        num_bytes: bytes stored.
        views: outputs by the hash of the view, on the CPU, whose memory the budget counts.
    """

    def __init__(self, max_bytes: int | None = None, *, budget: MemoryBudget = _PROCESS_BUDGET) -> None:
        self.max_bytes, self.num_bytes, self._budget = max_bytes, 0, budget
        self.views: dict[bytes, list[Tensor]] = {}

    def __reduce__(self) -> tuple[type[ViewCache], tuple[int | None]]:
        return ViewCache, (self.max_bytes,)  # a copy of a network must not double what is stored

    def recall(self, view: Sequence[Tensor], compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Returns the output of `compute` for a view, cached by the hash of the view's tensors."""
        if (key := view_digest(view)) in self.views:
            return [tensor.to(view[0].device) for tensor in self.views[key]]
        maps = compute()
        size = sum(tensor.nbytes for tensor in maps)
        if self._has_room(size):
            self.views[key] = [tensor.cpu() for tensor in maps]
            self.num_bytes += size
        elif self.max_bytes is None:
            self._budget.reject(self, key)
        return maps

    def _has_room(self, size: int) -> bool:
        if self.max_bytes is None:
            return self._budget.admits(self, size)
        return self.num_bytes + size <= self.max_bytes


def view_digest(view: Sequence[Tensor]) -> bytes:
    """Returns a hash of a view, by shapes and values of its tensors."""
    digest = hashlib.sha256()  # CPUs have instructions for SHA-256
    for part in view:
        digest.update(str(tuple(part.shape)).encode())  # images of one colour may share their bytes
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.digest()
