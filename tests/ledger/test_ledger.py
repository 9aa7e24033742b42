"""The row ledger: every claim is read back from the files of an output."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import ledger, storage
from pia_ray.config.knob_types import MAX_SEED
from pia_ray.errors import LeaseHeld, LedgerError, OutputError, VideoError
from pia_ray.ledger import Lease, Ledger, layout, new_run, runs
from pia_ray.ledger.index import find_keys, split_keys
from pia_ray.ledger.parts import write_part
from pia_ray.manifest import ITEMS_SCHEMA
from pia_ray.media.marking import ProvenanceLevel, at_level
from pia_ray.media.video import encode
from pia_ray.result_row import ResultRow
from tests.chaos_proxy import CUT_BODY, LOSE_ANSWER, RESET, ChaosProxy, chaos
from tests.s3_server import S3Server, s3, s3_server

__all__ = ["chaos", "s3", "s3_server"]  # fixtures

BEGIN = datetime(2026, 5, 1, 12, tzinfo=UTC)


def key_of(number: int, spec: str = "") -> str:
    return hashlib.sha256(f"{number}{spec}".encode()).hexdigest()


def row_of(number: int, *, output: str = "out", **changes: Any) -> ResultRow:
    key = changes.pop("work_key", key_of(number))
    input_uri, video_thumbnail = layout.thumbnail_uris(output, f"row {number}", work_key=key)
    row = ResultRow(
        id=f"row {number}",
        video_index=0,
        status="succeeded",
        error_code=None,
        error_message=None,
        retryable=None,
        attempts=1,
        video_uri=layout.video_uri(output, f"row {number}", work_key=key, ext="mp4"),
        thumbnail_uri=video_thumbnail,
        input_thumbnail_uri=input_uri,
        image_uri=f"pictures/{number}.png",
        prompt="a boat",
        seed=MAX_SEED - number,
        width=64,
        height=48,
        num_frames=4,
        fps=8,
        duration_s=0.5,
        size_bytes=4,
        sha256="00" * 32,
        input_sha256="11" * 32,
        original_width=640,
        original_height=480,
        params=json.dumps({"seed": str(MAX_SEED - number)}),
        work_key=key,
        model="demo",
        run_id="r",
        worker="here:1",
        fetch_s=0.1,
        animate_s=float(number),
        publish_s=0.2,
        gpu_s=0.5,
        motion=0.01,
        finished_at=BEGIN + timedelta(seconds=number),
    )
    return dataclasses.replace(row, **changes)


def failed(number: int, code: str = "image_not_found", **changes: Any) -> ResultRow:
    empty = dict.fromkeys(("video_uri", "thumbnail_uri", "input_thumbnail_uri", "size_bytes", "sha256", "gpu_s"))
    given = {"status": "failed", "error_code": code, "error_message": "gone", "retryable": False}
    return row_of(number, **{**empty, **given, **changes})


def items_of(numbers: Iterable[int], *, rejected: Iterable[int] = (), passed: dict[str, Any] | None = None) -> pa.Table:
    numbers, rejected = list(numbers), set(rejected)
    table = pa.Table.from_pylist(
        [
            {
                "work_key": key_of(number),
                "id": f"row {number}",
                "video_index": 0,
                "image": f"pictures/{number}.png",
                "image_identity": f"pictures/{number}.png",
                "prompt": "a boat",
                "seed": MAX_SEED - number,
                "style": "default",
                "params": "{}",
                "error_code": "bad_parameter" if number in rejected else None,
                "error_message": "motion_scale must be 0 to 8" if number in rejected else None,
            }
            for number in numbers
        ],
        schema=ITEMS_SCHEMA,
    )
    for name, values in (passed or {}).items():
        table = table.append_column(name, values)
    return table


def plan(output: str, numbers: Iterable[int], *, retry: tuple[str, ...] = (), **kinds: Any) -> ledger.Planned:
    with Ledger.open(output) as opened:
        return opened.plan([items_of(numbers, **kinds)], run=new_run(manifest="m.csv", model="demo"), retry=retry)


def record(output: str, rows: Iterable[ResultRow]) -> None:
    with Ledger.open(output) as opened:
        opened.append(rows)


def pending(planned: ledger.Planned, output: str) -> list[str]:
    items = pa.concat_tables(ledger.read_items(output, planned.run.run_id))
    return items.filter(items["pending"])["id"].to_pylist()


def results(output: str) -> dict[str, str]:
    with Ledger.open(output) as opened:
        opened.write_results()
    table = ledger.read_results(output)
    return dict(zip(table["id"].to_pylist(), table["status"].to_pylist(), strict=True))


def parts(output: str) -> list[Path]:
    return sorted((Path(output) / "_ledger" / "parts").glob("*.parquet"))


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out")


# Names


@pytest.mark.parametrize(
    ("row_id", "expected"),
    [
        ("shoes-12_b", "shoes-12_b"),
        ("../../etc/passwd", "etc-passwd"),
        (".", "row"),
        ("..", "row"),
        ("", "row"),
        ("日本", "row"),
        ("Café au lait", "Cafe-au-lait"),
        ("a/b\\c:d\x00e\nf", "a-b-c-d-e-f"),
        ("x" * 300, "x" * 64),
    ],
)
def test_a_slug_is_a_harmless_file_name(row_id: str, expected: str) -> None:
    assert layout.slug(row_id) == expected


def test_ids_with_the_same_slug_have_different_videos() -> None:
    one = ledger.video_uri("out", "a/b", work_key=key_of(1), ext="mp4")
    other = ledger.video_uri("out", "a b", work_key=key_of(2), ext=".mp4")
    assert one != other
    assert one == f"out/videos/{key_of(1)[:2]}/a-b-{key_of(1)[:16]}.mp4"
    assert layout.key_prefix(one) == int(key_of(1)[:16], 16)


def test_thumbnails_lie_beside_each_other_under_the_work_key() -> None:
    first, second = ledger.thumbnail_uris("s3://b/out/", "a", work_key=key_of(1))
    assert first == f"s3://b/out/thumbnails/{key_of(1)[:2]}/a-{key_of(1)[:16]}-input.webp"
    assert second.endswith("-video.webp")
    assert layout.key_prefix(first) == layout.key_prefix(second) == int(key_of(1)[:16], 16)


# Rows and the table


def test_the_schema_is_the_result_rows_fields_in_order() -> None:
    assert ledger.RESULTS_SCHEMA.names == [field.name for field in dataclasses.fields(ResultRow)]
    assert ledger.RESULTS_SCHEMA.field("seed") == pa.field("seed", pa.uint64(), nullable=False)
    assert ledger.RESULTS_SCHEMA.field("finished_at").type == pa.timestamp("us", tz="UTC")


def test_rows_come_back_from_a_table_as_they_were() -> None:
    rows = [row_of(0), failed(1)]
    assert ledger.from_table(ledger.to_table(rows)) == rows


def test_a_message_with_bytes_that_are_no_text_does_not_lose_its_row() -> None:
    table = ledger.to_table([failed(1, error_message="no file a\udcffb")])
    assert table["error_message"].to_pylist() == ["no file a?b"]


def test_a_record_without_a_needed_column_is_refused_by_name() -> None:
    with pytest.raises(LedgerError, match="seed"):
        ledger.from_record({**vars(row_of(1)), "seed": None})


def test_provenance_restores_the_row_but_for_what_a_file_cannot_say() -> None:
    row = row_of(3)
    values = json.loads(json.dumps(ledger.provenance(row)))
    assert values["seed"] == str(row.seed)
    restored = ledger.row_from_provenance(
        values,
        video_uri=str(row.video_uri),
        thumbnail_uri=row.thumbnail_uri,
        input_thumbnail_uri=row.input_thumbnail_uri,
        size_bytes=4,
        sha256="00" * 32,
    )
    assert restored == dataclasses.replace(row, publish_s=None)


@pytest.mark.parametrize(
    "values", [{}, {"id": "a"}, {"seed": "x"}, {**ledger.provenance(row_of(1)), "width": "wide"}, {"finished_at": 3}]
)
def test_a_video_without_our_provenance_is_no_result(values: dict[str, Any]) -> None:
    with pytest.raises(VideoError, match="provenance"):
        ledger.row_from_provenance(
            values, video_uri="v", thumbnail_uri=None, input_thumbnail_uri=None, size_bytes=1, sha256=""
        )


def test_results_of_an_output_without_any_say_what_to_do(output: str) -> None:
    with pytest.raises(OutputError, match="pia-ray animate"):
        ledger.read_results(output)


# Planning and winners


def test_a_fresh_output_has_everything_pending(output: str) -> None:
    planned = plan(output, range(5))
    assert (planned.num_items, planned.num_pending) == (5, 5)
    assert pending(planned, output) == [f"row {number}" for number in range(5)]


def test_succeeded_items_are_not_pending_again(output: str) -> None:
    record(output, [row_of(0), row_of(3)])
    planned = plan(output, range(5))
    assert pending(planned, output) == ["row 1", "row 2", "row 4"]
    assert (planned.num_succeeded_before, planned.num_pending) == (2, 3)


def test_failed_items_stay_failed_until_asked(output: str) -> None:
    record(output, [failed(0, "timeout"), failed(1, "image_not_found")])
    assert plan(output, range(3)).num_failed_before == 2
    assert pending(plan(output, range(3)), output) == ["row 2"]
    assert pending(plan(output, range(3), retry=("timeout",)), output) == ["row 0", "row 2"]
    assert pending(plan(output, range(3), retry=("failed",)), output) == ["row 0", "row 1", "row 2"]
    assert pending(plan(output, range(3), retry=("out_of_memory",)), output) == ["row 2"]


def test_success_wins_over_a_later_failure_and_the_newest_failure_over_older_ones(output: str) -> None:
    record(output, [failed(0, "timeout", finished_at=BEGIN + timedelta(days=1)), failed(1, "timeout")])
    record(output, [row_of(0), failed(1, "bad_image", finished_at=BEGIN + timedelta(days=1))])
    plan(output, range(2))
    assert results(output) == {"row 0": "succeeded", "row 1": "failed"}
    assert ledger.read_results(output)["error_code"].to_pylist() == [None, "bad_image"]


@pytest.mark.parametrize("hours", [-2, 2])
@pytest.mark.parametrize("compacted", [False, True])
def test_the_failure_that_was_recorded_last_wins_whatever_the_workers_clocks_say(
    output: str, hours: int, *, compacted: bool
) -> None:
    now = datetime.now(UTC)
    record(output, [failed(0, "timeout", finished_at=now + timedelta(hours=hours))])
    record(output, [failed(0, "bad_image", finished_at=now)])
    record(output, [failed(0, "out_of_memory", finished_at=now - timedelta(hours=hours))])
    plan(output, range(1))
    if compacted:
        with Ledger.open(output) as opened:
            opened.compact()
    results(output)
    assert ledger.read_results(output)["error_code"].to_pylist() == ["out_of_memory"]
    assert ledger.read_results(output).column_names == ledger.RESULTS_SCHEMA.names


def test_a_new_failure_wins_over_one_of_an_earlier_version_whose_worker_was_ahead(output: str) -> None:
    write_part(output, ledger.to_table([failed(0, "timeout", finished_at=datetime.now(UTC) + timedelta(hours=2))]))
    record(output, [failed(0, "bad_image", finished_at=datetime.now(UTC))])
    plan(output, range(1))
    results(output)
    assert ledger.read_results(output)["error_code"].to_pylist() == ["bad_image"]


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_worker_whose_clock_is_wrong_does_not_spoil_the_seconds_of_the_report(output: str, hours: int) -> None:
    begun = new_run(manifest="m", model="demo", now=datetime.now(UTC) - timedelta(seconds=60))
    with Ledger.open(output) as opened:
        planned = opened.plan([items_of(range(1))], run=begun)
        wrong = datetime.now(UTC) + timedelta(hours=hours)
        opened.append([row_of(0, run_id=planned.run.run_id, finished_at=wrong)])
        found = ledger.summary(opened)
    assert found.run_s is not None
    assert 59 < found.run_s < 600


def test_changed_params_are_new_items_and_old_results_stay(output: str) -> None:
    record(output, [row_of(0)])
    record(output, [row_of(0, work_key=key_of(0, "other seed"))])
    assert len(Ledger.open(output).index.winners) == 2


def test_rejected_items_become_failed_rows_once(output: str) -> None:
    planned = plan(output, range(4), rejected=[1, 2])
    assert (planned.num_rejected, planned.num_pending) == (2, 2)
    again = plan(output, range(4), rejected=[1, 2], retry=("failed",))
    assert (again.num_rejected, again.num_pending) == (2, 2)
    assert results(output) == {"row 1": "failed", "row 2": "failed"}
    assert sum(pq.read_metadata(part).num_rows for part in parts(output)) == 2
    row = ledger.from_table(ledger.read_results(output))[0]
    assert (row.error_code, row.error_message) == ("bad_parameter", "motion_scale must be 0 to 8")
    assert (row.seed, row.image_uri, row.retryable, row.model) == (MAX_SEED - 1, "pictures/1.png", False, "demo")


def test_counts_of_a_plan_add_up(output: str) -> None:
    record(output, [row_of(0), failed(1), failed(2, "timeout")])
    planned = plan(output, range(8), rejected=[6, 7], retry=("timeout",))
    parts_of_it = (planned.num_succeeded_before, planned.num_failed_before, planned.num_rejected, planned.num_pending)
    assert parts_of_it == (1, 1, 2, 4)
    assert sum(parts_of_it) == planned.num_items


def test_a_manifest_that_turns_out_bad_at_its_end_leaves_nothing(output: str) -> None:
    def tables() -> Iterator[pa.Table]:
        yield items_of(range(60_000), rejected=[3])
        raise LedgerError("duplicate ids")

    with Ledger.open(output) as opened, pytest.raises(LedgerError):
        opened.plan(tables(), run=new_run(manifest="m.csv", model="demo"))
    assert list(storage.list_objects(output)) == []


def test_a_long_manifest_is_written_in_files_of_bounded_size(output: str) -> None:
    with Ledger.open(output) as opened:
        tables = (items_of(range(begin, begin + 30_000)) for begin in range(0, 120_000, 30_000))
        planned = opened.plan(tables, run=new_run(manifest="m.csv", model="demo"))
    files = [len(table) for table in ledger.read_items(output, planned.run.run_id)]
    assert files == [50_000, 50_000, 20_000]
    ids = [row for table in ledger.read_items(output, planned.run.run_id) for row in table["id"].to_pylist()]
    assert ids == [f"row {number}" for number in range(120_000)]


def test_items_of_old_runs_are_dropped_but_for_a_few(output: str) -> None:
    planned = [plan(output, range(2)) for _ in range(runs.KEPT_ITEMS + 2)]
    kept = {uri.uri.split("/")[-3] for uri in storage.list_objects(layout.runs_uri(output), suffix=".parquet")}
    assert kept == {each.run.run_id for each in planned[-runs.KEPT_ITEMS :]}
    latest = ledger.latest_run(output)
    assert latest is not None
    assert latest.run_id == planned[-1].run.run_id


def test_a_driver_whose_clock_is_behind_keeps_its_items_and_counts_as_the_latest(output: str) -> None:
    for _ in range(25):
        plan(output, range(2))
    with Ledger.open(output) as opened:
        run = dataclasses.replace(
            new_run(manifest="m", model="demo"), run_id="20000101T000000-00", started_at=BEGIN - timedelta(days=9999)
        )
        planned = opened.plan([items_of([1])], run=run)
    assert pending(planned, output) == ["row 1"]
    latest = ledger.latest_run(output)
    assert latest is not None
    assert latest.run_id == run.run_id


def test_keys_that_share_their_first_half_are_told_apart() -> None:
    high = np.array([1, 5, 5, 5, 9], np.uint64)
    low = np.array([0, 1, 2, 7, 3], np.uint64)
    asked_high = np.array([5, 5, 5, 9, 10, 1, 5], np.uint64)
    asked_low = np.array([7, 1, 3, 3, 3, 1, 8], np.uint64)
    assert find_keys(high, low, high=asked_high, low=asked_low).tolist() == [3, 1, -1, 4, -1, -1, -1]


def test_keys_are_split_also_in_slices_and_chunks_of_a_column() -> None:
    keys = [key_of(number) for number in range(10)]
    column = pa.chunked_array([pa.array(keys[:4]).slice(1), pa.array([], pa.string()), pa.array(keys[4:])])
    high, low = split_keys(column)
    assert [f"{h:016x}{lo:016x}" for h, lo in zip(high.tolist(), low.tolist(), strict=True)] == [
        key[:32] for key in keys[1:]
    ]
    for bad in ("g" * 64, "a" * 63, "A" * 64):
        with pytest.raises(LedgerError):
            split_keys(pa.array([bad]))


# The results table


def test_results_follow_the_manifest_and_carry_its_columns(output: str) -> None:
    sku = pa.array([7, None, 9], pa.int16())
    tags = pa.array([["a"], [], None], pa.list_(pa.string()))
    plan(output, [2, 0, 1], passed={"sku": sku, "tags": tags, "pending": pa.array(["x", "y", "z"])})
    record(output, [row_of(0)])
    record(output, [row_of(1), row_of(2)])
    results(output)
    table = ledger.read_results(output)
    assert table.schema.names == [*ledger.RESULTS_SCHEMA.names, "sku", "tags", "pending"]
    assert table["id"].to_pylist() == ["row 2", "row 0", "row 1"]
    assert (table["sku"].type, table["sku"].to_pylist()) == (pa.int16(), [7, None, 9])
    assert table["tags"].to_pylist() == [["a"], [], None]
    assert table["pending"].to_pylist() == ["x", "y", "z"]
    assert ledger.from_table(table) == [row_of(2), row_of(0), row_of(1)]


def test_unfinished_items_are_left_out_of_results_until_they_end(output: str) -> None:
    plan(output, range(3), passed={"sku": pa.array([0, 1, 2])})
    record(output, [row_of(2)])
    assert list(results(output)) == ["row 2"]
    assert ledger.read_results(output)["sku"].to_pylist() == [2]
    record(output, [row_of(0), row_of(1)])
    assert list(results(output)) == ["row 0", "row 1", "row 2"]


def test_results_hold_the_latest_manifest_only(output: str) -> None:
    record(output, [row_of(number) for number in range(5)])
    plan(output, range(5))
    plan(output, [4, 1])
    assert list(results(output)) == ["row 4", "row 1"]


def test_results_before_any_row_are_an_empty_table_with_all_columns(output: str) -> None:
    plan(output, range(2), passed={"sku": pa.array([0, 1])})
    assert results(output) == {}
    assert ledger.read_results(output).schema.names == [*ledger.RESULTS_SCHEMA.names, "sku"]


@pytest.mark.heavy
def test_rows_that_finished_in_any_order_come_out_in_manifest_order(output: str) -> None:
    count = 120_000
    with Ledger.open(output) as opened:
        tables = [
            items_of(range(begin, begin + 40_000)).append_column("place", pa.array(range(begin, begin + 40_000)))
            for begin in range(0, count, 40_000)
        ]
        opened.plan(tables, run=new_run(manifest="m.csv", model="demo"))
    shuffled = np.random.default_rng(0).permutation(count)[: count - 10]
    template = ledger.to_table([row_of(0)])
    for numbers in np.array_split(shuffled, 15):
        table = template.take(pa.array(np.zeros(len(numbers), np.int64)))
        for name, values in (("work_key", [key_of(n) for n in numbers]), ("id", [f"row {n}" for n in numbers])):
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(values))
        write_part(output, table)
    with Ledger.open(output) as opened:
        assert opened.write_results() == count - 10
    table = ledger.read_results(output)
    assert table["id"].to_pylist() == [f"row {n}" for n in sorted(shuffled.tolist())]
    assert table["place"].to_pylist() == sorted(shuffled.tolist())


# Parts, damage, compaction


def test_rows_are_written_in_parts_of_64_and_the_rest_at_the_end(output: str) -> None:
    with Ledger.open(output) as opened:
        opened.append(row_of(number) for number in range(64))
        assert [pq.read_metadata(part).num_rows for part in parts(output)] == [64]
        opened.append([row_of(64)])
        assert len(parts(output)) == 1
    assert sum(pq.read_metadata(part).num_rows for part in parts(output)) == 65


def test_a_long_run_leaves_few_parts(output: str) -> None:
    with Ledger.open(output) as opened:
        for begin in range(0, 10_000, 64):
            opened.append(row_of(number) for number in range(begin, begin + 64))
    assert len(parts(output)) < 32
    index = Ledger.open(output).index
    assert len(index.winners) == 10_048
    assert sum(index.part_sizes) == 10_048


def flip_a_bit(part: Path, column: str) -> None:
    """Damages the values of one column, leaving the file's structure as it is."""
    chunk = pq.read_metadata(part).row_group(0).column(ledger.RESULTS_SCHEMA.names.index(column))
    content = bytearray(part.read_bytes())
    content[chunk.dictionary_page_offset + chunk.total_compressed_size // 2] ^= 1
    part.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "bit flip", "other columns"])
