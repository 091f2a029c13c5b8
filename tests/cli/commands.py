"""Calls the installed command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from testing.places import ROOT

WEAKSAM = str(Path(sys.executable).parent / "weaksam")


def call(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(args, capture_output=True, text=True, cwd=cwd, timeout=120)
    assert "Traceback" not in result.stderr, result.stderr
    return result
