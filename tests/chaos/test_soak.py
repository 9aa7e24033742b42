"""`make soak`: random faults of all kinds for `PIA_RAY_SOAK_S` seconds, from `PIA_RAY_SOAK_SEED` or a printed seed."""

from __future__ import annotations

import os
import random

import pytest

from tests.chaos.soak import soak


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the sockets of the proxy, whose clients are killed
def test_nothing_is_lost_redone_or_falsely_failed_under_random_faults() -> None:
    seed = int(os.environ.get("PIA_RAY_SOAK_SEED") or random.randrange(10**6))
    report = soak(seed, seconds=float(os.environ.get("PIA_RAY_SOAK_S", "600")))
    assert report.rounds
    assert not report.problems, "\n".join(report.problems)