def test_a_damaged_part_is_named_moved_aside_and_its_rows_are_redone(
    output: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    record(output, [row_of(number) for number in range(10)])
    (part,) = parts(output)
    record(output, [row_of(10)])
    if damage == "bit flip":
        flip_a_bit(part, "work_key")
    elif damage == "other columns":
        pq.write_table(pa.table({"x": [1]}), part)
    else:
        part.write_bytes({"truncated": part.read_bytes()[:100], "empty": b"", "garbage": b"x" * 500}[damage])
    with caplog.at_level(logging.WARNING):
        planned = plan(output, range(11))
    assert part.name in caplog.text
    assert planned.num_pending == 10
    assert not part.exists()
    assert (Path(output) / "_ledger" / "quarantine" / part.name).exists()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        Ledger.open(output)
    assert not caplog.records


def test_damage_in_a_column_that_planning_does_not_read_is_found_when_results_are_written(output: str) -> None:
    record(output, [row_of(number) for number in range(10)])
    (part,) = parts(output)
    record(output, [row_of(10)])
    plan(output, range(11))
    flip_a_bit(part, "animate_s")
    assert list(results(output)) == ["row 10"]
    assert plan(output, range(11)).num_pending == 10


def test_compaction_moves_a_part_with_a_damaged_column_aside(output: str) -> None:
    record(output, [row_of(number) for number in range(10)])
    (part,) = parts(output)
    record(output, [row_of(10)])
    flip_a_bit(part, "animate_s")
    with Ledger.open(output) as opened:
        opened.compact()
    assert (Path(output) / "_ledger" / "quarantine" / part.name).exists()
    assert plan(output, range(11)).num_pending == 10


def test_compaction_keeps_every_winner_and_drops_the_rest(output: str) -> None:
    for number in range(20):
        record(output, [row_of(number), failed(number + 1, finished_at=BEGIN)])
    plan(output, range(21))
    before = results(output)
    with Ledger.open(output) as opened:
        assert opened.compact() == (20, 1)
        assert opened.write_results() == 21
    assert results(output) == before
    assert sum(pq.read_metadata(part).num_rows for part in parts(output)) == 21
    with Ledger.open(output) as opened:
        assert opened.compact() == (1, 1)


def test_a_crash_between_write_and_drop_of_a_compaction_changes_nothing(output: str) -> None:
    for number in range(5):
        record(output, [row_of(number), failed(9)])
    plan(output, range(10))
    before = results(output)
    kept = {part: part.read_bytes() for part in parts(output)}
    with Ledger.open(output) as opened:
        opened.compact()
    for part, content in kept.items():  # as if the process had died before it dropped them
        part.write_bytes(content)
    assert len(parts(output)) == 6
    assert results(output) == before
    assert plan(output, range(10)).num_pending == 4
    with Ledger.open(output) as opened:
        assert opened.compact() == (6, 1)
    assert results(output) == before


def test_results_are_right_though_another_process_compacts_meanwhile(output: str) -> None:
    plan(output, range(6))
    for number in range(3):
        record(output, [row_of(number)])
    with Ledger.open(output) as opened:
        with Ledger.open(output) as other:
            other.compact()
        opened.append([row_of(3)])
        assert opened.write_results() == 4


def test_rows_that_something_deletes_meanwhile_are_told_at_the_end_with_their_number(output: str) -> None:
    run = plan(output, range(6)).run
    record(output, [row_of(0), row_of(1)])
    with Ledger.open(output) as opened:
        opened.check_kept()
        parts(output)[0].unlink()
        opened.append([row_of(2)])
        assert opened.write_results() == 1
        opened.finish(run)
        with pytest.raises(OutputError, match=r"2 rows that had ended are no longer in .*/out"):
            opened.check_kept()


def test_parts_and_results_of_a_version_that_had_no_flags_are_read(output: str) -> None:
    write_part(output, ledger.to_table([row_of(0), failed(1)]).drop_columns("flags"))
    with Ledger.open(output) as opened:
        opened.append([row_of(2, flags="frozen")])
        opened.flush()
        run = new_run(manifest="m", model="demo")
        planned = opened.plan([items_of(range(4))], run=run)
        assert (planned.num_succeeded_before, planned.num_failed_before, planned.num_pending) == (2, 1, 1)
        assert ledger.summary(opened).flags == {"frozen": 1}
        opened.finish(run)
        before = ledger.read_results(output)
        assert before.column_names == ledger.RESULTS_SCHEMA.names
        assert before["flags"].to_pylist() == [None, None, "frozen"]
        assert opened.compact() == (2, 1)
        opened.write_results()
    assert ledger.read_results(output).equals(before)
    assert ledger.verify(output).num_succeeded == 2

    pq.write_table(before.drop_columns("flags"), Path(output) / "results.parquet")
    rows = ledger.from_table(ledger.read_results(output))
    assert rows[0] == row_of(0)
    assert ledger.read_results(output).column_names == ledger.RESULTS_SCHEMA.names
    assert ledger.from_record({name: value for name, value in vars(rows[0]).items() if name != "flags"}) == rows[0]


def test_two_writers_on_one_output_lose_nothing(output: str) -> None:
    script = """
import sys
sys.path.insert(0, sys.argv[3])
from tests.ledger.test_ledger import row_of
from pia_ray.ledger import Ledger
begin = int(sys.argv[2])
with Ledger.open(sys.argv[1]) as opened:
    for number in range(begin, begin + 300):
        opened.append([row_of(number)])
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", script, output, str(begin), str(Path(__file__).parents[2])])
        for begin in (0, 150)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    plan(output, range(450))
    assert list(results(output)) == [f"row {number}" for number in range(450)]


DRIVERS = """
import os, sys
sys.path.insert(0, sys.argv[2])
from tests.ledger.test_ledger import items_of, row_of
from pia_ray.ledger import Ledger, new_run, read_items
for _ in sys.stdin:
    if driver := os.fork():
        print("ended", os.waitpid(driver, 0)[1], flush=True)
        continue
    print("begun", os.getpid(), flush=True)
    with Ledger.open(sys.argv[1]) as opened:
        planned = opened.plan([items_of(range(3000))], run=new_run(manifest="m", model="demo"))
        print("left", planned.num_pending, flush=True)
        for items in read_items(sys.argv[1], planned.run.run_id):
            for number, pending in enumerate(items["pending"].to_pylist()):
                if pending:
                    opened.append([row_of(number)])
                    if number % 500 == 499:
                        opened.compact()
                    if number % 64 == 63:
                        print("done", number, flush=True)
        opened.finish(planned.run)
    os._exit(0)
"""
"""A process that begins a driver for each line that it reads. Forked ones import nothing again."""


def drive(drivers: subprocess.Popen[str], *, kill_after: int = 0) -> list[list[str]]:
    """The words of the lines of a new driver, the last of which has its exit status. It is killed after so many."""
    assert drivers.stdin is not None and drivers.stdout is not None
    drivers.stdin.write("\n")
    drivers.stdin.flush()
    lines: list[list[str]] = []
    while not lines or lines[-1][0] != "ended":
        lines.append(drivers.stdout.readline().split())
        if len(lines) == kill_after:
            os.kill(int(lines[0][1]), signal.SIGKILL)
    return lines


@pytest.mark.heavy
def test_a_driver_killed_anywhere_loses_no_written_row(output: str) -> None:
    command = [sys.executable, "-c", DRIVERS, output, str(Path(__file__).parents[2])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as drivers:
        for kill_after in range(2, 11):  # in all before the last row
            lines = drive(drivers, kill_after=kill_after)
            assert lines[-1] == ["ended", str(int(signal.SIGKILL))]
            done = [int(number) for kind, number in lines if kind == "done"]
            index = Ledger.open(output).index
            written = range(max(done, default=-1) // 64 * 64)
            assert (index.find(*split_keys(pa.array([key_of(number) for number in written], pa.string()))) >= 0).all()
            assert not index.damaged
        assert drive(drivers)[-1] == ["ended", "0"]
        assert list(results(output)) == [f"row {number}" for number in range(3000)]
        assert drive(drivers)[1:] == [["left", "0"], ["ended", "0"]]


def test_rows_wait_in_memory_while_the_store_does_not_answer(output: str) -> None:
    folder = Path(output) / "_ledger" / "parts"
    folder.parent.mkdir(parents=True)
    with Ledger.open(output) as opened:
        folder.write_text("in the way")  # a file where the folder should be: no part can be written
        with pytest.raises(OutputError):
            opened.append(row_of(number) for number in range(64))
        folder.unlink()
        opened.flush()
    assert len(Ledger.open(output).index.winners) == 64


# Attempts


def test_an_attempt_that_ends_leaves_no_record(output: str) -> None:
    assert not ledger.earlier_attempts(output, key_of(1))
    record_ = ledger.begin_attempt(output, key_of(1), worker="a")
    ledger.remove_attempts((record_,))
    assert ledger.count_attempts(output) == {}


def test_a_row_whose_worker_died_knows_how_often(output: str) -> None:
    ledger.begin_attempt(output, key_of(1), worker="a", run_id="r", node="n", alone=True)
    ledger.set_attempt_state(ledger.begin_attempt(output, key_of(1), worker="b"), "died")
    ledger.begin_attempt(output, key_of(2), worker="b")
    assert ledger.count_attempts(output) == {key_of(1): 2, key_of(2): 1}
    found = sorted(ledger.earlier_attempts(output, key_of(1)), key=lambda record: record.worker)
    assert [(record.worker, record.run_id, record.node, record.alone, record.counts) for record in found] == [
        ("a", "r", "n", True, False),
        ("b", "", "", False, True),
    ]
    ledger.remove_attempts(found)
    assert ledger.count_attempts(output) == {key_of(2): 1}


def test_the_end_of_a_run_leaves_the_deaths_that_somebody_saw(output: str) -> None:
    ledger.begin_attempt(output, key_of(1), worker="a", run_id="r", state="died")
    ledger.begin_attempt(output, key_of(1), worker="b", run_id="r", state="animating")
    ledger.begin_attempt(output, key_of(2), worker="b", run_id="other", state="animating")
    ledger.remove_attempts_of_run(output, "r")
    assert ledger.count_attempts(output) == {key_of(1): 1, key_of(2): 1}
    assert [record.counts for record in ledger.earlier_attempts(output, key_of(1))] == [True]


def test_only_a_row_without_records_gets_a_first_one(output: str) -> None:
    first = ledger.begin_first_attempt(output, key_of(1), worker="a")
    assert first is not None
    assert ledger.begin_first_attempt(output, key_of(1), worker="b") is None
    assert ledger.earlier_attempts(output, key_of(1)) == (first,)
    ledger.remove_attempts((first,))
    assert ledger.begin_first_attempt(output, key_of(1), worker="b") is not None


def test_a_row_that_is_charged_with_a_later_death_keeps_its_first_record_at_the_end_of_the_run(output: str) -> None:
    assert ledger.begin_first_attempt(output, key_of(1), worker="a", run_id="r") is not None
    ledger.begin_attempt(output, key_of(1), worker="b", run_id="r", state="died")
    ledger.remove_attempts_of_run(output, "r")
    assert ledger.begin_first_attempt(output, key_of(1), worker="c") is None
    assert [record.counts for record in ledger.earlier_attempts(output, key_of(1))].count(True) == 1


def test_planning_lets_a_death_of_an_earlier_version_be_found(output: str) -> None:
    left = ledger.begin_attempt(output, key_of(1), worker="a", state="died")
    storage.move(left.uri, left.uri.replace(".first.", ".0123456789abcdef0123456789abcdef."))
    plan(output, range(3))
    assert ledger.begin_first_attempt(output, key_of(1), worker="b") is None
    assert [record.counts for record in ledger.earlier_attempts(output, key_of(1))].count(True) == 1


def test_a_record_of_an_earlier_version_counts_against_no_row(output: str) -> None:
    uri = ledger.begin_attempt(output, key_of(1), worker="a").uri
    for content in (b'{"work_key": "k", "worker": "a"}', b"[]", b"torn"):
        storage.write_bytes(uri, content, content_type="application/json")
        assert [record.counts for record in ledger.earlier_attempts(output, key_of(1))] == [False]


def test_planning_removes_the_attempts_of_rows_that_have_their_result(output: str) -> None:
    for number in range(3):
        ledger.begin_attempt(output, key_of(number), worker="a")
    record(output, [row_of(0), failed(1, "worker_died")])
    plan(output, range(3), retry=("failed",))
    assert ledger.count_attempts(output) == {key_of(2): 1}


# Upkeep


def commit(output: str, number: int, *, level: ProvenanceLevel = "full") -> ResultRow:
    """A real video with its provenance at its place, and its thumbnails."""
    row = row_of(number, output=output)
    frames = np.full((4, 48, 64, 3), 40 * number % 255, np.uint8)
    video = encode(frames, fps=8, format="mp4", provenance=at_level(ledger.provenance(row), level))
    storage.create_bytes(str(row.video_uri), video.content)
    storage.write_bytes(str(row.thumbnail_uri), b"x")
    storage.write_bytes(str(row.input_thumbnail_uri), b"x")
    return dataclasses.replace(row, size_bytes=video.size_bytes, sha256=video.sha256)


def test_verify_of_a_whole_output_finds_nothing(output: str) -> None:
    record(output, [*(commit(output, number) for number in range(3)), failed(9)])
    found = ledger.verify(output)
    assert found.ok
    assert (found.num_succeeded, found.num_failed) == (3, 1)
    assert (found.num_orphans, found.num_missing_thumbnails) == (0, 0)


def test_verify_names_what_is_missing_cut_off_without_a_row_or_damaged(output: str) -> None:
    rows = [commit(output, number) for number in range(4)]
    record(output, rows[:3])
    storage.delete(str(rows[0].video_uri))
    storage.write_bytes(str(rows[1].video_uri), b"short")
    storage.delete(str(rows[2].thumbnail_uri))
    (Path(output) / "_ledger" / "parts" / "bad.parquet").write_bytes(b"")
    found = ledger.verify(output)
    assert not found.ok
    assert found.missing == [rows[0].video_uri]
    assert found.wrong_size == [rows[1].video_uri]
    assert found.num_missing_thumbnails == 1
    assert found.orphans == [rows[3].video_uri]
    assert [uri.rpartition("/")[2] for uri in found.damaged_parts] == ["bad.parquet"]


def rot(path: str) -> None:
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)


def test_a_deep_verify_names_videos_of_the_right_size_with_other_bytes(output: str) -> None:
    rows = [commit(output, number) for number in range(3)]
    record(output, rows)
    rot(str(rows[1].video_uri))
    assert ledger.verify(output).ok, "the quick way compares sizes"
    told: list[tuple[int, int]] = []
    found = ledger.verify(output, deep=True, observe=lambda done, total: told.append((done, total)))
    assert (found.ok, found.damaged) == (False, [rows[1].video_uri])
    assert told[-1] == (3, 3)


def test_on_s3_a_quick_verify_compares_the_checksums_of_the_store(s3: str) -> None:
    output = f"{s3}/out"
    rows = [commit(output, number) for number in range(2)]
    record(output, rows)
    assert ledger.verify(output).ok
    content = storage.read_bytes(str(rows[0].video_uri))
    storage.write_bytes(str(rows[0].video_uri), bytes(len(content)))
    assert ledger.verify(output).damaged == [rows[0].video_uri]


def remade(output: str, numbers: Iterable[int], remake: tuple[str, ...]) -> list[str]:
    with Ledger.open(output) as opened:
        planned = opened.plan([items_of(numbers)], run=new_run(manifest="m", model="demo"), remake=remake)
    return pending(planned, output)


def test_missing_and_damaged_videos_are_pending_again_where_asked_for(output: str) -> None:
    rows = [commit(output, number) for number in range(5)]
    record(output, [failed(0), failed(1), *rows])
    record(output, rows[:1])  # the same row twice, as a crash in a compaction leaves it
    storage.delete(str(rows[0].video_uri))
    rot(str(rows[1].video_uri))
    storage.write_bytes(str(rows[2].video_uri), b"short")
    storage.delete(str(rows[4].video_uri))
    assert remade(output, range(4), ()) == []
    assert remade(output, range(4), ("missing",)) == ["row 0"]
    assert remade(output, range(4), ("damaged",)) == ["row 0", "row 1", "row 2"]
    assert results(output) == {"row 3": "succeeded"}
    assert not storage.exists(str(rows[1].video_uri))
    assert len(list(storage.list_objects(f"{output}/_ledger/quarantine"))) == 2
    assert ledger.verify(output).missing == [rows[4].video_uri], "the row is of no item of the manifest"


def test_rebuild_counts_the_videos_that_tell_too_little_to_restore_their_rows(output: str) -> None:
    restored = commit(output, 0)
    commit(output, 1, level="public")
    commit(output, 2, level="none")
    rebuilt = ledger.rebuild(output)
    counts = (rebuilt.num_videos, rebuilt.num_restored, rebuilt.num_reduced, rebuilt.num_foreign)
    assert counts == (3, 1, 2, 0)
    assert ledger.read_results(output)["id"].to_pylist() == [restored.id]


def test_on_s3_a_damaged_video_is_moved_aside_and_pending_again(s3: str) -> None:
    output = f"{s3}/out"
    rows = [commit(output, number) for number in range(2)]
    record(output, rows)
    storage.write_bytes(str(rows[0].video_uri), bytes(int(rows[0].size_bytes or 0)))
    assert remade(output, range(2), ("damaged",)) == ["row 0"]
    assert [found.uri.rpartition("/")[2] for found in storage.list_objects(f"{output}/_ledger/quarantine")] == [
        str(rows[0].video_uri).rpartition("/")[2]
    ]


def test_rebuild_restores_the_rows_from_the_videos_alone(output: str) -> None:
    rows = [commit(output, number) for number in range(3)]
    storage.delete(str(rows[2].thumbnail_uri))
    storage.write_bytes(f"{output}/videos/aa/holiday.mp4", b"not ours")
    rebuilt = ledger.rebuild(output)
    assert (rebuilt.num_videos, rebuilt.num_restored, rebuilt.num_foreign) == (4, 3, 1)
    found = {row.id: row for row in ledger.from_table(ledger.read_results(output))}
    expected = [dataclasses.replace(row, publish_s=None) for row in rows]
    expected[2] = dataclasses.replace(expected[2], thumbnail_uri=None)
    assert [found[row.id] for row in rows] == expected
    assert ledger.rebuild(output).num_restored == 0


def test_rebuild_rejoins_the_columns_of_the_manifest(output: str) -> None:
    plan(output, range(3), passed={"sku": pa.array(["a", "b", "c"])})
    record(output, [commit(output, number) for number in range(2)])
    for part in parts(output):
        part.unlink()
    assert ledger.rebuild(output).num_results == 2
    assert ledger.read_results(output)["sku"].to_pylist() == ["a", "b"]


def test_a_summary_counts_the_latest_manifest(output: str) -> None:
    record(output, [row_of(50)])
    begun = new_run(manifest="m", model="demo", now=datetime.now(UTC) - timedelta(seconds=60))
    with Ledger.open(output) as opened:
        planned = opened.plan([items_of(range(12), rejected=[11])], run=begun)
    with Ledger.open(output) as opened:
        later = planned.run.started_at
        opened.append(
            row_of(n, run_id=planned.run.run_id, finished_at=later + timedelta(seconds=6 * (n + 1))) for n in range(5)
        )
        opened.append([failed(5, "timeout", retryable=True), failed(6, "timeout", retryable=True), failed(7)])
        found = ledger.summary(opened)
    assert (found.num_items, found.num_succeeded, found.num_failed, found.num_left) == (12, 5, 4, 3)
    assert next(iter(found.errors.items())) == ("timeout", 2)
    assert found.errors == {"timeout": 2, "image_not_found": 1, "bad_parameter": 1}
    assert found.num_retryable == 2
    assert found.run_s == pytest.approx(30)
    assert found.videos_per_minute == pytest.approx(10)
    assert found.gpu_s == pytest.approx(2.5)
    assert found.size_bytes == 20
    assert found.percentiles_s["animate_s"][50] == 2.0


def test_a_summary_of_nothing_is_all_zero(output: str) -> None:
    found = ledger.summary(Ledger.open(output))
    assert (found.num_items, found.num_succeeded, found.videos_per_minute) == (0, 0, None)


def test_a_finished_run_is_on_record(output: str) -> None:
    with Ledger.open(output) as opened:
        run = new_run(manifest="m.csv", model="demo", config={"limit": 3, "actors": [1, 2]})
        planned = opened.plan([items_of(range(2))], run=run)
        opened.append([row_of(0), row_of(1)])
        opened.finish(planned.run)
    latest = ledger.latest_run(output)
    assert latest is not None
    assert latest.finished_at is not None
    assert latest.config == {"limit": 3, "actors": [1, 2]}
    assert latest.counts["num_pending"] == 2
    assert len(ledger.read_results(output)) == 2


# On S3


def test_on_s3_a_run_is_planned_recorded_repeated_and_compacted(s3: str) -> None:
    output = f"{s3}/some/output"
    storage.probe(output)
    with Lease(output, run_id="one") as lease, pytest.raises(LeaseHeld), Lease(output, run_id="two"):
        pass
    assert not lease.held
    assert plan(output, range(70), passed={"sku": pa.array(range(70))}).num_pending == 70
    record(output, [*(row_of(number) for number in range(64)), failed(64)])
    again = plan(output, range(70), rejected=[65], passed={"sku": pa.array(range(70))}, retry=("failed",))
    assert (again.num_succeeded_before, again.num_pending, again.num_rejected) == (64, 5, 1)
    before = results(output)
    assert len(before) == 66
    with Ledger.open(output) as opened:
        assert opened.compact()[1] == 1
        assert ledger.summary(opened).num_left == 4
    assert results(output) == before
    assert ledger.read_results(output)["sku"].to_pylist() == list(range(66))
    ledger.begin_attempt(output, key_of(1), worker="a")
    assert len(ledger.earlier_attempts(output, key_of(1))) == 1
    row = commit(output, 1)
    record(output, [row])
    assert ledger.verify(output).num_missing == 63
    assert ledger.rebuild(output).num_restored == 0


def test_on_s3_a_part_with_other_bytes_than_its_checksum_is_moved_aside(s3: str, s3_server: S3Server) -> None:
    record(f"{s3}/out", [row_of(0)])
    (part,) = storage.list_objects(f"{s3}/out/_ledger/parts")
    whole, key = hashlib.sha256(storage.read_bytes(part.uri)).digest(), part.uri.removeprefix(f"{s3}/")
    checksum = base64.b64encode(whole).decode()
    s3_server.client().put_object(
        Bucket=s3[5:], Key=key, Body=b"x", ChecksumAlgorithm="SHA256", ChecksumSHA256=checksum
    )
    assert plan(f"{s3}/out", range(1)).num_pending == 1
    assert not storage.exists(part.uri)
    assert len(list(storage.list_objects(f"{s3}/out/_ledger/quarantine"))) == 1


def test_on_s3_a_damaged_part_is_moved_aside(s3: str) -> None:
    record(s3, [row_of(0)])
    record(s3, [row_of(1)])
    first = next(storage.list_objects(layout.parts_uri(s3)))
    storage.write_bytes(first.uri, b"")
    assert plan(s3, range(2)).num_pending == 1
    assert storage.exists(layout.quarantine_uri(s3, first.uri))
    assert not storage.exists(first.uri)


@pytest.mark.heavy
def test_rows_survive_a_store_that_fails_cuts_and_loses_answers(chaos: ChaosProxy) -> None:
    faults = [503, LOSE_ANSWER, "", CUT_BODY, RESET, "", 500, "", ""]
    chaos.faults.extend(faults * 30)
    plan(chaos.bucket, range(200))
    for begin in range(0, 200, 20):
        record(chaos.bucket, [row_of(number) for number in range(begin, begin + 20)])
    assert list(results(chaos.bucket)) == [f"row {number}" for number in range(200)]
    assert plan(chaos.bucket, range(200)).num_pending == 0
    index = Ledger.open(chaos.bucket).index
    assert not index.damaged
