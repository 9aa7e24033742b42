"""A Ray cluster of several nodes on this machine: a head that runs no rows, and workers that say they have a GPU.

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
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx2
from ray.job_submission import JobStatus, JobSubmissionClient

from pia_ray import ModelConfig
from tests.cluster.networks import Network, Place, free_port, until
from tests.cluster.redis_server import Redis

ROOT = Path(__file__).parents[2]
PATIENCE_S = 300
"""For what takes seconds on an idle machine."""

ON_CPU = {**ModelConfig.named("demo").model_dump(mode="json", exclude_unset=True), "device": "cpu"}
"""The bundled model for nodes whose GPUs are only counted: a worker with a GPU that torch does not see refuses it."""


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

    def runs(self, name: str) -> bool:
        """Whether one of its processes has that in its command line; Ray puts the names of actors there."""
        for pid in self.place.processes(self._first.pid):
            with suppress(OSError):
                if name in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                    return True
        return False

    def kill(self) -> None:
        """SIGKILL to all its processes, as a machine that loses its power."""
        halted = set[int]()
        while new := self.place.processes(self._first.pid) - halted:
            _signal(new, signal.SIGSTOP)  # first all stand still: none starts another one unseen
            halted |= new
        _signal(halted, signal.SIGKILL)
        self._first.wait()
        # What is dead has no program, also where nobody has asked yet how it ended.
        until(
            lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in halted),
            seconds=PATIENCE_S,
            what="a killed node has no processes",
        )


class Nodes:
    """The cluster; `token` is its password. What `environment` says is in the environment of every node.

    With `redis` a new head takes over what the one before knew.
    """

    def __init__(
        self,
        network: Network,
        *,
        environment: Mapping[str, str],
        log: Path,
        redis: Redis | None = None,
    ) -> None:
        self.network = network
        self.redis = redis
        self.token = secrets.token_hex(32)
        self.http_port = free_port()
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
            "RAY_worker_niceness": "0",  # these two as in tests/conftest.py
            "RAY_event_stats": "0",
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # as the RayService has it
        }
        self._gcs_port, self._dashboard_port = free_port(), free_port()
        self._head: Node | None = None
        self._workers: list[Node] = []

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to talk to this cluster: `ray job`, `serve deploy`."""
        return {**self._environment, "RAY_API_SERVER_ADDRESS": self.dashboard}

    @property
    def head(self) -> Node:
        """The node with the cluster's memory, the dashboard and the drivers of jobs."""
        assert self._head is not None
        return self._head

    @property
    def workers(self) -> tuple[Node, ...]:
        """The nodes that say they have a GPU."""
        return tuple(self._workers)

    @property
    def dashboard(self) -> str:
        """The address of the Jobs API and of Serve's."""
        return f"http://{self.head.place.address}:{self._dashboard_port}"

    @property
    def bearer(self) -> dict[str, str]:
        """The header that the dashboard asks for."""
        return {"Authorization": f"Bearer {self.token}"}

    def ask(self, path: str, **query: str) -> Any:
        """What the dashboard answers to a GET, JSON; None while it does not answer."""
        try:
            answer = self._http.get(f"{self.dashboard}{path}", params=query)
        except httpx2.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def alive(self) -> list[dict[str, Any]]:
        """The nodes that the cluster believes to be there."""
        answer = self.ask("/api/v0/nodes", detail="1")
        return [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"] if answer else []

    def start(self, place: Place | None = None) -> None:
        """Starts the head, in that place or a new one."""
        arguments = [
            "--head",
            f"--port={self._gcs_port}",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            "--num-cpus=0",
            "--num-gpus=0",
            "--no-monitor",  # nothing here adds nodes
            *([f"--redis-password={self.redis.password}"] if self.redis else []),
        ]
        environment = {"RAY_REDIS_ADDRESS": self.redis.address} if self.redis else {}
        for left in (2, 1, 0):
            where = place or self.network.place()
            arguments = [*arguments, f"--dashboard-host={where.address}"]
            self._head = self._node(where, *arguments, environment=environment)
            until(lambda: self.head.ended or self.alive(), seconds=PATIENCE_S, what="the cluster has a head")
            if not self._head.ended:
                return
            assert left, f"the head does not start:\n{self._log.read_text()[-4000:]}"

    def bring_up(self, *, num_workers: int) -> None:
        """Starts the workers that are missing, and waits until the cluster has exactly so many."""
        num_starts = 0

        def are_there() -> bool:
            nonlocal num_starts
            assert not self.head.ended, f"the head has ended:\n{self._log.read_text()[-4000:]}"
            # Ray gives a node 30 s to start, and ends it then: few, on a machine with much to do.
            self._workers = [worker for worker in self._workers if not worker.ended]
            while len(self._workers) < num_workers:
                num_starts += 1
                assert num_starts <= 3 * num_workers, f"the workers do not start:\n{self._log.read_text()[-4000:]}"
                address = f"--address={self.head.place.address}:{self._gcs_port}"
                self._workers.append(self._node(self.network.place(), address, "--num-cpus=2", "--num-gpus=1"))
            return len(self.alive()) == num_workers + 1

        until(are_there, seconds=PATIENCE_S, what=f"there are {num_workers} workers")

    def kill(self, worker: Node) -> None:
        """Ends a worker without a word to the others."""
        self._workers.remove(worker)
        worker.kill()

    def submit(self, entrypoint: str, folder: Path, *, submission_id: str) -> str:
        """Submits a job with that working directory; its id."""
        return self._jobs.submit_job(
            entrypoint=entrypoint, submission_id=submission_id, runtime_env={"working_dir": str(folder)}
        )

    def job_ended(self, job: str) -> bool:
        """Whether the job is over, whatever it came to."""
        return self._jobs.get_job_status(job).is_terminal()

    def finish(self, job: str) -> str:
        """The log of a job that succeeds."""
        until(lambda: self.job_ended(job), seconds=PATIENCE_S, what=f"the job {job} is over")
        log = self._jobs.get_job_logs(job)
        assert self._jobs.get_job_status(job) == JobStatus.SUCCEEDED, log
        return log

    def close(self) -> None:
        """Ends everything."""
        self._http.close()
        for node in (*self._workers, *([self._head] if self._head else [])):
            node.kill()
        self.network.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @cached_property
    def _http(self) -> httpx2.Client:
        return httpx2.Client(headers=self.bearer, timeout=60)  # one: to make one takes more CPU time than to ask

    @cached_property
    def _jobs(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.dashboard, headers=self.bearer)

    def _node(self, place: Place, *arguments: str, environment: Mapping[str, str] | None = None) -> Node:
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
        return Node(place, [*arguments, *ours], {**self._environment, **(environment or {})}, self._log)


def _signal(processes: set[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
