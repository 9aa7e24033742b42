"""One UNet evaluation, as a row asks for it: its branches, their conditioning, and the generator that asks.

Knows no scheduler and no UNet: `denoising` makes evaluations, the engine packs them, `unet` runs them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal

import torch

Window = tuple[int, ...]
"""Frames that the motion modules see as their positions 0, 1, 2 ..."""

Text = Literal["prompt", "negative_prompt"]
"""Which of the two texts a side of guidance is told."""


@dataclass(frozen=True)
class ImageTokens:
    """What cross-attention reads of an IP-Adapter's picture, and how much that counts."""

    tokens: torch.Tensor
    """[K, C], with C as of the prompt."""
    scale: float


@dataclass(frozen=True)
class Branch:
    """One side of guidance: what the UNet is told beside the noisy latents."""

    prompt: torch.Tensor
    """[L, C]"""
    mask: torch.Tensor
    """Affinity, [1, T, 1, 1] or [1, T, h, w]."""
    condition: torch.Tensor
    """Condition latent, [4, 1, h, w] or [4, T, h, w]."""
    image: ImageTokens | None = None
    """The picture whose look the video takes on."""
    frames: tuple[int, ...] | None = None
    """Frames of the latents that this side looks at, T of them; None: all."""
    text: Text = "prompt"
    """Which text `prompt` embeds."""

    def view(self, latents: torch.Tensor) -> torch.Tensor:
        """What this side sees of latents [4, all frames, h, w]: [4, T, h, w]."""
        return latents if self.frames is None else take(latents, self.frames)

    def within(self, window: Window) -> Branch:
        """The same side of guidance for the frames of a window."""
        return replace(self, mask=take(self.mask, window), condition=take(self.condition, window), frames=window)


@dataclass(frozen=True)
class Evaluation:
    """What a program asks of the UNet: the same noisy latents under one or more branches."""

    latents: torch.Tensor
    """[4, T, h, w], float32, scaled as the scheduler wants its model input."""
    timestep: float
    branches: tuple[Branch, ...]
    step: int
    """Denoising steps finished before this evaluation."""
    num_steps: int
    """Denoising steps the row runs in all."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What must be equal within one forward: (T, h, w) and the length of the prompt embedding."""
        first = self.branches[0]
        num_frames = self.latents.shape[1] if first.frames is None else len(first.frames)
        return (num_frames, *self.latents.shape[2:], first.prompt.shape[0])


Program = Generator[Evaluation, torch.Tensor, torch.Tensor]
"""Yields evaluations, receives predictions [branches, 4, T, h, w] in float32, returns latents [4, T, h, w]."""


def take(frames: torch.Tensor, window: Window) -> torch.Tensor:
    """The frames of a window out of [C, T, h, w]; what is the same for all frames ([C, 1, h, w]) stays so."""
    if frames.shape[1] == 1:
        return frames
    if window == tuple(range(window[0], window[0] + len(window))):
        return frames[:, window[0] : window[-1] + 1]
    return frames[:, list(window)]
