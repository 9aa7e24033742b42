"""The bytes behind the references of a manifest, and the pictures and arrays in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pia_ray import storage
from pia_ray.config.knobs import ARRAY_KNOBS
from pia_ray.errors import (
    BadParameter,
    ImageNotFound,
    ImageTooLarge,
    InputChanged,
    RowError,
    StorageNotFound,
    StorageTooLarge,
)
from pia_ray.manifest.cells import read_image_cell
from pia_ray.manifest.references import decode_data_url
from pia_ray.manifest.spellings import fetched_url, other_spellings
from pia_ray.manifest.versions import version_read
from pia_ray.media import arrays
from pia_ray.media import image as pictures
from pia_ray.storage import sources
from pia_ray.storage.web import Web

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


_CELL = re.compile(r".+#row=[1-9][0-9]*&column=.+", re.DOTALL)
"""References that `manifest.read_image_cell` reads."""


def read_image(
    reference: str, *, max_bytes: int, what: str = "image", planned: str | None = None, web: Web | None = None
) -> bytes:
    """The bytes behind an image reference: a path, s3://, https:// or data: URL, a URI that fsspec
    reads, or a cell of a Parquet manifest.

    A path or object that is not there is also looked for under its other spellings. `what` names the file in errors.
    `planned` is the identity that ends in the version of the file or object; None where any version will do.
    Without `web`, public servers are asked.

    Raises:
        ImageError, FetchError, StorageError: as `fetch`.
        InputChanged: the file or object has another version than planned.
    """
    if reference.startswith(("https://", "http://")):
        from pia_ray.storage import https  # brings an HTTP client, which paths need not

        content = https.fetch(fetched_url(reference), max_bytes=max_bytes, web=web)
        storage.count_read(len(content))
        return content
    if reference.startswith("data:"):
        return _capped(decode_data_url(reference), max_bytes, what)
    if _CELL.fullmatch(reference):
        return _capped(read_image_cell(reference), max_bytes, what)
    missing = None
    for uri in (reference, *other_spellings(reference)):
        try:
            content, etag = sources.read_object(uri, max_bytes=max_bytes)
        except StorageNotFound as error:
            missing = missing or error.message
            continue
        except StorageTooLarge as error:
            raise ImageTooLarge(error.message) from None
        if planned is not None and not planned.endswith(version_read(uri, etag)):
            raise InputChanged(f"the {what} {uri} has changed since it was planned: run again, which plans it anew")
        return content
    raise ImageNotFound(f"there is no {what}: {missing}")


def read_references(
    uris: Mapping[str, str],
    *,
    background: str,
    max_bytes: int,
    max_pixels: int,
    max_side: int = pictures.MAX_SIDE,
    max_aspect: float = pictures.MAX_ASPECT,
    identities: Mapping[str, str] = MappingProxyType({}),
    planned: Mapping[str, str] = MappingProxyType({}),
    web: Web | None = None,
) -> dict[str, Image | np.ndarray[Any, Any]]:
    """The pictures (RGB, of their own size) and float32 arrays behind references, by knob.

    Transparent parts of a mask are black, which stays; those of other pictures show `background`. `identities`
    are those that were planned for bytes inside a manifest, `planned` those that end in the versions of files.

    Raises:
        RowError: as `fetch`; the message begins with the knob.
    """
    found: dict[str, Image | np.ndarray[Any, Any]] = {}
    for knob, uri in uris.items():
        with _named(knob):
            what = "array" if knob in ARRAY_KNOBS else "image"
            content = read_image(uri, max_bytes=max_bytes, what=what, planned=planned.get(knob), web=web)
            require_planned(identities.get(knob, ""), hashlib.sha256(content).hexdigest())
            limits: dict[str, Any] = {"max_pixels": max_pixels, "max_side": max_side, "max_aspect": max_aspect}
            found[knob] = _decode_reference(content, knob, background=background, max_bytes=max_bytes, **limits)
    return found


def decode_references(
    contents: Mapping[str, bytes], *, background: str, max_bytes: int, max_pixels: int
) -> dict[str, Image | np.ndarray[Any, Any]]:
    """As `read_references`, of the files' contents.

    Raises:
        ImageError, BadParameter: a file is not what its knob takes; the message begins with the knob.
    """
    found: dict[str, Image | np.ndarray[Any, Any]] = {}
    limits = {"max_bytes": max_bytes, "max_pixels": max_pixels}
    for knob, content in contents.items():
        with _named(knob):
            found[knob] = _decode_reference(content, knob, background=background, **limits)
    return found


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


def require_planned(identity: str, sha256: str) -> None:
    """Refuses bytes in a manifest that are not those that were planned.

    Raises:
        InputChanged: `identity` is the sha256 of other bytes.
    """
    planned = identity.partition("#")[0]
    if planned.startswith("sha256:") and planned != f"sha256:{sha256}":
        raise InputChanged("the manifest has changed since it was planned: run again, which plans it anew")


def _decode_reference(
    content: bytes, knob: str, *, background: str, max_bytes: int, **limits: Any
) -> Image | np.ndarray[Any, Any]:
    if knob in ARRAY_KNOBS:
        return arrays.decode(_capped(content, max_bytes, "array"), knob)
    below = "#000000" if knob == "mask_image" else background
    return pictures.decode(content, background=below, max_bytes=max_bytes, **limits).rgb


def _capped(content: bytes, max_bytes: int, what: str) -> bytes:
    if len(content) > max_bytes:
        raise ImageTooLarge(f"the {what} has {len(content):,} bytes, the cap is {max_bytes:,}")
    return content
