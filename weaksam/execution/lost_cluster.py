"""Ends this process with a message when its cluster is gone: Ray would end it without, with the exit code of a bug.

Ray's core ends a driver from C++, without running Python: at once when the raylet of its node dies, and after a minute
when the head (GCS) dies. A thread watches both and ends the process earlier.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from weaksam.errors import ClusterError

_HEAD_SECONDS = 20.0  # without an answer until the head counts as lost; Ray's core waits a minute
_LOOK_SECONDS = 5.0

_stop = threading.Event()


def end_when_lost() -> None:
    """Watches the cluster that Ray has just joined, until the process ends or `stop_watching` is called."""
    import ray  # the caller has imported it already, after `ray_env.prepare`

    _stop.clear()
    address, node_id = ray.get_runtime_context().gcs_address, ray.get_runtime_context().get_node_id()
    sockets = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == node_id]
    watched = (address, sockets[0] if sockets else "", _end)
    threading.Thread(target=watch, args=watched, name="lost-cluster", daemon=True).start()
    atexit.register(stop_watching)  # runs before Ray's own handler, which ends a local cluster


def stop_watching() -> None:
    """Stops watching: from now on the cluster may end."""
    _stop.set()


def watch(head: str, raylet: str, lost: Callable[[str], None], *, seconds: float = _HEAD_SECONDS) -> None:
    """Calls `lost` with the reason once the raylet or the head is gone, and returns.

    Args:
        head: `host:port` of the GCS.
        raylet: path of the raylet's socket on this machine.
        lost: called with a sentence.
        seconds: how long the head may be silent.
    """
    endpoint = host_and_port(head)
    assert endpoint is not None, head  # the address comes from Ray
    poll, connection = select.poll(), _connect_local(raylet)
    if connection is not None:
        poll.register(connection, select.POLLHUP)
    answered = time.monotonic()
    look = min(_LOOK_SECONDS, seconds / 4)
    while not _stop.is_set():
        if connection is None:
            _stop.wait(look)
        elif any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(1000 * look)):
            if _connect_local(raylet) is None:
                lost("Ray's process of this node (raylet) ended")
                return
            poll.unregister(connection)  # the raylet lives; it closed an idle connection
            connection = None
        if _stop.is_set():
            return
        if _answers(endpoint):
            answered = time.monotonic()
        elif time.monotonic() - answered > seconds:
            lost(f"the head of the cluster (GCS at {head}) does not answer any more")
            return


def _connect_local(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        return None
    return connection


def host_and_port(address: str) -> tuple[str, int] | None:
    """Returns the parts of `host:port`, with or without `ray://` before it; None for any other text."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or "/" in host or not 0 < int(port) < 2**16:
        return None
    return host, int(port)


def _answers(endpoint: tuple[str, int]) -> bool:
    try:
        socket.create_connection(endpoint, timeout=_LOOK_SECONDS).close()
    except OSError:
        return False
    return True


def _end(reason: str) -> Any:
    import ray

    if _stop.is_set() or not ray.is_initialized():
        return
    print(
        f"error: {reason}: ended from outside, out of memory, or its node is gone; its log is in "
        "/tmp/ray/session_latest/logs (or RAY_TMPDIR) of that node: the same command goes on",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ClusterError.exit_code)  # not sys.exit: this is a thread, and the main one waits inside Ray
