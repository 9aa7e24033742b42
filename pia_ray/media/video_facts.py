"""The facts of a video file: format, frames, size, speed, provenance; and the delays of frames in gif and webp."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pia_ray.config.knob_types import VideoFormat

Frames = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [T, H, W, 3], RGB."""


@dataclass(frozen=True)
class VideoFacts:
    """The facts of a video file, found by decoding it."""

    format: VideoFormat
    num_frames: int
    """Frames that were decoded, which may differ from the header."""
    width: int
    height: int
    fps: float
    """Frames by duration; off the asked-for rate by as much as the container rounds times."""
    provenance: dict[str, Any]
    """The JSON that `encode` put in; empty for a file from elsewhere."""


def canonical_json(provenance: Mapping[str, Any]) -> str:
    """One line of JSON. A lone surrogate, which no container holds, becomes the JSON escape that reads back as it."""
    text = json.dumps(dict(provenance), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_provenance(note: str | bytes | None) -> dict[str, Any]:
    """The provenance in a file's comment; empty where the comment is not one of ours."""
    try:
        value = json.loads(note or "")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def frame_delays(num_frames: int, fps: int, *, ticks: int) -> list[int]:
    """The time of each frame in 1/ticks s, such that every frame begins at the tick nearest to its time."""
    starts = [(2 * i * ticks + fps) // (2 * fps) for i in range(num_frames + 1)]
    return [max(1, after - start) for start, after in itertools.pairwise(starts)]
