"""/v1/files in the wire format of the OpenAI API: input files of batches, pictures, and output files of batches."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from pia_ray.config.serve import ServeConfig
from pia_ray.errors import BadParameter, UnsupportedBody
from pia_ray.online.documents.document import Order
from pia_ray.online.files import FileStore, Purpose, StoredFile, parse_purpose
from pia_ray.online.http import error_responses
from pia_ray.online.http.downloads import delivery
from pia_ray.online.http.middleware import Owner
from pia_ray.online.http.pagination import Listed, Listing, PageQuery
from pia_ray.online.http.wire_types import UnixTime
from pia_ray.online.public_errors import shortened
from pia_ray.online.requests.bodies import media_type
from pia_ray.online.requests.request_limits import MAX_FILES
from pia_ray.online.usage import Amounts, Usage

FILE_TTL_S: Final = 30 * 24 * 3600.0
"""Seconds for which files are kept by default."""

_TTL_BOUNDS_S: Final = (3600, 30 * 24 * 3600)


class FileObject(Listed):
    """A file in the format of the openai clients."""

    model_config = ConfigDict(from_attributes=True)

    object: Literal["file"] = "file"
    bytes: int = Field(validation_alias="size_bytes")
    created_at: UnixTime
    expires_at: UnixTime
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileList(Listing[FileObject]):
    """Part of the list of files."""


class FileListQuery(PageQuery):
    """The query parameters of the list of files."""

    limit: int = Field(100, ge=1, le=10_000)
    order: Order = Field("desc", description="By the time of creation.")
    purpose: Purpose | None = Field(None, description="Only files of this purpose.")


class FileDeleted(BaseModel):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def file_object(file: StoredFile) -> FileObject:
    """The file object of a stored file."""
    return FileObject.model_validate(file)


def file_routes(files: FileStore, *, config: ServeConfig, usage: Usage, prefix: str = "/v1") -> APIRouter:
    """The routes below /v1/files."""
    router = APIRouter(prefix=f"{prefix}/files", tags=["batches"])

    @router.post(
        "",
        operation_id="create_file",
        summary="Upload the input file of a batch, or a picture",
        responses=error_responses.responses(415),
        openapi_extra={"requestBody": _UPLOAD_BODY},
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
        created = await asyncio.to_thread(create_file)
        usage.add(owner, Amounts(num_bytes=created.size_bytes))
        return file_object(created)

    @router.get("", operation_id="list_files", summary="List files", responses=error_responses.responses(404))
    async def list_files(owner: Owner, page: Annotated[FileListQuery, Query()]) -> FileList:
        found = await asyncio.to_thread(
            lambda: files.list(owner, after=page.after, limit=page.limit, order=page.order, purpose=page.purpose)
        )
        return FileList.of([file_object(each) for each in found.documents], more=found.has_more)

    @router.get(
        "/{file_id}",
        operation_id="retrieve_file",
        summary="Retrieve a file",
        responses=error_responses.responses(404),
    )
    async def retrieve(owner: Owner, file_id: str) -> FileObject:
        return file_object(await asyncio.to_thread(files.get, owner, file_id))

    @router.delete(
        "/{file_id}", operation_id="delete_file", summary="Delete a file", responses=error_responses.responses(404)
    )
    async def delete(owner: Owner, file_id: str) -> FileDeleted:
        await asyncio.to_thread(files.delete, owner, file_id)
        return FileDeleted(id=file_id)

    _add_content(router, files)
    return router


def _add_content(router: APIRouter, files: FileStore) -> None:
    """Adds the routes of the content of a file."""

    @router.get(
        "/{file_id}/content",
        operation_id="download_file",
        summary="A file's content",
        response_class=Response,
        responses={
            **error_responses.responses(404),
            200: {"description": "The content.", "content": {"application/octet-stream": {}}},
            302: {"description": "A link to it, which is valid for 15 minutes."},
        },
    )
    @router.head(
        "/{file_id}/content",
        operation_id="describe_file",
        summary="Length and type of a file's content",
        response_class=Response,
        responses=error_responses.responses(404),
    )
    async def content(request: Request, owner: Owner, file_id: str) -> Response:
        file = await asyncio.to_thread(files.get, owner, file_id)
        return await delivery(
            files.content_uri(file),
            method=request.method,
            media_type="application/octet-stream",
            filename=file.filename,
            disposition="attachment",
        )


async def _upload(request: Request, *, max_bytes: int) -> tuple[str, bytes, Mapping[str, str]]:
    """Name and content of the form's only file, and the other fields."""
    if media_type(request.headers) != "multipart/form-data":
        raise UnsupportedBody("Send multipart/form-data.")
    fields: dict[str, str] = {}
    found: tuple[str, bytes] | None = None
    async with request.form(max_files=MAX_FILES, max_fields=10, max_part_size=max_bytes) as form:
        for field, value in form.multi_items():
            if field in fields or (field == "file" and found is not None):
                raise BadParameter(f"{shortened(field)} occurs twice", field)
            if isinstance(value, str):
                fields[field] = value
            elif field != "file":
                raise BadParameter(f'there is no file field "{shortened(field)}": send it as "file"', field)
            else:
                found = (_filename(value.filename or ""), await value.read())
    if found is None:
        raise BadParameter("file is missing: send one as multipart/form-data", "file")
    if not found[1]:
        raise BadParameter("file is empty: send one with content", "file")
    known = {"purpose", "expires_after[seconds]", "expires_after[anchor]"}
    for field in fields:
        if field not in known:
            raise BadParameter(f'there is no field "{shortened(field)}"', field)
    return (*found, fields)


def _filename(text: str) -> str:
    """A name for display and for downloads. It is never part of a path of ours."""
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


_UPLOAD_BODY: Final[dict[str, Any]] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": ["batch", "vision", "user_data"]},
                    "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                },
                "required": ["file", "purpose"],
            }
        }
    },
}
