"""Programs whose memory is to stay flat, and the slope of what they use."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pia_ray import AnimationParams, AnimationRequest, Animator
from pia_ray.config.model import ModelConfig
from pia_ray.testing import draw_picture
from tests.processes import num_descriptors, private_bytes

SIZES = ((64, 64), (64, 48), (48, 80))
FRAMES = (4, 8)
"""Few of both: for each shape of its operands oneDNN keeps kernels (1024 of all), some 0.6 MB for each new one here."""


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Growth of the second value for each 1 of the first, by least squares."""
    x, y = np.array(samples, float).T
    return float(np.polyfit(x, y, 1)[0])


def animate_many(num: int) -> None:
    """Animates so many rows of many prompts with the demo model; prints memory and descriptors as JSON."""
    rng, samples = np.random.default_rng(0), list[tuple[int, int, int]]()
    with Animator(ModelConfig.named("demo"), batch_size=2, cpu_threads=1) as animator:
        for number in range(num):
            width, height = (int(side) for side in rng.choice(SIZES))
            values = {
                "prompt": " ".join(f"word{n}" for n in rng.integers(0, 9999, 1 + number % 20)),
                "seed": number,
                "width": width,
                "height": height,
                "num_frames": int(rng.choice(FRAMES)),
                "num_inference_steps": 2,
                "guidance_scale": 1.0,
            }
            request = AnimationRequest(
                id=str(number),
                image=Image.open(io.BytesIO(draw_picture((width, height), seed=number))),
                params=AnimationParams(**values),
            )
            (outcome,) = animator.animate([request])
            if isinstance(outcome, Exception):
                raise outcome
            outcome.encode()
            if number % 5 == 4:
                gc.collect()
                samples.append((number + 1, private_bytes(os.getpid()), num_descriptors(os.getpid())))
    sys.stdout.write(json.dumps(samples))


if __name__ == "__main__":
    animate_many(int(sys.argv[1]))
