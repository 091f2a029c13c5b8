"""Masks as tensors: their boxes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from weaksam.ops.masks import masks_to_boxes

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14))


@given(MASKS)
def test_boxes_are_tight(mask):
    (box,) = masks_to_boxes(torch.from_numpy(mask)[None]).tolist()
    rows, columns = np.nonzero(mask)
    tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
    assert box == tight


def test_no_masks():
    assert masks_to_boxes(torch.zeros(0, 4, 5, dtype=torch.bool)).shape == (0, 4)
