"""The values that travel between modules: a manifest's row, a request, an encoded video.

Reads and writes nothing and loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import seed_from_id, seed_of_video

if TYPE_CHECKING:
    from PIL import Image


OutputType = Literal["uint8", "pil", "np", "pt", "latent"]


@dataclass(frozen=True)
class ManifestRow:
    """One work item as planned: thin, picklable, everything resolved. Holds no image bytes."""

    id: str
    video_index: int
    image: str
    """URI of the picture, or `<manifest uri>#row=<n>&column=<name>` for bytes inside a Parquet manifest."""
    image_identity: str
    """The picture in the work key: its reference as written, or `sha256:<hex>` for bytes."""
    params: AnimationParams
    """Resolved; `seed` is set; `width` and `height` may still be None (chosen from the picture). Knobs that refer to
    files hold the identity of what they name, as `image_identity` does."""
    work_key: str
    """64 hex digits."""
    references: Mapping[str, str] = field(default_factory=dict)
    """The URIs, as in `image`, of the files that the params refer to, by knob."""
    picture_index: int | None = None
    """The picture's number among those of its row, from 0, where the row has several."""
    accept: str | None = None
    retakes: str | None = None
    """The row's own cells of these names, which replace the run's settings. No part of the work key."""
    takes: str | None = None
    """The takes that were tried before, as in `ResultRow`."""
    review_note: str | None = None
    """The note of a person on a take before, as in `ResultRow`."""

    @property
    def reference_identities(self) -> dict[str, str]:
        """The work key's entries for the files that the params refer to, by knob: the values of these knobs."""
        return {knob: getattr(self.params, knob) for knob in self.references}


@dataclass(frozen=True)
class StepEnd:
    """The state of a row after a denoising step, as `AnimationRequest.on_step_end` gets it."""

    step: int
    """From 0; a scheduler that takes two evaluations a step, such as heun, counts each."""
    timestep: float
    """The scheduler's timestep at which the step began."""
    tensors: Mapping[str, Any]
    """The row's own torch tensors: `latents` [4, T, h, w], `prompt_embeds` [L, C] and, with guidance,
    `negative_prompt_embeds` [L, C]. They are copies, so a change in them has no effect."""


Upscale = Callable[[np.ndarray[Any, Any], int], np.ndarray[Any, Any]]
"""Frames uint8 [T, H, W, 3], and a factor -> frames that are larger by it. May be called on any thread."""


OnStepEnd = Callable[[StepEnd], Mapping[str, Any] | None]
"""May return tensors by the names of `StepEnd.tensors`, of the same shapes, that replace the row's own."""


@dataclass(frozen=True)
class AnimationRequest:
    """One animation to make: a picture and its params.

    The pictures and arrays are fields of the request. Knobs of the params with the same names only say where a picture
    or array comes from; a request with such a knob must have the field too.
    """

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
    """Mask of the parts that may move: white moves, black and transparent stay. Cropped and scaled as `image` is."""
    ip_adapter_image: Image.Image | np.ndarray[Any, Any] | None = None
    """The IP-Adapter's picture: its content and style guide the video in addition to the prompt."""
    ip_adapter_image_embeds: np.ndarray[Any, Any] | None = None
    """float32, in place of `ip_adapter_image`: one embedding, several (a further axis in front), or diffusers' layout
    (two axes in front, the outer one of 2 with the negative first)."""
    latents: np.ndarray[Any, Any] | None = None
    """float32 [4, T, h, w], normal noise to start from in place of the seed's own first draw; below strength 1, the
    noise that the picture is given."""
    prompt_embeds: np.ndarray[Any, Any] | None = None
    """float32 [L, C], in place of the prompt's, which then plays no part."""
    negative_prompt_embeds: np.ndarray[Any, Any] | None = None
    """float32 [L, C], in place of the negative prompt's; both sides of guidance must have the same L."""
    output_type: OutputType = "uint8"
    """The type of `Animation.output`."""
    scheduler_config: Mapping[str, Any] | None = None
    """The settings of the scheduler's diffusers class, exactly as they are. None: the model's own, with the linear
    betas of PIA's training and without clipping."""
    on_step_end: OnStepEnd | None = None
    """Called after each denoising step, on the engine's thread, so other rows wait for it. An error fails this row."""

    def videos(self) -> list[AnimationRequest]:
        """One request for each of `params.num_videos` videos, with seeds of their own: the first one's + 0, 1, 2 ..."""
        params = self.params
        first = seed_from_id(self.id) if params.seed is None else params.seed
        return [
            replace(self, params=params.model_copy(update={"num_videos": 1, "seed": seed_of_video(first, index)}))
            for index in range(params.num_videos)
        ]


@dataclass(frozen=True)
class PreparedRequest:
    """A request that an engine can run; only `pia_ray.prepare.prepare` makes one.

    It pickles, and its pictures have the size of the video, so it may be made in one process and submitted in another.
    The fields are those of `AnimationRequest`, and the pictures and arrays are checked.
    """

    image: Image.Image
    """RGB, of the video's size."""
    params: AnimationParams
    """Every knob, with the width, height and seed that are used."""
    id: str
    deadline_s: float | None
    end_image: Image.Image | None
    """RGB, of the video's size."""
    mask_image: Image.Image | None
    """Mode L, of the video's size."""
    ip_adapter_image: Image.Image | None
    """RGB, of its own size."""
    ip_adapter_image_embeds: np.ndarray[Any, Any] | None
    latents: np.ndarray[Any, Any] | None
    prompt_embeds: np.ndarray[Any, Any] | None
    negative_prompt_embeds: np.ndarray[Any, Any] | None
    output_type: OutputType
    scheduler_config: Mapping[str, Any] | None
    on_step_end: OnStepEnd | None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the video, in px."""
        return self.image.size

    @property
    def seed(self) -> int:
        """The seed that is used."""
        assert self.params.seed is not None
        return self.params.seed


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
