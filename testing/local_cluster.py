"""A Ray cluster of several nodes on this machine that outlives its drivers, and whose nodes can be killed.

A process of its own owns it (`python -m testing.local_cluster FOLDER CPUS`, which takes orders on standard input), so
that a driver can be killed alone. The head has no CPUs: all work is on nodes that may die.
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
# A node that does not answer is given up after five seconds instead of twenty.
_HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 5000}


class LocalCluster:
    """The owner process, as the one who started it sees it.

    Attributes:
        environment: what a driver's environment must hold.
        pid: of the owner; every process of the cluster descends from it.
        nodes: of each node that is alive its number and its raylet's process id, in the order they came.
    """

    def __init__(self, environment: Mapping[str, str], *, nodes: int = 2, cpus: float = 2) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wsc", dir="/tmp", ignore_cleanup_errors=True)  # short
        token = Path(self._folder.name, "token")
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment = {**environment, **auth, "RAY_BACKEND_LOG_LEVEL": "fatal"}
        # Ray notes the newest cluster in its folder of the machine, for everyone's next `ray.init`, and fails where no
        # Ray ran before: this cluster is nobody else's, so its owner has a folder of its own.
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
        """One more node; returns when it is alive."""
        added = self._ask({"do": "add"})
        self.nodes[added["node"]] = added["raylet"]

    def kill_node(self, node: int) -> None:
        """SIGKILL for a node's raylet and whatever else it started; its workers end with it."""
        self._ask({"do": "kill", "node": node})
        del self.nodes[node]

    def stop(self) -> None:
        """Ends the cluster and removes what it wrote."""
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
        told = Path(self._folder.name, "owner.log").read_text()[-1000:]
        raise RuntimeError(f"the cluster's owner ended: {told}")


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
        asked = json.loads(line)
        if asked["do"] == "add":
            nodes.append(cluster.add_node(num_cpus=cpus, **of_all))
            _say({"node": len(nodes) - 1, "raylet": nodes[-1].all_processes["raylet"][0].process.pid})
        else:
            cluster.remove_node(nodes[asked["node"]], allow_graceful=False)
            _say({})
    cluster.shutdown()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
