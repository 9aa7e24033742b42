"""PSNR and SSIM of two videos."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

Frames = np.ndarray[Any, Any]
"""uint8 [T, H, W, 3]."""

WINDOW: Final = 7
_FLOORS: Final = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)


def psnr(one: Frames, other: Frames) -> float:
    """The peak signal-to-noise ratio over all frames, in dB; infinite for equal videos."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(one: Frames, other: Frames) -> float:
    """The mean structural similarity of all windows of 7 x 7 px and channels: 1 for equal videos.

    Source: Wang et al., doi:10.1109/TIP.2003.819861, with flat windows, as scikit-image computes it by default.
    """
    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _means(x), _means(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variances = (_means(x * x) - mean_x**2 + _means(y * y) - mean_y**2) * unbiased
    covariance = (_means(x * y) - mean_x * mean_y) * unbiased
    light, structure = _FLOORS
    alike = (2 * mean_x * mean_y + light) / (mean_x**2 + mean_y**2 + light)
    return float((alike * (2 * covariance + structure) / (variances + structure)).mean())


def _means(values: Frames) -> Frames:
    """The means of all windows of [T, H, W, C]."""
    sums = np.pad(values, ((0, 0), (1, 0), (1, 0), (0, 0))).cumsum(1).cumsum(2)
    rows = sums[:, WINDOW:] - sums[:, :-WINDOW]
    means: Frames = (rows[:, :, WINDOW:] - rows[:, :, :-WINDOW]) / WINDOW**2
    return means
