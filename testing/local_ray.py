"""A small Ray on this machine, for tests in one process or in a separate program."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def disconnect() -> None:
    """Leaves the cluster that `weaksam.execution.connection.connect` joined; ends it when `connect` started it."""
    import ray

    from weaksam.execution.lost_cluster import stop_watching

    stop_watching()
    ray.shutdown()


@contextmanager
def local_ray(*, store_bytes: int, parent: str = "/tmp") -> Iterator[None]:
    """Runs Ray inside the context, with four logical CPUs: on two, a pipeline of read, actor and write can starve."""
    import ray

    folder = tempfile.mkdtemp(prefix="wsray", dir=parent)  # a short path, for the sockets in it
    try:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=store_bytes,
            _temp_dir=folder,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
