"""Runs without Ray: what goes in comes out once, is recorded, resumed and retried; failures stay with their rows."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import ledger, read_results, storage
from pia_ray.animation import Animation, OnStep
from pia_ray.catalog.local import run_local
from pia_ray.catalog.progress import Progress, RunSummary
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import DeviceLost, JobError, LeaseHeld, ManifestError, OutputError
from pia_ray.media.video import probe
from pia_ray.testing import FakeAnimator, make_catalog
from pia_ray.testing.catalogs import draw_picture
from pia_ray.types import AnimationRequest
from tests.models import DEMO
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures


def configure(manifest: Path, output: Path, **settings: Any) -> CatalogConfig:
    return build(CatalogConfig, {"manifest": str(manifest), "output": str(output), "model": DEMO, **settings})


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A manifest of these rows; each picture that is named is drawn."""
    for number, row in enumerate(rows):
        name = row.get("image")
        if isinstance(name, str) and name.endswith(".png"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(draw_picture((64, 48), seed=number))
    path = folder / "manifest.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def go(config: CatalogConfig, **how: Any) -> RunSummary:
    with FakeAnimator(DEMO, batch_size=4, **how) as animator:
        return run_local(config, animator=animator)


def rows_of(config: CatalogConfig) -> list[dict[str, Any]]:
    return read_results(config.output).to_pylist()


def by_id(config: CatalogConfig) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in rows_of(config)}


def videos_of(config: CatalogConfig) -> list[str]:
    return [found.uri for found in storage.list_objects(storage.join(config.output, "videos"))]


class CountingAnimator(FakeAnimator):
    """Counts what it is asked to animate."""

    def __init__(self, **how: Any) -> None:
        super().__init__(DEMO, batch_size=4, **how)
        self.asked: Counter[str] = Counter()

    def submit(
        self, request: AnimationRequest, *, alone: bool = False, on_step: OnStep | None = None, **how: Any
    ) -> Future[Animation]:
        self.asked[request.id] += 1
        return super().submit(request, alone=alone, on_step=on_step, **how)


def test_every_work_item_gives_one_result_row_in_manifest_order_with_its_columns(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=12, broken=0.25), tmp_path / "out")
    summary = go(config)
    rows = rows_of(config)
    assert [row["id"] for row in rows] == [f"item-{n:06d}" for n in range(12)]
    assert len({row["work_key"] for row in rows}) == 12
    assert Counter(row["status"] for row in rows) == {"succeeded": 9, "failed": 3}
    assert [row["sku"] for row in rows] == [f"SKU{n:05d}" for n in range(12)]
    assert summary.exit_code == 1
    assert summary.progress.num_succeeded == 9


def test_a_result_row_says_what_was_made_from_what_and_the_video_agrees(tmp_path: Path) -> None:
    rows = [{"id": "a", "image": "a.png", "prompt": "pan left", "motion_scale": 5, "seed": 2**64 - 1, "price": 3}]
    schema = pa.schema({"id": pa.string(), "image": pa.string(), "prompt": pa.string(), "motion_scale": pa.int64()})
    schema = schema.append(pa.field("seed", pa.uint64())).append(pa.field("price", pa.int16()))
    manifest = write(tmp_path, [{**rows[0], "seed": 0}])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), manifest)
    config = configure(manifest, tmp_path / "out", format="webm")
    assert go(config).exit_code == 0
    table = read_results(config.output)
    (row,) = table.to_pylist()
    assert row["seed"] == 2**64 - 1
    assert table.schema.field("seed").type == pa.uint64()
    assert table.schema.field("price").type == pa.int16()
    assert (row["original_width"], row["original_height"]) == (64, 48)
    assert (row["width"], row["height"]) == (64, 48)
    assert row["input_sha256"] == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    content = Path(row["video_uri"]).read_bytes()
    assert row["sha256"] == hashlib.sha256(content).hexdigest()
    assert row["size_bytes"] == len(content)
    facts = probe(content)
    assert facts.format == "webm"
    assert facts.num_frames == row["num_frames"]
    assert facts.provenance["work_key"] == row["work_key"]
    assert json.loads(row["params"])["motion_scale"] == 5
    assert row["duration_s"] == row["num_frames"] / row["fps"]
    assert Path(row["thumbnail_uri"]).exists()
    assert Path(row["input_thumbnail_uri"]).exists()


