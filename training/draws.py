"""Seeded random numbers of one training run, whose whole state can be saved and set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class Draws:
    """Random tensors on one device, and random choices for text, from one seed."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.words = random.Random(seed)  # noqa: S311 - nothing secret

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        """Uniform numbers in [low, high)."""
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def chance(self, probability: float, *shape: int) -> torch.Tensor:
        """True with the given probability."""
        return torch.rand(shape, generator=self.generator, device=self.device) < probability

    def weighted(self, weights: Sequence[float], count: int) -> torch.Tensor:
        """Indices drawn in proportion to the weights, with replacement."""
        table = torch.tensor(weights, dtype=torch.float32, device=self.device)
        return torch.multinomial(table, count, replacement=True, generator=self.generator)

    def one_of(self, items: Sequence[Item]) -> Item:
        """One item, each as likely as the others."""
        return self.words.choice(items)

    def happens(self, probability: float) -> bool:
        """True with the given probability, for decisions outside of tensors."""
        return self.words.random() < probability

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on from here."""
        return {"generator": self.generator.get_state(), "words": self.words.getstate()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.generator.set_state(state["generator"].cpu())
        version, numbers, gauss = state["words"]
        self.words.setstate((version, tuple(numbers), gauss))
