"""Every knob of an animation, declared once.

Manifest columns, command line flags, the HTTP form and the tables of the docs are all made from `AnimationParams`.
Reads and writes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Final

from pydantic import Field

from pia_ray.config.finish_knobs import FinishKnobs
from pia_ray.config.knob_types import (
    AS_WORD,
    MAX_COEFFICIENTS,
    MAX_SEED,
    MOTION_NAMES,
    Affinity,
    ContextSchedule,
    FloatCell,
    FrameNoise,
    FreeInitFilter,
    FreeU,
    IntCell,
    Knob,
    LongVideo,
    LoraChoice,
    MotionScale,
    OnOff,
    PresetName,
    PromptSyntax,
    Scheduler,
    Seam,
    Seed,
    Side,
    StyleName,
    Text,
    knob_of,
)

LOOPS: Final = range(3, 6)
"""Motion scales that close: the last frame is the picture again."""


MAX_FRAMES: Final = 32
"""Frames that are denoised in one piece unless context_frames says otherwise: the positions of PIA's motion modules."""

CONTEXT_FRAMES: Final = 16
"""Frames of a window or segment of longer videos: those of PIA's training. Source: arXiv 2312.13964."""

DISTILLED_STEPS: Final = 50
"""Most steps of the schedulers of distilled models, which pick theirs out of so many. Source: LCM, arXiv 2310.04378."""

NEGATIVE_PROMPT: Final = "wrong white balance, dark, sketches, worst quality, low quality, deformed, distorted"
"""The negative prompt of the documented PIA example; the default of Stable Diffusion 1.5 models."""

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


