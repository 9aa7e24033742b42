"""The model that catalogues of fakes are animated with."""

from __future__ import annotations

from typing import Final

from pia_ray.config.model import ModelConfig

_BUNDLED: Final = ModelConfig.named("demo")

DEMO: Final = _BUNDLED.model_copy(update={"long_edge": 64, "defaults": {**_BUNDLED.defaults, "num_frames": 4}})
"""The bundled model for small pictures and four frames, half of the work of sixteen."""
