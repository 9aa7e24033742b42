"""The work that `pia-ray bench` times: requests of random pictures, whole videos, and the stages of one video alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pia_ray.animation import Animation
from pia_ray.bench.card import BenchSettings
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.media import video
from pia_ray.pia.animator import Animator
from pia_ray.pia.components import Components
from pia_ray.pia.decoding.decode import decode, to_numpy
from pia_ray.pia.denoising.conditions import Conditions
from pia_ray.pia.engine import Engine
from pia_ray.prepare import prepare
from pia_ray.types import AnimationRequest, PreparedRequest


def stages_of(parts: Components, model: ModelConfig, settings: BenchSettings) -> dict[str, float]:
    """Seconds of one video alone, nothing cached: medians over the rounds."""
    stages: dict[str, list[float]] = {}
    for turn in range(settings.rounds + 1):
        request = request_of(model, settings, 1000 + turn)
        params, engine, conditions = request.params, Engine(parts, batch_size=1), Conditions(parts)
        engine.join(request)  # encodes once more, so that the next stage is the denoising alone
        found: dict[str, Any] = {}

        def text(request: PreparedRequest = request, conditions: Conditions = conditions) -> object:
            texts = (request.params.negative_prompt, request.params.prompt)
            return [conditions.prompt(text, clip_skip=None) for text in texts]

        def encode(request: PreparedRequest = request, conditions: Conditions = conditions) -> object:
            return conditions.picture(request.image, torch.Generator())

        def denoise(engine: Engine = engine, found: dict[str, Any] = found) -> None:
            while engine.rows:
                for _, outcome in engine.step():
                    if not isinstance(outcome, Animation):
                        raise outcome
                    found["latents"] = outcome.output.to(parts.device)

        def decode_latents(found: dict[str, Any] = found) -> object:
            found["frames"] = decode(parts, found["latents"])
            return found["frames"]

        def transfer(found: dict[str, Any] = found) -> object:
            found["pixels"] = to_numpy(found["frames"])
            return found["pixels"]

        def encode_video(found: dict[str, Any] = found, fps: int = params.fps) -> object:
            return video.encode(found["pixels"], fps=fps, format="mp4", provenance={})

        for name, work in (
            ("text", text),
            ("encode", encode),
            ("denoise", denoise),
            ("decode", decode_latents),
            ("transfer", transfer),
            ("video encode", encode_video),
        ):
            seconds = timed(parts, work)
            if turn:
                stages.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in stages.items()}


def animate(animator: Animator, model: ModelConfig, settings: BenchSettings, turn: int, rows: int) -> None:
    requests = [request_of(model, settings, 100 * turn + row, latent=False) for row in range(rows)]
    for outcome in animator.animate(requests):
        if not isinstance(outcome, Animation):
            raise outcome
        video.encode(outcome.frames, fps=outcome.params.fps, format="mp4", provenance={})


def encode_pictures(frames: Sequence[Any]) -> None:
    video.encode(np.stack([np.asarray(frame) for frame in frames]), fps=8, format="mp4", provenance={})


def request_of(model: ModelConfig, settings: BenchSettings, turn: int, *, latent: bool = True) -> PreparedRequest:
    """A request of its own for each turn, so that no cache knows its picture or prompt."""
    pixels = np.random.default_rng(turn).integers(0, 256, (settings.side, settings.side, 3), dtype=np.uint8)
    params = AnimationParams(
        prompt=f"a picture that moves, number {turn}",
        negative_prompt="dark",
        seed=turn,
        num_frames=settings.num_frames,
        num_inference_steps=settings.steps,
        guidance_scale=7.5,
        width=settings.side,
        height=settings.side,
    )
    kind: Literal["latent", "uint8"] = "latent" if latent else "uint8"
    return prepare(AnimationRequest(pixels, params, id=f"bench-{turn}", output_type=kind), model)


def timed(parts: Components, work: Callable[[], object]) -> float:
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if parts.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
