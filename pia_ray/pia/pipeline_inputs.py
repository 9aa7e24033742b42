"""The arguments of diffusers' `PIAPipeline` -> requests, one for each video. `pipeline` has the calls themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.resolving import lora_strengths, parse_params, seed_of_video
from pia_ray.errors import BadParameter, RowError
from pia_ray.pia.device.placement import DTYPES
from pia_ray.types import AnimationRequest, OnStepEnd, OutputType, StepEnd

Device = torch.device | str | int | None

Callback = Callable[[Any, int, torch.Tensor, dict[str, Any]], Mapping[str, Any]]
"""diffusers' `callback_on_step_end`: called with the pipeline, the step, its timestep and tensors by name."""


@dataclass
class PIAPipelineOutput(BaseOutput):
    """The videos of one call: a list of lists of PIL images, an array [B, T, H, W, 3], or a tensor [B, T, 3, H, W]."""

    frames: Any


def pictures_of(images: Any, field: str = "image") -> list[Image.Image]:
    """The pictures of diffusers' PipelineImageInput: a PIL image, an array or tensor of one or several, or a list.

    Raises:
        BadParameter: it is none of these.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, list | tuple) and images:
        return [picture for image in images for picture in pictures_of(image, field)]
    if not isinstance(images, np.ndarray | torch.Tensor):
        raise BadParameter(f"{field} must be a picture, an array, a tensor, or a list of them", field)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = images / 255.0
    values = VaeImageProcessor(do_resize=False).preprocess(images)  # [N, 3, H, W], -1 to 1
    pixels = ((values / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(each) for each in pixels]


def single_picture(images: Any, field: str) -> Image.Image:
    """The only picture of a PipelineImageInput.

    Raises:
        BadParameter: it is not one picture.
    """
    pictures = pictures_of(images, field)
    if len(pictures) > 1:
        raise BadParameter(f"{field} must be one picture, for all videos (got {len(pictures)})", field)
    return pictures[0]


def texts_of(text: str | list[str], field: str) -> list[str]:
    """The texts of a prompt.

    Raises:
        BadParameter: it is neither text nor a list of texts.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise BadParameter(f"{field} must be text or a list of texts, not {type(text).__name__}", field)
    return texts


def texts_or_embeds(
    field: str, text: str | list[str] | None, embeds: torch.Tensor | None, *, default: str | None
) -> dict[str, Sequence[Any] | None]:
    """The values of `field` and `<field>_embeds`, one for each prompt; those of the other are None.

    Raises:
        BadParameter: both are given, or none and there is no default.
    """
    if text is not None and embeds is not None:
        raise BadParameter(f"{field} and {field}_embeds are both given: give one of them", field)
    if embeds is None and text is None and default is None:
        raise BadParameter(f"{field} is missing: give it or {field}_embeds", field)
    texts = None if embeds is not None else texts_of(text or default or "", field)
    return {field: texts, f"{field}_embeds": arrays_of(embeds)}


def arrays_of(tensors: torch.Tensor | np.ndarray[Any, Any] | None) -> list[np.ndarray[Any, Any]] | None:
    """The tensors of a batch, one for each video, as float32 arrays."""
    if tensors is None:
        return None
    return list(torch.as_tensor(tensors).detach().float().cpu().numpy())


def single_embedding(embeds: Sequence[torch.Tensor] | None) -> np.ndarray[Any, Any] | None:
    """The embedding of the only IP-Adapter.

    Raises:
        BadParameter: there are several, or it is no list.
    """
    if embeds is None:
        return None
    field = "ip_adapter_image_embeds"
    if not isinstance(embeds, list | tuple) or len(embeds) != 1:
        raise BadParameter(f"{field} must be a list of one tensor, since there is one IP-Adapter", field)
    return torch.as_tensor(embeds[0]).detach().float().cpu().numpy()


def seeds_of(generator: torch.Generator | list[torch.Generator] | None, num: int) -> list[int]:
    """The seeds of `num` videos.

    A generator that has drawn nothing gives its own seed, which makes diffusers' frames; further videos have seed + 1,
    seed + 2 ... One that has drawn something gives a seed drawn from it. Each call draws from it, so that the next call
    with the same generator makes another video. Without a generator, torch's default one is used.

    Raises:
        BadParameter: a generator is not on the CPU, or a list has another length than there are videos.
    """
    if isinstance(generator, list | tuple):
        if len(generator) != num:
            raise BadParameter(f"generator must be one, or a list of {num}: one a video", "generator")
        return [_seed_of(each) for each in generator]
    first = _seed_of(torch.default_generator if generator is None else generator)
    return [seed_of_video(first, index) for index in range(num)]


