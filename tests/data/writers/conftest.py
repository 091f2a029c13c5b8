"""What tests of writers share."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.writers.export_images import make_image
from weaksam.data.writers.common import ExportImage


@pytest.fixture
def images() -> list[ExportImage]:
    """Four images: one with a space and umlauts, one without boxes, one of another split."""
    rng = np.random.default_rng(0)
    return [
        make_image("a", rng, number=1),
        make_image("ä b", rng, number=2, name="ä_b"),
        make_image("c", rng, num=0, number=3),
        make_image("d", rng, number=4, split="val"),
    ]
