"""A request as an engine takes it: knobs resolved, seed and size chosen, pictures fitted, arrays checked. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pia_ray.config.finish_checks import check_file_size
from pia_ray.config.knobs import ARRAY_KNOBS, PICTURE_KNOBS, REFERENCE_KNOBS, AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import check_pictures, lora_strengths, resolve, seed_from_id
from pia_ray.errors import BadParameter
from pia_ray.media import arrays, sizes
from pia_ray.media import image as pictures
from pia_ray.types import AnimationRequest, OutputType, PreparedRequest

if TYPE_CHECKING:
    from PIL.Image import Image


def prepare(request: AnimationRequest | PreparedRequest, model: ModelConfig) -> PreparedRequest:
    """The request with every knob resolved, a seed, and its pictures fitted to the size of the video.

    A request that has been prepared is returned as it is. Knobs that neither it nor `model` sets have their declared
    defaults; a seed that it does not set follows from its id.

    Raises:
        RowError: a knob, a picture or an array cannot be used.
    """
    if isinstance(request, PreparedRequest):
        return request
    _check_output(request)
    params = resolve(request.params, {}, model_defaults=model.defaults, sampling=model.sampling)
    lora_strengths(params, model.lora_weights)
    picture = pictures.as_rgb(request.image)
    width, height = sizes.choose_size(
        picture.size,
        long_edge=model.long_edge,
        size_step=model.size_step,
        width=params.width,
        height=params.height,
        aspect_ratio=params.aspect_ratio,
        fitting=params.fit,
    )
    seed = seed_from_id(request.id) if params.seed is None else params.seed
    _check_contents(request, params)
    params = params.model_copy(update={"width": width, "height": height, "seed": seed})
    check_file_size(params)
    size, focus = (width, height), params.focus
    end, mask, reference = request.end_image, request.mask_image, request.ip_adapter_image
    checked = _arrays(request)
    return PreparedRequest(
        image=sizes.fit(picture, size, focus=focus),
        params=params,
        id=request.id,
        deadline_s=request.deadline_s,
        end_image=None if end is None else sizes.fit(_picture(end, "end_image"), size, focus=focus),
        mask_image=None
        if mask is None
        else sizes.fit_mask(_picture(mask, "mask_image"), picture.size, size, focus=focus),
        ip_adapter_image=None if reference is None else _picture(reference, "ip_adapter_image"),
        output_type=request.output_type,
        scheduler_config=request.scheduler_config,
        on_step_end=request.on_step_end,
        **checked,
    )


def _check_output(request: AnimationRequest) -> None:
    """Refuses a request that asks for several videos, or for an unknown type of output."""
    if request.params.num_videos > 1:
        raise BadParameter(
            "num_videos is more than 1, and a request is one video: animate(request.videos()) makes them all",
            "num_videos",
        )
    if request.output_type not in get_args(OutputType):
        raise BadParameter(
            f"output_type must be one of {', '.join(get_args(OutputType))} (got {request.output_type!r})", "output_type"
        )


def _check_contents(request: AnimationRequest, params: AnimationParams) -> None:
    """Refuses params that name a file whose content the request lacks, and pictures that do not go with them."""
    for name in REFERENCE_KNOBS:
        if getattr(params, name) is not None and getattr(request, name) is None:
            raise BadParameter(
                f"{name} of the params only names a file: load {getattr(params, name)} and give its content as the "
                f"request's {name}",
                name,
            )
    check_pictures(params, names=[name for name in PICTURE_KNOBS if getattr(request, name) is not None])


def _arrays(request: AnimationRequest) -> dict[str, Any]:
    """The request's arrays by knob, checked; None where it has none."""
    return {
        name: None if (values := getattr(request, name)) is None else arrays.as_array(values, name)
        for name in ARRAY_KNOBS
    }


def _picture(image: object, field: str) -> Image:
    background = "#000000" if field == "mask_image" else "#ffffff"
    try:
        return pictures.as_rgb(image, background=background)  # type: ignore[arg-type]  # it refuses what is not a picture
    except BadParameter as error:
        raise BadParameter(f"{field}{error.message.removeprefix('image')}", field) from None
