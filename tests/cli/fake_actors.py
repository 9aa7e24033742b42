"""`pia-ray` with a `FakeAnimator` in each actor, which loads no torch: for what a command says, and how it ends.

Run: `fake_actors.py SECONDS_PER_STEP WORDS...`, the words of a command.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from pia_ray.catalog import cluster_run
from pia_ray.testing import make_fake


def run_with_fakes(*, seconds_per_step: float = 0.0) -> Callable[..., Any]:
    """`run_catalog` with fakes in its actors."""
    return partial(cluster_run.run_catalog, make_animator=partial(make_fake, seconds_per_step=seconds_per_step))


if __name__ == "__main__":
    cluster_run.run_catalog = run_with_fakes(seconds_per_step=float(sys.argv[1]))
    del sys.argv[1]
    runpy.run_module("pia_ray.cli", run_name="__main__", alter_sys=True)
