"""The requests that a row makes to a store, and the order in which what it writes appears."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pia_ray import ledger, manifest, storage, weights
from pia_ray.catalog.worker import CatalogWorker
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.testing import FakeAnimator, put_catalog
from pia_ray.types import ManifestRow
from tests.chaos_proxy import ChaosProxy, chaos
from tests.models import DEMO
from tests.s3_server import s3, s3_server

__all__ = ["chaos", "s3", "s3_server"]

ROWS = 4


def rows_in(bucket: str, **settings: Any) -> tuple[CatalogConfig, list[ManifestRow]]:
    """A config whose pictures and output are in the bucket, and its rows."""
    uri = put_catalog(f"{bucket}/in", rows=ROWS)
    values = {"manifest": uri, "output": f"{bucket}/out", "model": DEMO, "batch_size": 1, **settings}
    config = build(CatalogConfig, values)
    tables = manifest.plan(manifest.open_manifest(config), config, model_version=weights.version(config.model))
    return config, [manifest.row_from_item(item) for table in tables for item in table.to_pylist()]


def test_a_row_makes_six_requests_to_its_output_and_one_for_its_picture(s3: str) -> None:
    config, rows = rows_in(s3)
    before = Counter(storage.usage().requests)
    with FakeAnimator(DEMO) as animator:
        worker = CatalogWorker(config, run_id="r", animator=animator)
        results = [worker.work(row) for row in rows]
        worker.stop()
    assert [result and result.status for result in results] == ["succeeded"] * ROWS
    made = Counter(storage.usage().requests) - before
    removals = made.pop("DeleteObject", 0) + made.pop("DeleteObjects", 0)
    # A look for the video; the attempt record, two thumbnails and the video; the picture.
    assert made == {"HeadObject": ROWS, "PutObject": 4 * ROWS, "GetObject": ROWS}
    assert removals <= ROWS
    assert not ledger.count_attempts(config.output)


def test_a_video_appears_after_its_thumbnails_and_its_attempt_record_goes_last(chaos: ChaosProxy) -> None:
    config, rows = rows_in(chaos.bucket)
    before = len(chaos.requests)
    with FakeAnimator(DEMO) as animator:
        worker = CatalogWorker(config, run_id="r", animator=animator)
        worker.work(rows[0])
        worker.stop()
    changes = [(method, path) for method, path, _ in chaos.requests[before:] if method not in ("GET", "HEAD")]
    kinds = ["attempts", "thumbnails", "thumbnails", "videos", "attempts"]
    assert [next(kind for kind in kinds if f"/{kind}/" in path) for _, path in changes] == kinds
    assert changes[0][1].partition("?")[0] == changes[-1][1].partition("?")[0]


def test_a_thumbnail_that_cannot_be_written_leaves_no_video(chaos: ChaosProxy) -> None:
    config, rows = rows_in(chaos.bucket)
    chaos.matches = lambda method, path: method == "PUT" and "-input.webp" in path
    chaos.faults.append(403)
    with FakeAnimator(DEMO) as animator:
        worker = CatalogWorker(config, run_id="r", animator=animator)
        result = worker.work(rows[0])
        worker.stop()
    assert result is not None
    assert result.error_code == "bad_output"
    assert not list(storage.list_objects(storage.join(config.output, "videos")))
    assert not ledger.count_attempts(config.output)


@pytest.mark.parametrize("fails", [False, True])
def test_a_row_whose_video_is_there_leaves_no_attempt_record(s3: str, fails: bool) -> None:
    config, rows = rows_in(s3)
    with FakeAnimator(DEMO) as animator:
        first, second = (CatalogWorker(config, run_id="r", animator=animator) for _ in range(2))
        made, other = [first.work(row) for row in rows[:2]]
        first.stop()
        assert made is not None and made.video_uri is not None
        assert other is not None and other.video_uri is not None
        if fails:  # another work item's video has that name
            storage.copy(other.video_uri, made.video_uri)
        found = second.work(rows[0])
        second.stop()
    assert found is not None
    assert found.error_code == ("storage_failed" if fails else None)
    assert not ledger.count_attempts(config.output)
