"""The machine of a chaos run: an S3 server in a process of its own, a faulty proxy before it, a Ray cluster, folders.

All its processes carry a variable in their environment, by which those that outlive it are found.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pia_ray import storage
from tests.chaos import clocks
from tests.chaos.faulty_store import FaultyStore
from tests.processes import with_variable
from tests.ray_head import RayHead
from tests.s3_server import S3Server

MARK = "PIA_RAY_CHAOS"
ROOT = Path(__file__).parents[2]
DISK_MIB = 24


class Ground:
    """Opened, it has a server, a proxy, a cluster and, where the machine allows mounts, a small disk."""

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        for name in ("ray", "tmp", "disk"):
            (self.folder / name).mkdir()
        self.disk: Path | None = None
        self.problems: list[str] = []
        self._shm = _shm()

    def __enter__(self) -> Self:
        self._kept = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        with ExitStack() as stack:
            self.server = S3Server()
            stack.callback(self.server.stop)
            self.store = stack.enter_context(FaultyStore(self.server.url, seed=self.seed))
            self.s3 = self.server.client()
            # This process looks at the store past the proxy.
            for name in self._kept:
                del os.environ[name]
            os.environ.update(self.server.environment)
            storage.forget_clients()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(self.folder / "disk")]
            if os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
                self.disk = self.folder / "disk"
                stack.callback(subprocess.run, ["umount", "--lazy", str(self.disk)], check=False)
            self.head_clock = self.random.choice((0, 0, 2, -2))
            self.head = stack.enter_context(RayHead(self.environment(clock=self.head_clock)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        for name in self.server.environment:
            os.environ.pop(name, None)
        os.environ.update(self._kept)
        storage.forget_clients()
        self._check_nothing_is_left()
        if kind is None and not self.problems:
            shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, *, clock: int) -> dict[str, str]:
        """Environment variables of a process whose clock is so many hours off."""
        return {
            **self.server.environment,
            "AWS_ENDPOINT_URL": self.store.url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAY_TMPDIR": str(self.folder / "ray"),
            "TMPDIR": str(self.folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.mark,
            MARK: self.mark,
            **clocks.environment(self.folder, hours=clock),
        }

    def start_driver(self, settings: Mapping[str, Any], *, log: Path, marks: Path, said: Path, clock: int) -> Driver:
        """Starts a driver with this config. What it logs is added to the file `said`."""
        command = [sys.executable, "-m", "tests.chaos.driver", json.dumps(settings), str(log), str(marks)]
        with said.open("ab") as stream:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self.environment(clock=clock)},
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        return Driver(process)

    def freeze_store(self, seconds: float) -> None:
        """Stops the server's process for so long."""
        self.server.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self.server.process.send_signal(signal.SIGCONT)

    def fill_disk(self) -> None:
        """Leaves no space on the small disk."""
        assert self.disk is not None
        with suppress(OSError), (self.disk / "ballast").open("wb", buffering=0) as stream:
            while True:
                stream.write(b"\0" * 4096)

    def clear_disk(self) -> None:
        """Takes away what `fill_disk` has written."""
        if self.disk is not None:
            (self.disk / "ballast").unlink(missing_ok=True)

    def leftovers(self) -> list[str]:
        """Files of drivers that have ended, but for those that a later cluster removes."""
        return sorted(str(path.relative_to(self.folder)) for path in (self.folder / "tmp").iterdir())

    def _check_nothing_is_left(self) -> None:
        deadline = time.monotonic() + 60
        while (left := with_variable(MARK, self.mark)) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.problems += [f"process {pid} is left: {command}" for pid, command in left.items()]
        self.problems += [f"/dev/shm/{name} is left" for name in _unused_shm(self._shm)]


class Driver:
    """The process of one run."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.began = time.monotonic()
        self._answer: dict[str, Any] | None = None

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def answer(self) -> dict[str, Any]:
        """What it printed at its end; its exit code alone where it was killed."""
        if self._answer is None:
            text, _ = self.process.communicate()
            lines = text.strip().splitlines()
            self._answer = {"exit_code": self.process.returncode}
            with suppress(ValueError, IndexError):
                self._answer |= json.loads(lines[-1])
        return self._answer


def _shm() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _unused_shm(before: set[str]) -> list[str]:
    """New files of shared memory that no living process has mapped or open."""
    new = _shm() - before
    used = set()
    for folder in Path("/proc").iterdir():
        if new and folder.name.isdigit():
            with suppress(OSError):
                maps = (folder / "maps").read_text(errors="replace")
                used |= {name for name in new if f"/dev/shm/{name}" in maps}
            with suppress(OSError):
                used |= {each.readlink().name for each in (folder / "fd").iterdir()}
    return sorted(new - used)