def test_a_repeated_run_animates_nothing_and_changes_no_video(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=6), tmp_path / "out")
    go(config)
    before = {uri: Path(uri).stat().st_mtime_ns for uri in videos_of(config)}
    with CountingAnimator() as animator:
        summary = run_local(config, animator=animator)
    assert not animator.asked
    assert summary.exit_code == 0
    assert summary.progress.num_before == 6
    assert {uri: Path(uri).stat().st_mtime_ns for uri in videos_of(config)} == before


def test_only_new_and_changed_rows_of_an_edited_manifest_are_animated(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": f"{n}.png", "prompt": "pan left"} for n in range(4)]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    go(config)
    rows[1]["prompt"] = "pan right"
    write(tmp_path, [*rows[:3], {"id": "new", "image": "3.png", "prompt": "zoom in"}])
    with CountingAnimator() as animator:
        run_local(config, animator=animator)
    assert animator.asked == {"1": 1, "new": 1}
    assert animator.expected_rows == 2, "compilation has to pay in these"
    assert [row["id"] for row in rows_of(config)] == ["0", "1", "2", "new"]
    assert by_id(config)["1"]["prompt"] == "pan right"


def test_failed_rows_stay_failed_until_asked_and_then_only_those_asked_for(tmp_path: Path) -> None:
    rows = [
        {"id": "good", "image": "good.png", "prompt": "sea"},
        {"id": "gone", "image": "gone.jpg", "prompt": "sea"},
        {"id": "oom", "image": "oom.png", "prompt": "oom"},
        {"id": "nan", "image": "nan.png", "prompt": "nan"},
    ]
    config = configure(write(tmp_path, rows), tmp_path / "out", max_attempts=1)
    assert go(config).exit_code == 1
    found = {name: row["error_code"] for name, row in by_id(config).items()}
    assert found == {"good": None, "gone": "image_not_found", "oom": "out_of_memory", "nan": "nan_frames"}
    with CountingAnimator() as animator:
        run_local(config, animator=animator)
        assert not animator.asked
        run_local(config.model_copy(update={"retry": ("nan_frames",)}), animator=animator)
        assert animator.asked == {"nan": 1}
        (tmp_path / "gone.jpg").write_bytes(draw_picture((40, 40), seed=9, extension="jpg"))
        summary = run_local(config.model_copy(update={"retry": ("failed",)}), animator=animator)
    assert animator.asked == {"nan": 2, "oom": 1, "gone": 1}
    assert by_id(config)["gone"]["status"] == "succeeded"
    assert summary.progress.num_before == 1


def test_a_bad_row_fails_by_name_of_row_and_field_and_the_rest_goes_on(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "image": "a.png", "prompt": "sea", "motion_scale": 9, "width": None},
        {"id": "b", "image": "b.png", "prompt": None, "motion_scale": 1, "width": None},
        {"id": "c", "image": "c.png", "prompt": "sea", "motion_scale": 1, "width": 500},
        {"id": "d", "image": "d.png", "prompt": "sea", "motion_scale": 1, "width": 64},
    ]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    summary = go(config)
    found = by_id(config)
    for name, number, field in (("a", 1, "motion_scale"), ("b", 2, "prompt"), ("c", 3, "width")):
        assert found[name]["error_code"] == "bad_parameter"
        assert f"row {number}" in found[name]["error_message"]
        assert field in found[name]["error_message"]
    assert found["d"]["status"] == "succeeded"
    assert summary.progress.num_rejected == 3
    assert summary.exit_code == 1