class AnimationParams(FinishKnobs):
    """All knobs of one animation. A knob that is not given is filled from the run's and then the model's defaults.

    Which knobs were given is what decides, not their values: `AnimationParams(prompt="...", motion_scale=0)` asks for
    motion scale 0 also where a run's default is 5. `resolve` does the filling, once, before anything is hashed.
    """

    prompt: Text = Field(max_length=10_000, description="What the picture shows and how it moves.")
    negative_prompt: Text = Field(
        NEGATIVE_PROMPT,
        max_length=10_000,
        description="What to keep away from. Unused where guidance_scale is 1 or less.",
    )
    seed: Seed | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Start of the row's own random numbers. Left out: derived from the row's id.",
    )
    style: StyleName = Field(
        DEFAULT_STYLE,
        min_length=1,
        max_length=64,
        description=f"Which of the run's models animates the row, by its name among the styles; {DEFAULT_STYLE} is the "
        "run's own model.",
    )
    motion_scale: MotionScale = Field(
        0,
        ge=0,
        le=8,
        description="How much moves: 0-2 small to large, 3-5 the same as loops, 6-8 with a change of style; "
        "or by name (" + ", ".join(MOTION_NAMES) + ").",
    )
    affinity: Affinity | None = Field(
        None,
        description="Coefficients of your own in place of motion_scale: the n-th says how much the frame n away from "
        "condition_frame is to be the picture (1: it is, 0: free); the last one goes on.",
        json_schema_extra={"bounds": f"1 to {MAX_COEFFICIENTS} numbers, 0 to 1"},
    )
    condition_frame: IntCell = Field(
        0,
        ge=0,
        le=255,
        description="The frame that is the picture, counted from 0. Motion goes both ways from it; a loop wants 0.",
    )
    seam: Annotated[Seam, AS_WORD] = Field(
        "keep",
        description="Both ends of a loop are the picture: drop leaves the last out of the video, which then plays "
        "round without a stutter and is a frame shorter.",
    )
    num_frames: IntCell = Field(
        16,
        ge=1,
        le=256,
        description="Length of the video. More than 32 are made piece by piece, as long_video says.",
        json_schema_extra={"unit": "frames"},
    )
    fps: IntCell = Field(
        8, ge=1, le=60, description="Playing speed of the video.", json_schema_extra={"unit": "frames/s"}
    )
    num_inference_steps: IntCell = Field(
        25, ge=1, le=1000, description="Denoising steps: more is slower.", json_schema_extra={"unit": "steps"}
    )
    guidance_scale: FloatCell = Field(
        7.5, ge=0, le=50, description="How closely to follow the prompt. 1 or less: no guidance, half the work."
    )
    image_guidance_scale: FloatCell = Field(
        1.0,
        ge=0,
        le=50,
        description="How closely to follow the picture. 1: no guidance by it; any other: one more evaluation a step; "
        "0: the picture is left out, so that only the prompt counts.",
    )
    strength: FloatCell = Field(
        1.0,
        gt=0,
        le=1,
        description="1 starts from noise alone; less starts from the noised picture and runs that share of the steps.",
    )
    scheduler: Annotated[Scheduler, AS_WORD] = Field("ddim", description="Sampler of the denoising.")
    eta: FloatCell = Field(0.0, ge=0, le=1, description="Noise added at each step by the ddim and tcd schedulers.")
    clip_skip: IntCell | None = Field(
        None,
        ge=0,
        le=11,
        description="Last layers of the text encoder to leave out, from 0: A1111's clip skip 2 is 1 here.",
        json_schema_extra={"unit": "layers"},
    )
    ip_adapter_scale: FloatCell = Field(
        1.0,
        ge=0,
        le=2,
        description="How much the style and content of ip_adapter_image count against the prompt. 0: not at all.",
    )
    width: Side | None = Field(
        None,
        ge=8,
        le=2048,
        description="Width of the video, a multiple of 8. Left out: the nearest of the model's sizes.",
        json_schema_extra={"unit": "px"},
    )
    height: Side | None = Field(
        None,
        ge=8,
        le=2048,
        description="Height of the video, a multiple of 8. Left out: the nearest of the model's sizes.",
        json_schema_extra={"unit": "px"},
    )
    long_video: Annotated[LongVideo, AS_WORD] = Field(
        "windows",
        description="How videos of more than context_frames are made: windows denoises overlapping pieces together, "
        "chain makes one piece after the other, each from the last frame before it.",
    )
    context_frames: IntCell | None = Field(
        None,
        ge=2,
        le=MAX_FRAMES,
        description="Frames that are denoised in one piece. Left out: all, or 16 of more than 32.",
        json_schema_extra={"unit": "frames"},
    )
    context_overlap: IntCell = Field(
        4,
        ge=0,
        le=MAX_FRAMES - 1,
        description="Frames that neighbouring windows share.",
        json_schema_extra={"unit": "frames"},
    )
    context_schedule: Annotated[ContextSchedule, AS_WORD] = Field(
        "standard",
        description="Position of the windows: standard keeps them fixed, uniform moves them at each step, uniform-loop "
        "also lets them pass from the end to the start.",
    )
    context_stride: IntCell = Field(
        1,
        ge=1,
        le=4,
        description="Above 1, the uniform schedules add windows of every 2nd frame, at 3 also of every 4th, and so on.",
    )
    noise: Annotated[FrameNoise, AS_WORD] = Field(
        "shuffle",
        description="Noise of frames beyond the first window: shuffle and repeat use the first window's again, "
        "random draws anew.",
    )
    free_init: FreeInitFilter = Field(
        "off",
        description="Filter of FreeInit, which samples free_init_iters times for steadier motion, each time from the "
        "slow part of the result before.",
    )
    free_init_iters: IntCell = Field(
        3,
        ge=1,
        le=10,
        description="Times that FreeInit samples, the first included.",
        json_schema_extra={"unit": "times"},
    )
    free_init_fast_sampling: OnOff = Field("off", description="Whether FreeInit's earlier times take fewer steps.")
    free_init_order: IntCell = Field(4, ge=1, le=16, description="Steepness of the butterworth filter.")
    free_init_spatial_stop: FloatCell = Field(
        0.25, ge=0, le=1, description="Frequency in space up to which FreeInit keeps the result before."
    )
    free_init_temporal_stop: FloatCell = Field(
        0.25, ge=0, le=1, description="Frequency in time up to which FreeInit keeps the result before."
    )
    free_u: FreeU | None = Field(
        None,
        description="FreeU's s1,s2,b1,b2: weights of skip connections and backbone, such as 0.9,0.2,1.5,1.6.",
        json_schema_extra={"bounds": "4 numbers, above 0 to 4"},
    )
    num_videos: IntCell = Field(
        1,
        ge=1,
        le=64,
        description="Videos per row, each its own work item with video_index 0.. and seed + index.",
        json_schema_extra={"unit": "videos"},
    )
    preset: PresetName = Field(
        "exact",
        description="How many steps are computed: exact all, balanced and fast fewer; the others are extrapolated from "
        "them, where the sampler is smooth enough (see docs/speed.md).",
    )
    end_image: Text | None = Field(
        None,
        min_length=1,
        description="Second picture, which the last frame is to be: a path, URL or bytes, as `image`.",
    )
    mask_image: Text | None = Field(
        None,
        min_length=1,
        description="Picture of where the image may move: white moves, black and transparent stay.",
    )
    ip_adapter_image: Text | None = Field(
        None,
        min_length=1,
        description="Picture whose style and content the video takes on, for models with an IP-Adapter.",
    )
    ip_adapter_image_embeds: Text | None = Field(
        None, min_length=1, description="Embedding in place of ip_adapter_image: .safetensors file or array."
    )
    latents: Text | None = Field(
        None,
        min_length=1,
        description="Noise to start from in place of the seed's: .safetensors file or array [4, T, h, w].",
    )
    prompt_embeds: Text | None = Field(
        None, min_length=1, description="Embedding in place of the prompt's: .safetensors file or array [L, C]."
    )
    negative_prompt_embeds: Text | None = Field(
        None, min_length=1, description="Embedding in place of the negative prompt's, of the same length [L, C]."
    )

    lora: LoraChoice = Field(
        "default",
        description="LoRAs of the model with their weights, such as `pixar:0.8+detail`; none; or default, which is "
        "each at the weight that the model states.",
    )
    lora_scale: FloatCell = Field(
        1.0, ge=0, le=10, description="Factor on the weights of all LoRAs: 0 is the model without them."
    )

    prompt_syntax: Annotated[PromptSyntax, AS_WORD] = Field(
        "plain",
        description="How both prompts are read: plain as text; a1111 with weights as in `(red:1.2)`, ((x)) and [x], "
        "BREAK, and `<lora:name:0.8>` in the prompt.",
        json_schema_extra={"since": "0.2.0"},
    )

    @property
    def has_guidance(self) -> bool:
        """Whether the negative prompt and a second branch take part. Source: Imagen, arXiv 2205.11487, equation 2."""
        return self.guidance_scale > 1

    @property
    def has_image_guidance(self) -> bool:
        """Whether a branch without the picture takes part."""
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
        """Frames of the animation, of which `timeline_of` says how the finished video shows them."""
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


