"""The channel between a run's driver and its actors: the key-value store of the Ray cluster.

The driver asks for a drain, which each actor answers; actors report outages. Ray Data has no way to call the actors of
its pool, nor to end a run other than at once (ray 2.60).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from types import TracebackType
from typing import Final, Protocol, Self

import ray
from ray._private.state import state as cluster_state

from pia_ray.catalog.actors.kept_results import kept_prefix
from pia_ray.catalog.actors.key_values import ClusterKeyValues
from pia_ray.catalog.rows.outage import NO_OUTAGE, OutageState

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
"""Seconds between two questions of an actor whether the run drains: 0.5 ms of CPU time each."""

ANSWER_POLL_S: Final = 0.5
"""Seconds between two answers of an actor once it does."""

ANSWER_S: Final = 10.0
"""Seconds in which a living actor answers; one that has not by then was still loading its model, or has ended."""

SETTLED_S: Final = 2.9
"""Seconds that the last result takes from the actor to the driver at most, where nothing is slow."""

RENEW_S: Final = 10.0
"""Seconds after which an actor writes an outage that goes on again."""

STALE_S: Final = 35.0
"""Seconds after which an outage that is not renewed no longer counts, because its actor has ended."""

OUTAGE_S: Final = 2.0
"""Seconds between two reads of the actors' outages."""


END_S: Final = 5.0
"""Seconds that the processes of killed actors have to end at most."""

_END_POLL_S: Final = 0.05


class Worker(Protocol):
    """A worker, as its actor and the driver share it."""

    @property
    def num_in_flight(self) -> int:
        """The number of rows that it has begun."""

    @property
    def outage(self) -> OutageState:
        """The outage that it waits out."""

    def drain(self) -> None:
        """Begins no other row."""


def follow_run(worker: Worker, *, run_id: str) -> None:
    """Drains the worker when the run drains, and reports its rows then and its outages always, on a thread.

    A worker that comes up after the run's drain has begun is drained on return, so that it begins no row.
    """
    follower = _Follower(worker, run_id)
    follower.follow()
    threading.Thread(target=follower.follow_on, name="channel", daemon=True).start()


def node_is_alive(node: str) -> bool:
    """Whether Ray has not lost the node of that id."""
    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())  # type: ignore[no-untyped-call]


class RunChannel:
    """The driver's side. A context manager, which removes what it and the actors have written."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store = ClusterKeyValues()
        self._begun_at: float | None = None
        self._idle_since: float | None = None
        self._outage = NO_OUTAGE
        self._read_at = 0.0
        self._reports: dict[str, tuple[bytes, float]] = {}

    def drain(self) -> None:
        """Asks all actors of the run to begin no other rows."""
        self._begun_at = time.monotonic()
        self._store.put(_key("drain", self._run_id), b"")

    @property
    def is_drained(self) -> bool:
        """Whether all actors have answered that they have no row left, and their results are here."""
        if self._begun_at is None:
            return False
        now = time.monotonic()
        left = self._store.values(_key("drain", self._run_id, "")).values()
        waits = now - self._begun_at < ANSWER_S and not left
        if waits or any(number != b"0" for number in left):
            self._idle_since = None
            return False
        self._idle_since = self._idle_since or now
        return now - self._idle_since > SETTLED_S

    def wait_until_ended(self, *, timeout_s: float = END_S) -> bool:
        """Whether the processes of all actors have ended within the time, so that they write nothing more.

        Ray says that an actor is dead as soon as it is asked to kill it, and its process goes on for a moment
        (ray 2.60).
        """
        ends_at = time.monotonic() + timeout_s
        try:
            processes = {value.decode() for value in self._store.values(_key("process", self._run_id, "")).values()}
            while processes & set(cluster_state.workers()):  # type: ignore[no-untyped-call]
                if time.monotonic() > ends_at:
                    return False
                time.sleep(_END_POLL_S)
        except Exception:
            log.debug("the cluster does not say whether the workers have ended", exc_info=True)
        return True

    @property
    def outage(self) -> OutageState:
        """The outage that actors wait out, with the animations of all."""
        now = time.monotonic()
        if now - self._read_at > OUTAGE_S:
            self._read_at = now
            try:
                values = self._store.values(_key("outage", self._run_id, ""))
            except Exception:
                log.debug("the cluster's key-value store does not answer", exc_info=True)
                return self._outage
            self._reports = {
                key: (value, since if value == before else now)
                for key, value in values.items()
                for before, since in [self._reports.get(key, (b"", now))]
            }
            found = [_outage(value) for value, since in self._reports.values() if now - since < STALE_S]
            waiting = [state for state in found if state.reason]
            number = sum(state.num_animations for state in waiting)
            self._outage = OutageState(waiting[0].what, waiting[0].reason, number) if waiting else NO_OUTAGE
        return self._outage

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        written = [_key(what, self._run_id) for what in ("drain", "outage", "process")]
        for prefix in (*written, kept_prefix(self._run_id)):
            self._store.remove(prefix)


def _key(what: str, run_id: str, *actor: str) -> str:
    return "/".join([what, run_id, *actor])


def _outage(value: bytes) -> OutageState:
    what, reason, num_animations, _ = json.loads(value)
    return OutageState(what, reason, num_animations)


class _Follower:
    """The actor's side."""

    def __init__(self, worker: Worker, run_id: str) -> None:
        self._worker = worker
        self._run_id = run_id
        self._store = ClusterKeyValues()
        self._actor = ray.get_runtime_context().get_actor_id() or ""
        self._is_named = False
        self._drains = False
        self._reported = NO_OUTAGE
        self._reported_at = 0.0
        self._num_reports = 0

    def follow_on(self) -> None:
        while True:
            time.sleep(ANSWER_POLL_S if self._drains else POLL_S)
            self.follow()

    def follow(self) -> None:
        try:
            self._name()
            self._answer()
            self._report()
        except Exception:
            log.debug("the cluster's key-value store does not answer", exc_info=True)

    def _name(self) -> None:
        """Says which process the driver has to wait for at the end."""
        if not self._is_named:
            self._write("process", ray.get_runtime_context().get_worker_id())
            self._is_named = True

    def _answer(self) -> None:
        if not self._drains and self._store.has(_key("drain", self._run_id)):
            self._drains = True
            self._worker.drain()
        if self._drains:
            self._write("drain", str(self._worker.num_in_flight))

    def _report(self) -> None:
        state, now = self._worker.outage, time.monotonic()
        if state == self._reported and not (state.reason and now - self._reported_at > RENEW_S):
            return
        self._num_reports += 1  # makes the same outage another value, so that it counts as renewed
        self._write("outage", json.dumps([state.what, state.reason, state.num_animations, self._num_reports]))
        self._reported, self._reported_at = state, now

    def _write(self, what: str, value: str) -> None:
        self._store.put(_key(what, self._run_id, self._actor), value.encode())