def videos_of(
    columns: Mapping[str, Sequence[Any] | None],
    generator: torch.Generator | list[torch.Generator] | None,
    videos_per_prompt: int,
) -> list[dict[str, Any]]:
    """The values and the seed of each video: `videos_per_prompt` for each entry of the columns.

    A column of one entry is that of all videos; `latents` may also have an entry for each video.

    Raises:
        BadParameter: the columns have other numbers of entries, or as `seeds_of`.
    """
    if videos_per_prompt < 1:
        text = f"num_videos_per_prompt must be at least 1 (got {videos_per_prompt})"
        raise BadParameter(text, "num_videos_per_prompt")
    prompts = max(len(column) for name, column in columns.items() if column is not None and name != "latents")
    num = prompts * videos_per_prompt
    videos: list[dict[str, Any]] = [{"seed": seed} for seed in seeds_of(generator, num)]
    for name, column in columns.items():
        values = [None] if column is None else column
        if len(values) not in (1, prompts, num if name == "latents" else 1):
            raise BadParameter(f"{name} must have 1 entry or {prompts}, one a prompt (got {len(values)})", name)
        for index, video in enumerate(videos):
            video[name] = values[index * len(values) // num]
    return videos


def request_of(
    video: Mapping[str, Any], knobs: Mapping[str, Any], *, output_type: OutputType, **fields: Any
) -> AnimationRequest:
    """The request of one video of `videos_of`.

    Raises:
        BadParameter: a knob has no valid value.
    """
    arrays = {name: video[name] for name in ("latents", "prompt_embeds", "negative_prompt_embeds")}
    # Texts whose embeddings are given play no part.
    texts = {"prompt": video["prompt"] or "-", "negative_prompt": video["negative_prompt"] or ""}
    params = parse_params({**knobs, **texts, "seed": video["seed"]})
    return AnimationRequest(video["image"], params, output_type=output_type, **arrays, **fields)


def on_step_end(pipeline: Any, callback: Callback | None, names: Sequence[str]) -> OnStepEnd | None:
    """The function for a request's `on_step_end` that calls diffusers' `callback_on_step_end` with batches of one."""
    if callback is None:
        return None

    def call(step: StepEnd) -> dict[str, torch.Tensor]:
        tensors = {name: step.tensors[name][None] for name in names if name in step.tensors}
        returned = callback(pipeline, step.step, torch.tensor(step.timestep), tensors)
        return {name: tensor[0] for name, tensor in returned.items()}

    return call


def stacked(outcomes: Sequence[Animation | RowError], output_type: str) -> Any:
    """The outputs of all videos, as diffusers returns them: a list of lists of pictures, an array, or a tensor.

    Raises:
        RowError: of the first video that was not made.
    """
    outputs = []
    for outcome in outcomes:
        if not isinstance(outcome, Animation):
            raise outcome
        outputs.append(outcome.output)
    if output_type == "pil":
        return outputs
    return np.stack(outputs) if isinstance(outputs[0], np.ndarray) else torch.stack(outputs)


def _seed_of(generator: torch.Generator) -> int:
    if generator.device.type != "cpu":
        raise BadParameter(
            f"generator must be on the CPU, where a seed means the same on every machine (got {generator.device}): "
            'torch.Generator("cpu").manual_seed(...)',
            "generator",
        )
    seed = generator.initial_seed()
    unused = torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())
    drawn = int(torch.randint(2**63 - 1, (), generator=generator))
    return seed if unused else drawn


def lora_scale_of(cross_attention_kwargs: Mapping[str, Any] | None) -> float:
    """The factor on the weights of LoRAs, 1 where none is given.

    Raises:
        BadParameter: there is something else in it.
    """
    for name in cross_attention_kwargs or ():
        if name != "scale":
            raise BadParameter(f"cross_attention_kwargs has {name}: only scale is read here", "cross_attention_kwargs")
    return float((cross_attention_kwargs or {}).get("scale", 1.0))


def lora_choice(names: list[str] | str, weights: float | list[float] | None, *, known: Mapping[str, float]) -> str:
    """The knob `lora` for these LoRAs at these weights, 1 where none is given.

    Raises:
        BadParameter: there are not as many weights as names, or there is no such LoRA.
    """
    names = [names] if isinstance(names, str) else names
    factors = list(weights) if isinstance(weights, list | tuple) else [1.0 if weights is None else weights] * len(names)
    if len(factors) != len(names):
        raise BadParameter(f"adapter_weights must be one, or {len(names)} (got {len(factors)})", "adapter_weights")
    chosen = "+".join(f"{name}:{factor}" for name, factor in zip(names, factors, strict=True))
    lora_strengths(parse_params({"prompt": "-", "lora": chosen}), known)
    return chosen


def dtype_name(dtype: torch.dtype) -> str:
    """The model's setting of a precision.

    Raises:
        BadParameter: models do not run in it.
    """
    for name, same in DTYPES.items():
        if dtype == same:
            return name
    raise BadParameter(
        f"torch_dtype must be one of {', '.join(map(str, DTYPES.values()))} (got {dtype})", "torch_dtype"
    )


def device_name(device: Device, gpu_id: int | None = None) -> str:
    """The model's setting of a device; auto where none is given.

    Raises:
        BadParameter: it is neither the CPU nor the first GPU.
    """
    if device is None and gpu_id is None:
        return "auto"
    wanted = torch.device("cuda" if device is None else device)
    if wanted.type not in ("cpu", "cuda") or (wanted.index or 0) != 0 or (gpu_id or 0) != 0:
        raise BadParameter(
            f"device must be cpu or cuda (got {device if gpu_id is None else gpu_id}): choose another GPU by the "
            "environment variable CUDA_VISIBLE_DEVICES",
            "device",
        )
    return wanted.type


def file_of(name_or_path: str | Path, subfolder: str | None, file: str | None) -> str:
    """The path of a file, or its name on the hub as OWNER/NAME/FILE, from diffusers' three arguments.

    Raises:
        BadParameter: tensors are given in place of a file.
    """
    if not isinstance(name_or_path, str | Path):
        raise BadParameter(f"give the path of a .safetensors file, not a {type(name_or_path).__name__}", "path")
    return "/".join(str(part).rstrip("/") for part in (name_or_path, subfolder, file) if part)


def saved(part: ModelMixin | str | Path | None, folder: Path) -> str | None:
    """The id or path of a part of the model; one that has been loaded is written to the folder."""
    if isinstance(part, ModelMixin):
        part.save_pretrained(folder)
        return str(folder)
    return None if part is None else str(part)
