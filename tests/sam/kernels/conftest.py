"""Where there is no GPU, kernels run in Triton's interpreter; that is settled when Triton is imported first."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HALVES = [torch.float16, torch.bfloat16] if HAS_GPU else [torch.float16]  # the interpreter knows no bfloat16 products


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; skips where Triton is absent or does not interpret."""
    pytest.importorskip("triton", reason="Triton is not there: the engine does without")
    from triton import knobs

    if not HAS_GPU and not knobs.runtime.interpret:
        pytest.skip("no GPU, and TRITON_INTERPRET was not set when Triton was imported")
    versions = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if not HAS_GPU and versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of this Triton needs numpy < 2.4")
    return torch.device("cuda" if HAS_GPU else "cpu")
