"""/v1/batches in the wire format of the OpenAI API, for batches of video requests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from pia_ray.config.serve import ServeConfig
from pia_ray.errors import BadParameter, Busy, UnsupportedBody
from pia_ray.online.batches.input_file import ENDPOINT
from pia_ray.online.batches.store import Batch, BatchLineError, BatchStatus, BatchStore
from pia_ray.online.files import FileStore
from pia_ray.online.http import error_responses
from pia_ray.online.http.middleware import Owner
from pia_ray.online.http.pagination import Listed, Listing, PageQuery
from pia_ray.online.http.wire_types import UnixTime
from pia_ray.online.public_errors import shortened
from pia_ray.online.requests.bodies import media_type, parse_json

WINDOW_S: Final = 24 * 3600.0
"""Seconds of a completion_window of 24h, after which the remaining lines are given up."""

_RETRY_S: Final = 30.0


class RequestCounts(BaseModel):
    """The number of a batch's lines, and how many have completed or failed so far."""

    total: int
    completed: int
    failed: int


class BatchErrors(BaseModel):
    """The errors of an input file."""

    object: Literal["list"] = "list"
    data: list[BatchLineError]


class BatchObject(Listed):
    """A batch in the format of the openai clients. Times are seconds since 1970, UTC."""

    object: Literal["batch"] = "batch"
    endpoint: str = ENDPOINT
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str = "24h"
    status: BatchStatus
    output_file_id: str | None = Field(description="Lines with a video; once the batch has ended.")
    error_file_id: str | None = Field(description="Lines without; once the batch has ended.")
    created_at: UnixTime
    in_progress_at: UnixTime | None
    expires_at: UnixTime
    finalizing_at: UnixTime | None
    completed_at: UnixTime | None
    failed_at: UnixTime | None
    expired_at: UnixTime | None
    cancelling_at: UnixTime | None
    cancelled_at: UnixTime | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(Listing[BatchObject]):
    """Part of the list of batches."""


class BatchListQuery(PageQuery):
    """The query parameters of the list of batches, newest first."""

    limit: int = Field(20, ge=1, le=100)


def batch_object(batch: Batch) -> BatchObject:
    """The batch object of a batch."""
    counts = RequestCounts(total=batch.num_lines, completed=batch.num_completed, failed=batch.num_failed)
    errors = BatchErrors(data=list(batch.errors)) if batch.errors else None
    return BatchObject.model_validate({**dict(batch), "request_counts": counts, "errors": errors})


def batch_routes(
    batches: BatchStore,
    *,
    files: FileStore,
    config: ServeConfig,
    prefix: str = "/v1",
) -> APIRouter:
    """The routes below /v1/batches."""
    router = APIRouter(prefix=f"{prefix}/batches", tags=["batches"])

    @router.post(
        "",
        operation_id="create_batch",
        summary="Make the videos of an input file",
        responses=error_responses.responses(404, 415),
        openapi_extra=_BATCH_BODY,
    )
    async def create(request: Request, owner: Owner) -> BatchObject:
        if media_type(request.headers) != "application/json":
            raise UnsupportedBody("Send application/json.")
        file_id, metadata = _batch_fields(parse_json(await request.body()))
        file = await asyncio.to_thread(files.get, owner, file_id)
        if file.purpose != "batch":
            raise BadParameter(
                f"input_file_id: the purpose of {file.id} must be batch (it is {file.purpose})", "input_file_id"
            )
        if await asyncio.to_thread(batches.num_open, owner) >= config.max_jobs_per_key:
            raise Busy(f"{config.max_jobs_per_key} batches of this key are open: wait for one to end.", _RETRY_S)
        create_batch = partial(batches.create, owner, file.id, metadata=metadata, window_s=WINDOW_S)
        return batch_object(await asyncio.to_thread(create_batch))

    @router.get("", operation_id="list_batches", summary="List batches", responses=error_responses.responses(404))
    async def list_batches(owner: Owner, page: Annotated[BatchListQuery, Query()]) -> BatchList:
        found = await asyncio.to_thread(lambda: batches.list(owner, after=page.after, limit=page.limit))
        return BatchList.of([batch_object(each) for each in found.documents], more=found.has_more)

    @router.get(
        "/{batch_id}",
        operation_id="retrieve_batch",
        summary="Retrieve a batch",
        responses=error_responses.responses(404),
    )
    async def retrieve(owner: Owner, batch_id: str) -> BatchObject:
        return batch_object(await asyncio.to_thread(batches.get, owner, batch_id))

    @router.post(
        "/{batch_id}/cancel",
        operation_id="cancel_batch",
        summary="Cancel a batch; its finished videos are kept",
        responses=error_responses.responses(404, 409),
    )
    async def cancel(owner: Owner, batch_id: str) -> BatchObject:
        return batch_object(await asyncio.to_thread(batches.cancel, owner, batch_id))

    return router


def _batch_fields(fields: Mapping[str, object]) -> tuple[str, dict[str, str] | None]:
    for field in fields:
        if field not in _BATCH_FIELDS:
            raise BadParameter(f'there is no field "{shortened(field)}"', field)
    for field, wanted in (("endpoint", ENDPOINT), ("completion_window", "24h")):
        if fields.get(field) != wanted:
            raise BadParameter(f"{field} must be {wanted}", field)
    file_id, metadata = fields.get("input_file_id"), fields.get("metadata")
    if not isinstance(file_id, str):
        raise BadParameter("input_file_id is missing: upload the lines to /v1/files first", "input_file_id")
    if metadata is None:
        return file_id, None
    if not isinstance(metadata, dict) or len(metadata) > 16:
        raise BadParameter("metadata must be an object of at most 16 texts", "metadata")
    for key, value in metadata.items():
        if not isinstance(value, str) or len(key) > 64 or len(value) > 512:
            raise BadParameter("metadata: keys have up to 64 characters, values are text of up to 512", "metadata")
    return file_id, metadata


_BATCH_FIELDS: Final[Mapping[str, Any]] = {
    "input_file_id": {"type": "string", "description": "A file of lines {custom_id, method, url, body}."},
    "endpoint": {"type": "string", "enum": [ENDPOINT]},
    "completion_window": {"type": "string", "enum": ["24h"]},
    "metadata": {
        "type": ["object", "null"],
        "maxProperties": 16,
        "additionalProperties": {"type": "string", "maxLength": 512},
    },
}
_BATCH_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": dict(_BATCH_FIELDS),
                    "required": ["input_file_id", "endpoint", "completion_window"],
                },
                "example": {"input_file_id": "file_...", "endpoint": ENDPOINT, "completion_window": "24h"},
            }
        },
    }
}
