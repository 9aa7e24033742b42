"""One picture's way: fetch it, animate it, publish the video. Plain code that both wings use; knows no Ray.

`Fetch` and `Publish` are functions; the Animate step between them is `Animator.submit`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pia_ray import ledger, manifest, storage
from pia_ray.animation import Animation
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import (
    StorageError,
    VideoError,
)
from pia_ray.manifest.inputs import read_image, read_references, require_planned
from pia_ray.media import image as pictures
from pia_ray.media import video
from pia_ray.media.quality import flags_of
from pia_ray.types import AnimationRequest, ManifestRow, ResultRow

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class Fetched:
    """A row's picture, decoded, and what is to be told about it."""

    image: Image
    """RGB, upright, of its own size."""
    original_width: int
    original_height: int
    sha256: str
    fetch_s: float
    references: Mapping[str, Image | np.ndarray[Any, Any]] = field(default_factory=dict)
    """What the row's params refer to, by knob."""


def fetch(row: ManifestRow, config: CatalogConfig) -> Fetched:
    """Reads and decodes the row's picture and what else its params refer to, wherever it is.

    Raises:
        ImageError: there is none, or it cannot be used.
        BadParameter: an array is not what its knob takes.
        FetchError, StorageError: it could not be read.
        VideoError: the run's format cannot hold what the row asks for; found here, before the GPU.
    """
    started = time.perf_counter()
    params = row.params
    video.require_encodable(config.format, width=params.width or 8, height=params.height or 8, fps=params.fps)
    content = read_image(row.image, max_bytes=config.max_image_bytes)
    decoded = pictures.decode(
        content,
        background=config.background,
        max_bytes=config.max_image_bytes,
        max_pixels=config.max_image_pixels,
    )
    require_planned(row.image_identity, decoded.sha256)
    return Fetched(
        image=decoded.rgb,
        original_width=decoded.original_width,
        original_height=decoded.original_height,
        sha256=decoded.sha256,
        references=read_references(
            row.references,
            background=config.background,
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
            identities=row.reference_identities,
        ),
        fetch_s=time.perf_counter() - started,
    )


def request_of(row: ManifestRow, fetched: Fetched, *, deadline_s: float | None) -> AnimationRequest:
    """What the Animate step is asked for this row."""
    brings: dict[str, Any] = dict(fetched.references)
    return AnimationRequest(image=fetched.image, params=row.params, id=row.id, deadline_s=deadline_s, **brings)


def publish(
    animation: Animation,
    row: ManifestRow,
    *,
    fetched: Fetched,
    config: CatalogConfig,
    run_id: str,
    attempts: int,
) -> ResultRow:
    """Encodes, verifies and commits the video; the put of the video is the commit, thumbnails go before it.

    If an object with this row's work key is there already (a lost answer, or another run's twin), it is adopted.

    Raises:
        VideoError: the frames could not be encoded, or the file did not verify.
        StorageError: the store refused or failed.
    """
    started = time.perf_counter()
    params = animation.params
    uri = ledger.video_uri(config.output, row.id, work_key=row.work_key, ext=config.format)
    input_uri, thumbnail_uri = ledger.thumbnail_uris(config.output, row.id, work_key=row.work_key)
    result = ResultRow.succeeded(
        id=row.id,
        video_index=row.video_index,
        work_key=row.work_key,
        attempts=attempts,
        video_uri=uri,
        thumbnail_uri=thumbnail_uri,
        input_thumbnail_uri=input_uri,
        image_uri=manifest.shown(row.image),
        params=params,
        input_sha256=fetched.sha256,
        original_width=fetched.original_width,
        original_height=fetched.original_height,
        model=animation.model,
        run_id=run_id,
        worker=worker_name(),
        fetch_s=fetched.fetch_s,
        animate_s=animation.animate_s,
        gpu_s=animation.gpu_s,
        motion=animation.motion,
        finished_at=datetime.now(UTC),
        flags=",".join(flags_of(animation.frames, fetched.image)) or None,
    )
    encoded = video.encode(animation.frames, fps=params.fps, format=config.format, provenance=ledger.provenance(result))
    video.verify(encoded)
    storage.write_bytes(input_uri, pictures.thumbnail(fetched.image), content_type="image/webp")
    storage.write_bytes(thumbnail_uri, video.thumbnail(animation.frames, fps=params.fps), content_type="image/webp")
    mime, metadata = video.MIME[config.format], {"work-key": row.work_key, "sha256": encoded.sha256}
    if not storage.create_bytes(uri, encoded.content, content_type=mime, metadata=metadata):
        if (twin := committed(row, config)) is not None:
            return replace(twin, publish_s=time.perf_counter() - started)
        # What is there does not open: it is no commit, and this is.
        storage.write_bytes(uri, encoded.content, content_type=mime, metadata=metadata)
    return replace(
        result,
        size_bytes=encoded.size_bytes,
        sha256=encoded.sha256,
        publish_s=time.perf_counter() - started,
    )


def committed(row: ManifestRow, config: CatalogConfig) -> ResultRow | None:
    """The result of this row if its video is there already, read from the video itself; None if it is not.

    Raises:
        StorageError: the store failed, or the object at that place belongs to another row.
    """
    uri = ledger.video_uri(config.output, row.id, work_key=row.work_key, ext=config.format)
    if not storage.exists(uri):
        return None
    content = storage.read_bytes(uri)
    try:
        facts = video.probe(content)
    except VideoError:
        return None
    key = facts.provenance.get("work_key")
    if key != row.work_key:
        raise StorageError(f"{uri} is taken by another work item ({key}): move it away, or use another output")
    input_uri, thumbnail_uri = ledger.thumbnail_uris(config.output, row.id, work_key=row.work_key)
    return ledger.row_from_provenance(
        facts.provenance,
        video_uri=uri,
        thumbnail_uri=thumbnail_uri,
        input_thumbnail_uri=input_uri,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def worker_name() -> str:
    """This process as results name it: host and process id."""
    return f"{platform.node()}:{os.getpid()}"
