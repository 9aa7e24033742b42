"""The steps of one row of a catalogue but for `Animator.submit`: fetch, encode, commit. Knows no Ray."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from pia_ray import ledger, manifest, storage
from pia_ray.animation import Animation, require_safe
from pia_ray.config.canvas import file_size
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import StorageDamaged, StorageError, StorageNotFound, VideoError
from pia_ray.manifest.inputs import read_image, read_references, require_planned
from pia_ray.media import image as pictures
from pia_ray.media import video
from pia_ray.media.finish import encode_finished, finish, poster_of, require_finishable
from pia_ray.media.finish.enlarging import LANCZOS
from pia_ray.media.finish.posters import MIME as POSTER_MIME
from pia_ray.media.marking import at_level, is_marked, signer_of
from pia_ray.media.quality import flags_of
from pia_ray.result_row import ResultRow
from pia_ray.storage.host_rates import HostRates
from pia_ray.storage.web import Web
from pia_ray.types import AnimationRequest, EncodedVideo, ManifestRow

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class Fetched:
    """A row's picture, decoded, with its facts for the result row."""

    image: Image
    """RGB, upright, of its own size."""
    original_width: int
    original_height: int
    sha256: str
    fetch_s: float
    references: Mapping[str, Image | np.ndarray[Any, Any]] = field(default_factory=dict)
    """Pictures and arrays that the row's params refer to, by knob."""
    notes: tuple[str, ...] = ()
    """Parts of the picture's file that were not used, as `media.image.LEFT_OUT` names them."""


def web_of(config: CatalogConfig, *, num_workers: int = 1, stopped: threading.Event | None = None) -> Web:
    """The web for one of so many workers of a run; each has the same share of the run's rate. `stopped` ends waits."""
    rate = config.per_host_rate
    return Web(
        allow_http=config.allow_http,
        allowed_networks=config.allowed_networks,
        headers=config.headers_by_host,
        user_agent=config.user_agent,
        obey_opt_outs=not config.ignore_opt_outs,
        rates=HostRates(None if rate is None else rate / num_workers),
        patience_s=config.patience_s,
        stopped=stopped or threading.Event(),
    )


def fetch(row: ManifestRow, config: CatalogConfig, *, web: Web | None = None) -> Fetched:
    """The row's picture, read and decoded, with the other files that its params refer to.

    `web` is left out by who fetches but a few: it holds the pace of hosts for many rows.

    Raises:
        ImageError: there is no picture, or it cannot be used.
        InputChanged: a file is not the one that was planned.
        BadParameter: an array is not what its knob takes.
        FetchError, StorageError: it could not be read.
        VideoError: the run's format cannot hold what the row asks for; found here, before the GPU.
    """
    started = time.perf_counter()
    params = row.params
    require_finishable(config.format, params)
    watched = config.detect_changes
    web = web or web_of(config)
    limits: dict[str, Any] = {
        "background": config.background,
        "max_bytes": config.max_image_bytes,
        "max_pixels": config.max_image_pixels,
        "max_side": config.max_image_side,
        "max_aspect": config.max_image_aspect,
    }
    planned = row.image_identity if watched else None
    content = read_image(row.image, max_bytes=config.max_image_bytes, planned=planned, web=web)
    decoded = pictures.decode(content, **limits)
    require_planned(row.image_identity, decoded.sha256)
    return Fetched(
        image=decoded.rgb,
        original_width=decoded.original_width,
        original_height=decoded.original_height,
        sha256=decoded.sha256,
        notes=tuple(note for note in decoded.notes if note in pictures.LEFT_OUT),
        references=read_references(
            row.references,
            identities=row.reference_identities,
            planned=row.reference_identities if watched else {},
            web=web,
            **limits,
        ),
        fetch_s=time.perf_counter() - started,
    )


def request_of(row: ManifestRow, fetched: Fetched, *, deadline_s: float | None) -> AnimationRequest:
    """The request to the animator for this row."""
    brings: dict[str, Any] = dict(fetched.references)
    return AnimationRequest(image=fetched.image, params=row.params, id=row.id, deadline_s=deadline_s, **brings)


