"""Trouble of the output is no row's verdict: runs wait, stop and resume; what is the world's fault is tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pia_ray import read_results
from pia_ray.catalog.local import run_local
from pia_ray.catalog.progress import Progress
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import OutputError, OutputUnavailable
from pia_ray.testing import FakeAnimator, make_catalog
from tests.chaos_proxy import ChaosProxy, chaos
from tests.s3_server import s3_server

__all__ = ["chaos", "s3_server"]  # fixtures

DEMO = ModelConfig.named("demo").model_copy(update={"long_edge": 64})


def configure(folder: Path, output: str, *, rows: int, **settings: Any) -> CatalogConfig:
    manifest = make_catalog(folder, rows=rows)
    return build(CatalogConfig, {"manifest": str(manifest), "output": output, "model": DEMO, **settings})


def put_of_video(method: str, path: str) -> bool:
    return method == "PUT" and "/videos/" in path and "probe" not in path


def test_a_store_that_is_away_holds_animations_back_and_fails_no_row(chaos: ChaosProxy, tmp_path: Path) -> None:
    config = configure(tmp_path, f"{chaos.bucket}/out", rows=2)
    chaos.matches = put_of_video
    chaos.faults.extend([500] * 90)
    seen: list[Progress] = []

    def observe(progress: Progress) -> None:
        seen.append(progress)
        if progress.num_waiting:
            chaos.faults.clear()

    with FakeAnimator(DEMO, batch_size=4) as animator:
        assert run_local(config, animator=animator, observe=observe).exit_code == 0
    assert max(progress.num_waiting for progress in seen) >= 1
    assert all(progress.num_failed == 0 for progress in seen)


def test_a_run_out_of_patience_fails_no_row_and_the_same_command_goes_on(chaos: ChaosProxy, tmp_path: Path) -> None:
    config = configure(tmp_path, f"{chaos.bucket}/out", rows=1, patience_s=1)
    chaos.matches = put_of_video
    chaos.faults.extend([500] * 500)
    with FakeAnimator(DEMO, batch_size=4) as animator:
        with pytest.raises(OutputUnavailable) as stopped:
            run_local(config, animator=animator)
        assert stopped.value.exit_code == 4
        assert len(read_results(config.output)) == 0
        chaos.faults.clear()
        assert run_local(config, animator=animator).exit_code == 0


def test_rights_that_are_taken_away_stop_the_run_and_fail_no_row(chaos: ChaosProxy, tmp_path: Path) -> None:
    config = configure(tmp_path, f"{chaos.bucket}/out", rows=6)
    chaos.matches = put_of_video
    chaos.faults.extend([403] * 50)
    with FakeAnimator(DEMO, batch_size=4) as animator:
        with pytest.raises(OutputError) as stopped:
            run_local(config, animator=animator)
        assert stopped.value.exit_code == 2
        assert len(read_results(config.output)) == 0
        chaos.faults.clear()
        assert run_local(config, animator=animator).exit_code == 0
