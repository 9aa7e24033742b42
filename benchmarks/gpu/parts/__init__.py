"""The parts, cheapest first, so that a short time gives the most findings."""

from __future__ import annotations

from typing import Final

from benchmarks.gpu.part import Part
from benchmarks.gpu.parts import (
    batches,
    catalogue,
    compile_modes,
    endpoint,
    kernels,
    out_of_memory,
    parity,
    presets,
    resident,
    waits,
)

PARTS: Final[tuple[Part, ...]] = (
    kernels.PART,
    waits.PART,
    presets.PART,
    batches.PART,
    out_of_memory.PART,
    parity.PART,
    resident.PART,
    endpoint.PART,
    catalogue.PART,
    compile_modes.PART,
)
