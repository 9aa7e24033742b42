"""The calls of the openai client's videos for which there is nothing here, refused with the way that there is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

from fastapi import APIRouter

from pia_ray.errors import Unsupported
from pia_ray.online.http.middleware import Owner

_CHARACTERS: Final = (
    "This endpoint has no characters: give a style or a LoRA of the model in the knobs of POST /v1/videos."
)

_REASONS: Final = {
    (
        "POST",
        "/edits",
    ): "This endpoint does not edit videos: POST /v1/videos/{id}/remix makes another video of the same "
    "picture with a new prompt.",
    ("POST", "/extensions"): "This endpoint does not extend videos: ask POST /v1/videos for more num_frames, or for "
    "repeat or min_duration.",
    ("POST", "/characters"): _CHARACTERS,
    ("GET", "/characters/{character_id}"): _CHARACTERS,
}
"""The answer by method and path below /v1/videos."""


def unsupported_routes(*, prefix: str = "/v1") -> APIRouter:
    """The routes, which the OpenAPI document leaves out. They stand before those of a video's id."""
    routes = APIRouter(prefix=f"{prefix}/videos", include_in_schema=False)
    for (method, path), reason in _REASONS.items():
        routes.add_api_route(path, _refuse(reason), methods=[method], response_model=None)
    return routes


def _refuse(reason: str) -> Callable[[str], Awaitable[NoReturn]]:
    async def refuse(_: Owner) -> NoReturn:
        raise Unsupported(reason)

    return refuse
