"""The predictions of steps at which the UNet is not evaluated, from those before. `full_steps` chooses the steps.

A deterministic sampler changes its latents little from one step to the next, so its predictions lie on a smooth curve.
A polynomial through the last two or three continues it; docs/speed.md has its error.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container

import torch


class Extrapolation:
    """The last predictions of one run of a sampler, and their continuation.

    `full` are the steps at which the UNet is evaluated, `points` the predictions that a polynomial goes through: 2 for
    a line, 3 for a parabola. A sampler with `order` evaluations a step has a curve for each of them, because the
    latents of the second one are others.
    """

    def __init__(self, full: Container[int], *, points: int = 2, order: int = 1) -> None:
        self._full = full
        self._known: list[deque[tuple[int, torch.Tensor]]] = [deque(maxlen=points) for _ in range(order)]

    def add(self, index: int, prediction: torch.Tensor) -> None:
        """Keeps the prediction of an evaluation, [4, T, h, w]; those before have a smaller index."""
        step, which = divmod(index, len(self._known))
        self._known[which].append((step, prediction))

    def clear(self) -> None:
        """Drops the predictions, because those that follow do not continue them."""
        for known in self._known:
            known.clear()

    def at(self, index: int) -> torch.Tensor | None:
        """The prediction of an evaluation by Lagrange's polynomial; None where the UNet has to be evaluated."""
        step, which = divmod(index, len(self._known))
        known = self._known[which]
        if step in self._full or not known:
            return None
        prediction = torch.zeros_like(known[0][1])
        for position, each in known:
            weight = math.prod((step - other) / (position - other) for other, _ in known if other != position)
            prediction.add_(each, alpha=weight)
        return prediction
