"""The phases of the UNet's training: what is shown when, how often, and how fast is learnt.

Motions with little weight stay untrained, and warping by the prompt starts with a plateau that pans leave soonest: so
pans first, then zoom and rotation, then what is faint, then everything with all frames, then more of stillness, also
with the masks of motion, then detail, in larger pictures and at less noise, and at last how much of it the last steps
of sampling leave.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from training.prompts import MOTIONS


def weights(*, pans: float, zooms: float, turns: float, **others: float) -> tuple[float, ...]:
    """Weights in the order of MOTIONS; motions that are not named are left out."""
    groups = {"pan": pans, "zoom": zooms, "rotate": turns}
    return tuple(groups.get(name.split()[0], others.get(name, 0.0)) for name in MOTIONS)


@dataclass(frozen=True)
class Phase:
    """One phase. The learning rate is held for `hold` of the steps, then falls along a cosine."""

    steps: int
    rate: float
    weights: tuple[float, ...]
    sizes: dict[int, float] = field(default_factory=lambda: {64: 1.0})  # long edge: weight
    frames: dict[int, float] = field(default_factory=lambda: {2: 1.0})  # chosen frames, 0 for all: weight
    first_step: float = 0.5  # share of samples at the last timestep, where sampling begins
    hold: float = 0.4
    memory: float = 0.995  # of the moving average
    guidance: float = 0.05  # weight of the losses that show where pixels come from
    detail: float = 0.0  # extra weight of errors in what is finer than three latents
    texture: float = 0.0  # weight of there being as much detail as wanted, at little noise
    late: float = 0.0  # share of samples at little noise, where detail is made
    own: float = 0.0  # share of samples at little noise that begin with what the model itself has made of them


PHASES: Final = {
    "pans": Phase(2000, 3e-3, weights(pans=1.5, zooms=0.3, turns=0.2, still=0.1), first_step=0.6),
    "camera": Phase(2600, 2.5e-3, weights(pans=1.2, zooms=2.2, turns=1.3, sway=0.5, waves=0.3, still=0.1)),
    "effects": Phase(
        1200,
        1.5e-3,
        weights(pans=0.7, zooms=0.8, turns=0.9, sway=1.6, waves=2.2, flicker=1.0, pulse=1.2, still=0.2),
        sizes={64: 0.45, 80: 0.2, 96: 0.25, 128: 0.1},
        frames={2: 0.6, 3: 0.4},
        hold=0.9,
    ),
    "whole": Phase(
        1200,
        1.0e-3,
        weights(pans=0.9, zooms=0.9, turns=0.9, sway=1.0, waves=1.8, flicker=0.5, pulse=1.0, still=0.2),
        sizes={64: 0.3, 80: 0.15, 96: 0.4, 128: 0.15},
        frames={2: 0.3, 4: 0.45, 0: 0.25},
        first_step=0.35,
        hold=0.15,
        memory=0.99,
    ),
    "guided": Phase(
        2400,
        1.5e-3,
        weights(pans=0.9, zooms=1.1, turns=0.9, sway=0.9, waves=1.3, flicker=1.5, pulse=1.0, still=0.2),
        sizes={64: 0.45, 96: 0.35, 128: 0.2},
        frames={2: 0.4, 4: 0.4, 0: 0.2},
        first_step=0.4,
        hold=0.5,
        memory=0.99,
    ),
    "still": Phase(
        300,
        5e-4,
        weights(pans=0.8, zooms=1.0, turns=0.8, sway=0.8, waves=1.2, flicker=1.5, pulse=1.0, still=1.6),
        sizes={64: 0.45, 96: 0.35, 128: 0.2},
        frames={2: 0.4, 4: 0.4, 0: 0.2},
        hold=0.2,
        memory=0.99,
    ),
    "fine": Phase(
        1720,
        1.5e-3,
        weights(pans=0.9, zooms=1.1, turns=0.9, sway=0.9, waves=1.3, flicker=1.5, pulse=1.0, still=0.6),
        sizes={64: 0.5, 96: 0.4, 128: 0.1},
        frames={2: 0.45, 4: 0.4, 0: 0.15},
        first_step=0.3,
        hold=0.5,
        memory=0.99,
    ),
    "detail": Phase(
        2150,
        2e-3,
        weights(pans=0.9, zooms=1.1, turns=0.9, sway=0.9, waves=1.3, flicker=1.0, pulse=1.0, still=0.5),
        sizes={64: 0.5, 96: 0.4, 128: 0.1},
        frames={2: 0.45, 4: 0.4, 0: 0.15},
        first_step=0.45,
        hold=0.5,
        memory=0.99,
        guidance=0.4,
        detail=1.0,
    ),
    "texture": Phase(
        300,
        5e-4,
        weights(pans=0.9, zooms=1.1, turns=0.9, sway=0.9, waves=1.3, flicker=1.0, pulse=1.0, still=0.5),
        sizes={64: 0.45, 96: 0.45, 128: 0.1},
        frames={2: 0.45, 4: 0.4, 0: 0.15},
        first_step=0.4,
        hold=0.4,
        memory=0.99,
        guidance=0.02,
        detail=1.0,
        texture=120.0,
        late=0.7,
        own=1.0,
    ),
}
