"""The fastest of several ways to compute the same, for each kind of call, found by timing them on the device.

All ways are equal to float tolerance. What is known holds for all models of the process, because it is the device's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch

from pia_ray.pia.device.errors import device_is_lost

log = logging.getLogger(__name__)

LEAST_GAIN: Final = 0.1
"""A way replaces the default only if it takes this share less time."""

SAMPLES: Final = 2

TIMED_FLOP: Final = 250_000_000
"""Calls with more operations are timed with fewer pictures, rows or heads: some hundredths of a second for a kind."""

MOST_TIMED_FLOP: Final = 2_000_000_000
"""The same for calls with large weights, whose reading counts for less with more rows."""

TIMED_ROWS: Final = 1000
"""Rows, or pixels, that are timed with a weight that allows it."""

DEFAULT: Final = "default"
"""The name of the first way, which torch or diffusers would take."""

Kind = tuple[object, ...]
"""Operator, sizes and precision: equal for calls that take the same time."""

Way = Callable[[], object]

Clock = Callable[[str, Way], float]
"""The seconds of one run of a way, by its name.

Raises RuntimeError or AttributeError where it cannot run.
"""


class Choices:
    """The fastest way of each kind of call.

    A kind is timed at its first call, or with `waits` only within `choosing`; until then the default runs.
    """

    def __init__(self, clock: Clock, *, waits: bool = False) -> None:
        self._clock = clock
        self._waits = waits
        self._chosen: dict[Kind, str] = {}

    def __deepcopy__(self, memo: object) -> Choices:
        return self  # the timings are the device's, not the model's

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """A context in which kinds are timed; a GPU is waited for."""
        waits, self._waits = self._waits, False
        try:
            yield
        finally:
            self._waits = waits

    def choose(self, kind: Kind, ways: Callable[[], Mapping[str, Way]]) -> str:
        """The name of the fastest way; `ways` is called where they have to be timed, the first is the default."""
        if torch.compiler.is_dynamo_compiling() or self._waits or self.name_of(kind):
            return self.name_of(kind) or DEFAULT
        name = self._chosen[kind] = self._fastest(kind, ways())
        return name

    # Without this decorator, code would be compiled again whenever another kind has been timed.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def name_of(self, kind: Kind) -> str:
        """The name of the fastest way, or "" where the kind has not been timed."""
        return self._chosen.get(kind, "")

    def known(self) -> dict[str, str]:
        """The names that were found, by kind."""
        return {" ".join(map(str, kind)): name for kind, name in self._chosen.items()}

    def _fastest(self, kind: Kind, ways: Mapping[str, Way]) -> str:
        """The ways run by turns, and the least time of each counts, so that a busy machine delays none more often."""
        left, times = dict(ways), dict.fromkeys(ways, float("inf"))
        for sample in range(SAMPLES + 1):
            for name, way in list(left.items()):
                try:
                    seconds = self._clock(name, way)
                except (RuntimeError, AttributeError) as error:  # another torch may lack its operator
                    if device_is_lost(error) or name == DEFAULT:
                        raise
                    del left[name]  # it cannot run here
                    continue
                if sample:  # the first run loads code and makes ready
                    times[name] = min(times[name], seconds)
        best = min(left, key=times.__getitem__)
        name = best if times[best] < times[DEFAULT] * (1 - LEAST_GAIN) else DEFAULT
        log.debug("%s: %s of %s", kind, name, {each: round(seconds, 6) for each, seconds in times.items()})
        return name


def size_class(num: int) -> str:
    """A name that is equal for numbers of about the same size, within a factor of 4, so that few kinds are timed."""
    return f"4^{num.bit_length() // 2}"


def timed_share(flop: int, *, num_weights: int = 0) -> float:
    """The share of a call's operations that is timed, at most 1; a call with weights has two for each and each row."""
    return min(1.0, max(TIMED_FLOP, min(MOST_TIMED_FLOP, 2 * TIMED_ROWS * num_weights)) / flop)


def sample_of(pictures: torch.Tensor, share: float) -> torch.Tensor:
    """So many of the pictures [N, C, h, w], or rows of the first one, that this share of the operations is timed."""
    num, height = len(pictures), pictures.shape[2]
    if share * num >= 1:
        return pictures[: int(share * num)]
    return pictures[:1, :, : max(4, int(share * num * height))]


def seconds_on_cpu(_: str, way: Way) -> float:
    """CPU seconds of the calling thread, which does its share of every operator; other processes do not count."""
    started = time.thread_time()
    way()
    return time.thread_time() - started


def seconds_on_gpu(_: str, way: Way) -> float:
    """Seconds of one run on the GPU, which is waited for."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    way()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1000


ON_CPU: Final = Choices(seconds_on_cpu)
ON_GPU: Final = Choices(seconds_on_gpu, waits=True)


def choices_on(device: torch.device) -> Choices | None:
    """The process's choices for this kind of device; None where nothing can be timed."""
    return {"cpu": ON_CPU, "cuda": ON_GPU}.get(device.type)
