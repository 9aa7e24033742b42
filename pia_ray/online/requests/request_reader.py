"""Requests read from multipart and JSON bodies, with pictures by part, URL or data URL.

Every knob of `AnimationParams` is a field, and so are the names that clients of the videos API use: `model`, `size`,
`seconds`, `input_reference`. Everything is checked here, before a request reaches a GPU.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import Request
from starlette.datastructures import UploadFile

from pia_ray.config.canvas import file_size
from pia_ray.config.finish_checks import check_file_size
from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import ARRAY_KNOBS, DEFAULT_STYLE, KNOBS, PICTURE_KNOBS, AnimationParams, suggest
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import lora_strengths, parse_params, resolve
from pia_ray.config.serve import ServeConfig
from pia_ray.config.timeline import timeline_of
from pia_ray.errors import BadParameter, ImageTooLarge, RowError, UnsupportedBody, VideoError
from pia_ray.manifest import decode_data_url
from pia_ray.media import arrays, sizes
from pia_ray.media import image as pictures
from pia_ray.media.finish import require_finishable
from pia_ray.online.public_errors import shortened
from pia_ray.online.rendering.renderer import INTERACTIVE, RenderRequest
from pia_ray.online.requests import acceptance, request_limits
from pia_ray.online.requests.aliases import (
    IMAGE_FIELDS,
    format_of,
    lora_of,
    seconds_text,
    size_text,
    sources_of,
    spell_out_seconds,
    spell_out_size,
)
from pia_ray.online.requests.bodies import Fields, media_type, parse_json, unfold
from pia_ray.online.requests.fetch_shares import FetchShares
from pia_ray.storage.https import fetch
from pia_ray.takes import Policy

FetchUrl = Callable[[str, int], bytes]
"""The content at an https:// URL, of at most that many bytes. Raises FetchError, ImageError."""

OTHER_FIELDS: Final = (*IMAGE_FIELDS, "model", "size", "seconds", "format", *acceptance.FIELDS)
"""Fields of every request that are not knobs."""

_FETCHES: Final = 32
"""Pictures of calls and single videos that are fetched at a time."""

_LINE_FETCHES: Final = 16
"""Pictures of batches' lines that are fetched at a time. They have places of their own, as calls must not wait."""

_Value = TypeVar("_Value")


def fetch_url(url: str, max_bytes: int) -> bytes:
    """The content at a URL with a public address, as for a catalogue."""
    return fetch(url, max_bytes=max_bytes)


@dataclass(frozen=True)
class Form:
    """A checked request."""

    params: AnimationParams
    """The given knobs. `style` is the model's name; knobs that refer to files hold `sha256:<hex>` of them."""
    resolved: AnimationParams
    """Every knob, with the width and height of the video; the seed is None unless it was given."""
    model: str
    """Name of one of the endpoint's models."""
    image: bytes
    inputs: Mapping[str, bytes]
    """Files of the knobs that refer to one, by the knob's name."""
    format: VideoFormat | None
    """As given; None if the request leaves it to the endpoint."""
    policy: Policy

    @property
    def size(self) -> str:
        """Width and height of the video, such as "512x384"."""
        assert self.resolved.width is not None
        assert self.resolved.height is not None
        return size_text(*file_size((self.resolved.width, self.resolved.height), self.resolved))

    @property
    def seconds(self) -> str:
        """Duration of the video, such as "2" or "1.6"."""
        timeline = timeline_of(self.resolved)
        return seconds_text(timeline.num_frames, timeline.fps)

    def request(
        self,
        request_id: str,
        *,
        deadline_s: float | None,
        priority: int = INTERACTIVE,
        default_format: VideoFormat,
        owner: str = "",
    ) -> RenderRequest:
        """The request for an engine."""
        return RenderRequest(
            id=request_id,
            params=self.params,
            image=self.image,
            inputs=self.inputs,
            format=self.format or default_format,
            deadline_s=deadline_s,
            priority=priority,
            owner=owner,
            policy=self.policy,
        )


