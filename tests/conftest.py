"""What all tests share: one local Ray cluster a session, tiny steps, and where real data would lie."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_DATA = Path(os.environ.get("WEAKSAM_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with four logical CPUs: on two, a pipeline of read, actor and write can starve."""
    import ray

    os.environ["RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S"] = "30"
    folder = tempfile.mkdtemp(prefix="wsray", dir="/tmp")  # short: sockets live there
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=400_000_000,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=False,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
