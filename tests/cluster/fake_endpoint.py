"""The endpoint as `serve deploy` imports it, with fakes that take seconds and load no torch in place of animators."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import serve

from pia_ray.config.serve import load_serve
from pia_ray.online.serve import build_endpoint
from pia_ray.testing import make_fake_engine


def build_app(settings: Mapping[str, Any]) -> serve.Application:
    """`pia_ray.online.serve.build_app` with fakes."""
    return build_endpoint(
        load_serve(None, dict(settings)), make_animator=partial(make_fake_engine, seconds_per_step=0.3)
    )