class FormReader:
    """Reads the requests of one endpoint. Bounds how many pictures are fetched and decoded at a time.

    A call whose owner has too many fetches under way waits `patience_s` for a place and is then refused.
    """

    def __init__(self, config: ServeConfig, *, fetch_url: FetchUrl = fetch_url, patience_s: float = 2.0) -> None:
        self._config = config
        self._fetch_url = fetch_url
        # Decoding the largest picture takes some hundred MB; fetching waits for remote servers.
        self._decoders = CapacityLimiter(2)
        self._fetchers = CapacityLimiter(_FETCHES + _LINE_FETCHES)
        self._calls = FetchShares(total=_FETCHES, per_owner=8, per_host=6, patience_s=patience_s)
        # The runner of batches bounds how many lines wait.
        self._lines = FetchShares(total=_LINE_FETCHES, per_owner=8, per_host=4, patience_s=None)

    async def fields(self, request: Request) -> dict[str, object]:
        """The fields of a multipart, urlencoded or JSON body. Names such as `lora[pixar]` and `tags[]` are unfolded.

        Raises:
            BadParameter: it is not a JSON object, or a field occurs twice.
            UnsupportedBody: it is of another type.
            BodyTooLarge, SlowBody: it exceeds a limit.
        """
        kind = media_type(request.headers)
        if kind == "application/json" or kind.endswith("+json"):
            return parse_json(await request.body())
        if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
            raise UnsupportedBody("Send multipart/form-data or application/json.")
        most = self._config.max_body_bytes
        async with request.form(
            max_files=request_limits.MAX_FILES, max_fields=request_limits.MAX_FIELDS, max_part_size=most
        ) as form:
            pairs: list[tuple[str, str | bytes]] = []
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if value.filename or value.size:  # a browser sends an empty part where no file was chosen
                        pairs.append((name, await value.read()))
                elif value or name in ("prompt", "negative_prompt"):  # and an empty text where nothing was entered
                    pairs.append((name, value))
        return unfold(pairs)

    async def parse(self, fields: Fields, *, owner: str, is_line: bool = False) -> Form:
        """The request of these fields. A field of null counts as absent. `is_line`: whether a batch has it.

        Raises:
            RowError: a field is unknown or wrong, or a picture cannot be fetched or used.
            Busy: the owner's share of fetches is in use. A line waits instead.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        for name in given:
            if name not in KNOBS and name not in OTHER_FIELDS:
                near = suggest(shortened(name), (*KNOBS, *OTHER_FIELDS))
                raise BadParameter(f'there is no field "{shortened(name)}".{near}', shortened(name))
        model_name, model = self._model(given)
        video_format = format_of(given.pop("format", None))
        policy = acceptance.policy_of(given, model, self._config)
        sources = sources_of(given)
        length_field = "seconds" if "seconds" in given else "num_frames"
        params = self._params(given, sources, model_name, model)
        resolved = resolve(params, {}, model_defaults=model.defaults, sampling=model.sampling)
        request_limits.check_length(resolved, self._config, field=length_field)
        request_limits.check_cost(resolved, self._config)  # before pictures are fetched, where the size is known
        lora_strengths(resolved, model.lora_weights)
        files, places = {}, partial((self._lines if is_line else self._calls).hold, owner)
        for knob, source in sources.items():  # in turn, so that one request does not use many fetchers
            files[knob] = await self._content(source, knob, places)
        image = files.pop("image")
        width, height = await self._run(self._decoders, partial(self._checked_size, image, "image"))
        for knob, content in files.items():
            check = self._checked_size if knob in PICTURE_KNOBS else arrays.decode
            await self._run(self._decoders, partial[object](check, content, knob))
        identities = {knob: "sha256:" + hashlib.sha256(content).hexdigest() for knob, content in files.items()}
        params = params.model_copy(update=identities)
        width, height = sizes.choose_size(
            (width, height),
            long_edge=model.long_edge,
            size_step=model.size_step,
            width=resolved.width,
            height=resolved.height,
            aspect_ratio=resolved.aspect_ratio,
            fitting=resolved.fit,
        )
        resolved = resolved.model_copy(update={"width": width, "height": height, **identities})
        check_file_size(resolved)
        request_limits.check_cost(resolved, self._config)
        _check_encodable(video_format or "mp4", resolved)
        return Form(params, resolved, model_name, image, files, video_format, policy)

    def _model(self, given: dict[str, object]) -> tuple[str, ModelConfig]:
        models, named = self._config.models, given.pop("model", None)
        style = given.pop("style", None)
        for field, value in (("model", named), ("style", style)):
            if value is not None and not isinstance(value, str):
                raise BadParameter(f"{field} must be text, not {type(value).__name__}", field)
        if named is not None and style not in (None, DEFAULT_STYLE, named):
            raise BadParameter("model and style both name the model: give one of them", "style")
        field = "style" if named is None else "model"
        name = str(style if named is None else named).strip() if (named or style) is not None else DEFAULT_STYLE
        if name == DEFAULT_STYLE and name not in models:
            name = self._config.default_model
        if name not in models:
            known = f"This endpoint has {', '.join(models)}."
            raise BadParameter(
                f'there is no model "{shortened(name)}". {known}{suggest(shortened(name), models)}', field
            )
        return name, models[name]

    def _params(
        self, given: dict[str, object], sources: Mapping[str, object], model_name: str, model: ModelConfig
    ) -> AnimationParams:
        """The given knobs; those that refer to files hold a stand-in until their files have been read."""
        if not str(given.get("prompt", "")).strip():
            raise BadParameter("prompt is missing: say what the picture shows and how it moves", "prompt")
        if (lora := given.get("lora")) is not None:
            given["lora"] = lora_of(lora)
        spell_out_size(given)
        stand_ins = dict.fromkeys((knob for knob in sources if knob != "image"), "-")
        try:
            spell_out_seconds(given, model)
            return parse_params({**given, **stand_ins, "style": model_name})
        except BadParameter as error:
            raise request_limits.within(error, self._config) from None

    async def _content(
        self, source: object, knob: str, places: Callable[[str], AbstractAsyncContextManager[None]]
    ) -> bytes:
        """The bytes of a file, URL, data URL or list of numbers."""
        most = self._config.max_image_bytes
        if isinstance(source, list) and knob in ARRAY_KNOBS:
            return await self._run(self._decoders, partial(arrays.encode, source, knob))
        if isinstance(source, bytes):
            content = source
        elif not isinstance(source, str):
            raise BadParameter(f"{knob} must be a file, an https:// URL or a data: URL", knob)
        elif source[:5].lower() == "data:":
            content = await self._run(self._decoders, partial(decode_data_url, source, what=knob))
        elif re.match(r"\s*[a-zA-Z][a-zA-Z0-9+.-]*://", source):
            async with places(source.strip()):
                return await self._run(self._fetchers, partial(self._fetched, source.strip(), knob))
        else:
            raise BadParameter(f"{knob} must be a file, an https:// URL or a data: URL (got other text)", knob)
        if len(content) > most:
            raise ImageTooLarge(f"{knob} has {len(content):,} bytes; the limit is {most:,}.")
        return content

    def _fetched(self, url: str, knob: str) -> bytes:
        try:
            return self._fetch_url(url, self._config.max_image_bytes)
        except RowError as error:
            raise type(error)(f"{knob}: {error.message}") from None

    def _checked_size(self, content: bytes, knob: str) -> tuple[int, int]:
        """Width and height of the picture, upright, after it has been decoded whole."""
        try:
            found = pictures.decode(
                content,
                background=self._config.background,
                max_bytes=self._config.max_image_bytes,
                max_pixels=self._config.max_image_pixels,
            )
        except RowError as error:
            raise type(error)(f"{knob}: {error.message}") from None
        return found.original_width, found.original_height

    async def _run(self, limiter: CapacityLimiter, call: Callable[[], _Value]) -> _Value:
        return await anyio.to_thread.run_sync(call, limiter=limiter)


def _check_encodable(video_format: VideoFormat, resolved: AnimationParams) -> None:
    try:
        require_finishable(video_format, resolved)
    except VideoError as error:
        raise BadParameter(error.message, "format") from None