def test_a_lost_record_of_a_committed_video_is_restored_from_the_video_not_animated_again(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=4), tmp_path / "out")
    go(config)
    before = by_id(config)
    for part in storage.list_objects(storage.join(config.output, "_ledger", "parts")):
        storage.delete(part.uri)
    with CountingAnimator() as animator:
        summary = run_local(config, animator=animator)
    assert not animator.asked
    assert summary.progress.num_succeeded == 4
    unlike = {"publish_s"}
    for name, row in by_id(config).items():
        assert {k: v for k, v in row.items() if k not in unlike} == {
            k: v for k, v in before[name].items() if k not in unlike
        }


def test_a_video_that_does_not_open_is_no_commit_and_is_made_again(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=2), tmp_path / "out")
    go(config)
    victim = Path(rows_of(config)[0]["video_uri"])
    victim.write_bytes(victim.read_bytes()[:300])
    for part in storage.list_objects(storage.join(config.output, "_ledger", "parts")):
        storage.delete(part.uri)
    with CountingAnimator() as animator:
        run_local(config, animator=animator)
    assert animator.asked == {"item-000000": 1}
    assert probe(victim).num_frames > 1


def test_num_videos_gives_as_many_rows_with_seeds_of_their_own(tmp_path: Path) -> None:
    rows = [{"id": "a", "image": "a.png", "prompt": "sea", "seed": 10, "num_videos": 3}]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    go(config)
    assert [(row["video_index"], row["seed"]) for row in rows_of(config)] == [(0, 10), (1, 11), (2, 12)]
    assert len(videos_of(config)) == 3


def test_image_bytes_inside_a_manifest_are_read_from_there(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": draw_picture((48, 48), seed=n), "prompt": "sea"} for n in range(3)]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    assert go(config).exit_code == 0
    for row, made in zip(rows, rows_of(config), strict=True):
        assert made["input_sha256"] == hashlib.sha256(row["image"]).hexdigest()


def test_a_row_over_its_time_limit_fails_as_timeout(tmp_path: Path) -> None:
    rows = [{"id": "h", "image": "h.png", "prompt": "hang"}, {"id": "g", "image": "g.png", "prompt": "sea"}]
    config = configure(write(tmp_path, rows), tmp_path / "out", row_timeout_s=2)
    go(config)
    assert by_id(config)["h"]["error_code"] == "timeout"
    assert by_id(config)["g"]["status"] == "succeeded"


def test_a_run_past_its_deadline_stops_resumably(tmp_path: Path) -> None:
    rows = [{"id": "a", "image": "a.png", "prompt": "sea"}, {"id": "h", "image": "h.png", "prompt": "hang"}]
    config = configure(write(tmp_path, rows), tmp_path / "out", grace_s=0)
    summary = go(config.model_copy(update={"deadline_s": 3.0}))
    assert summary.exit_code == 4
    assert summary.progress.num_left == 1
    assert [row["id"] for row in rows_of(config)] == ["a"]
    assert not ledger.count_attempts(config.output), "a row that was stopped has not killed its worker"


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_row_whose_worker_died_each_time_is_failed_as_worker_died_and_can_be_tried_again(
    tmp_path: Path, max_attempts: int
) -> None:
    config = configure(make_catalog(tmp_path, rows=2), tmp_path / "out", max_attempts=max_attempts)
    items = rows_planned(config)
    # Once in company, whoever killed the worker then, and alone from the second time on.
    num_deaths = max(max_attempts, 2)
    for number in range(num_deaths):
        ledger.begin_attempt(config.output, items[0]["work_key"], worker="dead", alone=number > 0, state="died")
    with CountingAnimator() as animator:
        run_local(config, animator=animator)
        assert by_id(config)[items[0]["id"]]["error_code"] == "worker_died"
        assert by_id(config)[items[0]["id"]]["attempts"] == num_deaths
        assert animator.asked == {items[1]["id"]: 1}
        run_local(config.model_copy(update={"retry": ("worker_died",)}), animator=animator)
    assert by_id(config)[items[0]["id"]]["status"] == "succeeded"


def rows_planned(config: CatalogConfig) -> list[dict[str, Any]]:
    """The work items of a manifest, as a run on a scratch output plans them."""
    from pia_ray import manifest, weights

    opened = manifest.open_manifest(config)
    (table,) = manifest.plan(opened, config, model_version=weights.version(config.model))
    return table.to_pylist()


def test_a_row_tried_before_runs_alone(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=3), tmp_path / "out", max_attempts=1)
    suspect = rows_planned(config)[1]
    ledger.begin_attempt(config.output, suspect["work_key"], worker="dead", state="died")
    alone: dict[str, bool] = {}

    class Watching(FakeAnimator):
        def submit(self, request: AnimationRequest, *, alone: bool = False, **how: Any) -> Future[Animation]:
            asked_alone[request.id] = alone
            return super().submit(request, alone=alone, **how)

    asked_alone = alone
    with Watching(DEMO) as animator:
        run_local(config, animator=animator)
    assert alone == {"item-000000": False, "item-000001": True, "item-000002": False}
    assert by_id(config)[suspect["id"]]["attempts"] == 2


