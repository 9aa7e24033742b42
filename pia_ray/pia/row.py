"""A request -> its row's program: what the model is told of it, its noise, its scheduler; checked for this model."""

from __future__ import annotations

import torch
from PIL import Image

from pia_ray.errors import BadParameter
from pia_ray.params import AnimationParams, AnimationRequest
from pia_ray.pia.assemble import Components, make_scheduler
from pia_ray.pia.condition import Conditions, affinity_mask
from pia_ray.pia.program import Branch, Program, denoise, draw
from pia_ray.pia.speed import SDPA_ROWS


def row_program(request: AnimationRequest, components: Components, conditions: Conditions) -> Program:
    """The program of a resolved request (see `pia_ray.request.prepare`) on this model.

    Draws from the row's own generator: noise first, then the picture's posterior; the program draws the rest.

    Raises:
        BadParameter: this model cannot do what the request asks for.
    """
    params, image = request.params, request.image
    if params.seed is None or params.width is None or params.height is None or not isinstance(image, Image.Image):
        raise TypeError("the engine takes resolved requests: see Animator.submit")
    _check(params, components)
    device, factor = components.device, components.spatial_factor
    scheduler = make_scheduler(components, params)
    generator = torch.Generator("cpu").manual_seed(params.seed)
    shape = (components.latent_channels, params.num_frames, params.height // factor, params.width // factor)
    noise = draw(shape, generator, device)
    condition = conditions.picture(image, generator)  # [4, h, w]
    mask = affinity_mask(params, dtype=torch.float32, device=device)
    texts = [params.negative_prompt, params.prompt] if params.has_guidance else [params.prompt]
    branches = tuple(
        Branch(conditions.prompt(text, clip_skip=params.clip_skip), mask, condition[:, None]) for text in texts
    )
    return denoise(
        params, scheduler=scheduler, noise=noise, condition=condition, branches=branches, generator=generator
    )


def _check(params: AnimationParams, components: Components) -> None:
    factor = components.spatial_factor
    width, height = params.width or 0, params.height or 0
    if params.num_frames > components.max_frames:
        raise BadParameter(
            f"num_frames must be 1 to {components.max_frames} for this model (got {params.num_frames})", "num_frames"
        )
    if components.device.type == "cuda" and (width // factor) * (height // factor) > SDPA_ROWS:
        raise BadParameter(
            f"width x height must be at most {SDPA_ROWS * factor**2:,} px on a GPU (got {width} x {height})", "width"
        )
    for side, value in (("width", width), ("height", height)):
        if value % factor:
            raise BadParameter(f"{side} must be a multiple of {factor} for this model (got {value})", side)
