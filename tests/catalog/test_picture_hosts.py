"""Runs and picture hosts: throttled ones are waited for, private ones reached by setting, owners' refusals obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pia_ray import read_results
from pia_ray.catalog.local import run_local
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ConfigError
from pia_ray.testing import FakeAnimator
from tests.models import DEMO
from tests.picture_host import PictureHost, picture_host


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as up:
        yield up


def write(folder: Path, host: PictureHost, rows: int) -> Path:
    path = folder / "m.jsonl"
    lines = [{"id": str(n), "image": f"{host.url}/{n}.png", "prompt": "p"} for n in range(rows)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def animate(folder: Path, host: PictureHost, rows: int, **settings: Any) -> list[dict[str, Any]]:
    """The results by id."""
    reach = {"allow_http": True, "allowed_networks": "127.0.0.0/8", **settings}
    values = {"manifest": str(write(folder, host, rows)), "output": str(folder / "out"), "model": DEMO, **reach}
    with FakeAnimator(DEMO, batch_size=4) as animator:
        run_local(build(CatalogConfig, values), animator=animator)
    return sorted(read_results(str(folder / "out")).to_pylist(), key=lambda row: int(row["id"]))


@pytest.mark.parametrize("status", [429, 503])
def test_pauses_that_a_host_asks_for_use_up_no_attempt(tmp_path: Path, host: PictureHost, status: int) -> None:
    host.faults.extend([(status, {"Retry-After": "1"})] * 3)
    results = animate(tmp_path, host, 3, max_attempts=1)
    assert [(row["status"], row["attempts"]) for row in results] == [("succeeded", 1)] * 3
    times = [at for at, _, _ in host.asked]
    assert times[-1] - times[0] > 0.9


@pytest.mark.parametrize("status", [408, 425, 500])
def test_answers_that_pass_are_tried_again(tmp_path: Path, host: PictureHost, status: int) -> None:
    host.faults.append((status, {}))
    (row,) = animate(tmp_path, host, 1)
    assert (row["status"], row["attempts"]) == ("succeeded", 2)


def test_a_host_that_asks_for_more_than_patience_fails_its_rows_at_once(tmp_path: Path, host: PictureHost) -> None:
    host.faults.append((429, {"Retry-After": "3600"}))
    (row,) = animate(tmp_path, host, 1, patience_s=5)
    assert (row["error_code"], len(host.asked)) == ("fetch_unavailable", 1)


def test_a_step_limit_does_not_count_the_wait_for_a_turn(tmp_path: Path, host: PictureHost) -> None:
    host.faults.append((429, {"Retry-After": "1"}))
    (row,) = animate(tmp_path, host, 1, fetch_timeout_s=0.4, max_attempts=1)
    assert row["status"] == "succeeded"


def test_the_rate_of_a_host_is_kept(tmp_path: Path, host: PictureHost) -> None:
    animate(tmp_path, host, 5, per_host_rate=10)
    times = [at for at, _, _ in host.asked]
    assert times[-1] - times[0] > 0.35


def test_http_and_private_hosts_need_their_settings(tmp_path: Path, host: PictureHost) -> None:
    (row,) = animate(tmp_path, host, 1, allow_http=False)
    assert "http:// is not fetched; use https:// or s3://, or allow it with --allow-http" in row["error_message"]
    assert host.asked == []


def test_a_private_host_needs_its_network(tmp_path: Path, host: PictureHost) -> None:
    (row,) = animate(tmp_path, host, 1, allowed_networks="10.0.0.0/8")
    assert row["error_code"] == "address_refused"
    assert host.asked == []


def test_headers_go_to_their_host_alone_and_into_no_record(tmp_path: Path, host: PictureHost) -> None:
    headers = ["127.0.0.1:Authorization:Bearer 5ecret", "other.test:X-Key:5ecret2"]
    (row,) = animate(tmp_path, host, 1, header=headers, user_agent="shop-bot/2")
    assert row["status"] == "succeeded"
    (_, _, fields) = host.asked[0]
    assert (fields["Authorization"], fields["User-Agent"], "X-Key" in fields) == ("Bearer 5ecret", "shop-bot/2", False)
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"5ecret" not in written


@pytest.mark.parametrize("header", ["a.test", "a.test:Host:b.test", "a.test:X-A:5ecret\r\nX-B: 2", ":X-A:5ecret"])
def test_headers_that_cannot_be_sent_are_refused_and_not_quoted(header: str) -> None:
    with pytest.raises(ConfigError, match="header") as refused:
        build(CatalogConfig, {"manifest": "m", "output": "o", "model": DEMO, "header": [header]})
    assert "5ecret" not in str(refused.value)


@pytest.mark.parametrize("tag", ["noai", "index, NoImageAI", "pia-ray: noai"])
def test_pictures_whose_owner_refuses_models_are_left_out(tmp_path: Path, host: PictureHost, tag: str) -> None:
    host.fields = {"X-Robots-Tag": tag}
    (row,) = animate(tmp_path, host, 1)
    assert row["error_code"] == "fetch_opted_out"


@pytest.mark.parametrize("tag", ["noindex", "otherbot: noai"])
def test_other_directives_and_other_robots_do_not_count(tmp_path: Path, host: PictureHost, tag: str) -> None:
    host.fields = {"X-Robots-Tag": tag}
    (row,) = animate(tmp_path, host, 1)
    assert row["status"] == "succeeded"


def test_owners_refusals_are_ignored_where_the_run_says_so(tmp_path: Path, host: PictureHost) -> None:
    host.fields = {"X-Robots-Tag": "noai"}
    (row,) = animate(tmp_path, host, 1, ignore_opt_outs=True)
    assert row["status"] == "succeeded"


def test_validate_waits_as_a_run_and_counts_what_is_unreachable_apart(
    tmp_path: Path, host: PictureHost, capsys: pytest.CaptureFixture[str]
) -> None:
    host.faults.extend([(429, {"Retry-After": "1"}), (408, {})])
    manifest = str(write(tmp_path, host, 2))
    reach = ["--allow-http", "--allowed-networks", "127.0.0.0/8", "--model", "demo"]
    assert main(["validate", manifest, "--fetch", "--json", *reach]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"rows": 2, "bad": 0}
    host.faults.extend([(500, {})] * 2)
    assert main(["validate", manifest, "--fetch", "--max-attempts", "1", *reach]) == 1
    assert "2 work items, 0 bad, 2 unreachable now" in capsys.readouterr().out