class Deadly(CountingAnimator):
    """Loses its device over rows whose prompt begins with "deadly" while `kills` is true, and hangs over them else."""

    def __init__(self) -> None:
        super().__init__()
        self.kills = False

    def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
        if self.kills and request.params.prompt.startswith("deadly"):
            self.asked[request.id] += 1
            how["on_start"]()
            future: Future[Animation] = Future()
            future.set_exception(DeviceLost("the GPU failed"))
            return future
        return super().submit(request, **how)


def test_a_stop_leaves_the_record_of_the_workers_that_a_row_has_killed(tmp_path: Path) -> None:
    rows = [{"id": "a", "image": "a.png", "prompt": "sea"}, {"id": "h", "image": "h.png", "prompt": "hang"}]
    config = configure(write(tmp_path, rows), tmp_path / "out", deadline_s=3.0, grace_s=0)
    hanging = rows_planned(config)[1]["work_key"]
    for _ in range(2):
        ledger.begin_attempt(config.output, hanging, worker="dead", state="died")
    assert go(config).exit_code == 4
    assert ledger.count_attempts(config.output) == {hanging: 2}


def test_a_row_that_kills_workers_is_quarantined_also_where_runs_are_stopped_in_between(tmp_path: Path) -> None:
    config = configure(write(tmp_path, [{"id": "p", "image": "p.png", "prompt": "deadly hang"}]), tmp_path / "out")
    with Deadly() as animator:
        for _ in range(config.max_attempts):
            animator.kills = True
            with pytest.raises(JobError, match="the GPU failed"):
                run_local(config, animator=animator)
            animator.kills = False
            stopped = config.model_copy(update={"deadline_s": 2.0, "grace_s": 0.0})
            if ledger.count_attempts(config.output).total() < config.max_attempts:
                assert run_local(stopped, animator=animator).exit_code == 4
        asked = animator.asked["p"]
        assert run_local(config, animator=animator).exit_code == 1
    assert by_id(config)["p"]["error_code"] == "worker_died"
    assert animator.asked["p"] == asked


def test_a_lost_device_stops_the_run_and_keeps_what_is_committed(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=4), tmp_path / "out", batch_size=1, prefetch=0)

    class Losing(CountingAnimator):
        def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
            if sum(self.asked.values()) == 2:
                future: Future[Animation] = Future()
                future.set_exception(DeviceLost("the GPU failed"))
                return future
            return super().submit(request, **how)

    with Losing() as animator, pytest.raises(JobError, match="the GPU failed"):
        run_local(config, animator=animator)
    assert len(rows_of(config)) == 2
    assert go(config).progress.num_before == 2


def test_a_second_run_on_the_same_output_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=2), tmp_path / "out")
    with ledger.Lease(config.output, run_id="the-first"), pytest.raises(LeaseHeld, match="the-first"):
        go(config)
    assert go(config).exit_code == 0


def test_a_duplicate_id_stops_the_run_before_anything_is_animated(tmp_path: Path) -> None:
    rows = [{"id": "x", "image": "a.png", "prompt": p} for p in ("sea", "sky")]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    with pytest.raises(ManifestError, match=r"\bx\b"):
        go(config)
    assert not videos_of(config)
    rows[1]["id"] = "y"
    write(tmp_path, rows)
    assert go(config).exit_code == 0


