"""A network that enlarges finished frames, in tiles on the model's device, while the engine's forwards go on.

Knows no files: `loading.upscaler_file` reads it. One tile at a time is on the device, in a stream of the calling
thread, so that a forward never waits for more than that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from pia_ray.errors import DeviceLost, NonFiniteFrames, OutOfMemory
from pia_ray.pia.device.errors import device_is_lost, is_out_of_memory

TILE: Final = 256
"""`Upscaler.tile` at first."""

LEAST_TILE: Final = 32
"""Side of the least tile, in px; where not even that fits in memory, the row fails."""

MARGIN: Final = 24
"""Pixels round a tile that the network sees and that its neighbours show. ESRGAN's own code takes 10."""

ACTIVATION_WIDTHS: Final = 192
"""Values alive at the peak of a tile, per enlarged pixel: three times the 64 channels that ESRGAN has there."""

log = logging.getLogger(__name__)

_Array = np.ndarray[Any, Any]


@dataclass(eq=False)
class Upscaler:
    """A warm network. Calls of several threads follow one another, so that the memory of one tile is enough."""

    network: torch.nn.Module
    """Takes RGB [1, 3, H, W], 0 to 1, and gives [1, 3, scale H, scale W]."""
    scale: int
    """By how much the network itself enlarges."""
    name: str
    """Its architecture, for logs."""
    device: torch.device
    dtype: torch.dtype
    tile: int = TILE
    """Pixels of a side of a tile's own part; halved where memory runs out."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def reserved_bytes(self) -> int:
        """The bytes of the device that a tile takes, beside the network's weights."""
        side = self.scale * (self.tile + 2 * MARGIN)
        return ACTIVATION_WIDTHS * side * side * self.dtype.itemsize

    @torch.inference_mode()
    def enlarge(self, frames: _Array, factor: int) -> _Array:
        """Frames uint8 [T, H, W, 3] -> uint8 [T, factor H, factor W, 3].

        Where the network enlarges by more or less than `factor`, its result is brought to that size.

        Raises:
            OutOfMemory: not even the smallest tile fits on the device.
            NonFiniteFrames: the network gives NaN or infinity also in float32.
            DeviceLost: the GPU needs a new process.
        """
        count, height, width = frames.shape[:3]
        enlarged = np.empty((count, factor * height, factor * width, 3), np.uint8)
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with self._lock, torch.cuda.stream(stream):
            for source, target in zip(frames, enlarged, strict=True):
                self._enlarge_frame(source, target, factor)
        return enlarged

    def _enlarge_frame(self, source: _Array, target: _Array, factor: int) -> None:
        while True:
            tile = self.tile
            try:
                for own, seen in _tiles(source.shape[0], source.shape[1], tile):
                    self._enlarge_tile(source, target, own, seen, factor)
            except Exception as error:
                if device_is_lost(error):
                    raise DeviceLost(f"the GPU failed and needs a new process: {error}") from error
                if not is_out_of_memory(error):
                    raise
                if tile // 2 < LEAST_TILE:
                    raise OutOfMemory(
                        f"upscaler {self.name}: not even a tile of {tile} px fits on the device"
                    ) from error
            else:
                return
            # Outside of the handler, whose traceback keeps the tensors of the tile alive.
            self.tile = tile // 2
            log.warning("upscaler %s: a tile of %d px does not fit, tiles of %d px follow", self.name, tile, self.tile)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _enlarge_tile(self, source: _Array, target: _Array, own: _Box, seen: _Box, factor: int) -> None:
        part = np.ascontiguousarray(source[seen.top : seen.bottom, seen.left : seen.right])
        pixels = torch.from_numpy(part).to(self.device).permute(2, 0, 1)[None]  # [1, 3, h, w], uint8
        values = self._run(pixels)
        if self.scale != factor:
            size = (factor * pixels.shape[2], factor * pixels.shape[3])
            values = functional.interpolate(values.float(), size, mode="bicubic", antialias=True)
        made = (values[0].float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # [h, w, 3]
        top, left = factor * (own.top - seen.top), factor * (own.left - seen.left)
        height, width = factor * (own.bottom - own.top), factor * (own.right - own.left)
        target[factor * own.top : factor * own.bottom, factor * own.left : factor * own.right] = made[
            top : top + height, left : left + width
        ]

    def _run(self, pixels: torch.Tensor) -> torch.Tensor:
        """The network's output for uint8 [1, 3, h, w]; from the first NaN on in float32."""
        values: torch.Tensor = self.network(pixels.to(self.dtype) / 255)
        if bool(torch.isfinite(values).all()):
            return values
        if self.dtype == torch.float32:
            raise NonFiniteFrames(f"upscaler {self.name} made NaN or infinity of a frame")
        log.warning(
            "upscaler %s overflows %s, it goes on in float32", self.name, str(self.dtype).removeprefix("torch.")
        )
        self.network.float()
        self.dtype = torch.float32
        return self._run(pixels)


@dataclass(frozen=True)
class _Box:
    top: int
    bottom: int
    left: int
    right: int


def _tiles(height: int, width: int, tile: int) -> Iterator[tuple[_Box, _Box]]:
    """Each tile's own part of the frame, and that part with its margin."""
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            own = _Box(top, min(top + tile, height), left, min(left + tile, width))
            yield (
                own,
                _Box(
                    max(0, own.top - MARGIN),
                    min(height, own.bottom + MARGIN),
                    max(0, own.left - MARGIN),
                    min(width, own.right + MARGIN),
                ),
            )
