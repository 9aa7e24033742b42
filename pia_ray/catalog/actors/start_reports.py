"""The start of a run's actors in words, through the key-value store of the Ray cluster: download, import, load, row.

An actor writes what it does until its first row has ended; the driver reads it until the first result is there.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Protocol, Self

import ray

from pia_ray.catalog.actors.key_values import ClusterKeyValues
from pia_ray.formatting import size
from pia_ray.pia import import_s, imports_torch
from pia_ray.weights.transfers import TRANSFERS

log = logging.getLogger(__name__)

EVERY_S: Final = 1.0
"""Seconds between two reports, and two reads of them."""


class Denoising(Protocol):
    """A worker, as its start is reported."""

    @property
    def furthest_step(self) -> tuple[int, int]:
        """Steps done, and to do, of the row that is furthest."""


class ActorStart:
    """The actor's side."""

    def __init__(self, run_id: str) -> None:
        self._key = _key(run_id, ray.get_runtime_context().get_actor_id() or "")
        self._worker: Denoising | None = None
        self._begun_at = time.monotonic()
        self._seconds: tuple[float, float] = (0.0, 0.0)
        self._moved = threading.Event()
        self._ended = False
        threading.Thread(target=self._follow, name="start-reports", daemon=True).start()

    def loaded(self, worker: Denoising) -> None:
        """Says that the model is loaded; from now on the worker's first row is reported."""
        self._seconds = import_s(), time.monotonic() - self._begun_at - import_s()
        self._worker = worker
        self._moved.set()  # a first row may take less time than there is between two reports

    def end(self) -> None:
        """Says that a row has ended: nothing more is reported."""
        self._ended = True
        self._moved.set()

    def _follow(self) -> None:
        store, written = ClusterKeyValues(), list[Any]()
        while not self._ended:
            if (report := self._report()) != written:
                try:
                    store.put(self._key, json.dumps(report).encode())
                    written = report
                except Exception:
                    log.debug("the cluster's key-value store does not answer", exc_info=True)
            self._moved.wait(EVERY_S)
            self._moved.clear()

    def _report(self) -> list[Any]:
        if self._worker is not None:
            return ["denoises", *self._worker.furthest_step, *self._seconds]
        done, total = TRANSFERS.bytes
        if done < total:
            return ["fetches", done, total]
        return ["imports" if imports_torch() else "loads", 0, 0]


class RunStart:
    """The driver's side. A context manager, which removes what the actors have written."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store = ClusterKeyValues()
        self._read_at = 0.0
        self._has_read = False
        self._text = ""
        self._before = (0, 0.0)

    @property
    def text(self) -> str:
        """The state of the actors in words; empty before one of them has started."""
        now = time.monotonic()
        if now - self._read_at >= EVERY_S:
            self._read_at = now
            reports = self._read()
            if reports is None:
                return self._text
            fetched = max((done for what, done, *_ in reports if what == "fetches"), default=0)
            (before, before_at), self._before = self._before, (fetched, now)
            rate = (fetched - before) / (now - before_at) if 0 < before < fetched else 0.0
            self._text = start_in_words(reports, bytes_per_s=rate)
        return self._text

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the imports and of the loading of the model, of the actor that had its model first."""
        loaded = [report[3:] for report in self._read() or () if report[0] == "denoises"]
        return dict(zip(("imports", "model"), min(loaded, key=sum), strict=True)) if loaded else {}

    def _read(self) -> list[list[Any]] | None:
        """The actors' reports; None where the cluster does not answer."""
        self._has_read = True
        try:
            values = self._store.values(_key(self._run_id, "")).values()
        except Exception:
            log.debug("the cluster's key-value store does not answer", exc_info=True)
            return None
        return [json.loads(value) for value in values]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._has_read:
            self._store.remove(_key(self._run_id, ""))


def start_in_words(reports: Sequence[Sequence[Any]], *, bytes_per_s: float) -> str:
    """The actors' reports in words: the download that is furthest, else the import, the loading, or the first row."""
    fetching = [(done, total) for what, done, total, *_ in reports if what == "fetches"]
    if fetching:
        done, total = max(fetching)
        rate = f", {size(bytes_per_s)}/s" if bytes_per_s else ""
        return f"weights are fetched, {size(done)} of {size(total)}{rate}"
    steps = [(done, total) for what, done, total, *_ in reports if what == "denoises"]
    workers = "worker" if len(reports) == 1 else "workers"
    if importing := sum(what == "imports" for what, *_ in reports):
        return f"torch is imported on {importing} of {len(reports)} {workers}"
    if len(steps) < len(reports):
        return f"the model loads on {len(reports) - len(steps)} of {len(reports)} {workers}"
    done, total = max(steps, default=(0, 0))
    if total:
        return f"the first row denoises, step {done} of {total}"
    return "the first rows are fetched" if steps else ""


def _key(run_id: str, actor: str) -> str:
    return f"start/{run_id}/{actor}"
