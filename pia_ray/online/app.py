"""`create_app`: the endpoint's HTTP interface, from the routes of other modules.

Knows no Ray: `serve` gives it a renderer that reaches engines in other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import pia_ray
from pia_ray.config.knobs import PICTURE_KNOBS, REFERENCE_KNOBS
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import NotFound, PiaRayError
from pia_ray.online.http import error_responses, metrics
from pia_ray.online.http.api_keys import KeyRing
from pia_ray.online.http.metrics import Metrics
from pia_ray.online.http.middleware import HEALTH, METRICS, EndpointMiddleware, Owner, mark, request_id
from pia_ray.online.rendering.renderer import ModelFacts, Renderer
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.routes import animations, page
from pia_ray.online.usage import Usage

_DESCRIPTION: Final = (
    "Animates pictures with PIA. `/v1/animations` answers with the video; `/v1/videos` is the videos API that the "
    "openai clients speak. Errors have the shape of the schema Error, and every answer an `x-request-id`."
)


def create_app(
    renderer: Renderer,
    config: ServeConfig,
    *,
    forms: FormReader | None = None,
    routers: Sequence[APIRouter] = (),
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    check_alive: Callable[[], None] = lambda: None,
    replica: str = "",
    usage: Usage | None = None,
) -> FastAPI:
    """The ASGI application. `forms` replaces the endpoint's own reader, and `routers` are added to its routes.

    `lifespan` is entered before the first request and left after the last. `check_alive` raises `NotReady` if this
    process has to be replaced. `replica` is its name in metrics. `usage` holds the
    quotas; who gives none has to run none.

    Raises:
        ConfigError: the file of API keys cannot be read.
    """
    counters, usage = Metrics(replica), usage or Usage(config)
    app = FastAPI(
        title="pia-ray",
        description=_DESCRIPTION,
        version=pia_ray.__version__,
        # The document needs a key like every call, and FastAPI's pages would load scripts of other sites.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(
        EndpointMiddleware,
        config=config,
        keys=KeyRing(config.api_keys, allow_anonymous=config.allow_anonymous),
        metrics=counters,
        usage=usage,
    )
    _add_error_handlers(app)
    app.include_router(animations.router(renderer, forms or FormReader(config), config, metrics=counters, usage=usage))
    app.include_router(_models(renderer, config))
    app.include_router(_health(renderer, counters, check_alive))
    app.include_router(page.router(config, openapi=lambda: app.openapi()))
    for each in routers:
        app.include_router(each)
    _add_openapi(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(PiaRayError, error_responses.of_error)
    app.add_exception_handler(HTTPException, error_responses.of_framework)
    app.add_exception_handler(RequestValidationError, error_responses.of_validation)
    app.add_exception_handler(ClientDisconnect, _of_hangup)
    app.add_exception_handler(Exception, _of_bug)


def _models(renderer: Renderer, config: ServeConfig) -> APIRouter:
    routes = APIRouter(tags=["models"])

    @routes.get(
        "/v1/models",
        operation_id="list_models",
        summary="List the models",
        responses=_document(_MODEL_LIST) | error_responses.responses(),
    )
    async def list_models(_: Owner) -> JSONResponse:
        load = await renderer.load()
        return JSONResponse({"object": "list", "data": [_model(facts, config) for facts in load.models]})

    @routes.get(
        "/v1/models/{model}",
        operation_id="retrieve_model",
        summary="Retrieve a model",
        responses=_document(_MODEL) | error_responses.responses(404),
    )
    async def retrieve_model(model: str, _: Owner) -> JSONResponse:
        for facts in (await renderer.load()).models:
            if facts.name == model:
                return JSONResponse(_model(facts, config))
        raise NotFound("There is no model of that name; GET /v1/models lists them.")

    return routes


def _model(facts: ModelFacts, config: ServeConfig) -> dict[str, Any]:
    model = config.models[facts.name]
    stated = {**model.sampling, **model.defaults}
    has_look = model.ip_adapter is not None and model.image_encoder is not None
    return {
        "id": facts.name,
        "object": "model",
        "created": 0,  # clients need a number; models have no time of creation
        "owned_by": "pia-ray",
        "version": facts.version,
        "description": facts.description,
        "default": facts.default,
        "loras": model.lora_weights,
        "pictures": [name for name in PICTURE_KNOBS if has_look or name != "ip_adapter_image"],
        "defaults": {name: value for name, value in stated.items() if name not in _PRIVATE},
    }


def _health(renderer: Renderer, counters: Metrics, check_alive: Callable[[], None]) -> APIRouter:
    routes = APIRouter(tags=["health"])
    alive, ready = HEALTH

    @routes.get(
        alive,
        operation_id="alive",
        summary="Whether the process is sound",
        responses=_document(_HEALTH) | {503: error_responses.responses()[503]},
    )
    async def healthz() -> dict[str, str]:
        check_alive()
        return {"status": "ok"}

    @routes.get(
        ready,
        operation_id="ready",
        summary="Whether requests are accepted: an engine runs, or starts with the first request",
        responses=_document(_HEALTH) | {503: error_responses.responses()[503]},
    )
    async def readyz() -> dict[str, str]:
        check_alive()
        await renderer.check_ready()
        return {"status": "ok"}

    @routes.get(METRICS, include_in_schema=False)
    async def read_metrics() -> Response:
        return Response(counters.text(await renderer.load()), headers={"content-type": metrics.CONTENT_TYPE})

    return routes


async def _of_hangup(_: Request, __: Exception) -> Response:
    """Handler of callers that hang up while they send. No one reads the answer."""
    return Response(status_code=499)


async def _of_bug(request: Request, error: Exception) -> Response:
    """The answer to a bug. The middleware does not see it, so this sets the headers of every answer."""
    response = await error_responses.of_bug(request, error)
    mark(response.headers, request_id(request))
    return response


def _add_openapi(app: FastAPI) -> None:
    """Adds the route of the OpenAPI document, which needs a key."""

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(_: Owner) -> JSONResponse:
        return JSONResponse(app.openapi())

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schema.setdefault("components", {}).setdefault("schemas", {})["Error"] = dict(error_responses.SCHEMA)
        app.openapi_schema = schema
    return app.openapi_schema


def _document(schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "Success.", "content": {"application/json": {"schema": schema}}}}


_PRIVATE: Final = frozenset({*REFERENCE_KNOBS, "seed"})
"""Defaults of a model that callers do not see: paths of the server, and a number that JSON's readers round."""

_HEALTH: Final = {"type": "object", "required": ["status"], "properties": {"status": {"const": "ok"}}}
_MODEL: Final = {
    "type": "object",
    "required": [
        "id",
        "object",
        "created",
        "owned_by",
        "version",
        "description",
        "default",
        "loras",
        "pictures",
        "defaults",
    ],
    "properties": {
        "id": {"type": "string", "description": "Its name in requests."},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "version": {"type": "string"},
        "description": {"type": "string"},
        "default": {"type": "boolean", "description": "Whether it makes the requests that name no model."},
        "loras": {
            "type": "object",
            "additionalProperties": {"type": "number"},
            "description": "The weight of each LoRA that `lora` may choose, where a request names none.",
        },
        "pictures": {
            "type": "array",
            "items": {"type": "string"},
            "description": "The fields of further pictures that the model takes.",
        },
        "defaults": {"type": "object", "description": "The model's own values of knobs."},
    },
}
_MODEL_LIST: Final = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
