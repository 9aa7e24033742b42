"""Whether predictions are finite, answered when the device gets there: nothing here waits for a GPU."""

from __future__ import annotations

import torch


class FiniteCheck:
    """Which of N predictions hold neither NaN nor infinity, once that is known.

    On a GPU the answer is copied to the host behind the forward that made the predictions; asking for it while the GPU
    is still busy gives none.
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
        """Whether one of these predictions is known not to be finite."""
        return self.known and not bool(self._finite[part].all())

    @property
    def known(self) -> bool:
        """Whether the answer is there."""
        return self._copied is None or self._copied.query()
