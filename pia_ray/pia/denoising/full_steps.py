"""The denoising steps at which the UNet is evaluated, by the preset of a row; the rest are extrapolated. Numbers only.

The estimate of a run counts with it, so it must load without torch. The distances are measured: docs/speed.md.
"""

from __future__ import annotations

from typing import Final

from pia_ray.config.knobs import AnimationParams

SMOOTH: Final = frozenset({"ddim", "euler", "heun", "kdpm2", "dpm++2m", "dpm++2s", "unipc", "deis"})
"""Schedulers whose predictions lie on a smooth curve.

Not those that draw noise at each step (29 to 34 dB at every third step), nor Karras's sigmas (31 to 37 dB at every
second), nor pndm, which continues its own predictions (36 dB), nor the trailing ones, which are for few-step models.
"""

_STIFF: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "balanced": ((20, 2), (50, 3)),
    "fast": ((12, 2), (25, 3), (50, 5)),
}
"""From so many steps of a schedule on, the distance of evaluated steps. With fewer, and other presets, all are."""

_CALM: Final[dict[str, tuple[tuple[int, int], ...]]] = {
    "balanced": ((6, 2), (25, 3), (50, 4)),
    "fast": ((6, 3), (25, 4), (50, 6)),
}
"""The same for rows that are not stiff."""


def full_steps(params: AnimationParams, *, steps: int, count: int) -> tuple[int, ...]:
    """The steps at which the UNet is evaluated, of the last `count` of a schedule of `steps`, numbered from 0.

    The first, every so many from there on, and the last. Of stiff rows the first two, every so many from the second on,
    and the last two where the distance alone ends on the last.
    """
    distance = _distance(params, steps)
    if not is_stiff(params):
        return tuple(sorted({*range(0, count, distance), count - 1}))
    full = {0, *range(1, count, distance), count - 1}
    if (count - 2) % distance == 0:
        full.add(max(0, count - 2))
    return tuple(sorted(full))


def is_stiff(params: AnimationParams) -> bool:
    """Whether predictions bend more: with guidance, and where a step has two evaluations."""
    return params.num_branches > 1 or params.scheduler in ("heun", "kdpm2")


def _distance(params: AnimationParams, steps: int) -> int:
    if params.scheduler not in SMOOTH or params.eta:
        return 1
    table = _STIFF if is_stiff(params) else _CALM
    return max((distance for least, distance in table.get(params.preset, ()) if steps >= least), default=1)
