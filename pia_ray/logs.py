"""Log lines as text for people or as JSON for machines, with the run, row, attempt and worker that they are about.

Fields come from the block in which a line is logged (a context variable, which threads do not inherit), and else from
the process.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, Literal

LogFormat = Literal["text", "json"]

Field = str | int

TEXT_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_of_block: ContextVar[Mapping[str, Field]] = ContextVar("log_fields", default=MappingProxyType({}))
_of_process: list[Mapping[str, Field]] = []
"""The fields of each block that has them for the process, and of a worker; the last one that gives a field counts."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields that are known, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for fields in tuple(_of_process) for name, value in fields.items()},
            **_of_block.get(),
        }
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            values["stack"] = record.stack_info
        return json.dumps(values, default=str)


def set_up(log_format: LogFormat, *, level: int) -> None:
    """Has this process write its log lines to standard error in that format, and its warnings with them as JSON."""
    if log_format == "text":
        logging.basicConfig(level=level, format=TEXT_FORMAT)
        return
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for other in tuple(root.handlers):
        if type(other) is logging.StreamHandler:  # that of text, not one that somebody else has put there
            root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(capture=True)


def is_json() -> bool:
    """Whether this process writes its log lines as JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def take_over(logger: str) -> None:
    """Has the console handlers that a library has given its logger write JSON."""
    for handler in logging.getLogger(logger).handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setFormatter(JsonFormatter())


def set_up_worker(log_format: LogFormat, **fields: Field) -> None:
    """Has a worker's process write JSON where the run does, from INFO on, with these fields; else nothing changes."""
    _of_process.append(fields)
    if log_format == "json":
        set_up("json", level=logging.WARNING)
        logging.getLogger("pia_ray").setLevel(logging.INFO)


@contextmanager
def process_fields(**fields: Field) -> Iterator[None]:
    """Adds the fields to all lines of this process for the block, also to those of other threads.

    Blocks of several threads may overlap.
    """
    _of_process.append(fields)
    try:
        yield
    finally:
        own = next(number for number, each in enumerate(_of_process) if each is fields)
        del _of_process[own]


@contextmanager
def block_fields(**fields: Field) -> Iterator[None]:
    """Adds the fields to the lines of the block in this thread."""
    token = _of_block.set({**_of_block.get(), **fields})
    try:
        yield
    finally:
        _of_block.reset(token)


def add_fields(**fields: Field) -> None:
    """Adds the fields to the lines of the rest of this thread's block."""
    _of_block.set({**_of_block.get(), **fields})


def fields() -> Mapping[str, Field]:
    """The fields of this thread's block, to be given to another thread."""
    return _of_block.get()
