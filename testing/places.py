"""Paths of the checkout and of the real data that some tests read."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = Path(os.environ.get("WEAKSAM_SHARED_DATA", ROOT.parent / "shared" / "data"))
