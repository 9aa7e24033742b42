"""Every knob of an animation, declared once, and the value types that travel between modules.

Manifest columns, command line flags, the HTTP form and the README table are all made from `AnimationParams`. This
module reads and writes nothing and knows no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    pass

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
    "euler-karras",
    "dpm++2m-sde-karras",
    "dpm++2s",
    "dpm++2s-karras",
    "unipc-karras",
    "heun-karras",
    "kdpm2",
    "kdpm2-karras",
    "kdpm2-a",
    "kdpm2-a-karras",
    "ddpm",
    "tcd",
    "sa-solver",
]
FreeInit = Literal["off", "butterworth", "gaussian", "ideal"]
ContextSchedule = Literal["standard", "uniform", "uniform-loop"]
LongVideo = Literal["windows", "chain"]
FrameNoise = Literal["shuffle", "repeat", "random"]
Switch = Literal["off", "on"]
VideoFormat = Literal["mp4", "gif", "webp", "webm"]
Preset = Literal["standard", "draft"]
Seam = Literal["keep", "drop"]

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

LOOPS: Final = range(3, 6)
"""Motion scales that close: the last frame is the picture again."""

FIRST_VERSION: Final = "0.1.0"
"""The version whose knobs are all in a work key, whatever their values."""

MAX_COEFFICIENTS: Final = 64

MAX_SEED: Final = 2**64 - 1

MAX_FRAMES: Final = 32
"""Frames that are denoised in one piece unless context_frames says otherwise: the positions of PIA's motion modules."""

CONTEXT_FRAMES: Final = 16
"""Frames of a window or segment of longer videos: those of PIA's training. Source: arXiv 2312.13964."""

DISTILLED_STEPS: Final = 50
"""Most steps of the schedulers of distilled models, which pick theirs out of so many. Source: LCM, arXiv 2310.04378."""

NEGATIVE_PROMPT: Final = "wrong white balance, dark, sketches, worst quality, low quality, deformed, distorted"
"""The negative prompt of the documented PIA example; the default of Stable Diffusion 1.5 models."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "standard": {},
    "draft": {"scheduler": "unipc", "num_inference_steps": 10},
}
"""What each preset sets for knobs that neither the row nor the run names."""

DEFAULT_STYLE: Final = "default"
"""The style of rows that the run's own model animates."""

RESERVED_KNOBS: Final = frozenset(
    {
        "cross_attention_kwargs",
    }
)
"""Knobs of PIA that this version does not read yet. A manifest that has one as a column is refused, not half obeyed."""

PICTURE_KNOBS: Final = ("end_image", "mask_image", "ip_adapter_image")
"""Knobs that refer to a picture, as `image` does."""

ARRAY_KNOBS: Final[Mapping[str, str]] = {
    "ip_adapter_image_embeds": "[sides, images, tokens, C]",
    "latents": "[4, T, h, w]",
    "prompt_embeds": "[L, C]",
    "negative_prompt_embeds": "[L, C]",
}
"""Knobs that refer to an array of floats, each with its layout."""

REFERENCE_KNOBS: Final = (*PICTURE_KNOBS, *ARRAY_KNOBS)
"""Knobs whose value names a file; what is in it is the field of that name of `AnimationRequest`."""


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


def _affinity(value: object) -> object:
    """Numbers of a list, or of text such as "1, .9, .85"; a lone number is a list of one."""
    wrong = f"must be 1 to {MAX_COEFFICIENTS} numbers from 0 to 1, such as 1,.9,.85"
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    cells: list[Any] = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    if not 1 <= len(cells) <= MAX_COEFFICIENTS:
        raise ValueError(wrong)
    numbers = []
    for cell in cells:
        if cell is None or isinstance(cell, bool):
            raise ValueError(wrong)
        try:
            number = float(cell)
        except (TypeError, ValueError):
            raise ValueError(wrong) from None
        if not 0 <= number <= 1:
            raise ValueError(wrong)
        numbers.append(abs(number))  # -0.0 is written as 0.0
    return tuple(numbers)


def _name(value: object) -> object:
    return value.strip().lower().replace("_", "-") if isinstance(value, str) else value


def _loras(value: object) -> object:
    """One spelling for each choice of LoRAs, since it is part of the work key."""
    if not isinstance(value, str):
        raise ValueError(f"must be text such as pixar:0.8+detail, not {type(value).__name__}")
    text = value.strip().lower()
    if text in ("default", "none"):
        return text
    chosen: dict[str, str] = {}
    for part in text.split("+"):
        name, colon, weight = (word.strip() for word in part.partition(":"))
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            number = math.nan
        if not name or name in chosen or not -10 <= number <= 10:
            raise ValueError("must be default, none, or names with weights from -10 to 10, such as pixar:0.8+detail")
        chosen[name] = f"{name}:{number:g}" if colon else name
    return "+".join(chosen[name] for name in sorted(chosen))


def _switch(value: object) -> object:
    """Words and truth values for on and off; YAML reads a bare off as false."""
    if isinstance(value, bool):
        return "on" if value else "off"
    word = _name(value)
    return {"true": "on", "yes": "on", "false": "off", "no": "off"}.get(word, word) if isinstance(word, str) else word


