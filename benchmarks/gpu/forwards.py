"""The forwards of an engine, watched from outside: how large they were, and memory that ends where a test wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pia_ray.pia.components import Components
from pia_ray.pia.model_cache import Model
from pia_ray.pia.unet.forward import BatchEntry, Forward


class WatchedForward:
    """A model's forward that keeps the number of evaluations of each call that succeeds, in `sizes`, or fails.

    `most` stands for a device whose memory ends: larger calls fail as they do there.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.sizes: list[int] = []
        self.failed: list[int] = []
        self.most: int | None = None

    def predict(self, entries: Sequence[BatchEntry], **options: Any) -> torch.Tensor:
        """As `Forward.predict`."""
        self.failed.append(len(entries))
        if self.most is not None and len(entries) > self.most:
            raise torch.OutOfMemoryError(f"no memory for more than {self.most} evaluations, as the test asks")
        predictions = self._forward.predict(entries, **options)
        self.sizes.append(self.failed.pop())
        return predictions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)


def watched(components: Components) -> tuple[Model, WatchedForward]:
    """A model for `Engine.join`, and its forward."""
    model = Model(components)
    forward = WatchedForward(model.forward)
    model.forward = forward  # type: ignore[assignment]  # it has all of its attributes
    return model, forward
