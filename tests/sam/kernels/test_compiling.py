"""Kernels compile for the GPUs they are meant for and fit them, without one being there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have, by compute capability


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_kernels_compile_and_fit(capability, dtype):
    pytest.importorskip("triton", reason="Triton is not there: the engine does without")
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability), dtype],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) >= 8
    for name, shared_memory in kernels.items():
        assert shared_memory <= SHARED_MEMORY[capability], name
