"""The interface of a renderer: its requests and its events. Knows neither HTTP nor Ray.

`local_renderer` renders in this process; `serve` carries the same requests and events to engines in other processes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from pydantic import BaseModel, ConfigDict

from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import AnimationParams
from pia_ray.result_row import JUDGED
from pia_ray.takes import NO_POLICY, Policy

INTERACTIVE: Final = 0
"""Priority of a synchronous call, whose caller waits."""

VIDEO_JOB: Final = 1
"""Priority of a video job."""

BATCH_LINE: Final = 2
"""Priority of a line of a batch."""


@dataclass(frozen=True)
class RenderRequest:
    """A request for one video, with its files as they came over the wire."""

    id: str
    """Names the request in logs and errors; gives the seed where `params` has none."""
    params: AnimationParams
    """`style` is the name of a model, or "default"."""
    image: bytes
    """The picture's file."""
    inputs: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the knobs that refer to one (`REFERENCE_KNOBS`), by the knob's name."""
    format: VideoFormat = "mp4"
    deadline_s: float | None = None
    """Seconds, counted from its arrival in the engine, after which it fails with `Timeout`."""
    priority: int = INTERACTIVE
    owner: str = ""
    """Whose request it is: requests of one priority begin in turn between owners. Empty: an owner of its own."""
    policy: Policy = NO_POLICY
    """The video is animated again where it misses a bound, within `deadline_s` for all takes together."""


@dataclass(frozen=True)
class Queued:
    """The request waits in the engine's queue."""

    position: int
    """Requests that must end before this one begins; 0 for the next one."""


@dataclass(frozen=True)
class StepDone:
    """A denoising step has been done.

    A request with retakes counts the steps of all takes that it may have, so that its progress never goes back.
    """

    done: int
    total: int
    gpu_s: float = field(default=0.0, compare=False)
    """Seconds of engine time of the request until then, about: its share of the time between its steps."""


class FinishedVideo(BaseModel):
    """A finished video: the facts of its file, and the parameters and measurements of its making."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    num_frames: int
    """Frames of the video."""
    width: int
    height: int
    fps: int
    size_bytes: int
    sha256: str
    params: AnimationParams
    """Resolved, with the width, height and seed that were used."""
    model_version: str
    """Name and version of the model that made it."""
    gpu_s: float
    """As `Animation.gpu_s`: its share of the engine's time."""
    animate_s: float
    """As `Animation.animate_s`: from submission to the finished frames."""
    motion: float
    likeness: float | None = None
    likeness_min: float | None = None
    likeness_part: float | None = None
    flicker: float | None = None
    sharpness: float | None = None
    colour_shift: float | None = None
    stillness: float | None = None
    closure: float | None = None
    subject_similarity: float | None = None
    prompt_similarity: float | None = None
    """The numbers of a `Judgement`, with `motion`; None where an earlier version made the video."""
    nsfw: bool | None = None
    """As `Animation.nsfw`."""

    accepted: bool | None = None
    """Whether the video meets the request's bounds; None without bounds."""
    take: int | None = None
    """Number of the take that is this video, from 0."""
    takes: tuple[dict[str, Any], ...] | None = None
    """The takes that were made: number, seed, numbers and `gpu_s` of each; `error` of one without a video."""

    @property
    def total_gpu_s(self) -> float:
        """Seconds of engine time of all takes."""
        return self.gpu_s if self.takes is None else sum(take.get("gpu_s") or 0.0 for take in self.takes)

    @property
    def judgement(self) -> dict[str, float | None]:
        """The numbers of the `Judgement` by name."""
        return {name: getattr(self, name) for name in JUDGED}


@dataclass(frozen=True)
class Rendered:
    """The finished video with its files; the last event."""

    video: FinishedVideo
    content: bytes
    format: VideoFormat
    thumbnail: bytes
    """Animated webp."""
    spritesheet: bytes
    """The frames side by side: one webp."""
    poster: bytes | None = None
    """The best frame, a JPEG or WebP as the params ask; None where they ask for none."""


Event = Queued | StepDone | Rendered
"""An event of a request. All pickle."""


@dataclass(frozen=True)
class ModelFacts:
    """A model that requests can name."""

    name: str
    version: str
    description: str
    default: bool
    """Whether it makes the requests that name no model."""


@dataclass(frozen=True)
class Load:
    """The requests and models of a renderer."""

    num_running: int
    num_waiting: int
    step_s: float | None
    """Seconds of a recent step of one request; None before the first."""
    models: tuple[ModelFacts, ...]


class Renderer(Protocol):
    """Makes videos of requests."""

    def render(self, request: RenderRequest) -> AsyncIterator[Event]:
        """Queue positions, then steps, then the video, which is the last event. Closing the iterator (`aclose`) cancels
        the request: it leaves the engine at the next step.

        Raises:
            RowError: of this request; `Busy` where too many wait already.
            JobError: the engine is unusable.
        """
        ...

    async def load(self) -> Load:
        """The present requests, and the models."""
        ...

    async def check_ready(self) -> None:
        """Checks that requests are accepted.

        Raises:
            NotReady: they are not at present.
        """
        ...
