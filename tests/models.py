"""The models that tests animate with: the bundled one, made quicker."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final

import yaml

from pia_ray.config.model import ModelConfig

_BUNDLED: Final = ModelConfig.named("demo")

DEMO: Final = _BUNDLED.model_copy(update={"long_edge": 64, "defaults": {**_BUNDLED.defaults, "num_frames": 4}})
"""The bundled model for small pictures and four frames, half of the work of sixteen."""


def home_of_quick_demo(folder: Path) -> Path:
    """The home of a user whose `demo` is the bundled model for tiny pictures, four frames and two steps.

    Programs and notebooks that name `demo` run there as they stand, in a tenth of the time.
    """
    demo = yaml.safe_load(files("pia_ray.config").joinpath("models.yaml").read_text("utf-8"))["demo"]
    quick = {"num_frames": 4, "num_inference_steps": 2}
    own = {"demo": {**demo, "long_edge": 32, "defaults": {**demo["defaults"], **quick}}}
    settings = folder / ".config" / "pia-ray"
    settings.mkdir(parents=True)
    (settings / "models.yaml").write_text(yaml.safe_dump(own))
    return folder
