"""The metadata of finished videos, read and written anew in every format."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.marking import ProvenanceLevel
from pia_ray.errors import VideoError
from pia_ray.media.marking import gif, mp4, webm, webp
from pia_ray.media.marking.levels import at_level
from pia_ray.media.marking.xmp import DIGITAL_SOURCE_TYPE
from pia_ray.media.video_facts import canonical_json, read_provenance

_Reader = Callable[[bytes], tuple[str, bytes]]
_Writer = Callable[[bytes, str], bytes]

_FORMATS: Final[Mapping[VideoFormat, tuple[_Reader, _Writer]]] = MappingProxyType(
    {
        "mp4": (mp4.read, mp4.write),
        "webm": (webm.read, webm.write),
        "webp": (webp.read, webp.write),
        "gif": (gif.read, gif.write),
    }
)
"""By format: (the note and the mark's bytes of a file, the file with the mark and another note)."""

_DAMAGE: Final = (IndexError, ValueError, KeyError, struct.error, OverflowError)


def write_metadata(content: bytes, format: VideoFormat, *, note: str) -> bytes:  # noqa: A002 - the field's word
    """The same video with the mark and this note; other metadata of the file, and a C2PA manifest, are left out.

    Raises:
        VideoError: the file is damaged, or not of that format.
    """
    try:
        return _FORMATS[format][1](content, note)
    except _DAMAGE as error:
        raise VideoError(f"the {format} is damaged: its metadata cannot be written ({error})") from error


def strip_provenance(content: bytes, format: VideoFormat, level: ProvenanceLevel) -> bytes:  # noqa: A002 - as above
    """The same video, marked as generated, that tells no more of its making than `level` allows.

    Pictures and times are not encoded anew; the same file and level give the same bytes. A file that is marked and
    tells no more comes back as it is, with its C2PA manifest; every other loses the manifest, whose hash would not fit.

    Raises:
        VideoError: the file is damaged, or not of that format.
    """
    note, mark = _read(content, format)
    if level != "full":
        provenance = at_level(read_provenance(note), level)
        kept = canonical_json(provenance) if provenance else ""
    else:
        kept = note
    if kept == note and _is_mark(mark):
        return content
    return write_metadata(content, format, note=kept)


def is_marked(content: bytes, format: VideoFormat) -> bool:  # noqa: A002 - as above
    """Whether the file says that it is generated.

    Raises:
        VideoError: as `strip_provenance`.
    """
    return _is_mark(_read(content, format)[1])


def _read(content: bytes, format: VideoFormat) -> tuple[str, bytes]:  # noqa: A002 - as above
    try:
        return _FORMATS[format][0](content)
    except _DAMAGE as error:
        raise VideoError(f"the {format} is damaged: its metadata cannot be read ({error})") from error


def _is_mark(mark: bytes) -> bool:
    return DIGITAL_SOURCE_TYPE.encode() in mark
