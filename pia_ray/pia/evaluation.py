"""One UNet evaluation of a row: its guidance branches, their conditioning, and the type of the program that yields it.

Knows no scheduler and no UNet: `denoising` makes evaluations, the engine packs them, `unet` runs them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from pia_ray.pia.transfers import to_device

Window = tuple[int, ...]
"""Frames that the motion modules see at their positions 0, 1, 2 ..."""

Text = Literal["prompt", "negative_prompt"]
"""The text of a guidance branch."""


@dataclass(frozen=True)
class ImageTokens:
    """The tokens that cross-attention reads of an IP-Adapter's picture, and their weight."""

    tokens: torch.Tensor
    """[K, C], with C as of the prompt."""
    scale: float


@dataclass(frozen=True)
class Branch:
    """One branch of guidance: the inputs of the UNet besides the noisy latents."""

    prompt: torch.Tensor
    """[L, C]"""
    mask: torch.Tensor
    """Affinity, [1, T, 1, 1] or [1, T, h, w]."""
    condition: torch.Tensor
    """Condition latent, [4, 1, h, w] or [4, T, h, w]."""
    image: ImageTokens | None = None
    """The IP-Adapter's picture."""
    frames: tuple[int, ...] | None = None
    """The T frames of the latents that this branch evaluates; None: all."""
    text: Text = "prompt"
    """The text that `prompt` embeds."""

    def frames_of(self, latents: torch.Tensor) -> torch.Tensor:
        """This branch's frames, [4, T, h, w], of latents [4, all frames, h, w]."""
        return latents if self.frames is None else select_frames(latents, self.frames)

    def for_window(self, window: Window) -> Branch:
        """The same branch for the frames of a window."""
        return replace(
            self, mask=select_frames(self.mask, window), condition=select_frames(self.condition, window), frames=window
        )


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the UNet: the same noisy latents under one or more branches."""

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
        """(T, h, w, L), with L the length of the prompt embedding: equal for all evaluations of one forward."""
        first = self.branches[0]
        num_frames = self.latents.shape[1] if first.frames is None else len(first.frames)
        return (num_frames, *self.latents.shape[2:], first.prompt.shape[0])


Program = Generator[Evaluation, torch.Tensor, torch.Tensor]
"""Yields evaluations, receives predictions [branches, 4, T, h, w] in float32, returns latents [4, T, h, w]."""


def select_frames(frames: torch.Tensor, window: Window) -> torch.Tensor:
    """The frames of a window out of [C, T, h, w]; a tensor that holds for all frames, [C, 1, h, w], comes back as it
    is."""
    if frames.shape[1] == 1:
        return frames
    if window == tuple(range(window[0], window[0] + len(window))):
        return frames[:, window[0] : window[-1] + 1]
    return frames.index_select(1, to_device(torch.tensor(window), frames.device))