_FIELDS: Final = AnimationParams.model_fields

KNOBS: Final[Mapping[str, Knob]] = {
    name: knob_of(name, _FIELDS[name])
    for name in (*(name for name in _FIELDS if name not in FinishKnobs.model_fields), *FinishKnobs.model_fields)
}
"""Every knob by name, in the order of declaration; those of finishing last."""


def folded_name(column: str) -> str:
    """The name of a column without regard to case, in snake case: `Image Src` is `image_src`."""
    return "_".join(column.casefold().replace("-", " ").split())


def knob_named(column: str) -> str | None:
    """The knob that a column of this name holds, without regard to case and the prefix `pia.`; None for no knob."""
    name = folded_name(column).removeprefix("pia.")
    return name if name in KNOBS else None


def suggest(name: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known name, or an empty string."""
    by_spelling = {_folded(word): word for word in sorted(known)}
    # A word of a longer name comes first: "steps" stands for num_inference_steps, not for style.
    folded = _folded(name)
    near = [word for word in by_spelling if word.endswith(f"-{folded.lstrip('-')}")] if len(name) >= 4 else []
    if len(near) != 1 or folded in by_spelling:
        near = difflib.get_close_matches(folded, by_spelling, n=1, cutoff=0.6)
    return f' Did you mean "{by_spelling[near[0]]}"?' if near else ""


def _folded(name: str) -> str:
    """The name without what people write in several ways: case, `_` for `-`, and other programs' dpmpp for dpm++."""
    return name.lower().replace("_", "-").replace("dpmpp", "dpm++")
