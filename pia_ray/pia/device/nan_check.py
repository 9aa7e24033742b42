"""Whether predictions are finite. The device computes it in its own time: nothing here waits for a GPU."""

from __future__ import annotations

import torch


class FiniteCheck:
    """A check of N predictions for NaN and infinity.

    On a GPU the result is copied to the host after the forward that makes the predictions. It is not `known` before.
    """

    def __init__(self, predictions: torch.Tensor) -> None:
        finite = torch.isfinite(predictions).flatten(1).all(1)  # [N]
        self._copied: torch.cuda.Event | None = None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._finite = finite

    def fails(self, part: slice) -> bool:
        """Whether one of these predictions is known to hold NaN or infinity."""
        return self.known and not bool(self._finite[part].all())

    @property
    def known(self) -> bool:
        """Whether the result has reached the host."""
        return self._copied is None or self._copied.query()
