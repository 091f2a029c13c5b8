"""The folder in which this machine caches copies of remote files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from weaksam.errors import ConfigError


def cache_folder() -> Path:
    """Returns `$WEAKSAM_CACHE`, else `~/.cache/weaksam`, else a folder in /tmp if the home folder is not writable.

    Raises:
        ConfigError: the folder in /tmp belongs to another user.
    """
    if named := os.environ.get("WEAKSAM_CACHE"):
        return Path(named).expanduser()
    try:
        folder = Path.home() / ".cache" / "weaksam"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        pass
    folder = Path(tempfile.gettempdir()) / f"weaksam-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder}: belongs to another user: set WEAKSAM_CACHE to a folder of your own")
    return folder
