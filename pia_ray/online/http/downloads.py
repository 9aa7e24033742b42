"""An object of storage as an HTTP answer: the file if it is on this host; if it is on S3 a link, or its bytes."""

from __future__ import annotations

import asyncio
from typing import Final, Literal

from fastapi import Response
from fastapi.responses import FileResponse, RedirectResponse, StreamingResponse

from pia_ray import storage
from pia_ray.errors import NotFound, StorageNotFound

LINK_S: Final = 900
"""Seconds for which a link to an object on S3 is valid."""


async def delivery(
    uri: str,
    *,
    method: str,
    media_type: str,
    filename: str,
    disposition: Literal["inline", "attachment"] = "inline",
    by_link: bool = True,
) -> Response:
    """The answer to a GET or HEAD of the object; for an object on this host also of a range of it.

    Without `by_link` an object on S3 is passed on: pages of this endpoint may read answers of no other origin.

    Raises:
        NotFound: it was deleted.
    """
    on_s3 = storage.is_s3(uri)
    if on_s3 and method != "HEAD" and not by_link:
        return await asyncio.to_thread(_passed_on, uri, media_type, filename)
    if on_s3 and method != "HEAD":
        link = await asyncio.to_thread(lambda: storage.presign(uri, expires_s=LINK_S))
        return RedirectResponse(link, status_code=302, headers={"cache-control": "no-store"})
    facts = await asyncio.to_thread(storage.head, uri)
    if facts is None:
        raise NotFound("the content has been deleted")
    if on_s3:  # a link is signed for GET only
        shape = {"content-length": str(facts.size_bytes), "accept-ranges": "bytes", "cache-control": "no-store"}
        return Response(media_type=media_type, headers=shape)
    return FileResponse(
        storage.local_path(uri),
        media_type=media_type,
        filename=filename,
        content_disposition_type=disposition,
        headers={"cache-control": "private, no-cache"},
    )


def _passed_on(uri: str, media_type: str, filename: str) -> Response:
    try:
        size_bytes, pieces = storage.pieces_of(uri)
    except StorageNotFound:
        raise NotFound("the content has been deleted") from None
    headers = {
        "content-length": str(size_bytes),
        "cache-control": "no-store",
        "content-disposition": f'inline; filename="{filename}"',
    }
    return StreamingResponse(pieces, media_type=media_type, headers=headers)
