"""Ends this process with a sentence when its cluster is gone: Ray would end it without one, with the code of a bug.

Ray's core ends a driver from C++ when the raylet of its node dies, at once, and when the head (GCS) does, after a
minute; no Python runs then. A thread that watches both is there first.
"""

from __future__ import annotations

import atexit
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from weaksam.errors import ClusterError

log = logging.getLogger(__name__)

_HEAD_SECONDS = 20.0  # without an answer until a head is given up; Ray's core gives up after a minute
_LOOK_SECONDS = 5.0

_stop = threading.Event()


def end_when_lost() -> None:
    """Watches the cluster that Ray has just joined, until the process ends or `stop_watching` is called."""
    import ray  # whoever calls this has imported it, after `ray_env.prepare`

    _stop.clear()
    address, node_id = ray.get_runtime_context().gcs_address, ray.get_runtime_context().get_node_id()
    sockets = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == node_id]
    watched = (address, sockets[0] if sockets else "", _end)
    threading.Thread(target=watch, args=watched, name="lost-cluster", daemon=True).start()
    atexit.register(stop_watching)  # runs before Ray's own, which ends a cluster of ours


def stop_watching() -> None:
    """From now on the cluster may end."""
    _stop.set()


def watch(head: str, raylet: str, lost: Callable[[str], None], *, seconds: float = _HEAD_SECONDS) -> None:
    """Calls `lost` with what happened once the raylet or the head is gone, and returns.

    Args:
        head: `host:port` of the GCS.
        raylet: path of the raylet's socket on this machine.
        lost: gets a sentence.
        seconds: how long the head may be silent.
    """
    place = host_and_port(head)
    assert place is not None, head  # Ray's own
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
            poll.unregister(connection)  # it only closed a connection on which nobody spoke
            connection = None
        if _stop.is_set():
            return
        if _answers(place):
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
    """The parts of `host:port`, with `ray://` before it or not; None if it is no such address."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or "/" in host or not 0 < int(port) < 2**16:
        return None
    return host, int(port)


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=_LOOK_SECONDS).close()
    except OSError:
        return False
    return True


def _end(what: str) -> Any:
    import ray

    if _stop.is_set() or not ray.is_initialized():
        return
    print(
        f"error: {what}: ended from outside, out of memory, or its node is gone; its log is in /tmp/ray/session_latest"
        "/logs (or RAY_TMPDIR) of that node: the same command goes on",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ClusterError.exit_code)  # not sys.exit: this is a thread, and the main one waits inside Ray