def _free_init(value: object) -> object:
    return {"on": "butterworth"}.get(str(word), word) if isinstance(word := _switch(value), str) else word


def _free_u(value: object) -> object:
    """Four numbers, or text that holds them."""
    if isinstance(value, str):
        value = value.strip().strip("[]").split(",")
    if isinstance(value, np.ndarray):
        value = value.tolist()
    text = "must be four numbers s1,s2,b1,b2 above 0 and at most 4, such as 0.9,0.2,1.5,1.6"
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise ValueError(text)
    try:
        numbers = tuple(float(_no_bool(number)) for number in value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(text) from None
    if not all(0 < number <= 4 for number in numbers):
        raise ValueError(text)
    return numbers


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {type(value).__name__}")
    if any("\ud800" <= ch <= "\udfff" for ch in value):
        raise ValueError("must be valid Unicode text (it holds a lone surrogate)")
    return value


def _style(value: object) -> object:
    value = _text(value)
    return value.strip() if isinstance(value, str) else value


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
_Style = Annotated[str, BeforeValidator(_style)]
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
    style: _Style = Field(
        DEFAULT_STYLE,
        min_length=1,
        max_length=64,
        description=f"Which of the run's models animates the row, by its name among the styles; {DEFAULT_STYLE} is the "
        "run's own model.",
    )
    motion_scale: Annotated[int, BeforeValidator(_motion_scale)] = Field(
        0,
        ge=0,
        le=8,
        description="How much moves: 0-2 small to large, 3-5 the same as loops, 6-8 with a change of style; "
        "or by name (" + ", ".join(MOTION_NAMES) + ").",
    )
    affinity: Annotated[tuple[float, ...], BeforeValidator(_affinity)] | None = Field(
        None,
        description="Coefficients of your own in place of motion_scale: the n-th says how much the frame n away from "
        "condition_frame is to be the picture (1: it is, 0: free); the last one goes on.",
        json_schema_extra={"bounds": f"1 to {MAX_COEFFICIENTS} numbers, 0 to 1"},
    )
    condition_frame: _Int = Field(
        0,
        ge=0,
        le=255,
        description="The frame that is the picture, counted from 0. Motion goes both ways from it; a loop wants 0.",
    )
    seam: Annotated[Seam, BeforeValidator(_name)] = Field(
        "keep",
        description="Both ends of a loop are the picture: drop leaves the last out of the video, which then plays "
        "round without a stutter and is a frame shorter.",
    )
    num_frames: _Int = Field(
        16,
        ge=1,
        le=256,
        description="Length of the video. More than 32 are made piece by piece, as long_video says.",
        json_schema_extra={"unit": "frames"},
    )
    fps: _Int = Field(8, ge=1, le=60, description="Playing speed of the video.", json_schema_extra={"unit": "frames/s"})
    num_inference_steps: _Int = Field(
        25, ge=1, le=1000, description="Denoising steps: more is slower.", json_schema_extra={"unit": "steps"}
    )
    guidance_scale: _Float = Field(
        7.5, ge=0, le=50, description="How closely to follow the prompt. 1 or less: no guidance, half the work."
    )
    image_guidance_scale: _Float = Field(
        1.0,
        ge=0,
        le=50,
        description="How closely to follow the picture. 1: no guidance by it; any other: one more evaluation a step; "
        "0: the picture is left out, so that only the prompt counts.",
    )
    strength: _Float = Field(
        1.0,
        gt=0,
        le=1,
        description="1 starts from noise alone; less starts from the noised picture and runs that share of the steps.",
    )
    scheduler: Annotated[Scheduler, BeforeValidator(_name)] = Field("ddim", description="Sampler of the denoising.")
    eta: _Float = Field(0.0, ge=0, le=1, description="Noise added at each step by the ddim and tcd schedulers.")
    clip_skip: _Int | None = Field(
        None,
        ge=0,
        le=11,
        description="Last layers of the text encoder to leave out.",
        json_schema_extra={"unit": "layers"},
    )
    ip_adapter_scale: _Float = Field(
        1.0, ge=0, le=2, description="How much the look of ip_adapter_image counts, beside the prompt. 0: not at all."
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
    long_video: Annotated[LongVideo, BeforeValidator(_name)] = Field(
        "windows",
        description="How videos of more than context_frames are made: windows denoises overlapping pieces together, "
        "chain makes one piece after the other, each from the last frame before it.",
    )
    context_frames: _Int | None = Field(
        None,
        ge=2,
        le=MAX_FRAMES,
        description="Frames that are denoised in one piece. Left out: all, or 16 of more than 32.",
        json_schema_extra={"unit": "frames"},
    )
    context_overlap: _Int = Field(
        4,
        ge=0,
        le=MAX_FRAMES - 1,
        description="Frames that neighbouring windows share.",
        json_schema_extra={"unit": "frames"},
    )
    context_schedule: Annotated[ContextSchedule, BeforeValidator(_name)] = Field(
        "standard",
        description="Where windows lie: standard keeps them in place, uniform moves them at each step, uniform-loop "
        "also lets them pass from the end to the start.",
    )
    context_stride: _Int = Field(
        1,
        ge=1,
        le=4,
        description="Above 1, the uniform schedules add windows of every 2nd frame, at 3 also of every 4th, and so on.",
    )
    noise: Annotated[FrameNoise, BeforeValidator(_name)] = Field(
        "shuffle",
        description="Noise of frames beyond the first window: shuffle and repeat use the first window's again, "
        "random draws anew.",
    )
    free_init: Annotated[FreeInit, BeforeValidator(_free_init)] = Field(
        "off",
        description="Filter of FreeInit, which samples free_init_iters times for steadier motion, each time from the "
        "slow part of the result before.",
    )
    free_init_iters: _Int = Field(
        3,
        ge=1,
        le=10,
        description="Times that FreeInit samples, the first included.",
        json_schema_extra={"unit": "times"},
    )
    free_init_fast_sampling: Annotated[Switch, BeforeValidator(_switch)] = Field(
        "off", description="Whether FreeInit's earlier times take fewer steps."
    )
    free_init_order: _Int = Field(4, ge=1, le=16, description="Steepness of the butterworth filter.")
    free_init_spatial_stop: _Float = Field(
        0.25, ge=0, le=1, description="Frequency in space up to which FreeInit keeps the result before."
    )
    free_init_temporal_stop: _Float = Field(
        0.25, ge=0, le=1, description="Frequency in time up to which FreeInit keeps the result before."
    )
    free_u: Annotated[tuple[float, float, float, float], BeforeValidator(_free_u)] | None = Field(
        None,
        description="FreeU's s1,s2,b1,b2: weights of skip connections and backbone, such as 0.9,0.2,1.5,1.6.",
        json_schema_extra={"bounds": "4 numbers, above 0 to 4"},
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

    lora: Annotated[str, BeforeValidator(_loras)] = Field(
        "default",
        description="LoRAs of the model with their weights, such as `pixar:0.8+detail`; none; or default, which is "
        "each at the weight that the model states.",
    )
    lora_scale: _Float = Field(
        1.0, ge=0, le=10, description="Factor on the weights of all LoRAs: 0 is the model without them."
    )

    @property
    def has_guidance(self) -> bool:
        """Whether the negative prompt and a second branch take part. Source: Imagen, arXiv 2205.11487, equation 2."""
        return self.guidance_scale > 1

    @property
    def has_image_guidance(self) -> bool:
        """Whether a branch without the picture takes part beside those with it."""
        return self.image_guidance_scale not in (0, 1)

    @property
    def num_branches(self) -> int:
        """Sides of guidance: UNet evaluations wherever the sampler asks for a prediction."""
        return 1 + self.has_guidance + self.has_image_guidance

    @property
    def is_loop(self) -> bool:
        """Whether the last frame is the picture as much as the first."""
        if self.num_frames < 2 or self.condition_frame:
            return False
        if self.affinity is None:
            return self.motion_scale in LOOPS
        return self.affinity[0] == self.affinity[min(self.num_frames, len(self.affinity)) - 1] == 1

    @property
    def video_frames(self) -> int:
        """Frames of the finished video."""
        return self.num_frames - (self.seam == "drop")

    @property
    def piece_frames(self) -> int:
        """Most frames that are denoised in one piece: all of them, or those of one window or segment."""
        if self.context_frames is not None:
            return min(self.context_frames, self.num_frames)
        return self.num_frames if self.num_frames <= MAX_FRAMES else CONTEXT_FRAMES

    @property
    def iterations(self) -> tuple[int, ...]:
        """Denoising steps of each of FreeInit's iterations; one without it. Source: arXiv 2312.07537."""
        steps, times = self.num_inference_steps, self.free_init_iters
        if self.free_init == "off":
            return (steps,)
        if self.free_init_fast_sampling == "off":
            return (steps,) * times
        return tuple(max(1, int(steps / times * (iteration + 1))) for iteration in range(times))


@dataclass(frozen=True)
class Knob:
    """One knob as flags, forms and tables see it."""

    name: str
    type: type
    """`int`, `float` or `str`."""
    choices: tuple[str, ...]
    """Allowed values of a knob that is one of a few names, else empty."""
    many: bool
    """Whether it holds several numbers: a list, or text with commas."""
    default: Any
    bounds: str
    """The allowed range as people write it, such as "0 to 8", or an empty string."""
    unit: str
    meaning: str
    since: str
    """The version of pia-ray that has it first; `json_schema_extra` says so of those after the first."""


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
        many=get_origin(kind) is tuple,
        default=None if field.is_required() else field.default,
        bounds=str(extra["bounds"])
        if isinstance(extra, dict) and "bounds" in extra
        else f"{low} to {high}"
        if low and high
        else "",
        unit=str(extra.get("unit", "")) if isinstance(extra, dict) else "",
        meaning=field.description or "",
        since=str(extra.get("since", FIRST_VERSION)) if isinstance(extra, dict) else FIRST_VERSION,
    )


KNOBS: Final[Mapping[str, Knob]] = {name: _knob(name) for name in AnimationParams.model_fields}
"""Every knob by name, in the order of declaration."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
