"""A request -> its row's program: its conditions, its noise, its schedulers; checked for this model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import BadParameter
from pia_ray.pia.components import Components
from pia_ray.pia.denoising.affinity import nearest_keyframe
from pia_ray.pia.denoising.conditions import Conditions, affinity_mask, stillness
from pia_ray.pia.denoising.context_windows import segments
from pia_ray.pia.denoising.denoise import chain, denoise
from pia_ray.pia.denoising.schedulers import make_configured, make_scheduler
from pia_ray.pia.denoising.window_blending import frame_noise
from pia_ray.pia.evaluation import Branch, Program, Text, select_frames
from pia_ray.pia.transfers import to_device
from pia_ray.pia.unet.motion_modules import most_positions
from pia_ray.types import PreparedRequest


def row_program(request: PreparedRequest, components: Components, conditions: Conditions) -> Program:
    """The program of a request on this model.

    The row's own generator draws the noise first, then the picture's posterior and the end picture's, then below
    strength 1 the noise of the pictures; the programs draw the rest. Given latents replace the noise that the row
    starts from, and nothing is drawn for it.

    Raises:
        BadParameter: this model cannot run the request.
    """
    _check(request, components)
    params, device, factor = request.params, components.device, components.spatial_factor
    parts = [replace(request, params=params.model_copy(update={"num_frames": num})) for num in segments(params)]
    # All of them now, so that a step count that one cannot do is refused before anything is encoded.
    schedulers = [[_scheduler(request, components, steps) for steps in params.iterations] for _ in parts]
    generator = torch.Generator("cpu").manual_seed(request.seed)
    size = (request.size[1] // factor, request.size[0] // factor)

    def draw(part: AnimationParams) -> torch.Tensor:
        return frame_noise(part, (components.latent_channels, part.num_frames, *size), generator, device)

    given = start_noise(request, (components.latent_channels, params.num_frames, *size), device)
    noise = draw(parts[0].params) if given is None else given
    keyframes, condition = keyframe_conditions(parts[0], conditions, generator)
    if params.strength < 1 and given is None:
        noise = draw(parts[0].params)
    texts, tokens = text_embeddings(request, conditions), conditions.picture_tokens(request)

    def program_of(segment: int, before: torch.Tensor | None) -> Program:
        part = parts[segment].params
        picture = condition if before is None else before
        mask = affinity_of(parts[segment], keyframes, components)
        nothing = torch.zeros_like(mask), torch.zeros_like(picture)
        branches = tuple(
            Branch(texts[text], *((mask, picture) if with_picture else nothing), text=text, image=tokens.get(text))
            for text, with_picture in guidance_branches(part)
        )
        return denoise(
            part,
            schedulers=schedulers[segment],
            noise=noise if before is None else draw(part),
            fresh_noise=lambda: draw(part),
            condition=picture,
            branches=branches,
            generator=generator,
            on_step_end=request.on_step_end,
            texts=texts,
            segment=segment,
            num_segments=len(parts),
        )

    program = program_of(0, None) if len(parts) == 1 else chain(program_of, len(parts))
    return _without_seam(program) if params.seam == "drop" else program


def keyframe_conditions(
    request: PreparedRequest, conditions: Conditions, generator: torch.Generator
) -> tuple[list[int], torch.Tensor]:
    """The keyframes, and for each frame the latent of the nearest one's picture, [4, 1 or T, h, w].

    The latents are drawn from the row's generator, the end picture's after the picture's.
    """
    params = request.params
    condition = conditions.picture(request.image, generator)[:, None]  # [4, 1, h, w]
    keyframes = [params.condition_frame]
    if request.end_image is not None:
        keyframes.append(params.num_frames - 1)
        end = conditions.picture(request.end_image, generator)[:, None]
        condition = select_frames(torch.cat([condition, end], dim=1), nearest_keyframe(params.num_frames, keyframes))
    return keyframes, condition


def affinity_of(request: PreparedRequest, keyframes: list[int], components: Components) -> torch.Tensor:
    """The affinity mask of the branches with the picture, [1, T, 1 or h, 1 or w]."""
    still = None
    if request.mask_image is not None:
        still = stillness(request.mask_image, components.spatial_factor)
    return affinity_mask(request.params, keyframes=keyframes, device=components.device, still=still)


def guidance_branches(params: AnimationParams) -> list[tuple[Text, bool]]:
    """The guidance branches: the text of each, and whether it has the picture.

    Without it, mask and condition latent are zero, as in a fifth of PIA's training. Source: its published code.
    """
    branches: list[tuple[Text, bool]] = [("prompt", params.image_guidance_scale != 0)]
    if params.has_guidance:
        branches.insert(0, ("negative_prompt", params.image_guidance_scale != 0))
    if params.has_image_guidance:
        branches.insert(0, (branches[0][0], False))
    return branches


def start_noise(request: PreparedRequest, shape: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """The request's own latents, or None where they are drawn.

    Raises:
        BadParameter: they have another shape than this row's.
    """
    if request.latents is None:
        return None
    if request.latents.shape != shape:
        raise BadParameter(
            f"latents must be {list(shape)} for this row's frames and size (got {list(request.latents.shape)})",
            "latents",
        )
    return to_device(torch.tensor(request.latents, dtype=torch.float32), device)


def text_embeddings(request: PreparedRequest, conditions: Conditions) -> dict[Text, torch.Tensor]:
    """The embeddings of the row's texts, the negative one first: given ones, or the encoded text.

    The shorter one is made as long as the other by chunks of the empty prompt.

    Raises:
        BadParameter: given embeddings do not fit this model, or each other.
    """
    params = request.params
    names: tuple[Text, ...] = ("negative_prompt", "prompt") if params.has_guidance else ("prompt",)
    given = {"negative_prompt": request.negative_prompt_embeds, "prompt": request.prompt_embeds}

    def of_text(name: Text, length: int | None = None) -> torch.Tensor:
        text: str = getattr(params, name)
        return conditions.prompt(text, clip_skip=params.clip_skip, syntax=params.prompt_syntax, length=length)

    texts = {
        name: of_text(name) if (values := given[name]) is None else conditions.embedding(values, field=f"{name}_embeds")
        for name in names
    }
    longest = max(map(len, texts.values()))
    for name, embedding in texts.items():
        if len(embedding) < longest:
            texts[name] = (
                of_text(name, longest)
                if given[name] is None
                else conditions.lengthened(embedding, longest, clip_skip=params.clip_skip)
            )
    lengths = {text: len(embedding) for text, embedding in texts.items()}
    if len(set(lengths.values())) > 1:
        missing = "negative_prompt_embeds" if request.negative_prompt_embeds is None else "prompt_embeds"
        raise BadParameter(
            f"both branches of guidance need embeddings of one length (the negative prompt's is "
            f"{lengths['negative_prompt']}, the prompt's {lengths['prompt']}): give prompt_embeds and "
            "negative_prompt_embeds of equal length",
            missing,
        )
    return texts


def _scheduler(request: PreparedRequest, components: Components, steps: int) -> Any:
    name = request.params.scheduler
    if request.scheduler_config is not None:
        return make_configured(request.scheduler_config, name, steps=steps)
    return make_scheduler(components.scheduler_config, name, steps=steps)


def _without_seam(program: Program) -> Program:
    """The same program without the last frame, which in a loop equals the first."""
    return (yield from program)[:, :-1]


def _check(request: PreparedRequest, components: Components) -> None:
    params, factor = request.params, components.spatial_factor
    width, height = request.size
    if params.piece_frames > components.max_frames:
        most = components.max_frames
        if params.context_frames is not None and params.context_frames < params.num_frames:
            text = f"context_frames must be 2 to {most} for this model (got {params.context_frames})"
            raise BadParameter(text, "context_frames")
        raise BadParameter(
            f"num_frames must be 1 to {most} for this model (got {params.num_frames}), "
            f"or context_frames at most {most} be given, which makes longer videos of pieces",
            "num_frames",
        )
    if request.latents is not None and len(segments(params)) > 1:
        raise BadParameter("latents cannot be given for a chain: use long_video windows", "latents")
    bound = most_positions(components.unet, components.device)
    if bound is not None and (width // factor) * (height // factor) > bound:
        raise BadParameter(
            f"width x height must be at most {bound * factor**2:,} px for this model on a GPU (got {width} x {height})",
            "width",
        )
    for side, value in (("width", width), ("height", height)):
        if value % factor:
            raise BadParameter(f"{side} must be a multiple of {factor} for this model (got {value})", side)
