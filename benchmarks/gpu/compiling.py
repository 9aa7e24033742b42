"""Engines whose UNet is compiled, and the seconds and graphs that it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from torch._dynamo.utils import counters

from benchmarks.gpu.random_model import RandomModel, animate
from pia_ray.pia.components import CompileMode, Components
from pia_ray.pia.engine import Engine
from pia_ray.types import PreparedRequest


@dataclass(frozen=True)
class Compiled:
    """A compiled engine, and what it took until a row ran without compiling anything."""

    seconds: float
    graphs: int
    rows: int
    """Rows that were animated meanwhile."""


def compiled_engine(components: Components, mode: CompileMode) -> Engine:
    """An engine for one row at a time that compiles; `components` may be in use by others."""
    return Engine(replace(components, compile_mode=mode), batch_size=1)


def compile_for(engine: Engine, model: RandomModel, request: PreparedRequest) -> Compiled:
    """Animates the request until nothing more is compiled for it.

    Where torch compiles beside the rows, several rows run before the first graph is there: for at most three times the
    usual seconds.
    """
    started, first, rows, seconds = time.perf_counter(), num_graphs(), 0, 0.0
    while True:
        before = num_graphs()
        animate(engine, request)
        rows += 1
        now = time.perf_counter() - started
        if num_graphs() > before:
            seconds = now
        elif num_graphs() > first or now >= 3 * model.size.compile_s:
            return Compiled(seconds or now, num_graphs() - first, rows)


def num_graphs() -> int:
    """The graphs that torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])
