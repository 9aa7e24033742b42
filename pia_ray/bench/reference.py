"""diffusers' own PIAPipeline as a yardstick: the documented example, kept resident or verbatim, and its operations.

For benchmarks and checks alone; nothing here animates a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PIAPipeline, UNetMotionModel
from diffusers.utils.export_utils import export_to_gif
from torch.utils.flop_counter import FlopCounterMode

from pia_ray.pia.components import Components
from pia_ray.pia.denoising.schedulers import make_scheduler
from pia_ray.types import PreparedRequest


def resident_pipeline(folder: Path, components: Components) -> PIAPipeline:
    """The whole pipeline in a folder, on the device and in the precision of our model, ready and without offload."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated upstream; its arithmetic is what is compared
        pipe = PIAPipeline.from_pretrained(folder, torch_dtype=components.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(components.device)


def documented_pipeline(folder: Path, components: Components) -> PIAPipeline:
    """The pipeline as diffusers' documentation sets it up: offloaded between its parts, the VAE one frame at a time.

    Without a GPU there is nothing to offload from.
    """
    pipe = resident_pipeline(folder, components)
    if components.device.type == "cuda":
        pipe.enable_model_cpu_offload()
    pipe.vae.enable_slicing()  # the pipeline's own method of the documented example is gone
    return pipe


def run_pipeline(
    pipe: PIAPipeline, request: PreparedRequest, components: Components, *, gif: Path | None = None
) -> Any:
    """Frames of one resolved request, as PIL images; written to `gif` too, as the documented example does."""
    params = request.params
    pipe.scheduler = make_scheduler(components.scheduler_config, params.scheduler, steps=params.num_inference_steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = pipe(
            image=request.image,
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            num_frames=params.num_frames,
            width=params.width,
            height=params.height,
            num_inference_steps=params.num_inference_steps,
            guidance_scale=params.guidance_scale,
            strength=params.strength,
            motion_scale=params.motion_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed % 2**63),
        ).frames[0]
    if gif is not None:
        export_to_gif(frames, str(gif))
    return frames


def step_flops(components: Components, *, num_frames: int, height: int, width: int, branches: int = 2) -> int:
    """Floating-point operations of one step of one row in diffusers' UNet; height and width are of the latents.

    Counted without weights on the meta device: two per multiplication and addition of matrix products, convolutions
    and attention.
    """
    with torch.device("meta"):
        unet = UNetMotionModel.from_config(components.unet.config)
        sample = torch.empty(branches, unet.config["in_channels"], num_frames, height, width)
        length, cross = components.tokenizer.model_max_length, unet.config["cross_attention_dim"]
        prompts, timesteps = torch.empty(branches * num_frames, length, cross), torch.empty(branches)
    return _flops(lambda: unet(sample, timesteps, encoder_hidden_states=prompts))


def decode_flops(components: Components, *, num_frames: int, height: int, width: int) -> int:
    """The same of decoding one row's latents in diffusers' VAE."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(components.vae.config)
        latents = torch.empty(num_frames, components.latent_channels, height, width)
    return _flops(lambda: vae.decode(latents))


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of one large matrix product here: what the model could reach at most, in operations per second."""
    import time

    side = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _flops(work: Callable[[], object]) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
