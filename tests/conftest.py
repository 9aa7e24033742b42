"""For all tests: the environment of their processes, a cluster that they share, and what runs in parallel."""

from __future__ import annotations

import atexit
import gc
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

gc.disable()  # a quarter of the imports was its time; `pytest_collection_finish` enables it

# One thread for torch's operators. The models of the tests are so small that threads cost more than they bring, most of
# all on a busy machine, where each operator waits for the slowest of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if "RAY_TMPDIR" not in os.environ:  # the processes of one run of pytest share it: each cluster has a folder in it
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")
    atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)

# Ray gives clusters the password of the user's file, which it makes where there is none; two that start at once would
# each make one. Processes join a cluster whose password is in their environment.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Ray's workers have niceness 15 otherwise: beside tests that use both cores they would get a thirtieth of one.
os.environ.setdefault("RAY_worker_niceness", "0")

# What nothing here reads: times of tasks and of Ray's own events, which its processes keep, and statistics of its use.
os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
os.environ.setdefault("RAY_event_stats", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")  # statistics of the machine, else every 5 s

SHARED_CLUSTERS: Final = {
    "tests/online/serve/": "serve",
    "tests/catalog/test_graph.py": "graph",
    "tests/cli/": "ray",
    "tests/jobs/": "ray",
    "tests/docs/test_docs.py": "ray",
    "tests/docs/test_notebooks.py::test_a_catalogue": "ray",
    "tests/cluster/": "nodes",
}
"""Heavy tests by the beginning of their id, and the cluster that they share. They run in one process, one by one."""

ALONE: Final = ("tests/docs/test_notebooks.py::test_the_endpoint",)
"""Heavy tests that share nothing, so that any process may take any of them."""

LONGEST: Final = ("serve", "graph", "ray", "nodes", "catalog.test_own_clusters")
"""Groups that take minutes, in the order in which they start: one that starts late would end last, alone."""


WHOLLY_HEAVY: Final = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.heavy\b", re.MULTILINE)
"""The mark of files whose tests are all heavy."""


_modules_frozen = 0


def pytest_collection_finish() -> None:
    """Enables the garbage collector, which was off while test files were imported."""
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Keeps the garbage collector out of imported modules: a third of some tests was its way through all of torch."""
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 200:
        _modules_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray cluster without GPUs for all tests that only need one, in processes of its own.

    Its workers reach the S3 server of this process's tests.
    """
    from tests.ray_head import RayHead  # most tests need no Ray
    from tests.s3_server import shared_server

    with RayHead(shared_server().environment) as head:
        yield head.address


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files of which no test is asked for: each process of a run would take seconds to import them."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text("utf-8")
    is_left_out = {"heavy": "heavy" not in text, "not heavy": bool(WHOLLY_HEAVY.search(text))}
    return is_left_out.get(config.option.markexpr) or None


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only `make soak` runs, and sorts tests into groups for `--dist loadgroup`, long ones first."""
    if "soak" not in config.option.markexpr:
        soak = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=soak)
        items[:] = [item for item in items if item not in soak]
    places = {item: _place(item) for item in items}
    for item, (_, group) in places.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: places[item][0])


def _place(item: pytest.Item) -> tuple[int, str]:
    """When the test starts, and its group: those of one group run in one process, in order."""
    file = item.nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py").replace("/", ".")
    if item.get_closest_marker("heavy") is None:
        return len(LONGEST) + 1, file
    shared = [group for start, group in SHARED_CLUSTERS.items() if item.nodeid.startswith(start)]
    group = shared[0] if shared else "" if item.nodeid.startswith(ALONE) else f"{file}.heavy"
    rank = LONGEST.index(group.removesuffix(".heavy")) if group.removesuffix(".heavy") in LONGEST else len(LONGEST)
    return rank, group
