"""TF32: products of float32 matrices with factors of 10 bits, which GPUs since Ampere do several times faster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pia_ray.pia.components import Components


@contextmanager
def products_of(components: Components) -> Iterator[None]:
    """Lets products of float32 matrices be made in TF32 inside, where the model's `dtype` says so.

    The setting is the process's, so only the thread that runs the forwards uses it, and restores it. Work of other
    threads that must not depend on the time when it runs takes no such products.
    """
    if not components.tf32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
