"""The work beside the endpoint's answers: what is told where it ends by a fault."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pia_ray.config import ServeConfig
from pia_ray.online.jobs import JobStore
from pia_ray.online.local import LocalRenderer
from pia_ray.online.service import create_endpoint
from pia_ray.testing import FakeAnimator


class BrokenStore(JobStore):
    """A store with a bug: its sweep fails with what no store raises."""

    def sweep(self, *args: Any, **how: Any) -> int:
        raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("broken", [False, True])
def test_a_process_that_works_on_no_jobs_any_more_asks_to_be_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: bool
):
    config = ServeConfig.model_validate({"storage": str(tmp_path)})
    jobs = (BrokenStore if broken else JobStore)(config.storage)
    with FakeAnimator(config.models["demo"]) as animator, caplog.at_level(logging.CRITICAL):
        app = create_endpoint(LocalRenderer(animator, config), jobs, config)
        with TestClient(app, base_url="http://127.0.0.1:8000") as client:
            deadline = time.monotonic() + 60
            while broken and client.get("/healthz").status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            for path in ("/healthz", "/readyz"):
                answer = client.get(path)
                assert answer.status_code == (503 if broken else 200)
                assert not broken or answer.json()["error"]["code"] == "not_ready"
    assert ("the work on video jobs has ended" in caplog.text) == broken
