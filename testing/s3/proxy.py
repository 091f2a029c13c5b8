"""HAProxy between clients and an S3 server, on loopback: refuses, fails, drops and stalls a share of the requests.

Clients sign the host name of the proxy. HAProxy passes it on unchanged, so the server accepts the signature.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from testing.s3.server import free_port

_START_SECONDS = 20.0
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
# `-m int`: without it a variable is compared as text. `silent-drop` would leave clients waiting; `reject` hangs up.
_CONFIG = """\
global
  maxconn 500
defaults
  mode http
  timeout connect 3s
  timeout client 60s
  timeout server 60s
  timeout tarpit {stall_ms}ms
frontend s3
  bind 127.0.0.1:{port}
  http-request set-var(txn.r) rand(1000)
  http-request return status 503 content-type application/xml string '{slow_down}' if {{ var(txn.r) -m int lt {a} }}
  http-request return status 500 content-type application/xml string '{error}' if \
{{ var(txn.r) -m int ge {a} }} {{ var(txn.r) -m int lt {b} }}
  http-request reject if {{ var(txn.r) -m int ge {b} }} {{ var(txn.r) -m int lt {c} }}
  http-request tarpit deny_status 503 if {{ var(txn.r) -m int ge {c} }} {{ var(txn.r) -m int lt {d} }}
  http-response return status 500 content-type application/xml string '{error}' if \
{{ var(txn.r) -m int ge {d} }} {{ var(txn.r) -m int lt {e} }}
  default_backend server
backend server
  server a 127.0.0.1:{server_port}
"""


@dataclass(frozen=True)
class Faults:
    """Shares of the requests that fail, in thousandths."""

    slow_down: int = 100
    """Refused with 503 SlowDown."""
    error: int = 30
    """Refused with 500."""
    drop: int = 30
    """Connection closed without an answer."""
    stall: int = 10
    """Left waiting for `stall_seconds`, then refused with 503."""
    lost: int = 20
    """Done by the server, but the client gets 500."""
    stall_seconds: float = 1.0


NO_FAULTS = Faults(0, 0, 0, 0, 0)


class FaultyProxy:
    """The proxy; its files are in `folder`.

    Attributes:
        endpoint: its URL, which clients use instead of the server's.
    """

    def __init__(self, folder: Path, server_port: int, faults: Faults = Faults()) -> None:
        self.folder, self.port = folder, free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "haproxy.cfg").write_text(_config(self.port, server_port, faults))

    def start(self) -> None:
        """Starts the proxy, or restarts it on the same port, and waits until it listens."""
        with open(self.folder / "haproxy.out", "ab") as log:
            command = ["haproxy", "-db", "-f", str(self.folder / "haproxy.cfg")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + _START_SECONDS
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > end:
                shown = (self.folder / "haproxy.out").read_text()[-1000:]
                raise RuntimeError(f"HAProxy does not start: {shown}")
            time.sleep(0.05)

    def pause(self) -> None:
        """Makes all requests, also new requests, wait until `resume`."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Cuts every connection at once, also in the middle of an object, and refuses new connections until `start`."""
        process = self._running()
        process.kill()
        process.wait()

    def stop(self) -> None:
        """Ends the proxy if it runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("the proxy is not running")
        return self._process

    def _listens(self) -> bool:
        with socket.socket() as client:
            client.settimeout(1.0)
            return client.connect_ex(("127.0.0.1", self.port)) == 0


def _config(port: int, server_port: int, faults: Faults) -> str:
    a = faults.slow_down
    b = a + faults.error
    c = b + faults.drop
    d = c + faults.stall
    return _CONFIG.format(
        port=port,
        server_port=server_port,
        slow_down=_ERROR.format(code="SlowDown"),
        error=_ERROR.format(code="InternalError"),
        stall_ms=int(1000 * faults.stall_seconds),
        **{"a": a, "b": b, "c": c, "d": d, "e": d + faults.lost},
    )