@dataclass(frozen=True)
class Outputs:
    """The files of a finished row, encoded and verified, and its result row. Nothing of it is written yet."""

    result: ResultRow
    video: EncodedVideo
    video_thumbnail: bytes
    """webp, as `input_thumbnail`."""
    input_thumbnail: bytes
    poster: bytes | None
    """A JPEG or WebP; None where the row asks for none."""
    encode_s: float


def encode_outputs(
    animation: Animation,
    row: ManifestRow,
    *,
    fetched: Fetched,
    config: CatalogConfig,
    run_id: str,
    attempts: int,
    judged: Callable[[ResultRow], ResultRow] = lambda row: row,
    publishes: Callable[[ResultRow], bool] = lambda row: True,
) -> Outputs | ResultRow:
    """The row's video, with as much of its provenance inside as the run says, thumbnails and result row.

    Reads and writes no storage.
    `judged` adds to the result row what its numbers lead to, before it is written into the video. Where `publishes`
    says no to it, it is returned alone, and nothing is finished or encoded.

    Raises:
        UnsafeContent: as `require_safe`.
        VideoError: the frames could not be encoded or signed, or the file did not verify.
        FetchUnavailable: the server of time stamps gave none.
    """
    started = time.perf_counter()
    require_safe(animation, config)
    result = judged(_result_of(animation, row, fetched=fetched, config=config, run_id=run_id, attempts=attempts))
    if not publishes(result):
        return result
    finished = finish(animation.frames, animation.params, upscale=animation.upscale)
    provenance = at_level(ledger.provenance(result), config.provenance)
    encoded = encode_finished(finished, config.format, provenance=provenance)
    input_thumbnail = pictures.thumbnail(fetched.image)
    if (signer := signer_of(config)) is not None:
        encoded = signer.sign(encoded, picture=input_thumbnail, model=animation.model)
    video.verify(encoded)
    return Outputs(
        result=replace(result, size_bytes=encoded.size_bytes, sha256=encoded.sha256),
        video=encoded,
        video_thumbnail=video.thumbnail(finished.preview, fps=animation.params.fps),
        input_thumbnail=input_thumbnail,
        poster=poster_of(finished, animation.params, judged=animation.frames, image=animation.image),
        encode_s=time.perf_counter() - started,
    )


def _result_of(
    animation: Animation, row: ManifestRow, *, fetched: Fetched, config: CatalogConfig, run_id: str, attempts: int
) -> ResultRow:
    """The result row but for length and hash of the file."""
    finished_at = datetime.now(UTC)  # from here on the row uses no engine, unless a network enlarges it
    input_uri, thumbnail_uri = ledger.thumbnail_uris(config.output, row.id, work_key=row.work_key)
    height, width = animation.frames.shape[1:3]
    width, height = file_size((width, height), animation.params)
    return ResultRow.succeeded(
        id=row.id,
        video_index=row.video_index,
        picture_index=row.picture_index,
        work_key=row.work_key,
        attempts=attempts,
        video_uri=_video_uri(row, config),
        thumbnail_uri=thumbnail_uri,
        input_thumbnail_uri=input_uri,
        poster_uri=ledger.poster_uri(config.output, row.id, work_key=row.work_key, kind=row.params.poster),
        image_uri=manifest.redacted(row.image),
        params=animation.params,
        width=width,
        height=height,
        input_sha256=fetched.sha256,
        original_width=fetched.original_width,
        original_height=fetched.original_height,
        model=animation.model,
        run_id=run_id,
        worker=worker_name(),
        fetch_s=fetched.fetch_s,
        animate_s=animation.animate_s,
        gpu_s=animation.gpu_s,
        judgement=animation.judge().as_dict(),
        finished_at=finished_at,
        flags=",".join(_flags(animation, fetched)) or None,
        nsfw=animation.nsfw,
    )


def _flags(animation: Animation, fetched: Fetched) -> tuple[str, ...]:
    enlarged = animation.params.upscale > 1 and animation.upscale is None
    found = (("nsfw", animation.nsfw), (LANCZOS, enlarged))
    return *flags_of(animation.frames, fetched.image), *(name for name, is_so in found if is_so), *fetched.notes


