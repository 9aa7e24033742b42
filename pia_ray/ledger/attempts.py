"""Attempt records: one small object per row in an engine, so that a row that kills each of its workers is found.

A record is written before the row enters the engine. Only a death leaves it behind, so those that are there when a row
begins are the deaths it has seen.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pia_ray import storage
from pia_ray.errors import StorageError
from pia_ray.ledger import layout

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttemptRecord:
    """One row's stay in an engine."""

    uri: str
    work_key: str
    earlier: tuple[str, ...]
    """Records that were there before: each is a worker that died, or another run's worker at work."""

    @property
    def num_earlier(self) -> int:
        """The number of attempts that have not ended properly."""
        return len(self.earlier)


def earlier_attempts(output: str, work_key: str) -> tuple[str, ...]:
    """The records that a row has now, before an attempt of one's own.

    Raises:
        StorageError: the store refused or did not answer.
    """
    found = storage.list_objects(_folder(output, work_key))
    return tuple(record.uri for record in found if _key(record.uri) == work_key)


def begin_attempt(output: str, work_key: str, *, worker: str, earlier: tuple[str, ...] | None = None) -> AttemptRecord:
    """Writes the record of a row that is about to enter an engine.

    `earlier` are the records from `earlier_attempts`; left out, they are listed here.

    Raises:
        StorageError: the store refused or did not answer.
    """
    if earlier is None:
        earlier = earlier_attempts(output, work_key)
    uri = storage.join(_folder(output, work_key), f"{work_key}.{uuid.uuid4().hex}.json")
    content = json.dumps({"work_key": work_key, "worker": worker})
    storage.write_bytes(uri, content.encode(), content_type="application/json")
    return AttemptRecord(uri=uri, work_key=work_key, earlier=earlier)


def end_attempt(record: AttemptRecord) -> None:
    """Removes the record and the row's earlier ones, because the row has its result.

    A record that cannot be removed now is removed when the next run is planned.
    """
    _remove((record.uri, *record.earlier))


def withdraw_attempt(record: AttemptRecord) -> None:
    """Removes this record alone, because the row was stopped and has no result: the deaths before it still count."""
    _remove((record.uri,))


def attempt_uris(output: str) -> frozenset[str]:
    """The records of all rows."""
    return frozenset(record.uri for record in _records(output))


def withdraw_latest_attempts(output: str, *, kept: frozenset[str]) -> None:
    """Removes the newest record of every row but those in `kept`: its run has stopped the worker that wrote it."""
    newest: dict[str, storage.ObjectStat] = {}
    for record in _records(output):
        latest = newest.setdefault(_key(record.uri), record)
        if record.last_modified > latest.last_modified:
            newest[_key(record.uri)] = record
    _remove(record.uri for record in newest.values() if record.uri not in kept)


def count_attempts(output: str) -> Counter[str]:
    """Records per work key, in one listing."""
    return Counter(_key(record.uri) for record in _records(output))


def end_stale_attempts(output: str, work_keys: Iterable[str]) -> None:
    """Removes the records of rows that have their result, where a worker died between result and removal."""
    ended = set(work_keys)
    _remove(record.uri for record in _records(output) if _key(record.uri) in ended)


def _records(output: str) -> Iterator[storage.ObjectStat]:
    return storage.list_objects(layout.attempts_uri(output), suffix=".json")


def _folder(output: str, work_key: str) -> str:
    return storage.join(layout.attempts_uri(output), work_key[:2])


def _key(uri: str) -> str:
    return uri.rpartition("/")[2].partition(".")[0]


def _remove(uris: Iterable[str]) -> None:
    for uri in uris:
        try:
            storage.delete(uri)
        except StorageError as error:
            _log.warning("an attempt record stays for now: %s", error.message)
