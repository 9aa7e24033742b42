"""/v1/files and /v1/batches in the wire format of the OpenAI API, for batches of video requests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from pia_ray.config import ServeConfig
from pia_ray.errors import BadParameter, Busy, UnsupportedBody
from pia_ray.online import faults
from pia_ray.online.batch_runner import ENDPOINT
from pia_ray.online.batch_store import Batch, BatchFault, BatchStatus, BatchStore
from pia_ray.online.edge import Owner
from pia_ray.online.files import FileStore, Order, Purpose, StoredFile, parse_purpose, shown
from pia_ray.online.forms import parse_json
from pia_ray.online.limits import MAX_FILES
from pia_ray.online.videos import delivery

WINDOW_S: Final = 24 * 3600.0
"""What a completion_window of 24h means: lines that are not made by then are given up."""

FILE_TTL_S: Final = 30 * 24 * 3600.0
"""How long files are kept that say nothing else."""

_TTL_BOUNDS_S: Final = (3600, 30 * 24 * 3600)
_RETRY_S: Final = 30.0


class FileObject(BaseModel):
    """A file, as the openai clients know it."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """Part of the list of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FilePage(BaseModel):
    """Which part of the list of files."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, description="The last_id of the page before.", max_length=100)
    limit: int = Field(100, ge=1, le=10_000)
    order: Order = Field("desc", description="By the time of creation.")
    purpose: Purpose | None = Field(None, description="Of these files alone.")


class FileDeleted(BaseModel):
    """That a file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class RequestCounts(BaseModel):
    """How many lines a batch has, and what became of them so far."""

    total: int
    completed: int
    failed: int


class BatchFaults(BaseModel):
    """What is wrong with an input file."""

    object: Literal["list"] = "list"
    data: list[BatchFault]


class BatchObject(BaseModel):
    """A batch, as the openai clients know it. Times are seconds since 1970, UTC."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str = ENDPOINT
    errors: BatchFaults | None
    input_file_id: str
    completion_window: str = "24h"
    status: BatchStatus
    output_file_id: str | None = Field(description="Lines with a video; once the batch has ended.")
    error_file_id: str | None = Field(description="Lines without; once the batch has ended.")
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Part of the list of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class BatchPage(BaseModel):
    """Which part of the list of batches, newest first."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = Field(None, description="The last_id of the page before.", max_length=100)
    limit: int = Field(20, ge=1, le=100)


def file_object(file: StoredFile) -> FileObject:
    """The file as callers get it."""
    return FileObject(
        id=file.id,
        bytes=file.size_bytes,
        created_at=int(file.created_at),
        expires_at=int(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
    )


def batch_object(batch: Batch) -> BatchObject:
    """The batch as callers get it."""

    def seconds(time: float | None) -> int | None:
        return None if time is None else int(time)

    return BatchObject(
        id=batch.id,
        errors=BatchFaults(data=list(batch.errors)) if batch.errors else None,
        input_file_id=batch.input_file_id,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at),
        in_progress_at=seconds(batch.in_progress_at),
        expires_at=int(batch.expires_at),
        finalizing_at=seconds(batch.finalizing_at),
        completed_at=seconds(batch.completed_at),
        failed_at=seconds(batch.failed_at),
        expired_at=seconds(batch.expired_at),
        cancelling_at=seconds(batch.cancelling_at),
        cancelled_at=seconds(batch.cancelled_at),
        request_counts=RequestCounts(total=batch.num_lines, completed=batch.num_completed, failed=batch.num_failed),
        metadata=batch.metadata,
    )


