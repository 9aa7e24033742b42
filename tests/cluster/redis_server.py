"""A Redis for the state of a test's cluster, started as by the component `redis`. It is Debian's (redis-server)."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.manifests import COMPONENTS, documents
from tests.cluster.networks import Network, free_port


@dataclass(frozen=True)
class Redis:
    """Where it listens, and its password."""

    address: str
    password: str


def is_there() -> bool:
    """Whether this machine has one."""
    return shutil.which("redis-server") is not None


@contextmanager
def open_redis(network: Network, folder: Path) -> Iterator[Redis]:
    """A Redis that runs by the component's command line, with its files in `folder`, for as long as the block lasts."""
    (container,) = documents(COMPONENTS / "redis" / "redis.yaml")[0]["spec"]["template"]["spec"]["containers"]
    port, password = free_port(), secrets.token_hex(16)
    shell, flag, command = container["command"]
    command = command.replace("--dir /data", f"--dir {folder} --bind {network.host} --port {port}")
    process = subprocess.Popen(
        [shell, flag, command], env={**os.environ, "REDIS_PASSWORD": password}, stdout=subprocess.DEVNULL
    )
    try:
        yield Redis(f"{network.host}:{port}", password)
    finally:
        process.terminate()
        process.wait(60)
