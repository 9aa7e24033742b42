"""FreeU: a UNet's skip connections weakened and its backbone strengthened. Source: arXiv 2309.11497."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def free_u(unet: Any, factors: tuple[float, float, float, float] | None) -> Iterator[None]:
    """A context in which a UNet runs with FreeU's s1, s2, b1, b2, or as it is where they are None.

    diffusers stores the factors on the UNet, where they would act on the next forward; the context removes them at its
    end.
    """
    if factors is None:
        yield
        return
    s1, s2, b1, b2 = factors
    unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
    try:
        yield
    finally:
        unet.disable_freeu()
