"""Models shared by the tests of the SAM engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from segment_anything.modeling import Sam

from testing.calibrate import calibrate, noise_image
from tests.sam.tiny import build_tiny_sam, shake
from weaksam.sam.checkpoints import load_sam
from weaksam.sam.shipped import SHIPPED


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on many threads, and far slower when the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_sam() -> Sam:
    """A tiny SAM of which realistic shares of masks pass the filters."""
    return calibrate(shake(build_tiny_sam()), noise_image(90, 120))


@pytest.fixture(scope="session")
def bundled_sam() -> Sam:
    """The small SAM in the package."""
    if not SHIPPED["vit_xs"].is_file():
        pytest.skip(f"{SHIPPED['vit_xs']} is not there: train it with jobs/train_demo_sam.py")
    return load_sam("vit_xs")
