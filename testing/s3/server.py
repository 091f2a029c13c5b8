"""A real S3 server on loopback: one-node Ceph with its RADOS Gateway, started and ended by process id.

Needs Debian's ceph-mon, ceph-osd, radosgw and ceph-common (`install.sh`). Nothing listens beyond loopback.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_START_SECONDS = 90.0
_CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
log file = {folder}/log/$name.log
mon cluster log file = {folder}/log/cluster.log
keyring = {folder}/admin.keyring
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = {store_bytes}
[mon]
mon data = {folder}/mon
[osd]
osd data = {folder}/osd
keyring = {folder}/osd/keyring
[client.rgw]
keyring = {folder}/rgw.keyring
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw run sync thread = false
"""


class CephServer:
    """The server; all its files are below `folder`.

    Attributes:
        endpoint: its URL.
        access_key, secret_key: keys of its only user.
    """

    def __init__(self, folder: Path, *, store_bytes: int = 4 * 2**30) -> None:
        self.folder, self._store_bytes = folder, store_bytes
        self.port, self._mon_ports = free_port(), (free_port(), free_port())
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.access_key, self.secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self._daemons: dict[str, subprocess.Popen] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a client's environment needs."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Creates the cluster and waits until it answers."""
        folder = self.folder
        for name in ("mon", "osd", "run", "log"):
            (folder / name).mkdir(parents=True)
        fsid, admin, mon = str(uuid.uuid4()), folder / "admin.keyring", folder / "mon.keyring"
        ports = {"mon_v2": self._mon_ports[0], "mon_v1": self._mon_ports[1], "port": self.port}
        config = _CONFIG.format(fsid=fsid, folder=folder, store_bytes=self._store_bytes, **ports)
        (folder / "ceph.conf").write_text(config)
        rights = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        self._call("ceph-authtool", "--create-keyring", admin, "--gen-key", "-n", "client.admin", *rights)
        self._call("ceph-authtool", "--create-keyring", mon, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._call("ceph-authtool", mon, "--import-keyring", admin)
        address = f"[v2:127.0.0.1:{ports['mon_v2']},v1:127.0.0.1:{ports['mon_v1']}]"
        self._call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, folder / "monmap")
        self._call("ceph-mon", "-i", "a", "--mkfs", "--monmap", folder / "monmap", "--keyring", mon)
        self._daemon("mon", "ceph-mon", "-i", "a")
        self._call("ceph", "--connect-timeout", "30", "mon", "stat")
        osd, secret = str(uuid.uuid4()), self._call("ceph-authtool", "--gen-print-key").strip()
        self._call("ceph", "osd", "new", osd, "-i", "-", text=f'{{"cephx_secret":"{secret}"}}')
        self._call("ceph-authtool", "--create-keyring", folder / "osd/keyring", "-n", "osd.0", "--add-key", secret)
        self._call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("osd", "ceph-osd", "-i", "0")
        self._wait(lambda: "1 up" in self._call("ceph", "osd", "stat"), "its store")
        keyring = folder / "rgw.keyring"
        self._call("ceph", "auth", "get-or-create", "client.rgw", "mon", "allow rw", "osd", "allow rwx", "-o", keyring)
        self.start_gateway()
        keys = (f"--access-key={self.access_key}", f"--secret={self.secret_key}")
        self._call("radosgw-admin", "user", "create", "--uid=tests", "--display-name=tests", *keys)

    def add_user(self, name: str) -> dict[str, str]:
        """Adds a user without rights to the objects of other users; returns the variables for its environment."""
        key, secret = secrets.token_hex(8), secrets.token_hex(16)
        keys = (f"--access-key={key}", f"--secret={secret}")
        self._call("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}", *keys)
        return self.environment | {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

    def start_gateway(self) -> None:
        """Starts the S3 gateway, and waits until it answers."""
        self._daemon("gateway", "radosgw", "-n", "client.rgw")
        self._wait(self._answers, "its gateway")

    def pause_gateway(self) -> None:
        """Makes requests wait until `resume_gateway`."""
        self._daemons["gateway"].send_signal(signal.SIGSTOP)

    def resume_gateway(self) -> None:
        self._daemons["gateway"].send_signal(signal.SIGCONT)

    def kill_gateway(self) -> None:
        """Ends all connections at once, and refuses new connections."""
        self._daemons["gateway"].kill()
        self._daemons["gateway"].wait()

    def stop(self) -> None:
        """Ends all daemons."""
        for name in ("gateway", "osd", "mon"):
            if (daemon := self._daemons.get(name)) is not None and daemon.poll() is None:
                daemon.send_signal(signal.SIGCONT)
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _daemon(self, name: str, *command: str) -> None:
        log = open(self.folder / "log" / f"{name}.out", "ab")  # noqa: SIM115  (the daemon keeps it open)
        with log:
            self._daemons[name] = subprocess.Popen([*command, "-f"], stdout=log, stderr=log, env=self._env())

    def _call(self, *command: str | Path, text: str = "") -> str:
        done = subprocess.run(
            list(map(str, command)), input=text, capture_output=True, text=True, env=self._env(), timeout=_START_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
        return done.stdout

    def _env(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _wait(self, is_ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"Ceph's {name} ended: see {self.folder / 'log'}")
            if is_ready():
                return
            time.sleep(0.2)
        raise RuntimeError(
            f"the S3 server: {what} does not answer after {_START_SECONDS:g} s: see {self.folder / 'log'}"
        )

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(self.endpoint, timeout=2):
            return True
        return False


def free_port() -> int:
    """Returns a free port of loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
