"""Every knob of an animation, declared once, and the value types that travel between modules.

Manifest columns, command line flags, the HTTP form and the README table are all made from `AnimationParams`. This
module reads and writes nothing and knows no torch.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pia_ray.errors import BadParameter

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

Scheduler = Literal[
    "ddim",
    "euler",
    "euler-a",
    "dpm++2m",
    "dpm++2m-karras",
    "dpm++2m-sde",
    "unipc",
    "pndm",
    "deis",
    "heun",
    "lcm",
]
VideoFormat = Literal["mp4", "gif", "webp", "webm"]
Preset = Literal["standard", "draft"]

MOTION_NAMES: Final = (
    "small",
    "moderate",
    "large",
    "loop-small",
    "loop-moderate",
    "loop-large",
    "style-small",
    "style-moderate",
    "style-large",
)
"""Names of the nine motion scales, by number. Source: PIA, arXiv 2312.13964, and its published tables."""

MAX_SEED: Final = 2**64 - 1

NEGATIVE_PROMPT: Final = "wrong white balance, dark, sketches, worst quality, low quality, deformed, distorted"
"""The negative prompt of the documented PIA example; the default of Stable Diffusion 1.5 models."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "standard": {},
    "draft": {"scheduler": "unipc", "num_inference_steps": 10},
}
"""What each preset sets for knobs that neither the row nor the run names."""

RESERVED_KNOBS: Final = frozenset(
    {
        "style",
        "ip_adapter_scale",
        "free_init",
        "cross_attention_kwargs",
        "image_guidance_scale",
    }
)
"""Knobs of PIA that this version does not read yet. A manifest that has one as a column is refused, not half obeyed."""

PICTURE_KNOBS: Final = ("end_image", "mask_image", "ip_adapter_image")
"""Knobs that refer to a picture, as `image` does."""

ARRAY_KNOBS: Final[Mapping[str, str]] = {
    "ip_adapter_image_embeds": "[images, tokens, C]",
    "latents": "[4, T, h, w]",
    "prompt_embeds": "[L, C]",
    "negative_prompt_embeds": "[L, C]",
}
"""Knobs that refer to an array of floats, each with its layout."""

REFERENCE_KNOBS: Final = (*PICTURE_KNOBS, *ARRAY_KNOBS)
"""Knobs whose value names a file; what is in it is the field of that name of `AnimationRequest`."""

OutputType = Literal["uint8", "pil", "np", "pt", "latent"]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value


def _motion_scale(value: object) -> object:
    if isinstance(value, str):
        name = value.strip().lower().replace("_", "-").replace(" ", "-")
        if name in MOTION_NAMES:
            return MOTION_NAMES.index(name)
    number = _int_cell(value)
    if isinstance(number, str):
        raise ValueError(f"must be 0 to 8 or one of {', '.join(MOTION_NAMES)}")
    return number


def _name(value: object) -> object:
    return value.strip().lower().replace("_", "-") if isinstance(value, str) else value


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {type(value).__name__}")
    if any("\ud800" <= ch <= "\udfff" for ch in value):
        raise ValueError("must be valid Unicode text (it holds a lone surrogate)")
    return value


