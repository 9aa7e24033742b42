"""The model that all parts measure: random weights on one device, as diffusers' pipeline and as our components."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from diffusers import PIAPipeline

from benchmarks.gpu.sizes import Size
from pia_ray.animation import Animation
from pia_ray.bench.reference import matmul_flops_per_s
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import parse_params
from pia_ray.pia.components import Components
from pia_ray.pia.device.timing import Stopwatch
from pia_ray.pia.engine import Engine
from pia_ray.pia.loading.load import assemble
from pia_ray.pia.loading.weight_sharing import WeightPool
from pia_ray.prepare import prepare
from pia_ray.testing import make_pipeline_folder
from pia_ray.testing.checkpoints import random_pipeline
from pia_ray.types import AnimationRequest, PreparedRequest
from pia_ray.weights import resolve

USUAL_SHARE: Final = 0.3
"""Share of the rate of a large matrix product that an uncompiled step reaches, for estimates of time."""


@dataclass(frozen=True)
class Cost:
    """The work of a part, for an estimate of its time."""

    steps: float = 0.0
    """Steps of one row with guidance, at the size of the measurement."""
    loads: int = 0
    """Models loaded, or processes of them started."""
    compiles: int = 0
    """Kinds of forward compiled."""
    fixed_s: float = 0.0


class RandomModel:
    """A model of that size on that device, in a temporary folder of its own. A context manager.

    `compiles`: whether parts compile it.
    """

    def __init__(self, size: Size, device: torch.device, *, compiles: bool) -> None:
        self.size, self.device, self.compiles = size, device, compiles
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self._temporary = tempfile.TemporaryDirectory(prefix="pia-ray-gpu-")
        self.work_folder = Path(self._temporary.name)

    def __enter__(self) -> RandomModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._temporary.cleanup()

    @cached_property
    def config(self) -> ModelConfig:
        """The settings of the model; `folder` makes its weights. Nothing is compiled."""
        return ModelConfig(
            name=f"random-{self.size.name}",
            base=str(self.work_folder / "model"),
            device="cuda" if self.device.type == "cuda" else "cpu",
            dtype=name_of(self.dtype),
            compile="off",
        )

    @cached_property
    def folder(self) -> Path:
        """The folder of the weights, written now."""
        path = Path(self.config.base)
        if self.size.name == "tiny":
            make_pipeline_folder(path, dtype=name_of(self.dtype))
        else:
            self.pipeline(self.dtype).save_pretrained(path)
        return path

    @cached_property
    def components(self) -> Components:
        """Our model, loaded from the folder as any model is; all parts share it."""
        return self.load()

    def load(self, **settings: Any) -> Components:
        """Our model, loaded anew with these settings of `ModelConfig`."""
        _ = self.folder
        model = self.config.model_copy(update=settings)
        return assemble(resolve(model), model)

    def pipeline(self, dtype: torch.dtype) -> PIAPipeline:
        """diffusers' pipeline with the same weights, on the device."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated upstream; its arithmetic is what is compared
            if self.size.name == "tiny":
                pipeline = PIAPipeline.from_pretrained(self.folder, torch_dtype=dtype)
            else:
                pipeline = random_pipeline(self.size.name, device=str(self.device))
                for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
                    _enliven(part)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.device, dtype)

    def components_of(self, pipeline: PIAPipeline) -> Components:
        """Our model over the pipeline's own weights, which are rewritten when it first runs."""
        for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
            part.requires_grad_(False).eval()
            WeightPool().move(part, lambda name: "", device=self.device, dtype=part.dtype)
        return Components(
            unet=pipeline.unet,
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            scheduler_config=dict(pipeline.scheduler.config),
            device=self.device,
            dtype=pipeline.unet.dtype,
            vae_dtype=pipeline.vae.dtype,
            vae_tiling="auto",
            memory_bytes=None,
            compile_mode=None,
            compile_cache=None,
            version=f"random-{self.size.name}",
        )

    def request(self, seed: int = 0, *, side: int | None = None, **knobs: Any) -> PreparedRequest:
        """A request of a random picture with guidance; another seed is another picture, prompt and noise."""
        side = side or self.size.side
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        plain = {
            "prompt": f"a picture that moves, number {seed}",
            "negative_prompt": "dark",
            "seed": seed,
            "num_frames": self.size.num_frames,
            "num_inference_steps": self.size.steps,
            "guidance_scale": 7.5,
            "width": side,
            "height": side,
        }
        return prepare(AnimationRequest(pixels, parse_params(plain | knobs), id=f"gpu-{seed}"), self.config)

    @cached_property
    def flops_per_s(self) -> float:
        """The rate of a large matrix product here."""
        return matmul_flops_per_s(self.device, self.dtype)

    def expected_s(self, cost: Cost) -> float:
        """About the seconds that a part takes here."""
        flop = cost.steps * self.size.step_tflop * 1e12
        steps_s = flop / (USUAL_SHARE * self.flops_per_s) if flop else 0.0
        compile_s = cost.compiles * self.size.compile_s if self.compiles else 0.0
        return cost.fixed_s + steps_s + cost.loads * self.size.load_s + compile_s

    def seconds(self, work: Callable[[], object]) -> float:
        """The seconds of the device for the work, with its waits for the host."""
        watch = Stopwatch(self.device)
        work()
        return watch.stop().seconds

    def median_s(self, work: Callable[[], object], *, samples: int = 5) -> float:
        """Median seconds, after a first time that does not count."""
        return statistics.median([self.seconds(work) for _ in range(samples + 1)][1:])

    def free(self) -> None:
        """Returns the memory that nothing holds to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def animate(engine: Engine, *requests: PreparedRequest) -> list[Animation]:
    """The animations of the requests, in order, denoised together.

    Raises:
        RowError: a row failed.
    """
    rows = [engine.join(request) for request in requests]
    made: dict[int, Animation] = {}
    while engine.rows:
        for row, outcome in engine.step():
            if not isinstance(outcome, Animation):
                raise outcome
            made[id(row)] = outcome
    return [made[id(row)] for row in rows]


def wall_s(work: Callable[[], object]) -> float:
    """Seconds of the host."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def name_of(dtype: torch.dtype) -> Any:
    """A precision's name, such as float16."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _enliven(module: torch.nn.Module) -> None:
    """Draws every weight anew, so that no layer is zero or an identity, and activations stay near one.

    torch's own start shrinks what it passes on by a factor of 1.7 in each layer.
    """
    generator: torch.Generator | None = None
    for name, weight in module.named_parameters():
        generator = generator or torch.Generator(weight.device).manual_seed(0)
        weight.normal_(generator=generator)
        if weight.ndim > 1:
            weight.mul_(weight[0].numel() ** -0.5)
        else:
            weight.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)
