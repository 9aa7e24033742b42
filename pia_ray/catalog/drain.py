"""The drain of a run's actors through the key-value store of the Ray cluster: the driver asks, each actor answers.

Ray Data has no way to call the actors of its pool, nor to end a run other than at once (ray 2.60).
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Final, Protocol, Self

import ray
from ray.experimental import internal_kv

log = logging.getLogger(__name__)

POLL_S: Final = 0.5

ANSWER_S: Final = 10.0
"""Seconds in which a living actor answers; one that has not by then was still loading its model, or has ended."""

SETTLED_S: Final = 1.5
"""Seconds that the last result takes from the actor to the driver at most, where nothing is slow."""


class Drainable(Protocol):
    """A worker, as an actor drains it."""

    @property
    def num_in_flight(self) -> int:
        """The number of rows that it has begun."""

    def drain(self) -> None:
        """Begins no other row."""


def drain_with_run(worker: Drainable, *, run_id: str) -> None:
    """Drains the worker when the run drains, and then says on a thread how many rows it has left.

    A worker that comes up after the run's drain has begun is drained on return, so that it begins no row.
    """
    name = ray.get_runtime_context().get_actor_id() or ""
    asked = _answer(worker, run_id, name, asked=False)
    threading.Thread(target=_follow, args=(worker, run_id, name, asked), name="drain", daemon=True).start()


def node_is_alive(node: str) -> bool:
    """Whether Ray has not lost the node of that id."""
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())  # type: ignore[no-untyped-call]


class RunDrain:
    """The driver's side of a drain. A context manager, which removes what it and the actors have written."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._begun_at: float | None = None
        self._idle_since: float | None = None

    def begin(self) -> None:
        """Asks all actors of the run to begin no other rows."""
        self._begun_at = time.monotonic()
        internal_kv._internal_kv_put(_key(self._run_id), b"", namespace=_NAMESPACE)

    @property
    def is_over(self) -> bool:
        """Whether all actors have answered that they have no row left, and their results are here."""
        if self._begun_at is None:
            return False
        now = time.monotonic()
        left = [internal_kv._internal_kv_get(key, namespace=_NAMESPACE) for key in self._answers()]
        waits = now - self._begun_at < ANSWER_S and not left
        if waits or any(number != b"0" for number in left):
            self._idle_since = None
            return False
        self._idle_since = self._idle_since or now
        return now - self._idle_since > SETTLED_S

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._begun_at is not None:
            internal_kv._internal_kv_del(_key(self._run_id), del_by_prefix=True, namespace=_NAMESPACE)

    def _answers(self) -> list[bytes]:
        return internal_kv._internal_kv_list(_key(self._run_id, ""), namespace=_NAMESPACE)


_NAMESPACE: Final = b"pia-ray"


def _key(run_id: str, *actor: str) -> bytes:
    return "/".join(["drain", run_id, *actor]).encode()


def _follow(worker: Drainable, run_id: str, name: str, asked: bool) -> None:
    while True:
        time.sleep(POLL_S)
        asked = _answer(worker, run_id, name, asked=asked)


def _answer(worker: Drainable, run_id: str, name: str, *, asked: bool) -> bool:
    """Whether the run drains; where it does, the worker is drained and its number of rows is written."""
    try:
        if not asked and internal_kv._internal_kv_exists(_key(run_id), namespace=_NAMESPACE):
            asked = True
            worker.drain()
        if asked:
            number = str(worker.num_in_flight).encode()
            internal_kv._internal_kv_put(_key(run_id, name), number, overwrite=True, namespace=_NAMESPACE)
    except Exception:
        log.debug("the cluster's key-value store does not answer", exc_info=True)
    return asked
