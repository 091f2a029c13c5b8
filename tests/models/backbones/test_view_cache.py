"""What something frozen saw is remembered as far as memory goes, and counts the same whether it is or not."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from torch import Tensor

from weaksam.models.backbones import view_cache
from weaksam.models.backbones.pyramids import SamPyramid
from weaksam.models.backbones.view_cache import MemoryBudget, ViewCache

VIEWS = [torch.full((2,), value) for value in range(5)]
SIZE = 40  # bytes that are seen of a view


def compute_maps(view: Tensor) -> list[Tensor]:
    return [view.repeat(5).to(torch.float32)]


def recall(cache: ViewCache, view: Tensor) -> list[Tensor]:
    return cache.recall([view], lambda: compute_maps(view))


def test_all_of_a_process_share_half_of_the_memory() -> None:
    asked = []
    budget = MemoryBudget(lambda: asked.append(1) or 6 * SIZE)
    one, other = ViewCache(budget=budget), ViewCache(budget=budget)
    assert not asked  # before the first view is stored, the network is not built yet
    for view in VIEWS[:2]:
        recall(one, view)
    for view in VIEWS:
        recall(other, view)
    assert (len(one.views), len(other.views), len(asked)) == (2, 1, 1)
    del one
    gc.collect()
    recall(other, VIEWS[1])
    assert len(other.views) == 2  # a network that is gone leaves its part


def test_the_workers_of_a_node_divide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cache = ViewCache(budget=MemoryBudget(lambda: 8 * SIZE))
    for view in VIEWS:
        recall(cache, view)
    assert len(cache.views) == 2


def test_a_limit_of_its_own_asks_nobody() -> None:
    cache = ViewCache(2 * SIZE, budget=MemoryBudget(lambda: pytest.fail("asked")))
    for view in VIEWS:
        recall(cache, view)
    assert (len(cache.views), cache.num_bytes) == (2, 2 * SIZE)


def test_the_log_says_once_that_memory_is_full(caplog: pytest.LogCaptureFixture) -> None:
    budget = MemoryBudget(lambda: 4 * SIZE)
    one, other = ViewCache(budget=budget), ViewCache(budget=budget)
    with caplog.at_level(logging.WARNING, logger=view_cache.__name__):
        for view in VIEWS:
            recall(one, view)
            recall(other, view)
        assert not caplog.messages  # nothing was computed again so far
        for view in VIEWS * 2:
            recall(one, view)
    (message,) = caplog.messages
    assert "0.00 GiB are stored, 8 views did not fit" in message
    assert "fewer scales" in message


def test_a_copy_begins_empty() -> None:
    cache = ViewCache(3 * SIZE)
    recall(cache, VIEWS[0])
    other = copy.deepcopy(cache)
    assert (other.max_bytes, other.num_bytes, other.views) == (3 * SIZE, 0, {})


def test_what_is_remembered_changes_no_result() -> None:
    pyramid = SamPyramid()
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    size = sum(one.nbytes for one in pyramid.eval()(images[:1]))
    computed = [pyramid(one) for one in images.split(1)]
    pyramid.train()
    for room in (0, 1, 3):
        pyramid.view_cache = ViewCache(budget=MemoryBudget(lambda room=room: 2 * room * size))
        for batch in ([0, 1, 2], [2, 1, 0]):
            for place, maps in zip(batch, zip(*pyramid(images[batch]), strict=True), strict=True):
                assert all(torch.equal(a, b[0]) for a, b in zip(maps, computed[place], strict=True))
        assert len(pyramid.view_cache.views) == room
