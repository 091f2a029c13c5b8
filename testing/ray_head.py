"""A real Ray head on loopback with its own ports and token; it is ended by process id."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from testing.s3.server import free_port

_START_SECONDS = 120.0


class RayHead:
    """A process of `ray start --head`; its jobs inherit `environment`.

    Attributes:
        address: URL of its dashboard.
        client: the variables that a client's environment needs.
    """

    def __init__(self, environment: dict[str, str], *, cpus: int = 4) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wshd", dir="/tmp"))  # a short path, for the sockets in it
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        bin_folder = str(Path(sys.executable).parent)
        own = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
            "RAY_JOB_STOP_WAIT_TIME_S": "10",
        }
        command = [f"{bin_folder}/ray", "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--port", str(free_port()), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.port)]
        command += ["--num-cpus", str(cpus), "--object-store-memory", "300000000", "--temp-dir", str(self.folder / "r")]
        command += ["--node-ip-address", "127.0.0.1", "--ray-client-server-port", str(free_port())]
        command += ["--dashboard-agent-listen-port", str(free_port())]
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment, **self.client, **own}
            )
        self._wait()

    def stop(self) -> None:
        """Ends the head and its child processes."""
        self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        # Ray may take half a minute to end its children; the command line of each of them names the folder.
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pids(self) -> list[int]:
        pids = [self._process.pid]
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(self.folder).encode() in path.read_bytes():
                    pids.append(int(path.parent.name))
        return pids

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.address}/api/version", timeout=2)
            except urllib.error.HTTPError:  # it answers, and requires the token
                return
            except OSError:
                time.sleep(0.3)
            else:
                return
        raise RuntimeError(f"no Ray head: {(self.folder / 'log').read_text()[-2000:]}")
