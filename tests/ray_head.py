"""A Ray cluster of one node for tests that only need a cluster: it ends with the test process, and not before."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Self

import pytest
from ray._private.node import Node

HOLD = """
import sys
import ray
from ray._private.node import Node

# Nobody reads logs or asks for the cluster's state, and no node is added.
Node.start_log_monitor = Node.start_monitor = Node.start_api_server = lambda node, **options: None
context = ray.init(
    address="local", num_cpus=8, num_gpus=0, include_dashboard=False, log_to_driver=False,
    object_store_memory=200 * 2**20, logging_level="ERROR",
)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""

WITHOUT_METRICS: Final = {"RAY_enable_metrics_collection": "0"}
"""Then Ray gathers no metrics. With the settings of tests/conftest.py what is idle takes two thirds of the CPU time."""


class RayHead:
    """A cluster with more CPUs than there are, which are counted, not bound, and no GPU.

    A process of its own holds the cluster: the test process may join it, have one of its own, or none. Its processes
    inherit this one's environment, with `environment` over it.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})

    def __enter__(self) -> Self:
        self._holder = subprocess.Popen(
            [sys.executable, "-c", HOLD],
            env={**os.environ, **self._environment, **WITHOUT_METRICS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._holder.stdout.readline().strip()
        assert self.address, "the cluster does not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.communicate(timeout=120)


@contextmanager
def without_monitors() -> Iterator[None]:
    """Has clusters that this process starts in the block no process that reads logs, adds nodes or shows state."""
    with pytest.MonkeyPatch.context() as changed:
        for name in ("start_log_monitor", "start_monitor", "start_api_server"):
            changed.setattr(Node, name, lambda node, **options: None)
        yield