def test_progress_is_told_from_the_first_word_to_the_last(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=5), tmp_path / "out")
    seen: list[Progress] = []
    with FakeAnimator(DEMO) as animator:
        run_local(config, animator=animator, observe=seen.append)
    phases = list(dict.fromkeys(progress.phase for progress in seen))
    assert phases == ["planning", "starting", "animating", "writing", "ended"]
    assert seen[-1].num_succeeded == 5
    assert seen[-1].num_left == 0


def test_a_full_disk_fails_the_rows_it_hits_and_leaves_no_torn_video(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=3), tmp_path / "out", max_attempts=1)
    go(config.model_copy(update={"limit": 1}))
    blocked = {row["work_key"][:2] for row in rows_planned(config)[1:]}
    for prefix in blocked - {rows_planned(config)[0]["work_key"][:2]}:
        # A file where the folder should be: the write is refused as a full or read-only disk refuses it.
        (tmp_path / "out" / "videos" / prefix).write_text("")
    go(config)
    assert {row["status"] for row in rows_of(config)[1:]} == {"failed"}
    assert all(row["error_code"].startswith("storage") for row in rows_of(config)[1:])


def test_an_interrupt_records_what_is_done_and_the_next_run_does_the_rest(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=8), tmp_path / "out", batch_size=1, prefetch=0)
    main = threading.main_thread()

    def interrupt_after(number: int) -> Callable[[Progress], None]:
        def observe(progress: Progress) -> None:
            assert threading.current_thread() is main
            if progress.phase == "animating" and progress.num_succeeded >= number:
                raise KeyboardInterrupt

        return observe

    with CountingAnimator() as animator:
        summary = run_local(config, animator=animator, observe=interrupt_after(3))
        assert summary.exit_code == 130
        done = {row["id"] for row in rows_of(config)}
        assert len(done) >= 3
        assert run_local(config, animator=animator).exit_code == 0
    assert len(rows_of(config)) == 8
    assert all(animator.asked[name] == 1 for name in done)


def test_signatures_and_embedded_pictures_stay_out_of_the_results(tmp_path: Path) -> None:
    import base64

    inline = "data:image/png;base64," + base64.b64encode(draw_picture((48, 48), seed=1)).decode()
    signed = "https://192.0.2.1/cat.jpg?size=large&X-Amz-Signature=0123abcd"
    rows = [{"id": "in", "image": inline, "prompt": "sea"}, {"id": "signed", "image": signed, "prompt": "sea"}]
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configure(path, tmp_path / "out")
    go(config)
    found = by_id(config)
    assert found["in"]["status"] == "succeeded"
    assert len(found["in"]["image_uri"]) < 200
    assert found["in"]["image_uri"].startswith("data:image/png;base64,sha256:")
    assert found["signed"]["error_code"] == "address_refused"
    assert found["signed"]["image_uri"] == "https://192.0.2.1/cat.jpg?size=large"
    everything = b"".join(f.read_bytes() for f in (tmp_path / "out").rglob("*.parquet") if "items" not in f.parts)
    assert b"0123abcd" not in everything


def test_a_gallery_of_a_huge_catalogue_shows_part_and_says_so() -> None:
    from pia_ray.catalog.gallery import MOST_ROWS
    from pia_ray.catalog.gallery.rows import chosen_rows
    from pia_ray.catalog.gallery.summary import left_out

    statuses = ["succeeded"] * 30_000 + ["failed"] * 8_000
    chosen = chosen_rows(statuses, [None] * 38_000)
    assert len(chosen) == MOST_ROWS
    assert sum(statuses[place] == "failed" for place in chosen) == MOST_ROWS // 4
    assert "20,000 of 38,000 rows" in left_out(len(chosen), 18_000)
    reviewed = chosen_rows(statuses, ["done"] * 10_000 + [None] * 10_000 + ["retaken"] * 10_000 + [None] * 8_000)
    assert {place for place in reviewed if place < 30_000} == {*range(10_000, 15_000), *range(20_000, 30_000)}


