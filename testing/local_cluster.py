"""A Ray cluster of several nodes on this machine that outlives its drivers, and whose nodes can be killed.

A separate process owns it (`python -m testing.local_cluster FOLDER CPUS`, which reads orders from standard input), so
that a test can kill a driver alone. The head has no CPUs: all work is on nodes that may die.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testing.places import ROOT

_STORE_BYTES = 150_000_000
# A node that does not answer counts as dead after five seconds instead of twenty.
_HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 5000}


class LocalCluster:
    """A handle of the owner process.

    Attributes:
        environment: the environment for a driver.
        pid: process id of the owner; every process of the cluster descends from it.
        nodes: the raylet's process id of each live node, by the node's number, in the order of their start.
    """

    def __init__(self, environment: Mapping[str, str], *, nodes: int = 2, cpus: float = 2) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wsc", dir="/tmp", ignore_cleanup_errors=True)  # short
        token = Path(self._folder.name, "token")
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment = {**environment, **auth, "RAY_BACKEND_LOG_LEVEL": "fatal"}
        # Ray records the newest cluster in its folder of the machine, where every later `ray.init` reads it, and fails
        # if no Ray ran before. No other program should join this cluster, so its owner has a separate folder.
        Path(self._folder.name, "ray").mkdir()
        with open(Path(self._folder.name, "owner.log"), "wb") as log:
            self._owner = subprocess.Popen(
                [sys.executable, "-m", "testing.local_cluster", self._folder.name, f"{cpus:g}"],
                cwd=ROOT,
                env={**self.environment, "RAY_TMPDIR": self._folder.name},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.pid = self._owner.pid
        self.nodes: dict[int, int] = {}
        self.environment["RAY_ADDRESS"] = self._answer()["address"]
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> None:
        """Adds a node; returns when it is alive."""
        added = self._ask({"do": "add"})
        self.nodes[added["node"]] = added["raylet"]

    def kill_node(self, node: int) -> None:
        """Sends SIGKILL to a node's raylet and its other processes; its workers end with it."""
        self._ask({"do": "kill", "node": node})
        del self.nodes[node]

    def stop(self) -> None:
        """Ends the cluster and removes its files."""
        if self._owner.stdin:
            self._owner.stdin.close()
        try:
            self._owner.wait(60)
        except subprocess.TimeoutExpired:
            self._owner.kill()
            self._owner.wait()
        self._folder.cleanup()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._owner.stdin is not None
        self._owner.stdin.write(json.dumps(what) + "\n")
        self._owner.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._owner.stdout is not None
        while line := self._owner.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        log = Path(self._folder.name, "owner.log").read_text()[-1000:]
        raise RuntimeError(f"the cluster's owner ended: {log}")


def main() -> None:
    """Owns the cluster until standard input ends."""
    from ray.cluster_utils import Cluster

    folder, cpus = sys.argv[1], float(sys.argv[2])
    of_all: dict[str, Any] = {"object_store_memory": _STORE_BYTES}
    head = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": False, "_system_config": _HEALTH}
    cluster = Cluster(initialize_head=True, head_node_args=of_all | head)
    nodes = []
    _say({"address": cluster.address})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "add":
            nodes.append(cluster.add_node(num_cpus=cpus, **of_all))
            _say({"node": len(nodes) - 1, "raylet": nodes[-1].all_processes["raylet"][0].process.pid})
        else:
            cluster.remove_node(nodes[order["node"]], allow_graceful=False)
            _say({})
    cluster.shutdown()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
