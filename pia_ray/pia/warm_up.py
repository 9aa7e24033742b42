"""The warm-up of an engine: rows that nobody waits for, so that later ones find kernels chosen and code compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.errors import ConfigError, RowError
from pia_ray.pia.engine import Engine
from pia_ray.pia.model_cache import Model
from pia_ray.prepare import prepare
from pia_ray.types import AnimationRequest, PreparedRequest

log = logging.getLogger(__name__)

STEPS: Final = 2
"""Denoising steps of a row of a warm-up."""

MOST_RUNS: Final = 128
"""Most runs by which the size of forwards is found; a size that memory bounds anew each time never settles."""


def warm_up(engine: Engine, model: Model, config: ModelConfig, rows: Sequence[AnimationParams]) -> None:
    """Runs rows of these params in an engine that has none, and compiles what the model compiles.

    For each: one row, which chooses kernels; on a GPU, as many as it takes to find the size of forwards; then, where
    kinds of forward are compiled, one row and as many as fill a forward.

    Raises:
        ConfigError: such a row cannot be animated; names its size.
        DeviceLost: the GPU is beyond repair for this process.
    """
    for params in rows:
        started = time.perf_counter()
        size = f"{params.width}x{params.height}x{params.num_frames}"
        try:
            num = _warm_up(engine, model, _request_of(params, config))
        except RowError as error:
            raise ConfigError(f"warm: {size}: {error.message}") from error
        log.info("warmed up for %s, %d rows together, in %.1f s", size, num, time.perf_counter() - started)
    engine.forget_ended()


def _warm_up(engine: Engine, model: Model, request: PreparedRequest) -> int:
    """Warms up for one size; returns the rows that fill a forward."""
    tuner = engine.tuner_of(model, _run(engine, model, request, 1))

    def most() -> int:
        return max(1, min(engine.room, tuner.limit // request.params.num_branches))

    for _ in range(MOST_RUNS):
        if tuner.settled:
            break
        _run(engine, model, request, most())
    num = most()
    with model.forward.compiling():
        for together in sorted({1, num}):
            _run(engine, model, request, together)
    return num


def _run(engine: Engine, model: Model, request: PreparedRequest, num: int) -> tuple[int, ...]:
    """Runs so many such rows together; returns the shape of their evaluations."""
    joined = [engine.join(request, model) for _ in range(num)]
    shape = joined[0].evaluation.shape
    while engine.rows:
        for _, outcome in engine.step():
            if not isinstance(outcome, Animation):
                raise outcome
    return shape


def _request_of(params: AnimationParams, config: ModelConfig) -> PreparedRequest:
    assert params.width is not None
    assert params.height is not None
    picture = Image.new("RGB", (params.width, params.height), "grey")
    few = params.model_copy(update={"num_inference_steps": STEPS})
    return prepare(AnimationRequest(picture, few, id="warm-up"), config)
