"""One picture through diffusers' PIAPipeline and through pia-ray, with the same weights and settings; PSNR per frame.

Any model will do: a name, or a YAML file with the settings of one, with LoRAs, textual inversions and IP-Adapter. Each
side loads the weights with its own code. Prints a card and, last, one JSON line; exits with 1 where the videos differ.

    .venv/bin/python benchmarks/reference_check.py --model realistic-vision --image cat.png --prompt "cat in a field"
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import card
import numpy as np
import torch
from diffusers import AutoencoderKL, MotionAdapter, PIAPipeline, StableDiffusionPipeline, UNetMotionModel
from PIL import Image
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pia_ray.animation import Animation
from pia_ray.config.model import ModelConfig, load_model
from pia_ray.config.resolving import parse_params
from pia_ray.media.image import decode
from pia_ray.pia.animator import Animator
from pia_ray.pia.denoising.schedulers import SCHEDULERS
from pia_ray.pia.device.placement import device_of, dtype_of
from pia_ray.prepare import prepare
from pia_ray.testing import draw_picture
from pia_ray.types import AnimationRequest, PreparedRequest
from pia_ray.weights import LocalWeights, resolve

LEAST_PSNR = {torch.float32: 40.0, torch.float16: 25.0, torch.bfloat16: 20.0}
"""Worst frame that still counts as the same video, in dB: both sides round, in an order of their own."""

PASSED_ON = (
    "num_frames",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "strength",
    "eta",
    "motion_scale",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both and compares."""
    options = parse(arguments)
    model = load_model(options.model)
    cells = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
        "num_inference_steps": options.steps,
        "num_frames": options.frames,
        "guidance_scale": options.guidance_scale,
        "motion_scale": options.motion_scale,
        "scheduler": options.scheduler,
        "strength": options.strength,
        "width": options.width,
        "height": options.height,
        "ip_adapter_scale": options.ip_adapter_scale,
    }
    drawn = draw_picture((768, 512), seed=0)
    picture = decode(drawn if options.image is None else options.image.read_bytes()).rgb
    reference_picture = None if options.ip_adapter_image is None else decode(options.ip_adapter_image.read_bytes()).rgb
    request = prepare(AnimationRequest(picture, parse_params(cells), ip_adapter_image=reference_picture), model)
    started = time.perf_counter()
    ours = animate(model, request)
    ours_s, started = time.perf_counter() - started, time.perf_counter()
    theirs = reference(model, resolve(model), request)
    theirs_s = time.perf_counter() - started
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        ours.save(options.output / "pia-ray.mp4")
        replace(ours, frames=theirs).save(options.output / "diffusers.mp4")
    dtype = dtype_of(model, device_of(model))
    result = {
        "benchmark": "reference_check",
        "model": ours.model,
        "device": str(device_of(model)),
        "dtype": str(dtype).removeprefix("torch."),
        **compare(ours.frames, theirs, least_psnr=LEAST_PSNR[dtype]),
        "sha256": hashlib.sha256(ours.frames.tobytes()).hexdigest(),
        "pia_ray_s": round(ours_s, 1),
        "diffusers_s": round(theirs_s, 1),
        "params": json.loads(ours.params.model_dump_json()),
        **card.machine("torch", "diffusers", "transformers"),
    }
    show(result)
    return int(result["verdict"] == "different")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags; a knob that is left out is the model's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="name, or YAML file of one (demo)")
    parser.add_argument("--image", type=Path, help="picture file (a drawn one)")
    parser.add_argument("--prompt", default="cat in a field")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="num_inference_steps")
    parser.add_argument("--frames", type=int, help="num_frames")
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--motion-scale")
    parser.add_argument("--scheduler", choices=list(SCHEDULERS))
    parser.add_argument("--strength", type=float)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--ip-adapter-image", type=Path, help="picture file, for a model with an ip_adapter")
    parser.add_argument("--ip-adapter-scale", type=float)
    parser.add_argument("--output", type=Path, help="folder for both videos")
    return parser.parse_args(arguments)


def animate(model: ModelConfig, request: PreparedRequest) -> Animation:
    """pia-ray's video."""
    with Animator(model, batch_size=1) as animator:
        (outcome,) = animator.animate([request])
    if not isinstance(outcome, Animation):
        raise outcome
    free()
    return outcome


def reference(model: ModelConfig, weights: LocalWeights, request: PreparedRequest) -> np.ndarray[Any, Any]:
    """diffusers' video of the same resolved request, uint8 [T, H, W, 3]."""
    params = request.params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline is deprecated upstream
        pipe = pipeline(model, weights)
        picture: dict[str, Any] = {}
        if request.ip_adapter_image is not None:
            pipe.set_ip_adapter_scale(params.ip_adapter_scale)
            picture["ip_adapter_image"] = request.ip_adapter_image
        elif weights.ip_adapter is not None:
            # Once an adapter is loaded, the pipeline cannot do without a picture; at scale 0 it does not count.
            pipe.set_ip_adapter_scale(0.0)
            picture["ip_adapter_image"] = Image.new("RGB", (64, 64))
        kind, settings = SCHEDULERS[params.scheduler]
        betas = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **betas, **settings)
        result = pipe(
            image=request.image,
            prompt=params.prompt,
            negative_prompt=params.negative_prompt,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="np",
            **{name: getattr(params, name) for name in PASSED_ON},
            **picture,
        )
    frames: np.ndarray[Any, Any] = (np.asarray(result.frames[0]) * 255).round().astype(np.uint8)
    return frames


