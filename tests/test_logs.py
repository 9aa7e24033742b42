"""JSON log lines: one object each, with the run, row, attempt and worker that it is about."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import ExitStack
from typing import Any

from pia_ray import logs
from pia_ray.catalog.rows.stages import Stages


def line(message: str = "it is so", **how: Any) -> dict[str, Any]:
    """A line as it is written here and now."""
    record = logging.LogRecord("pia_ray.test", logging.WARNING, __file__, 1, message, (), None, **how)
    written = logs.JsonFormatter().format(record)
    assert "\n" not in written
    values: dict[str, Any] = json.loads(written)
    return values


def test_a_line_says_when_how_bad_where_and_what() -> None:
    values = line("two\nlines")
    assert values.pop("time").endswith("+00:00")
    assert values == {"level": "WARNING", "logger": "pia_ray.test", "message": "two\nlines"}


def test_fields_of_overlapping_blocks_end_with_their_own() -> None:
    first, second = logs.process_fields(run_id="a"), logs.process_fields(run_id="b")
    with ExitStack() as later:
        with first:
            later.enter_context(second)
            assert line()["run_id"] == "b"
        assert line()["run_id"] == "b"
    assert "run_id" not in line()


def test_fields_of_the_block_and_of_the_process_are_in_its_lines_only() -> None:
    with logs.process_fields(run_id="r"), logs.block_fields(row_id="car"):
        logs.add_fields(attempt=2)
        values = line()
        assert (values["run_id"], values["row_id"], values["attempt"]) == ("r", "car", 2)
        inside: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: inside.append(line()))
        thread.start()
        thread.join()
        assert inside[0]["run_id"] == "r"
        assert "row_id" not in inside[0]
    assert not {"run_id", "row_id", "attempt"} & set(line())


def test_the_stages_of_a_row_log_its_fields_though_they_are_threads_of_their_own() -> None:
    with logs.block_fields(row_id="car"):
        assert Stages().call("a stage", line, limit_s=10)["row_id"] == "car"


def test_a_traceback_is_a_field_of_the_same_line() -> None:
    try:
        raise ValueError("odd")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "no", (), sys.exc_info())
    assert "ValueError: odd" in json.loads(logs.JsonFormatter().format(record))["exception"]
