"""Attempt records: one small object per row that a worker has begun, so that a row that kills its workers is found.

A record outlives its worker's process. Of those that are left behind only the ones that a living driver has seen count
against the row: it sends the row again within the same run. An end of the driver or of a node counts against no row.

So none has to outlive its machine: on a local disk they are not synced, which took more CPU time than to write them.

A row's first record has a name of its own and stays while others do. So who can create it knows in that one request
that the row has no earlier ones.
"""

from __future__ import annotations

import contextvars
import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal, get_args

from pia_ray import storage
from pia_ray.errors import StorageError, StorageNotFound
from pia_ray.ledger import layout

_FIRST: Final = "first"
"""In the name of a row's first record where others have a number of their own."""
_READERS: Final = 16

_log = logging.getLogger(__name__)

AttemptState = Literal["waiting", "animating", "suspected", "died", "timeout"]
"""waiting: not in the engine yet; animating: in it, or past it; suspected: the engine hung over several rows, this one
among them; died: a living driver saw the worker's process end; timeout: the row hung, and its process was ended."""


@dataclass(frozen=True)
class AttemptRecord:
    """One try of a row by one worker."""

    uri: str
    work_key: str
    worker: str
    run_id: str = ""
    node: str = ""
    """The node of the worker, or an empty string where the run has one machine."""
    alone: bool = False
    """Whether no other row was in the worker's process."""
    state: AttemptState = "waiting"

    @property
    def counts(self) -> bool:
        """Whether the row is charged with it, in this run and later ones."""
        return self.state in ("died", "timeout")


def earlier_attempts(output: str, work_key: str) -> tuple[AttemptRecord, ...]:
    """The records that a row has now, before an attempt of one's own.

    Raises:
        StorageError: the store refused or did not answer.
    """
    found = [each.uri for each in storage.list_objects(_folder(output, work_key)) if _key(each.uri) == work_key]
    return tuple(record for uri in found if (record := _read(uri)) is not None)


def begin_first_attempt(
    output: str,
    work_key: str,
    *,
    worker: str,
    run_id: str = "",
    node: str = "",
    state: AttemptState = "waiting",
) -> AttemptRecord | None:
    """The record, now written, of a row that a worker is about to begin; None where the row has one already.

    Raises:
        StorageError: the store refused or did not answer.
    """
    record = AttemptRecord(_first_uri(output, work_key), work_key, worker=worker, run_id=run_id, node=node, state=state)
    return record if _create(record) else None


def begin_attempt(
    output: str,
    work_key: str,
    *,
    worker: str,
    run_id: str = "",
    node: str = "",
    alone: bool = False,
    state: AttemptState = "waiting",
) -> AttemptRecord:
    """The record of a row that a worker is about to begin, written beside those that the row has.

    Raises:
        StorageError: the store refused or did not answer.
    """
    record = AttemptRecord(
        _first_uri(output, work_key), work_key, worker=worker, run_id=run_id, node=node, alone=alone, state=state
    )
    if _create(record):
        return record
    return _write(replace(record, uri=storage.join(_folder(output, work_key), f"{work_key}.{uuid.uuid4().hex}.json")))


def set_attempt_state(record: AttemptRecord, state: AttemptState) -> AttemptRecord:
    """The record in its new state, written.

    Raises:
        StorageError: the store refused or did not answer.
    """
    return _write(replace(record, state=state))


def remove_attempts(records: Iterable[AttemptRecord]) -> None:
    """Removes the records, because their rows have their results or were stopped.

    A record that cannot be removed now counts against no row unless it does so already.
    """
    _remove([record.uri for record in records])


def remove_attempts_of_run(output: str, run_id: str) -> None:
    """Removes the records of a run that has ended, but for those that count."""
    with ThreadPoolExecutor(_READERS, thread_name_prefix="attempts") as pool:
        uris = [found.uri for found in _records(output)]
        read = [pool.submit(contextvars.copy_context().run, _read, uri) for uri in uris]
        records = [record for each in read if (record := each.result()) is not None]
    ended = [record for record in records if record.run_id == run_id and not record.counts]
    left = {record.work_key for record in records if record not in ended}
    _remove([record.uri for record in ended if not (_is_first(record.uri) and record.work_key in left)])


def count_attempts(output: str) -> Counter[str]:
    """Records per work key, in one listing."""
    return Counter(_key(record.uri) for record in _records(output))


def end_stale_attempts(output: str, work_keys: Iterable[str]) -> None:
    """Removes the records of rows that have their result, where a worker died between result and removal."""
    ended = set(work_keys)
    _remove([record.uri for record in _records(output) if _key(record.uri) in ended])


def name_first_attempts(output: str) -> None:
    """Gives rows a first record that have others alone, as versions before 0.2 left them; it counts for nothing."""
    keys, first = set[str](), set[str]()
    for found in _records(output):
        (first if _is_first(found.uri) else keys).add(_key(found.uri))
    for key in keys - first:
        begin_first_attempt(output, key, worker="")


def _read(uri: str) -> AttemptRecord | None:
    """The record; None where it has gone. One that cannot be understood counts against no row."""
    try:
        values = json.loads(storage.read_bytes(uri))
    except StorageNotFound:
        return None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        values = {}
    text = {name: str(values.get(name, "")) for name in ("worker", "run_id", "node")}
    return AttemptRecord(
        uri,
        _key(uri),
        **text,
        alone=values.get("alone") is True,
        state=next((state for state in get_args(AttemptState) if state == values.get("state")), "waiting"),
    )


def _create(record: AttemptRecord) -> bool:
    return storage.create_bytes(record.uri, _content(record), content_type="application/json", synced=False)


def _write(record: AttemptRecord) -> AttemptRecord:
    storage.write_bytes(record.uri, _content(record), content_type="application/json", synced=False)
    return record


def _content(record: AttemptRecord) -> bytes:
    return json.dumps({name: value for name, value in asdict(record).items() if name != "uri"}).encode()


def _records(output: str) -> Iterator[storage.ObjectStat]:
    return storage.list_objects(layout.attempts_uri(output), suffix=".json")


def _folder(output: str, work_key: str) -> str:
    return storage.join(layout.attempts_uri(output), work_key[:2])


def _key(uri: str) -> str:
    return uri.rpartition("/")[2].partition(".")[0]


def _first_uri(output: str, work_key: str) -> str:
    return storage.join(_folder(output, work_key), f"{work_key}.{_FIRST}.json")


def _is_first(uri: str) -> bool:
    return uri.endswith(f".{_FIRST}.json")


def _remove(uris: Sequence[str]) -> None:
    """Removes these objects, first records last: while there are others, a reader finds that one."""
    for some in ([uri for uri in uris if not _is_first(uri)], [uri for uri in uris if _is_first(uri)]):
        try:
            storage.delete_all(some)
        except StorageError as error:
            _log.warning("attempt records stay for now: %s", error.message)
            return