def test_pictures_inside_a_manifest_that_was_rewritten_meanwhile_are_not_taken_for_those_planned(
    tmp_path: Path,
) -> None:
    rows = [{"id": str(n), "image": draw_picture((48, 48), seed=n), "prompt": "sea"} for n in range(3)]
    manifest = write(tmp_path, rows)
    config = configure(manifest, tmp_path / "out")

    def rewrite(progress: Progress) -> None:
        if progress.phase == "starting":
            swapped = [{**row, "image": rows[2 - n]["image"]} for n, row in enumerate(rows)]
            write(tmp_path, swapped)

    with FakeAnimator(DEMO) as animator:
        run_local(config, animator=animator, observe=rewrite)
    found = by_id(config)
    assert found["1"]["status"] == "succeeded"
    for name in ("0", "2"):
        assert found[name]["error_code"] == "input_changed"
        assert "changed since it was planned" in found[name]["error_message"]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_picture_that_changes_after_it_was_planned_is_not_animated_under_the_old_work_key(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    folder = f"{request.getfixturevalue('s3')}/in" if place == "s3" else str(tmp_path)
    for name in "ab":
        storage.write_bytes(f"{folder}/{name}.png", draw_picture((64, 48), seed=1))
    rows = [{"id": name, "image": f"{folder}/{name}.png", "prompt": "sea", "end_image": None} for name in "abc"]
    rows[2] |= {"image": f"{folder}/b.png", "end_image": f"{folder}/a.png"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    config = configure(tmp_path / "m.parquet", tmp_path / "out", detect_changes=True)

    def replace_picture(progress: Progress) -> None:
        if progress.phase == "starting":
            storage.write_bytes(f"{folder}/a.png", draw_picture((64, 48), seed=2))

    with FakeAnimator(DEMO) as animator:
        run_local(config, animator=animator, observe=replace_picture)
        found = by_id(config)
        assert {name: row["error_code"] for name, row in found.items()} == {
            "a": "input_changed",
            "b": None,
            "c": "input_changed",
        }
        assert run_local(config, animator=animator).progress.num_succeeded == 2
        assert by_id(config)["a"]["work_key"] != found["a"]["work_key"]


@pytest.mark.parametrize("place", ["out", "."])
def test_an_output_beside_the_pictures_is_not_taken_for_part_of_the_catalogue(tmp_path: Path, place: str) -> None:
    for n in range(2):
        (tmp_path / "shots" / f"{n}").mkdir(parents=True)
        (tmp_path / "shots" / f"{n}" / "a.png").write_bytes(draw_picture((48, 48), seed=n))
    config = configure(tmp_path / "shots", tmp_path / "shots" / place, defaults={"prompt": "sea"})
    assert go(config).progress.num_items == 2
    again = go(config)
    assert again.progress.num_items == again.progress.num_before == 2


def test_a_malformed_url_is_a_bad_row_and_no_end_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    (tmp_path / "a.png").write_bytes(draw_picture((48, 48), seed=1))
    path.write_text("image,prompt\nhttps://[bad/1.jpg,sea\nfile://[bad/1.jpg,sea\na.png,sea\n")
    config = configure(path, tmp_path / "out")
    summary = go(config)
    assert summary.progress.num_succeeded == 1
    assert summary.progress.num_failed_in_all == 2


def test_a_store_that_is_away_for_a_moment_costs_no_second_animation(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path, rows=1), tmp_path / "out")
    (item,) = rows_planned(config)
    place = Path(ledger.video_uri(config.output, item["id"], work_key=item["work_key"], ext="mp4")).parent
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullDisk(CountingAnimator):
        def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
            future = super().submit(request, **how)
            future.result()
            # From now on files may not grow, as on a full disk, until a moment later.
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
            threading.Timer(0.5, resource.setrlimit, (resource.RLIMIT_FSIZE, limit)).start()
            return future

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with FullDisk() as animator:
            summary = run_local(config, animator=animator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert summary.exit_code == 0
    assert animator.asked == {item["id"]: 1}
    assert rows_of(config)[0]["attempts"] == 1  # waiting for the output is no try at the row
    assert len(list(place.glob("*.mp4"))) == 1


def test_a_reader_that_goes_away_does_not_end_the_work() -> None:
    code = "from pia_ray.cli.console import Screen; s = Screen(); [s.print('x' * 70) for _ in range(20000)]; exit(7)"
    script = f'"{sys.executable}" -c "{code}" | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}'
    assert subprocess.run(["bash", "-c", script], capture_output=True, timeout=60).returncode == 7


def test_a_damaged_and_a_deleted_video_are_made_again_where_asked_for(tmp_path: Path) -> None:
    rows = [{"id": str(number), "image": f"{number}.png", "prompt": "a boat"} for number in range(3)]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    assert go(config).exit_code == 0
    before = by_id(config)
    damaged, deleted = (Path(before[row_id]["video_uri"]) for row_id in ("0", "1"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:200] + bytes(len(content) - 200))
    deleted.unlink()
    assert go(config).progress.num_pending == 0
    with CountingAnimator() as animator:
        summary = run_local(config.model_copy(update={"remake": ("missing", "damaged")}), animator=animator)
    assert summary.exit_code == 0
    assert animator.asked == Counter({"0": 1, "1": 1})
    assert ledger.verify(config.output, deep=True).ok
    assert {row["status"] for row in rows_of(config)} == {"succeeded"}
    assert probe(damaged.read_bytes()).provenance["id"] == "0"


def test_a_run_during_which_the_rows_of_the_one_before_are_deleted_fails_and_keeps_its_own(tmp_path: Path) -> None:
    rows = [{"id": str(number), "image": f"{number}.png", "prompt": "a boat"} for number in range(2)]
    config = configure(write(tmp_path, rows[:1]), tmp_path / "out")
    assert go(config).exit_code == 0

    class Deleting(CountingAnimator):
        def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
            shutil.rmtree(Path(config.output) / "_ledger" / "parts", ignore_errors=True)
            return super().submit(request, **how)

    config = configure(write(tmp_path, rows), tmp_path / "out")
    with Deleting() as animator, pytest.raises(OutputError, match="1 row that had ended"):
        run_local(config, animator=animator)
    assert [row["id"] for row in rows_of(config)] == ["1"]
    assert go(config).exit_code == 0
    assert [row["id"] for row in rows_of(config)] == ["0", "1"]


def test_a_run_whose_gallery_cannot_be_written_names_none(tmp_path: Path) -> None:
    config = configure(write(tmp_path, [{"id": "a", "image": "a.png", "prompt": "sea"}]), tmp_path / "out")
    (tmp_path / "out" / "index.html").mkdir(parents=True)
    summary = go(config)
    assert (summary.exit_code, summary.gallery_uri) == (0, None)


def test_a_run_at_work_shows_its_rows_with_stage_and_age_and_leaves_no_trace_of_its_workers(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path / "catalog", rows=2), tmp_path / "out")
    with FakeAnimator(DEMO, batch_size=1, seconds_per_step=0.4) as animator:
        run = threading.Thread(target=run_local, args=(config,), kwargs={"animator": animator})
        run.start()
        while True:
            live = ledger.live_run(config.output) if Path(config.output).exists() else None
            if live is not None and live.workers:
                break
            time.sleep(0.05)
        run.join()
    (worker,) = live.workers
    assert {row.stage for row in worker.rows} == {"animate", "queue"}
    assert all(0 < row.stage_s <= row.age_s < 60 for row in worker.rows)
    assert worker.busy_share is not None
    assert 0 < worker.busy_share <= 1
    assert ledger.live_run(config.output) is None


def test_a_report_tells_the_share_of_the_time_in_which_the_engines_computed(tmp_path: Path) -> None:
    config = configure(make_catalog(tmp_path / "catalog", rows=3), tmp_path / "out")
    with FakeAnimator(DEMO, batch_size=1, seconds_per_step=0.01) as animator:
        run_local(config, animator=animator)
    share = ledger.summary(ledger.Ledger.open(config.output)).busy_share
    assert share is not None
    assert 0.5 < share <= 1