def pipeline(model: ModelConfig, weights: LocalWeights) -> Any:
    """PIAPipeline as its documentation builds it, from the same files by diffusers' own loaders."""
    device = device_of(model)
    how: dict[str, Any] = {"torch_dtype": dtype_of(model, device), "local_files_only": True}
    extra: dict[str, Any] = {}
    if weights.vae is not None:
        extra["vae"] = load_vae(weights, how)
    if weights.motion_adapter is not None:
        extra["motion_adapter"] = MotionAdapter.from_pretrained(weights.motion_adapter, **how)
    if weights.base.is_file():
        pipe = from_single_file(weights, how, extra)
    else:
        if weights.motion_adapter is None:
            # A pipeline that was saved with its motion modules in the UNet has no adapter beside it.
            extra["unet"] = UNetMotionModel.from_pretrained(weights.base / "unet", **how)
            extra["motion_adapter"] = None
        pipe = PIAPipeline.from_pretrained(weights.base, **extra, **how)
    for token, path in weights.textual_inversions.items():
        pipe.load_textual_inversion(str(path), token=token)
    for name, path in weights.loras.items():
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"lora_{name}")
    if weights.loras:
        strengths = [lora.weight for lora in model.loras.values()]
        pipe.set_adapters([f"lora_{name}" for name in model.loras], strengths)
    if weights.ip_adapter is not None:
        add_ip_adapter(pipe, weights, how)
    pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device)


def from_single_file(weights: LocalWeights, how: dict[str, Any], extra: dict[str, Any]) -> Any:
    """The pipeline around a checkpoint in one file."""
    plain = StableDiffusionPipeline.from_single_file(
        str(weights.base),
        config=str(weights.config),
        safety_checker=None,
        **{name: part for name, part in extra.items() if name == "vae"},
        **how,
    )
    parts = {name: getattr(plain, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return PIAPipeline(**parts, motion_adapter=extra.get("motion_adapter"))


def load_vae(weights: LocalWeights, how: dict[str, Any]) -> AutoencoderKL:
    """The VAE in place of the base's own."""
    assert weights.vae is not None
    if weights.vae.is_file():
        return AutoencoderKL.from_single_file(str(weights.vae), config=str(weights.config), subfolder="vae", **how)
    return AutoencoderKL.from_pretrained(weights.vae, **how)


def add_ip_adapter(pipe: Any, weights: LocalWeights, how: dict[str, Any]) -> None:
    """The adapter by diffusers' loader, with its image encoder from wherever it is."""
    assert weights.ip_adapter is not None
    if weights.image_encoder is not None:
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            weights.image_encoder, dtype=how["torch_dtype"], local_files_only=True
        )
        side = encoder.config.image_size
        pipe.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessorPil(size=side, crop_size=side))
    path = weights.ip_adapter
    pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)


def compare(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], *, least_psnr: float) -> dict[str, Any]:
    """PSNR of each frame in dB (null where the frames are equal), differences in levels of 255, and the verdict."""
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    errors = [float((frame**2).mean()) for frame in difference]
    decibels = [None if error == 0 else round(10 * np.log10(255**2 / error), 2) for error in errors]
    worst = min((value for value in decibels if value is not None), default=None)
    if difference.max() <= 1:
        verdict = "equal to a level of 255"
    else:
        verdict = "same up to rounding" if worst is None or worst >= least_psnr else "different"
    return {
        "verdict": verdict,
        "psnr_db": decibels,
        "worst_psnr_db": worst,
        "most_levels": int(difference.max()),
        "mean_levels": round(float(difference.mean()), 4),
    }


def show(result: dict[str, Any]) -> None:
    """The card, and the JSON line."""
    params = result["params"]
    print(f"pia-ray against diffusers' PIAPipeline: {result['model']}, {result['device']}, {result['dtype']}")
    print(
        f"  {params['width']} x {params['height']} px, {params['num_frames']} frames, {params['scheduler']}, "
        f"{params['num_inference_steps']} steps, guidance {params['guidance_scale']:g}, seed {params['seed']}"
    )
    shown = ["equal" if value is None else f"{value:.1f}" for value in result["psnr_db"]]
    for start in range(0, len(shown), 8):
        print(f"  PSNR of frames {start:2}.. in dB   " + "  ".join(f"{value:>6}" for value in shown[start : start + 8]))
    print(
        f"  {result['verdict']}: off by {result['mean_levels']:.4f} of 255 levels on average, {result['most_levels']} "
        "at most"
    )
    print(f"  pia-ray {result['pia_ray_s']} s, diffusers {result['diffusers_s']} s, both with loading")
    facts = card.machine("torch", "diffusers", "transformers")
    print(f"  {card.line(facts)}")
    print(json.dumps(result))


def free() -> None:
    """Lets the GPU's memory go, so that the other side fits."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
