"""Trouble of the output is no row's verdict: runs wait, stop and resume; what is the world's fault is tried again."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pia_ray import manifest, read_results, spare_threads, storage, weights
from pia_ray.animation import Animation
from pia_ray.catalog.local import run_local
from pia_ray.catalog.progress import Progress, RunSummary
from pia_ray.catalog.rows.outage import NO_OUTAGE, Outage, Sources
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import FetchUnavailable, HubUnavailable, OutputError, OutputUnavailable, TooManyFailures
from pia_ray.storage.host_rates import KNOWN_HOSTS
from pia_ray.testing import FakeAnimator, draw_picture, make_catalog
from pia_ray.types import AnimationRequest, ManifestRow
from tests.chaos_proxy import ChaosProxy, chaos
from tests.models import DEMO
from tests.s3_server import s3_server
from tests.tables import num_entries

__all__ = ["chaos", "s3_server"]  # fixtures


@pytest.fixture
def store(chaos: ChaosProxy, monkeypatch: pytest.MonkeyPatch) -> ChaosProxy:
    """The proxy before the S3 server, asked without the pauses of botocore, which cannot be set."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return chaos


def configure(folder: Path, output: str, *, rows: int, **settings: Any) -> CatalogConfig:
    manifest = make_catalog(folder, rows=rows)
    return build(CatalogConfig, {"manifest": str(manifest), "output": output, "model": DEMO, **settings})


def go(config: CatalogConfig, **how: Any) -> RunSummary:
    with FakeAnimator(DEMO, batch_size=4) as animator:
        return run_local(config, animator=animator, **how)


def codes(config: CatalogConfig) -> list[str | None]:
    return [row["error_code"] for row in read_results(config.output).to_pylist()]


def put_of_video(method: str, path: str) -> bool:
    return method == "PUT" and "/videos/" in path and "probe" not in path


def test_a_store_that_is_away_holds_animations_back_and_fails_no_row(store: ChaosProxy, tmp_path: Path) -> None:
    config = configure(tmp_path, f"{store.bucket}/out", rows=2, patience_s=10)
    store.matches = put_of_video
    store.faults.extend([500] * 90)
    seen: list[Progress] = []

    def observe(progress: Progress) -> None:
        seen.append(progress)
        if progress.num_waiting:
            store.faults.clear()

    assert go(config, observe=observe).exit_code == 0
    assert max(progress.num_waiting for progress in seen) >= 1
    assert {progress.away for progress in seen} == {"", "the store"}
    assert all(progress.num_failed == 0 for progress in seen)


def writing() -> list[threading.Thread]:
    """The threads that write a video now; threads without a call keep the name of their last one."""
    return [t for t in threading.enumerate() if t.name == "writing the video" and t not in spare_threads._idle]


