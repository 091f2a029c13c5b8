"""Masks as tensors: boxes and stability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from weaksam.ops.masks import masks_to_boxes, stability_score

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14))


@given(MASKS)
def test_boxes_are_tight(mask):
    (box,) = masks_to_boxes(torch.from_numpy(mask)[None]).tolist()
    rows, columns = np.nonzero(mask)
    tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
    assert box == tight


def test_no_masks():
    assert masks_to_boxes(torch.zeros(0, 4, 5, dtype=torch.bool)).shape == (0, 4)
    assert stability_score(torch.zeros(0, 4, 5), offset=1.0).shape == (0,)


def test_stability_is_the_overlap_of_two_cuts():
    logits = torch.tensor([[[2.0, 0.5], [-0.5, -2.0]], [[-3.0, -3.0], [-3.0, -3.0]]])
    found = stability_score(logits, offset=1.0)
    assert found[0] == pytest.approx(1 / 3)  # 2 above +1; 2, 0.5 and -0.5 above -1
    assert found[1].isnan()
