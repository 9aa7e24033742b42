"""A Ray cluster of several nodes on this machine: a head without GPU and workers that say they have one each.

Every node is a `ray start` of its own, which dies as a machine does: all its processes at once. What is started here
is stopped here, and nothing else.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from ray.job_submission import JobSubmissionClient

from tests.cluster.networks import Place, free_port, open_network, until

ROOT = Path(__file__).parents[2]
START_S = 180


class Node:
    """`ray start` in a place, with all that it starts."""

    def __init__(self, place: Place, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.place = place
        words = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--node-ip-address={place.address}"]
        with log.open("ab") as stream:
            self._first = subprocess.Popen(
                place.command(*words, *arguments),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether it has gone, by itself or killed."""
        return self._first.poll() is not None

    def kill(self) -> None:
        """SIGKILL to all its processes, as a machine that loses its power."""
        halted = set[int]()
        while new := self.place.processes(self._first.pid) - halted:
            _signal(new, signal.SIGSTOP)  # first all stand still: none starts another one unseen
            halted |= new
        _signal(halted, signal.SIGKILL)
        self._first.wait()
        until(lambda: not self.place.processes(self._first.pid), seconds=60, what="a killed node has no processes")


class Nodes:
    """The cluster. `token` is its password, in the environment of all that take part."""

    def __init__(self, *, environment: Mapping[str, str], log: Path) -> None:
        self.network = open_network()
        self.token = secrets.token_hex(32)
        # Ray's sockets have paths of at most 107 characters: not under pytest's folders.
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self._log = log
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))},
            **environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._gcs_port, self._dashboard_port = free_port(), free_port()
        self._workers: list[Node] = []
        self._head: Node | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to talk to this cluster, on any machine that reaches it."""
        return {**self._environment, "RAY_API_SERVER_ADDRESS": self.dashboard}

    @property
    def dashboard(self) -> str:
        """The address of the Jobs API and of Serve's."""
        return f"http://{self.head.place.address}:{self._dashboard_port}"

    @property
    def head(self) -> Node:
        """The node with the cluster's memory and the dashboard."""
        assert self._head is not None
        return self._head

    @property
    def workers(self) -> tuple[Node, ...]:
        """The nodes that say they have a GPU."""
        return tuple(self._workers)

    @property
    def jobs(self) -> JobSubmissionClient:
        """The Jobs API."""
        return JobSubmissionClient(self.dashboard, headers=self._bearer)

    def start(self, *, num_workers: int) -> None:
        """Starts the head, then the workers."""
        place = self.network.place()
        self._head = self._node(
            place,
            "--head",
            f"--port={self._gcs_port}",
            f"--dashboard-host={place.address}",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            "--num-cpus=2",
            "--num-gpus=0",
        )
        self.add_workers(num_workers)

    def add_workers(self, num: int) -> None:
        """Starts so many workers, and waits until the cluster has them."""
        wanted = len(self._workers) + num
        for _ in range(num):
            place = self.network.place()
            address = f"--address={self.head.place.address}:{self._gcs_port}"
            self._workers.append(self._node(place, address, "--num-cpus=3", "--num-gpus=1"))
        until(lambda: len(self.alive()) == wanted + 1, seconds=START_S, what=f"{wanted} workers are there")

    def kill_worker(self, worker: Node) -> None:
        """Ends a worker without a word to the others."""
        self._workers.remove(worker)
        worker.kill()

    def alive(self) -> list[dict[str, Any]]:
        """The nodes that the cluster believes to be there."""
        dead = [node for node in (self.head, *self._workers) if node.ended]
        assert not dead, f"a node has ended by itself:\n{self._log.read_text()[-4000:]}"
        try:
            answer = httpx.get(
                f"{self.dashboard}/api/v0/nodes", params={"detail": "1"}, headers=self._bearer, timeout=30
            )
        except httpx.TransportError:
            return []  # the dashboard is not up yet
        if answer.status_code != 200:
            return []
        nodes: list[dict[str, Any]] = answer.json()["data"]["result"]["result"]
        return [node for node in nodes if node["state"] == "ALIVE"]

    def close(self) -> None:
        """Ends everything."""
        for node in (*self._workers, *([self._head] if self._head else [])):
            node.kill()
        self.network.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def _node(self, place: Place, *arguments: str) -> Node:
        ours = [
            # Of several nodes at one address each takes the ports that are free.
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            f"--object-store-memory={100 * 2**20}",
            "--include-log-monitor=false",
            # Its own, as on a machine of its own: nodes that start side by side would take each other's sockets.
            f"--temp-dir={tempfile.mkdtemp(dir=self._folder)}",
        ]
        return Node(place, [*arguments, *ours], self._environment, self._log)


def _signal(processes: set[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
