"""The end of a run for programs: `summary.json`, and a signed post of it that never changes how the run ends."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pia_ray import ledger, storage
from pia_ray.catalog.local import run_local
from pia_ray.catalog.progress import RunSummary
from pia_ray.catalog.run_end import EndPost
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ConfigError, LeaseHeld, TooManyFailures
from pia_ray.testing import FakeAnimator, make_catalog
from tests.models import DEMO

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Receiver(ThreadingHTTPServer):
    """Answers the statuses of its script, then 204; keeps what it got."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/services/T0/B0/token"

    @property
    def summaries(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(({name.lower(): value for name, value in self.headers.items()}, content))
        self.send_response(self.server.script.pop(0) if self.server.script else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def configure(folder: Path, receiver: Receiver, *, broken: float = 0.0, **settings: Any) -> CatalogConfig:
    values = {
        "manifest": str(make_catalog(folder / "catalog", rows=4, broken=broken)),
        "output": str(folder / "out"),
        "model": DEMO,
        "on_end": receiver.url,
        "on_end_networks": "127.0.0.1/32",
    }
    return build(CatalogConfig, {**values, **settings})


def go(config: CatalogConfig) -> RunSummary:
    with FakeAnimator(DEMO, batch_size=4) as animator:
        return run_local(config, animator=animator)


def written(config: CatalogConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(storage.read_bytes(ledger.summary_uri(config.output)))
    return content


def test_the_summary_in_the_output_is_posted_at_the_end_and_counts_what_was_done(
    tmp_path: Path, receiver: Receiver
) -> None:
    config = configure(tmp_path, receiver, broken=0.5)
    assert go(config).exit_code == 1
    (posted,) = receiver.summaries
    assert posted == written(config)
    assert (posted["type"], posted["exit_code"], posted["error"]) == ("run.finished", 1, None)
    assert (posted["num_items"], posted["num_succeeded"], posted["num_failed"], posted["num_left"]) == (4, 2, 2, 0)
    assert sum(posted["errors"].values()) == 2
    assert posted["gpu_s"] > 0
    assert 0 < posted["busy_share"] <= 1


def test_a_post_is_signed_as_the_webhooks_of_the_endpoint_are(tmp_path: Path, receiver: Receiver) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    go(configure(tmp_path, receiver, on_end_secret=str(tmp_path / "secret")))
    headers, body = receiver.got[0]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"


def test_a_run_that_stops_for_trouble_posts_its_exit_code_and_reason(tmp_path: Path, receiver: Receiver) -> None:
    config = configure(tmp_path, receiver, broken=0.5, max_failures="0")
    with pytest.raises(TooManyFailures):
        go(config)
    (posted,) = receiver.summaries
    assert posted == written(config)
    assert (posted["type"], posted["exit_code"], posted["error"]) == ("run.failed", 2, "too_many_failures")
    assert "--max-failures" in posted["reason"]


def test_a_run_that_is_refused_posts_and_leaves_the_summary_of_the_run_at_work(
    tmp_path: Path, receiver: Receiver
) -> None:
    config = configure(tmp_path, receiver)
    with ledger.Lease(config.output, run_id="other"), pytest.raises(LeaseHeld):
        go(config)
    (posted,) = receiver.summaries
    assert (posted["exit_code"], posted["error"]) == (2, "lease_held")
    assert not storage.exists(ledger.summary_uri(config.output))


def test_a_run_past_its_deadline_posts_that_it_stopped(tmp_path: Path, receiver: Receiver) -> None:
    config = configure(tmp_path, receiver, deadline_s=0.01, grace_s=0)
    assert go(config).exit_code == 4
    (posted,) = receiver.summaries
    assert (posted["type"], posted["exit_code"], posted["reason"]) == ("run.stopped", 4, "the deadline has passed")


def test_a_receiver_that_refuses_is_tried_a_few_times_with_one_id_and_changes_nothing(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(tmp_path, receiver)
    go(config)
    receiver.got.clear()
    receiver.script += [500, 503, 500]
    EndPost(config, retry_delays_s=(0.01, 0.01)).send(written(config))
    assert len(receiver.got) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert "on_end has not taken the run's summary" in caplog.text
    receiver.got.clear()
    receiver.script += [410]
    EndPost(config, retry_delays_s=(0.01, 0.01)).send(written(config))
    assert len(receiver.got) == 1
    assert "token" not in caplog.text


def test_a_run_ends_as_it_would_where_nobody_listens(tmp_path: Path, receiver: Receiver) -> None:
    receiver.script += [410]
    assert go(configure(tmp_path, receiver)).exit_code == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"on_end": "http://10.0.0.1/", "on_end_networks": ()}, "http:// is refused"),
        ({"on_end": "ftp://10.0.0.1/"}, "ftp:// is refused"),
        ({"on_end": "https://user:word@example.com/"}, "credentials"),
        ({"on_end": "http://user:word@10.0.0.1/"}, "credentials"),
        ({"on_end": "http:///"}, "not a valid URL"),
        ({"on_end": "http://[::1/"}, "not a valid URL"),
        ({"on_end_secret": "whsec_short"}, "on_end_secret must be"),
        ({"on_end_secret": "/nowhere/at/all"}, "on_end_secret must begin"),
    ],
)
def test_a_url_or_secret_that_cannot_work_stops_the_run_before_it_begins(
    tmp_path: Path, receiver: Receiver, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        go(configure(tmp_path, receiver, **settings))
    assert not (tmp_path / "out").exists()


def test_networks_that_are_none_are_refused_by_name(tmp_path: Path, receiver: Receiver) -> None:
    with pytest.raises(ConfigError, match="on_end_networks"):
        configure(tmp_path, receiver, on_end_networks="10.0.0")


def test_plain_http_goes_to_allowed_networks_only(
    tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    assert go(configure(tmp_path, receiver, on_end_networks="10.0.0.0/8")).exit_code == 0
    assert not receiver.got
    assert "in no allowed network" in caplog.text


def test_neither_url_nor_secret_of_the_webhook_is_written_to_the_output(tmp_path: Path, receiver: Receiver) -> None:
    config = configure(tmp_path, receiver, on_end_secret=SECRET)
    go(config)
    for found in storage.list_objects(config.output, suffix=".json"):
        content = storage.read_bytes(found.uri)
        assert b"token" not in content
        assert SECRET.encode() not in content
