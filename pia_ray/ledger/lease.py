"""The lease that keeps two runs from animating the same output at once.

Advisory: it saves work, and nothing becomes wrong without it. Its age is judged by the store's clock alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pia_ray import storage
from pia_ray.errors import LeaseHeld, OutputError, StorageError, StorageNotFound
from pia_ray.ledger import layout

TTL_S: Final = 60.0
"""A lease that has not been renewed for so long may be taken over; renewal comes three times as often."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """The holder of a lease, as written in it."""

    run_id: str
    host: str
    pid: int
    started_at: str
    process: str
    """Differs for every process on every machine; empty where the system does not say."""
    ttl_s: float

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.pid} on {self.host}, started {self.started_at})"


class Lease:
    """Held while the body of a `with` runs, and renewed by a thread.

    A holder that is seen to live is left alone at once; one that may have died is watched until it renews its lease
    or the lease expires, which is then taken over. On a store without conditional writes there is no lease.

    Each partition of an output has a lease of its own, beside that of whole runs.

    Raises:
        LeaseHeld: another run is at work; names it.
    """

    def __init__(self, output: str, *, run_id: str, ttl_s: float = TTL_S, partition: tuple[int, int] = (1, 1)) -> None:
        self._output = output
        self._uri = layout.lease_uri(output, partition=partition)
        self._ttl_s = ttl_s
        self._holder = Holder(
            run_id=run_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            process=_process(os.getpid()),
            ttl_s=ttl_s,
        )
        self._etag = ""
        self._ended = threading.Event()
        self._renewer: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether this run holds the lease now; false after another run has taken it over."""
        return bool(self._etag)

    def __enter__(self) -> Self:
        if not storage.conditional_writes(self._output):
            _log.warning("%s: no lease, because the store has no conditional writes", self._output)
            return self
        try:
            self._acquire()
        except StorageError as error:
            raise OutputError(f"the lease of {self._output} cannot be taken: {error.message}") from None
        if self.held:
            self._renewer = threading.Thread(target=self._renew_until_ended, name="lease", daemon=True)
            self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._renewer is not None:
            self._renewer.join()
        if not self.held:
            return
        try:
            with storage.hurry():
                found = storage.head(self._uri)
                if found is not None and found.etag == self._etag:
                    storage.delete(self._uri)
        except StorageError as failure:
            _log.warning("the lease stays until it expires in %.0f s: %s", self._ttl_s, failure.message)
        self._etag = ""

    def _acquire(self) -> None:
        content = json.dumps(vars(self._holder)).encode()
        watched = refused = ""
        while True:
            if (etag := storage.create_object(self._uri, content, content_type="application/json")) is not None:
                self._etag = etag
                return
            found = storage.head(self._uri)
            if found is None:
                if not storage.conditional_writes(self._output):
                    return
                continue
            holder = read_holder(self._uri)
            if holder is None:
                continue
            renewed = watched not in ("", found.etag)
            alive = _is_alive(holder)
            left_s = holder.ttl_s - (storage.clock(self._output) - found.last_modified).total_seconds()
            if alive or (renewed and left_s > 0):
                raise LeaseHeld(
                    f"{self._output} is in use by {holder}. Wait for it or stop it; if it is dead, its lease expires "
                    f"{max(left_s, 0):.0f} s from now and the same command takes over."
                )
            if alive is False or left_s <= 0:
                etag = storage.replace_bytes(self._uri, content, etag=found.etag)
                if etag is not None:
                    _log.warning("took over the lease of %s from %s", self._output, holder)
                    self._etag = etag
                    return
                if refused == found.etag:
                    _log.warning("%s: no lease, because the store replaces no object by its ETag", self._output)
                    return
                refused = found.etag
                continue
            if not watched:
                _log.warning("waiting up to %.0f s to see whether %s is alive", left_s, holder)
            watched = found.etag
            time.sleep(min(max(left_s, 0.1), 1.0))

    def _renew_until_ended(self) -> None:
        content = json.dumps(vars(self._holder)).encode()
        while not self._ended.wait(self._ttl_s / 3):
            try:
                etag = storage.replace_bytes(self._uri, content, etag=self._etag)
                etag = etag or self._taken_again(content)
            except StorageError as error:
                _log.warning("the lease was not renewed: %s", error.message)
                continue
            if etag is None:
                _log.error(
                    "another run has taken over the lease of %s; both go on, which costs time only", self._output
                )
                self._etag = ""
                return
            self._etag = etag

    def _taken_again(self, content: bytes) -> str | None:
        """The ETag of the lease, written anew after its file was deleted; None where another run holds it."""
        etag = storage.create_object(self._uri, content, content_type="application/json")
        if etag is not None:
            _log.warning("the lease's file %s was deleted; it is written anew", self._uri)
        return etag


def read_holder(uri: str) -> Holder | None:
    """The holder of the lease; None if it was released just now. A damaged file gives an unknown holder."""
    try:
        values: dict[str, Any] = json.loads(storage.read_bytes(uri, max_bytes=100_000))
        return Holder(
            run_id=str(values["run_id"]),
            host=str(values["host"]),
            pid=int(values["pid"]),
            started_at=str(values["started_at"]),
            process=str(values["process"]),
            ttl_s=float(values["ttl_s"]),
        )
    except StorageNotFound:
        return None
    except (ValueError, KeyError, TypeError):
        return Holder(run_id="unknown", host="unknown", pid=0, started_at="unknown", process="", ttl_s=TTL_S)


def _is_alive(holder: Holder) -> bool | None:
    """Whether the holder's process lives; None where this machine cannot know."""
    here, there = _process(os.getpid()).rpartition("/"), holder.process.rpartition("/")
    if not holder.process or here[0] != there[0]:
        return None
    return _process(holder.pid) == holder.process


def _process(pid: int) -> str:
    """`<boot>/<process namespace>/<pid>:<start time>` of a process of this machine, or an empty string."""
    with contextlib.suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        facts = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        if facts[0] not in "ZX":  # dead, though its parent has not waited for it yet
            return f"{boot}/{namespace}/{pid}:{facts[19]}"
    return ""
