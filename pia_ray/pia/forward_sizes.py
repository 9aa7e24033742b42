"""The number of UNet evaluations in a forward, for each model and shape of an engine."""

from __future__ import annotations

import time

from pia_ray.config.workers import DEFAULT_BATCH_SIZE
from pia_ray.pia.components import Components
from pia_ray.pia.device.batch_tuner import RETRY_S, START, ForwardTuner
from pia_ray.pia.device.memory import evaluations_that_fit
from pia_ray.pia.device.placement import most_evaluations
from pia_ray.pia.unet.motion_modules import most_positions

_Key = tuple[object, ...]


class ForwardSizes:
    """The tuners of forwards. `batch_size` bounds the rows of a forward; with `tunes` the number that pays is found."""

    def __init__(self, *, batch_size: int, tunes: bool) -> None:
        self._batch_size = batch_size
        self._tunes = tunes
        self._tuners: dict[_Key, ForwardTuner] = {}
        """By model version and shape."""
        self._measured_at: dict[_Key, float] = {}
        """When the free memory for the keys of `_tuners` was measured since a model was last loaded or dropped."""

    @property
    def room(self) -> int:
        """The number of rows in flight that fills forwards of the sizes that are tried, or have been found."""
        if not self._tunes:
            return self._batch_size
        largest = max((tuner.largest for tuner in self._tuners.values()), default=0)
        return max(DEFAULT_BATCH_SIZE, min(self._batch_size, largest // 2))

    def measure_memory(self) -> None:
        """Measures free memory again at the next step; called after weights were loaded, merged or dropped."""
        self._measured_at.clear()

    def of(self, components: Components, shape: tuple[int, ...]) -> ForwardTuner:
        """The tuner of forwards of a model and a shape (T, h, w, L)."""
        # By version, because the id of a dropped model may be used again.
        sized = (components.version, *shape)
        now = time.monotonic()
        # Again after a while, because other processes on the GPU take memory and give it back.
        if (known := self._tuners.get(sized)) is not None and now - self._measured_at.get(sized, -RETRY_S) < RETRY_S:
            return known
        num_frames, height, width = shape[:3]
        device = components.device
        bound = most_positions(components.unet, device)
        most = most_evaluations(self._batch_size, num_frames, height, width, device=device, most_positions=bound)
        # A CPU's best size is known: see placement.CPU_FORWARD_PIXELS.
        start = START if self._tunes and device.type == "cuda" else most
        tuner = self._tuners.setdefault(sized, ForwardTuner(most=most, start=start))
        tuner.room = evaluations_that_fit(components, num_frames=num_frames, height=height, width=width)
        self._measured_at[sized] = now
        return tuner