def _multiple_of_8(value: object) -> object:
    value = _no_bool(value)
    if isinstance(value, int) and value % 8:
        low = max(8, value // 8 * 8)
        raise ValueError(f"must be a multiple of 8; the nearest are {low} and {value // 8 * 8 + 8}")
    return value


def _int_cell(value: object) -> object:
    """Text from CSV and floats with a whole value are integers; 2**63 and more must not pass through a float."""
    value = _no_bool(value)
    if isinstance(value, str):
        text = value.strip()
        try:
            return int(text)
        except ValueError:
            pass
        try:
            number = float(text)
        except ValueError:
            return text
        return int(number) if math.isfinite(number) and number.is_integer() and abs(number) < 2**53 else text
    # pandas writes a column of integers with gaps as floats.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _side(value: object) -> object:
    return _multiple_of_8(_int_cell(value))


_Int = Annotated[int, BeforeValidator(_int_cell)]
_Float = Annotated[float, BeforeValidator(_no_bool)]
_Text = Annotated[str, BeforeValidator(_text)]
_Side = Annotated[int, BeforeValidator(_side)]
_Reference = Annotated[str, BeforeValidator(_text)]


class AnimationParams(BaseModel):
    """All knobs of one animation. A knob that is not given is filled from the run's and then the model's defaults.

    Which knobs were given is what decides, not their values: `AnimationParams(prompt="...", motion_scale=0)` asks for
    motion scale 0 also where a run's default is 5. `resolve` does the filling, once, before anything is hashed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: _Text = Field(min_length=1, max_length=10_000, description="What the picture shows and how it moves.")
    negative_prompt: _Text = Field(
        NEGATIVE_PROMPT,
        max_length=10_000,
        description="What to keep away from. Unused where guidance_scale is 1 or less.",
    )
    seed: _Int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Start of the row's own random numbers. Left out: derived from the row's id.",
    )
    motion_scale: Annotated[int, BeforeValidator(_motion_scale)] = Field(
        0,
        ge=0,
        le=8,
        description="How much moves: 0-2 small to large, 3-5 the same as loops, 6-8 with a change of style; "
        "or by name (" + ", ".join(MOTION_NAMES) + ").",
    )
    num_frames: _Int = Field(16, ge=1, le=32, description="Length of the video.", json_schema_extra={"unit": "frames"})
    fps: _Int = Field(8, ge=1, le=60, description="Playing speed of the video.", json_schema_extra={"unit": "frames/s"})
    num_inference_steps: _Int = Field(
        25, ge=1, le=1000, description="Denoising steps: more is slower.", json_schema_extra={"unit": "steps"}
    )
    guidance_scale: _Float = Field(
        7.5, ge=0, le=50, description="How closely to follow the prompt. 1 or less: no guidance, half the work."
    )
    strength: _Float = Field(
        1.0,
        gt=0,
        le=1,
        description="1 starts from noise alone; less starts from the noised picture and runs that share of the steps.",
    )
    scheduler: Annotated[Scheduler, BeforeValidator(_name)] = Field("ddim", description="Sampler of the denoising.")
    eta: _Float = Field(0.0, ge=0, le=1, description="Noise added at each step by the ddim scheduler.")
    clip_skip: _Int | None = Field(
        None,
        ge=0,
        le=11,
        description="Last layers of the text encoder to leave out.",
        json_schema_extra={"unit": "layers"},
    )
    width: _Side | None = Field(
        None,
        ge=8,
        le=2048,
        description="Width of the video, a multiple of 8. Left out: the nearest of the model's sizes.",
        json_schema_extra={"unit": "px"},
    )
    height: _Side | None = Field(
        None,
        ge=8,
        le=2048,
        description="Height of the video, a multiple of 8. Left out: the nearest of the model's sizes.",
        json_schema_extra={"unit": "px"},
    )
    num_videos: _Int = Field(
        1,
        ge=1,
        le=64,
        description="Videos per row, each its own work item with video_index 0.. and seed + index.",
        json_schema_extra={"unit": "videos"},
    )
    preset: Annotated[Preset, BeforeValidator(_name)] = Field(
        "standard",
        description="Values for knobs that neither row nor run names: standard keeps the model's own, "
        "draft is 10 unipc steps.",
    )
    end_image: _Reference | None = Field(
        None,
        min_length=1,
        description="Second picture, which the last frame is to be: a path, URL or bytes, as `image`.",
    )
    mask_image: _Reference | None = Field(
        None,
        min_length=1,
        description="Picture of where the image may move: white moves, black and transparent stay.",
    )
    ip_adapter_image: _Reference | None = Field(
        None, min_length=1, description="Picture whose look the video takes on, for models with an IP-Adapter."
    )
    ip_adapter_image_embeds: _Reference | None = Field(
        None, min_length=1, description="Embedding in place of ip_adapter_image: .safetensors file or array."
    )
    latents: _Reference | None = Field(
        None,
        min_length=1,
        description="Noise to start from in place of the seed's: .safetensors file or array [4, T, h, w].",
    )
    prompt_embeds: _Reference | None = Field(
        None, min_length=1, description="Embedding in place of the prompt's: .safetensors file or array [L, C]."
    )
    negative_prompt_embeds: _Reference | None = Field(
        None, min_length=1, description="Embedding in place of the negative prompt's, of the same length [L, C]."
    )

    @property
    def has_guidance(self) -> bool:
        """Whether the negative prompt and a second branch take part. Source: Imagen, arXiv 2205.11487, equation 2."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Knob:
    """One knob as flags, forms and tables see it."""

    name: str
    type: type
    """`int`, `float` or `str`."""
    choices: tuple[str, ...]
    """Allowed values of a knob that is one of a few names, else empty."""
    default: Any
    bounds: str
    """The allowed range as people write it, such as "0 to 8", or an empty string."""
    unit: str
    meaning: str


def _knob(name: str) -> Knob:
    field = AnimationParams.model_fields[name]
    kind = field.annotation
    options = [a for a in get_args(kind) if a is not type(None)] if get_origin(kind) is not Literal else [kind]
    kind = options[0] if options else kind
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    choices = tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()
    low = high = ""
    for rule in field.metadata:
        if (ge := getattr(rule, "ge", None)) is not None:
            low = f"{ge:g}" if isinstance(ge, float) else str(ge)
        if (gt := getattr(rule, "gt", None)) is not None:
            low = f"above {gt:g}"
        if (le := getattr(rule, "le", None)) is not None:
            high = "2^64-1" if le == MAX_SEED else str(le)
    extra = field.json_schema_extra
    return Knob(
        name=name,
        type=int if kind is int else float if kind is float else str,
        choices=choices,
        default=None if field.is_required() else field.default,
        bounds=f"{low} to {high}" if low and high else "",
        unit=str(extra.get("unit", "")) if isinstance(extra, dict) else "",
        meaning=field.description or "",
    )


KNOBS: Final[Mapping[str, Knob]] = {name: _knob(name) for name in AnimationParams.model_fields}
"""Every knob by name, in the order of declaration."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def parse_params(cells: Mapping[str, object]) -> AnimationParams:
    """The params of one row or request from its cells; null cells count as absent.

    Raises:
        BadParameter: an unknown knob (with the nearest known one) or a value out of bounds; names the field.
    """
    given = {name: value for name, value in cells.items() if value is not None}
    for name in given:
        if name not in KNOBS:
            raise BadParameter(f'there is no knob "{name}".{suggest(name, KNOBS)}', name)
    if "prompt" not in given:
        raise BadParameter("prompt is missing or null: give each row a prompt, or the run a --prompt", "prompt")
    try:
        return AnimationParams.model_validate(given)
    except ValidationError as error:
        raise _bad_parameter(error) from None


def parse_defaults(cells: Mapping[str, object]) -> dict[str, Any]:
    """Validated run or model defaults: the given knobs only, each with its proper type.

    Raises:
        BadParameter: as `parse_params`.
    """
    params = parse_params({"prompt": "-", **cells})
    return {name: getattr(params, name) for name in params.model_fields_set if name in cells}


def _bad_parameter(error: ValidationError) -> BadParameter:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    knob = KNOBS.get(field)
    text = str(first["msg"]).removeprefix("Value error, ")
    value = first.get("input")
    if knob is not None and knob.choices:
        text = f"must be one of {', '.join(knob.choices)}.{suggest(str(value), knob.choices)}"
    elif knob is not None and knob.bounds and not text.startswith("must"):
        whole = "a whole number from " if knob.type is int else ""
        text = f"must be {whole}{knob.bounds}"
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return BadParameter(f"{field} {text} (got {shown})" if text.startswith("must") else f"{field}: {text}", field)


def resolve(
    params: AnimationParams, run_defaults: Mapping[str, Any], *, model_defaults: Mapping[str, Any]
) -> AnimationParams:
    """The same params with every knob set: row, then run, then preset, then model, then the declared default.

    Idempotent. The values of `run_defaults` and `model_defaults` have been through `parse_defaults`.
    """
    given = {name: getattr(params, name) for name in params.model_fields_set}
    named = {**run_defaults, **given}
    preset = named.get("preset", model_defaults.get("preset", "standard"))
    values: dict[str, Any] = {}
    for layer in (model_defaults, PRESETS[preset], named):
        values.update(layer)
    for name, knob in KNOBS.items():
        values.setdefault(name, knob.default)
    return AnimationParams.model_construct(_fields_set=set(values), **values)


def seed_from_id(row_id: str) -> int:
    """The uint64 seed of a row that names none: the first eight bytes of sha256 of its id."""
    return int.from_bytes(hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def seed_of_video(seed: int, video_index: int) -> int:
    """The seed of the n-th video of a row: seed + index, modulo 2^64."""
    return (seed + video_index) % (MAX_SEED + 1)


@dataclass(frozen=True)
class ManifestRow:
    """One work item as planned: thin, picklable, everything resolved. Holds no image bytes."""

    id: str
    video_index: int
    image: str
    """URI of the picture, or `<manifest uri>#row=<n>&column=<name>` for bytes inside a Parquet manifest."""
    image_identity: str
    """What the work key says of the picture: its reference as written, or `sha256:<hex>` for bytes."""
    params: AnimationParams
    """Resolved; `seed` is set; `width` and `height` may still be None (chosen from the picture). Knobs that refer to
    files hold the identity of what they name, as `image_identity` does."""
    work_key: str
    """64 hex digits."""
    references: Mapping[str, str] = field(default_factory=dict)
    """Where the files lie that the params refer to: URIs as in `image`, by knob."""


@dataclass(frozen=True)
class StepEnd:
    """What `AnimationRequest.on_step_end` is told when a denoising step is done."""

    step: int
    """From 0; a scheduler that takes two evaluations a step, such as heun, counts each."""
    timestep: float
    """That the step began at."""
    tensors: Mapping[str, Any]
    """torch tensors of this row alone: `latents` [4, T, h, w], `prompt_embeds` [L, C] and, with guidance,
    `negative_prompt_embeds` [L, C]. Copies: what is changed in them changes nothing."""


OnStepEnd = Callable[[StepEnd], Mapping[str, Any] | None]
"""May return tensors by the names of `StepEnd.tensors`, of the same shapes, that take the place of the row's own."""


@dataclass(frozen=True)
class AnimationRequest:
    """One animation to make: a picture and its params."""

    image: Image.Image | np.ndarray[Any, Any]
    """PIL image, or uint8 [H, W, 3] RGB (also [H, W] or [H, W, 4])."""
    params: AnimationParams
    id: str = ""
    """Names the request in logs and errors; gives the seed where `params` has none."""
    deadline_s: float | None = None
    """Seconds from submission after which the request fails with `Timeout`."""
    end_image: Image.Image | np.ndarray[Any, Any] | None = None
    """Second keyframe: the picture that the last frame is to be. Fitted like `image`."""
    mask_image: Image.Image | np.ndarray[Any, Any] | None = None
    """Where the picture may move: white moves, black and transparent stay. Cropped and scaled as `image` is; in an
    engine it has mode L."""
    ip_adapter_image: Image.Image | np.ndarray[Any, Any] | None = None
    """Picture whose look the video takes on."""
    ip_adapter_image_embeds: np.ndarray[Any, Any] | None = None
    """float32, in place of `ip_adapter_image`."""
    latents: np.ndarray[Any, Any] | None = None
    """float32 [4, T, h, w], normal noise to start from in place of the seed's own first draw; below strength 1, the
    noise that the picture is given."""
    prompt_embeds: np.ndarray[Any, Any] | None = None
    """float32 [L, C], in place of the prompt's, which then plays no part."""
    negative_prompt_embeds: np.ndarray[Any, Any] | None = None
    """float32 [L, C], in place of the negative prompt's; both sides of guidance must have the same L."""
    output_type: OutputType = "uint8"
    """What `Animation.output` is."""
    on_step_end: OnStepEnd | None = None
    """Called after each denoising step, on the engine's thread: other rows wait for it. Raising fails this row."""

    def videos(self) -> list[AnimationRequest]:
        """One request for each of `params.num_videos` videos, with seeds of their own: the first one's + 0, 1, 2 ..."""
        params = self.params
        first = seed_from_id(self.id) if params.seed is None else params.seed
        return [
            replace(self, params=params.model_copy(update={"num_videos": 1, "seed": seed_of_video(first, index)}))
            for index in range(params.num_videos)
        ]


@dataclass(frozen=True)
class Animation:
    """A finished animation in memory."""

    frames: np.ndarray[Any, Any]
    """uint8 [T, H, W, 3], RGB. Empty for the output type "latent", which is not decoded."""
    params: AnimationParams
    """Resolved, with the width, height and seed that were used."""
    model: str
    """Name and version of the model that made it."""
    id: str
    gpu_s: float
    """Seconds of engine time: this row's share of every forward it took part in, plus its decode."""
    animate_s: float
    """Seconds from submission to the finished frames."""
    motion: float
    """Mean L1 over H, S, V and an edge channel against the first frame, 0 to 1. Source: PIA's training score."""
    output: Any = None
    """As the request's `output_type` asks: "uint8": `frames`; "pil": a list of PIL images; "np": float32 [T, H, W, 3]
    and "pt": a torch tensor [T, 3, H, W], both 0 to 1 and not rounded to 8 bits; "latent": the denoised latents, a
    torch tensor [4, T, h, w]. Tensors are float32, on the CPU."""

    def save(self, path: str | Path) -> None:
        """Encodes to a file; the extension picks the format (mp4, gif, webp, webm).

        Raises:
            VideoError: unknown extension, no frames, or the encoder failed.
        """
        from pia_ray.video import save_animation  # the one step down the module order: a method people expect

        save_animation(self, path)


@dataclass(frozen=True)
class EncodedVideo:
    """A finished video file in memory."""

    content: bytes
    format: VideoFormat
    num_frames: int
    width: int
    height: int
    fps: int
    sha256: str

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return len(self.content)


@dataclass(frozen=True)
class ResultRow:
    """One row of the results table; the fields are RESULTS_SCHEMA, in order. Unknown values are None."""

    id: str
    video_index: int
    status: Literal["succeeded", "failed"]
    error_code: str | None
    error_message: str | None
    retryable: bool | None
    attempts: int
    video_uri: str | None
    thumbnail_uri: str | None
    input_thumbnail_uri: str | None
    image_uri: str
    prompt: str | None
    seed: int
    width: int | None
    height: int | None
    num_frames: int | None
    fps: int | None
    duration_s: float | None
    size_bytes: int | None
    sha256: str | None
    input_sha256: str | None
    original_width: int | None
    original_height: int | None
    params: str
    """The resolved params as canonical JSON; seeds as strings."""
    work_key: str
    model: str
    run_id: str
    worker: str
    fetch_s: float | None
    animate_s: float | None
    publish_s: float | None
    gpu_s: float | None
    motion: float | None
    finished_at: datetime
