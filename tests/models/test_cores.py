"""Parts of a batch on cores of their own."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from weaksam.models.cores import map_on_cores


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parts_are_computed_side_by_side_by_one_thread_each_and_come_in_order() -> None:
    both = threading.Barrier(2, timeout=30)  # breaks when only one part is computed at a time
    net = nn.Conv2d(1, 2, 3)

    def function(part: torch.Tensor) -> tuple[int, torch.Tensor]:
        both.wait()
        return torch.get_num_threads(), net(part)

    batch = torch.rand(4, 1, 8, 8)
    found = map_on_cores(function, batch.split(2))
    assert [threads for threads, _ in found] == [1, 1]
    assert not any(maps.requires_grad for _, maps in found)
    torch.testing.assert_close(torch.cat([maps for _, maps in found]), net(batch).detach())
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_is_as_before_after_a_fault() -> None:
    def function(part: torch.Tensor) -> None:
        raise ValueError("a part")

    with pytest.raises(ValueError, match="a part"):
        map_on_cores(function, torch.rand(4, 1).split(2))
    assert torch.get_num_threads() == 2


def test_one_part_or_one_thread_needs_no_other_threads() -> None:
    here = threading.get_ident()
    assert map_on_cores(lambda part: threading.get_ident(), [torch.rand(2)]) == [here]
    torch.set_num_threads(1)
    assert map_on_cores(lambda part: threading.get_ident(), torch.rand(4).split(2)) == [here, here]
