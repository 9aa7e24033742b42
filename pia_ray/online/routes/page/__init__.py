"""The web page at /, static, which makes video jobs of pictures, follows them and shows the results.

Its markup, style and script are in this folder and load nothing from other sites. They hold no secret, so they need no
key; the page's calls need an API key as those of every caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, Final, get_args

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

import pia_ray
from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.knobs import KNOBS
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import NotFound
from pia_ray.media.video import MIME
from pia_ray.online.requests import request_limits
from pia_ray.online.routes.page.reference import reference_page

LABELS: Final = {
    "num_frames": "Frames",
    "fps": "Frames per second",
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance",
    "seed": "Seed",
    "width": "Width",
    "height": "Height",
    "preset": "Preset",
    "scheduler": "Scheduler",
    "lora_scale": "LoRA scale",
    "ip_adapter_scale": "Look scale",
    "seam": "Seam of loops",
    "negative_prompt": "Negative prompt",
}
"""The labels of the knobs in the page's folded part, in its order. Their help is that of their declaration."""

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "media-src blob:",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
"""The page's Content-Security-Policy. The page fetches videos from this endpoint alone (`redirect=0`), so that no other
origin, as that of a store with links of everybody, is one of its sources."""

PICTURES: Final = {
    "end_image": ("Last frame", "A second picture, with which the video ends."),
    "mask_image": ("Where it may move", "White parts of this picture move; black and transparent ones stay."),
    "ip_adapter_image": ("Look", "A picture whose style and content the video takes on."),
}
"""Label and help of further pictures; GET /v1/models says which a model takes."""

_EXAMPLE: Final = ("demo", "catalog", "images", "sunset-mountains.jpg")
"""The example picture, below the package."""

_TYPES: Final = {
    "page.html": "text/html",
    "page.css": "text/css",
    **dict.fromkeys(("page.js", "form.js", "jobs.js", "parts.js", "store.js", "operator.js"), "text/javascript"),
}


def router(config: ServeConfig, *, openapi: Callable[[], Mapping[str, Any]]) -> APIRouter:
    """The routes of the page at / and of its files below /page/. `openapi` gives the document of the reference."""
    routes = APIRouter(include_in_schema=False)
    folder = files(__name__)
    answers = {
        name: (folder.joinpath(name).read_bytes(), {"content-type": f"{kind}; charset=utf-8"})
        for name, kind in _TYPES.items()
    }

    @routes.get("/")
    async def page() -> Response:
        content, headers = answers["page.html"]
        return Response(content, headers={**headers, "content-security-policy": POLICY})

    @routes.get("/page/example.jpg")
    async def example() -> Response:
        return Response(files("pia_ray").joinpath(*_EXAMPLE).read_bytes(), media_type="image/jpeg")

    @routes.get("/page/reference.html")
    async def reference() -> Response:
        headers = {"content-type": "text/html; charset=utf-8", "content-security-policy": POLICY}
        return Response(reference_page(openapi()), headers=headers)

    @routes.get("/page/settings.json")
    async def settings() -> JSONResponse:
        return JSONResponse(_settings(config))

    @routes.get("/page/{name:path}")
    async def part(name: str) -> Response:
        if name not in answers:
            raise NotFound("the page has no such part")
        content, headers = answers[name]
        return Response(content, headers=headers)

    return routes


def _settings(config: ServeConfig) -> dict[str, Any]:
    """The settings of this endpoint for the page's form."""
    most = request_limits.most_of(config)
    return {
        "version": pia_ray.__version__,
        "needs_key": config.needs_key and not config.allow_anonymous,
        "max_image_bytes": config.max_image_bytes,
        "formats": {name: MIME[name] for name in get_args(VideoFormat)},
        "knobs": [_field(name, label, most.get(name)) for name, label in LABELS.items()],
        "pictures": [{"name": name, "label": label, "meaning": meaning} for name, (label, meaning) in PICTURES.items()],
    }


def _field(name: str, label: str, most: int | None) -> dict[str, Any]:
    knob = KNOBS[name]
    return {
        "name": name,
        "label": label,
        "meaning": knob.meaning,
        "bounds": knob.bounds if most is None else f"1 to {most}",
        "unit": knob.unit,
        "choices": knob.choices,
        "default": knob.default,
        "is_number": knob.type is not str,
        "is_integer": knob.type is int,
    }
