"""One picture's way: fetch it, animate it, publish the video. Plain code that both wings use; knows no Ray.

`Fetch` and `Publish` are functions; the Animate step between them is `Animator.submit`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pia_ray import ledger, manifest, storage
from pia_ray.animation import Animation
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import ARRAY_KNOBS
from pia_ray.errors import (
    BadParameter,
    ImageNotFound,
    ImageTooLarge,
    RowError,
    StorageError,
    StorageNotFound,
    StorageTooLarge,
    VideoError,
)
from pia_ray.fetch import fetch as fetch_url
from pia_ray.media import arrays, video
from pia_ray.media import image as pictures
from pia_ray.media.quality import flags_of
from pia_ray.types import AnimationRequest, ManifestRow, ResultRow

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

_CELL = re.compile(r".+#row=[1-9][0-9]*&column=.+", re.DOTALL)
"""References that `manifest.read_image_cell` reads."""


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
    _require_planned(row.image_identity, decoded.sha256)
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
            identities={knob: getattr(params, knob) for knob in row.references},
        ),
        fetch_s=time.perf_counter() - started,
    )


def read_image(reference: str, *, max_bytes: int) -> bytes:
    """The bytes behind an image reference: a path, s3://, https:// or data: URL, or a cell of a Parquet manifest.

    Raises:
        ImageError, FetchError, StorageError: as `fetch`.
    """
    if reference.startswith("https://"):
        return fetch_url(reference, max_bytes=max_bytes)
    if reference.startswith("data:"):
        return _capped(manifest.decode_data_url(reference), max_bytes)
    if _CELL.fullmatch(reference):
        return _capped(manifest.read_image_cell(reference), max_bytes)
    try:
        return storage.read_bytes(reference, max_bytes=max_bytes)
    except StorageNotFound as error:
        raise ImageNotFound(f"there is no image: {error.message}") from None
    except StorageTooLarge as error:
        raise ImageTooLarge(error.message) from None


def read_references(
    uris: Mapping[str, str],
    *,
    background: str,
    max_bytes: int,
    max_pixels: int,
    identities: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Image | np.ndarray[Any, Any]]:
    """What is behind references, by knob: RGB pictures of their own size, and float32 arrays.

    Transparent parts of a mask are black, which stays; those of other pictures show `background`. `identities` say
    what was planned for bytes that lie in a manifest.

    Raises:
        RowError: as `fetch`; the message begins with the knob.
    """
    found: dict[str, Image | np.ndarray[Any, Any]] = {}
    for knob, uri in uris.items():
        with _named(knob):
            content = read_image(uri, max_bytes=max_bytes)
            _require_planned(identities.get(knob, ""), hashlib.sha256(content).hexdigest())
            limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
            found[knob] = _decode_reference(content, knob, background=background, **limits)
    return found


def decode_references(
    contents: Mapping[str, bytes], *, background: str, max_bytes: int, max_pixels: int
) -> dict[str, Image | np.ndarray[Any, Any]]:
    """As `read_references`, of files that are at hand.

    Raises:
        ImageError, BadParameter: a file is not what its knob takes; the message begins with the knob.
    """
    found: dict[str, Image | np.ndarray[Any, Any]] = {}
    limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
    for knob, content in contents.items():
        with _named(knob):
            found[knob] = _decode_reference(content, knob, background=background, **limits)
    return found


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
    result = ResultRow(
        id=row.id,
        video_index=row.video_index,
        status="succeeded",
        error_code=None,
        error_message=None,
        retryable=None,
        attempts=attempts,
        video_uri=uri,
        thumbnail_uri=thumbnail_uri,
        input_thumbnail_uri=input_uri,
        image_uri=manifest.shown(row.image),
        prompt=params.prompt,
        seed=params.seed or 0,
        width=params.width,
        height=params.height,
        num_frames=params.video_frames,
        fps=params.fps,
        duration_s=params.video_frames / params.fps,
        size_bytes=None,
        sha256=None,
        input_sha256=fetched.sha256,
        original_width=fetched.original_width,
        original_height=fetched.original_height,
        params=manifest.canonical_params(params),
        work_key=row.work_key,
        model=animation.model,
        run_id=run_id,
        worker=worker_name(),
        fetch_s=fetched.fetch_s,
        animate_s=animation.animate_s,
        publish_s=None,
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


@contextmanager
def _named(knob: str) -> Iterator[None]:
    """Says in an error which knob's file it is about."""
    try:
        yield
    except BadParameter as error:
        raise BadParameter(error.message, knob) from None
    except RowError as error:
        message = f"{knob}: {error.message}"
        if knob in ARRAY_KNOBS and isinstance(error, ImageNotFound):
            raise StorageNotFound(message) from None
        if knob in ARRAY_KNOBS and isinstance(error, ImageTooLarge):
            raise StorageTooLarge(message) from None
        raise type(error)(message) from None


def _require_planned(identity: str, sha256: str) -> None:
    planned = identity.partition("#")[0]
    if planned.startswith("sha256:") and planned != f"sha256:{sha256}":
        raise ImageNotFound("the manifest has changed since it was planned: run again, which plans it anew")


def _decode_reference(
    content: bytes, knob: str, *, background: str, max_bytes: int, max_pixels: int
) -> Image | np.ndarray[Any, Any]:
    if knob in ARRAY_KNOBS:
        return arrays.decode(_capped(content, max_bytes), knob)
    below = "#000000" if knob == "mask_image" else background
    return pictures.decode(content, background=below, max_bytes=max_bytes, max_pixels=max_pixels).rgb


def _capped(content: bytes, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise ImageTooLarge(f"the image has {len(content):,} bytes, the cap is {max_bytes:,}")
    return content