def file_routes(files: FileStore, *, config: ServeConfig, prefix: str = "/v1") -> APIRouter:
    """The routes below /v1/files."""
    router = APIRouter(prefix=f"{prefix}/files", tags=["batches"])

    @router.post(
        "",
        operation_id="create_file",
        summary="Upload lines of a batch, or a picture",
        responses=faults.responses(415),
        openapi_extra=_multipart(
            {
                "file": {"type": "string", "format": "binary"},
                "purpose": {"type": "string", "enum": ["batch", "vision", "user_data"]},
                "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            },
            required=["file", "purpose"],
        ),
    )
    async def create(request: Request, owner: Owner) -> FileObject:
        name, content, fields = await _upload(request, max_bytes=config.max_body_bytes)
        create_file = partial(
            files.create,
            owner,
            content,
            filename=name,
            purpose=parse_purpose(fields.get("purpose", "")),
            ttl_s=_ttl_s(fields),
        )
        return file_object(await asyncio.to_thread(create_file))

    @router.get("", operation_id="list_files", summary="List files", responses=faults.responses(422))
    async def list_files(owner: Owner, page: Annotated[FilePage, Query()]) -> FileList:
        found, more = await asyncio.to_thread(
            lambda: files.list(owner, after=page.after, limit=page.limit, order=page.order, purpose=page.purpose)
        )
        listed = [file_object(each) for each in found]
        return FileList(data=listed, has_more=more, first_id=_first(listed), last_id=_last(listed))

    @router.get(
        "/{file_id}", operation_id="retrieve_file", summary="What a file is", responses=faults.responses(404, 422)
    )
    async def retrieve(owner: Owner, file_id: str) -> FileObject:
        return file_object(await asyncio.to_thread(files.get, owner, file_id))

    @router.delete(
        "/{file_id}", operation_id="delete_file", summary="Delete a file", responses=faults.responses(404, 422)
    )
    async def delete(owner: Owner, file_id: str) -> FileDeleted:
        await asyncio.to_thread(files.delete, owner, file_id)
        return FileDeleted(id=file_id)

    @router.get(
        "/{file_id}/content",
        operation_id="download_file",
        summary="A file's content",
        response_class=Response,
        responses={
            **faults.responses(404, 422),
            200: {"description": "The content.", "content": {"application/octet-stream": {}}},
            302: {"description": "A link to it, which works for a quarter of an hour."},
        },
    )
    async def content(owner: Owner, file_id: str) -> Response:
        file = await asyncio.to_thread(files.get, owner, file_id)
        return await delivery(
            files.content_uri(file), media_type="application/octet-stream", filename=file.filename, inline=False
        )

    return router


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
        summary="Make the videos of a file's lines",
        responses=faults.responses(404, 415),
        openapi_extra=_BATCH_BODY,
    )
    async def create(request: Request, owner: Owner) -> BatchObject:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
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

    @router.get("", operation_id="list_batches", summary="List batches", responses=faults.responses(422))
    async def list_batches(owner: Owner, page: Annotated[BatchPage, Query()]) -> BatchList:
        found, more = await asyncio.to_thread(
            lambda: batches.list(owner, after=page.after, limit=page.limit, order="desc")
        )
        listed = [batch_object(each) for each in found]
        return BatchList(data=listed, has_more=more, first_id=_first(listed), last_id=_last(listed))

    @router.get(
        "/{batch_id}",
        operation_id="retrieve_batch",
        summary="How a batch is coming on",
        responses=faults.responses(404, 422),
    )
    async def retrieve(owner: Owner, batch_id: str) -> BatchObject:
        return batch_object(await asyncio.to_thread(batches.get, owner, batch_id))

    @router.post(
        "/{batch_id}/cancel",
        operation_id="cancel_batch",
        summary="Stop a batch; what is made is kept",
        responses=faults.responses(404, 409, 422),
    )
    async def cancel(owner: Owner, batch_id: str) -> BatchObject:
        return batch_object(await asyncio.to_thread(batches.cancel, owner, batch_id))

    return router


async def _upload(request: Request, *, max_bytes: int) -> tuple[str, bytes, Mapping[str, str]]:
    """Name and content of the one file of a form, and the other fields."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise UnsupportedBody("Send multipart/form-data.")
    fields: dict[str, str] = {}
    found: tuple[str, bytes] | None = None
    async with request.form(max_files=MAX_FILES, max_fields=10, max_part_size=max_bytes) as form:
        for field, value in form.multi_items():
            if field in fields or (field == "file" and found is not None):
                raise BadParameter(f"{shown(field)} occurs twice", field)
            if isinstance(value, str):
                fields[field] = value
            elif field != "file":
                raise BadParameter(f'there is no file field "{shown(field)}": send it as "file"', field)
            else:
                found = (_filename(value.filename or ""), await value.read())
    if found is None:
        raise BadParameter("file is missing: send one as multipart/form-data", "file")
    known = {"purpose", "expires_after[seconds]", "expires_after[anchor]"}
    for field in fields:
        if field not in known:
            raise BadParameter(f'there is no field "{shown(field)}"', field)
    return (*found, fields)


def _filename(text: str) -> str:
    """A name to show and to save under; it enters no path of ours."""
    return re.sub(r"[^\w .()+-]", "_", re.split(r"[/\\]", text)[-1])[:128].strip(" .") or "file"


def _ttl_s(fields: Mapping[str, str]) -> float | None:
    text = fields.get("expires_after[seconds]")
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise BadParameter("expires_after: anchor must be created_at", "expires_after")
    if text is None:
        return None
    least, most = _TTL_BOUNDS_S
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise BadParameter(f"expires_after: seconds must be a whole number from {least} to {most}", "expires_after")
    return float(text)


def _batch_fields(fields: Mapping[str, object]) -> tuple[str, dict[str, str] | None]:
    for field in fields:
        if field not in _BATCH_FIELDS:
            raise BadParameter(f'there is no field "{shown(field)}"', field)
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


def _first(listed: list[Any]) -> str | None:
    return listed[0].id if listed else None


def _last(listed: list[Any]) -> str | None:
    return listed[-1].id if listed else None


def _multipart(properties: Mapping[str, Any], *, required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": dict(properties), "required": required}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


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
