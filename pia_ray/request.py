"""Makes a request ready for an engine: knobs resolved, a seed, the picture fitted. Plain Pillow, no torch."""

from __future__ import annotations

from dataclasses import replace

from pia_ray import image as pictures
from pia_ray.config import ModelConfig
from pia_ray.errors import BadParameter
from pia_ray.params import AnimationRequest, resolve, seed_from_id


def prepare(request: AnimationRequest, model: ModelConfig) -> AnimationRequest:
    """The same request with every knob resolved, a seed, and the picture fitted to the size to make.

    Raises:
        RowError: a knob or the picture cannot be used.
    """
    if request.params.num_videos > 1:
        raise BadParameter("num_videos is more than 1: ask once per video, with seeds of their own", "num_videos")
    params = resolve(request.params, {}, model_defaults=model.defaults)
    picture = pictures.as_rgb(request.image)
    width, height = pictures.choose_size(
        picture.size,
        long_edge=model.long_edge,
        size_step=model.size_step,
        width=params.width,
        height=params.height,
    )
    seed = seed_from_id(request.id) if params.seed is None else params.seed
    params = params.model_copy(update={"width": width, "height": height, "seed": seed})
    return replace(request, image=pictures.fit(picture, (width, height)), params=params)