def test_a_row_whose_pictures_are_written_too_late_gets_no_video_after_it_has_failed(
    store: ChaosProxy, tmp_path: Path
) -> None:
    config = configure(tmp_path, f"{store.bucket}/out", rows=1, publish_timeout_s=2, max_attempts=1)
    released = threading.Event()

    def hold_thumbnails(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith("-video.webp"):
            released.wait(60)
        return False

    store.matches = hold_thumbnails
    store.faults.append(500)  # none is applied
    go(config)
    assert codes(config) == ["timeout"]
    assert writing()
    released.set()
    until_ended = time.monotonic() + 60
    while writing() and time.monotonic() < until_ended:
        time.sleep(0.02)
    assert not writing()
    assert not [path for method, path, _ in store.requests if put_of_video(method, path)]
    retried = go(config.model_copy(update={"retry": ("timeout",)}))
    assert (retried.exit_code, codes(config)) == (0, [None])


def test_a_run_out_of_patience_fails_no_row_and_the_same_command_goes_on(store: ChaosProxy, tmp_path: Path) -> None:
    config = configure(tmp_path, f"{store.bucket}/out", rows=1, patience_s=1)
    store.matches = put_of_video
    store.faults.extend([500] * 500)
    with FakeAnimator(DEMO, batch_size=4) as animator:
        with pytest.raises(OutputUnavailable) as stopped:
            run_local(config, animator=animator)
        assert stopped.value.exit_code == 4
        assert len(read_results(config.output)) == 0
        store.faults.clear()
        assert run_local(config, animator=animator).exit_code == 0


@pytest.mark.parametrize("refusal", [403, 404])
def test_an_output_that_is_denied_or_gone_meanwhile_stops_the_run_and_fails_no_row(
    store: ChaosProxy, tmp_path: Path, refusal: int
) -> None:
    config = configure(tmp_path, f"{store.bucket}/out", rows=4)
    store.matches = put_of_video
    store.faults.extend([refusal] * 50)
    with pytest.raises(OutputError, match="ExpiredToken" if refusal == 403 else "there is no bucket") as stopped:
        go(config)
    assert stopped.value.exit_code == 2
    assert codes(config) == []
    store.faults.clear()
    assert go(config).exit_code == 0
    assert codes(config) == [None] * 4


@pytest.mark.parametrize("folder", ["videos", "thumbnails"])
def test_a_folder_that_cannot_be_written_is_found_before_a_row_begins(
    store: ChaosProxy, tmp_path: Path, folder: str
) -> None:
    config = configure(tmp_path, f"{store.bucket}/out", rows=1)
    store.matches = lambda method, path: method == "PUT" and f"/{folder}/" in path
    store.faults.append(403)
    log = tmp_path / "begun"
    with FakeAnimator(DEMO, log=log) as animator, pytest.raises(OutputError, match="expired"):
        run_local(config, animator=animator)
    assert not log.exists()


# The manifest, the pictures and the hub


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_a_manifest_is_read_where_half_of_the_first_answers_are_slow_down(
    store: ChaosProxy,
    tmp_path: Path,
    format: str,  # noqa: A002
) -> None:
    path = make_catalog(tmp_path / "made", rows=2, format=format)
    for file in [path, *(tmp_path / "made" / "images").iterdir()]:
        uri = f"{store.bucket}/in/{file.relative_to(tmp_path / 'made').as_posix()}"
        storage.write_bytes(uri, file.read_bytes())
    storage.forget_clients()
    store.matches = lambda method, path: "/in/manifest" in path
    store.faults.extend([503, ""] * 3)
    values = {"manifest": f"{store.bucket}/in/{path.name}", "output": str(tmp_path / "out"), "model": DEMO}
    assert go(build(CatalogConfig, {**values, "patience_s": 10})).exit_code == 0
    assert 503 in {fault for _, _, fault in store.requests}


def with_pictures_in(store: ChaosProxy, folder: Path, *, rows: int, **settings: Any) -> CatalogConfig:
    """The config of a run over pictures in the bucket."""
    lines = []
    for number in range(rows):
        storage.write_bytes(f"{store.bucket}/in/{number}.png", draw_picture((64, 48), seed=number))
        lines.append(json.dumps({"id": str(number), "image": f"{store.bucket}/in/{number}.png", "prompt": "sea"}))
    (folder / "m.jsonl").write_text("\n".join(lines))
    values = {"manifest": str(folder / "m.jsonl"), "output": str(folder / "out"), "model": DEMO, **settings}
    return build(CatalogConfig, values)


def test_pictures_whose_store_is_away_are_waited_for(store: ChaosProxy, tmp_path: Path) -> None:
    config = with_pictures_in(store, tmp_path, rows=3, patience_s=10)
    store.matches = lambda method, path: "/in/" in path
    store.faults.extend([500] * 500)
    seen: list[Progress] = []

    def observe(progress: Progress) -> None:
        seen.append(progress)
        if progress.away:
            store.faults.clear()

    assert go(config, observe=observe).exit_code == 0
    assert {progress.away for progress in seen} == {"", "the store"}
    assert codes(config) == [None] * 3


def test_the_same_command_tries_again_what_was_the_worlds_fault_and_not_the_rows(
    store: ChaosProxy, tmp_path: Path
) -> None:
    config = with_pictures_in(store, tmp_path, rows=3)
    storage.write_bytes(f"{store.bucket}/in/2.png", b"<!doctype html>")
    store.matches = lambda method, path: path.endswith(("/0.png", "/1.png"))
    store.faults.extend([403] * 2)
    assert go(config).exit_code == 1
    assert codes(config) == ["storage_denied", "storage_denied", "unsupported_image"]
    again = go(config)
    assert (again.progress.num_succeeded, again.progress.num_failed_before) == (2, 1)
    assert codes(config) == [None, None, "unsupported_image"]


def rows_of_hosts(folder: Path, *hosts: str) -> list[ManifestRow]:
    """Work items whose pictures are at these hosts."""
    config = configure(folder, str(folder / "out"), rows=len(hosts))
    tables = manifest.plan(manifest.open_manifest(config), config, model_version=weights.version(DEMO))
    rows = [manifest.row_from_item(item) for table in tables for item in table.to_pylist()]
    return [replace(row, image=f"https://{host}/x.png") for row, host in zip(rows, hosts, strict=True)]


def test_a_host_that_fails_three_rows_in_a_row_is_away_until_it_answers(tmp_path: Path) -> None:
    outage, down = Outage(), FetchUnavailable("it answers 503")
    sources = Sources(outage, patience_s=60)
    *rows, other = rows_of_hosts(tmp_path, *["a.example"] * 3, "b.example")
    assert not any(sources.are_away(row, down) for row in rows), "it has never answered"
    sources.answered(rows[0])
    assert [sources.are_away(row, down) for row in rows] == [False, False, True]
    assert (outage.state.what, outage.state.reason) == ("the host of the pictures", "it answers 503")
    assert not sources.are_away(other, down)
    sources.answered(rows[1])
    assert outage.state == NO_OUTAGE
    assert not sources.are_away(rows[0], down)


def test_a_host_is_not_waited_for_beyond_the_patience(tmp_path: Path) -> None:
    sources, down = Sources(Outage(), patience_s=0), FetchUnavailable("it answers 503")
    rows = rows_of_hosts(tmp_path, *["a.example"] * 3)
    sources.answered(rows[0])
    assert not any(sources.are_away(row, down) for row in rows)


def test_a_run_over_any_number_of_hosts_knows_so_many(tmp_path: Path) -> None:
    sources, down = Sources(Outage(), patience_s=60), FetchUnavailable("it answers 503")
    (row,) = rows_of_hosts(tmp_path, "a.example")
    for number in range(KNOWN_HOSTS + 100):
        sources.answered(replace(row, image=f"https://shop-{number}.test/x.png"))
        sources.are_away(replace(row, image=f"https://away-{number}.test/x.png"), down)
    assert num_entries(sources) == 3 * KNOWN_HOSTS


class AwayHub(http.server.ThreadingHTTPServer):
    """A hub that answers 503 so often, and then names a commit."""

    def __init__(self, *, failures: int) -> None:
        super().__init__(("127.0.0.1", 0), AwayHubHandler)
        self.failures = failures
        self.url = f"http://127.0.0.1:{self.server_port}"


class AwayHubHandler(http.server.BaseHTTPRequestHandler):
    server: AwayHub

    def do_GET(self) -> None:
        self.server.failures -= 1
        content = json.dumps({"id": "someone/tiny-pia", "sha": "0" * 40, "siblings": []}).encode()
        self.send_response(503 if self.server.failures >= 0 else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("failures", [3, 1000])
def test_the_hub_is_waited_for_and_then_ends_the_run_with_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    hub = AwayHub(failures=failures)
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    model = DEMO.model_copy(update={"base": "someone/tiny-pia"})
    config = configure(tmp_path, str(tmp_path / "out"), rows=1, patience_s=3 if failures == 3 else 0.5)
    config = config.model_copy(update={"model": model})
    try:
        if failures == 3:
            assert go(config).exit_code == 0
        else:
            with pytest.raises(HubUnavailable) as stopped:
                go(config)
            assert stopped.value.exit_code == 4
            assert not (tmp_path / "out").exists()
    finally:
        hub.shutdown()
        hub.server_close()


# Failures of many rows


class Broken(FakeAnimator):
    """Fails each row by an error that no row is to blame for, unless its prompt says otherwise."""

    def submit(self, request: AnimationRequest, **how: Any) -> Future[Animation]:
        if request.params.prompt == "well":
            return super().submit(request, **how)
        future: Future[Animation] = Future()
        future.set_exception(RuntimeError("a bug"))
        return future


def prompted(folder: Path, prompts: list[str], **settings: Any) -> CatalogConfig:
    """The config of a run over one picture with these prompts."""
    url = "data:image/png;base64," + base64.b64encode(draw_picture((64, 48), seed=1)).decode()
    lines = [json.dumps({"id": str(n), "image": url, "prompt": prompt}) for n, prompt in enumerate(prompts)]
    (folder / "m.jsonl").write_text("\n".join(lines))
    values = {"manifest": str(folder / "m.jsonl"), "output": str(folder / "out"), "model": DEMO, **settings}
    return build(CatalogConfig, values)


def test_twenty_failures_alike_in_a_row_stop_the_run_and_none_is_recorded(tmp_path: Path) -> None:
    config = prompted(tmp_path, ["sea"] * 22)
    with (
        Broken(DEMO) as animator,
        pytest.raises(
            TooManyFailures, match=r"2[0-2] rows in a row failed with unexpected"
        ) as end,  # up to all that have ended
    ):
        run_local(config, animator=animator)
    assert end.value.exit_code == 2
    assert codes(config) == []
    assert go(config).exit_code == 0


def test_failures_with_a_success_between_them_are_recorded(tmp_path: Path) -> None:
    config = prompted(tmp_path, [*["sea"] * 12, "well", *["sea"] * 12], batch_size=1, prefetch=0)
    with Broken(DEMO) as animator:
        assert run_local(config, animator=animator).exit_code == 1
    assert sorted(map(str, codes(config))) == ["None", *["unexpected"] * 24]


@pytest.mark.parametrize("most", ["2", "25%"])
def test_more_failures_than_are_allowed_stop_the_run_and_are_recorded(tmp_path: Path, most: str) -> None:
    config = prompted(tmp_path, ["nan", "sea", "nan", "sea", "nan", "sea", "nan", "sea"], max_failures=most)
    with pytest.raises(TooManyFailures) as stopped:
        go(config)
    assert stopped.value.exit_code == 2
    num_failed = codes(config).count("nan_frames")
    assert num_failed in (3, 4)  # the fourth may have ended before the third was read
    assert f"{num_failed} rows failed, more than --max-failures" in stopped.value.message