def commit(
    outputs: Outputs, *, attempts: int, replaces: bool = False, given_up: Callable[[], bool] = lambda: False
) -> ResultRow:
    """The result row of the video that is there after the pictures, side by side, and then the video are written.

    The put of the video is the commit.

    With `replaces` it takes the place of the row's earlier video. Else, if an object with this row's work key is there
    already (a lost answer, or another run's twin), it is adopted.
    Nothing is lost when it raises: the same outputs may be committed again, as a later one of the row's `attempts`.

    Raises:
        StorageError: the store refused or failed.
        CancelledError: the caller has `given_up` before the put of the video, which is left out then.
    """
    started = time.perf_counter()
    result, encoded = replace(outputs.result, attempts=attempts), outputs.video
    assert result.video_uri is not None
    assert result.thumbnail_uri is not None
    assert result.input_thumbnail_uri is not None
    _write_sidecars(outputs)
    if given_up():
        raise CancelledError
    mime, metadata = video.MIME[encoded.format], {"work-key": result.work_key, "sha256": encoded.sha256}
    if replaces:
        storage.write_bytes(result.video_uri, encoded.content, content_type=mime, metadata=metadata)
    elif not storage.create_bytes(result.video_uri, encoded.content, content_type=mime, metadata=metadata):
        twin = _committed(
            result.video_uri,
            (result.input_thumbnail_uri, result.thumbnail_uri, result.poster_uri),
            work_key=result.work_key,
        )
        if twin is None:
            # The file there does not open, or has not its hash: it is not a commit, and this is.
            storage.write_bytes(result.video_uri, encoded.content, content_type=mime, metadata=metadata)
        else:
            result = twin
    return replace(result, publish_s=outputs.encode_s + time.perf_counter() - started)


def _write_sidecars(outputs: Outputs) -> None:
    """Writes the thumbnails and the poster side by side."""
    result = outputs.result
    assert result.thumbnail_uri is not None
    assert result.input_thumbnail_uri is not None
    files = [
        (result.input_thumbnail_uri, outputs.input_thumbnail, "image/webp"),
        (result.thumbnail_uri, outputs.video_thumbnail, "image/webp"),
    ]
    if result.poster_uri is not None and outputs.poster is not None:
        kind = result.poster_uri.rpartition(".")[2]
        files.append((result.poster_uri, outputs.poster, POSTER_MIME[kind]))
    storage.side_by_side(
        *(partial(storage.write_bytes, uri, content, content_type=mime) for uri, content, mime in files)
    )


def committed(row: ManifestRow, config: CatalogConfig) -> ResultRow | None:
    """The result of this row if its video is there already, read from the video itself; None if it is not.

    A video whose provenance is reduced tells too little: None, and the row is animated again.

    Raises:
        StorageError: the store failed, or the object with the video's name belongs to another row.
    """
    thumbnails = ledger.thumbnail_uris(config.output, row.id, work_key=row.work_key)
    poster_uri = ledger.poster_uri(config.output, row.id, work_key=row.work_key, kind=row.params.poster)
    return _committed(_video_uri(row, config), (*thumbnails, poster_uri), work_key=row.work_key)


def _committed(uri: str, picture_uris: tuple[str, str, str | None], *, work_key: str) -> ResultRow | None:
    """`picture_uris` are those of the input's thumbnail, the video's and the poster."""
    found = storage.head(uri)
    if found is None:
        return None
    try:
        content = storage.read_bytes(uri)
        facts = video.probe(content)
    except (StorageDamaged, StorageNotFound, VideoError):  # damaged, or removed since
        return None
    sha256 = hashlib.sha256(content).hexdigest()
    if found.metadata.get("sha256", sha256) != sha256:
        return None
    key = facts.provenance.get("work_key")
    if key in (None, work_key) and not ledger.tells_row(facts.provenance) and is_marked(content, facts.format):
        return None
    if key != work_key:
        raise StorageError(f"{uri} is taken by another work item ({key}): move it away, or use another output")
    return ledger.row_from_provenance(
        facts.provenance,
        video_uri=uri,
        thumbnail_uri=picture_uris[1],
        input_thumbnail_uri=picture_uris[0],
        poster_uri=picture_uris[2],
        size_bytes=len(content),
        sha256=sha256,
    )


def _video_uri(row: ManifestRow, config: CatalogConfig) -> str:
    return ledger.video_uri(config.output, row.id, work_key=row.work_key, ext=config.format)


def worker_name() -> str:
    """This process as results name it: host and process id."""
    return f"{platform.node()}:{os.getpid()}"
