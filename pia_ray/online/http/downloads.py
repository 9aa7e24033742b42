"""An object of storage as an HTTP answer: a link if it is on S3, the file itself if it is on this host."""

from __future__ import annotations

import asyncio
from typing import Final, Literal

from fastapi import Response
from fastapi.responses import FileResponse, RedirectResponse

from pia_ray import storage
from pia_ray.errors import NotFound

LINK_S: Final = 900
"""Seconds for which a link to an object on S3 is valid."""


async def delivery(
    uri: str, *, method: str, media_type: str, filename: str, disposition: Literal["inline", "attachment"] = "inline"
) -> Response:
    """The answer to a GET or HEAD of the object; for an object on this host also of a range of it.

    Raises:
        NotFound: it was deleted.
    """
    on_s3 = storage.is_s3(uri)
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
