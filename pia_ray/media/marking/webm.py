"""Metadata in webm: the note and the mark are tags. Matroska has no place for XMP, and webm allows no attachments.

Source: EBML, RFC 8794; Matroska, RFC 9559.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from pia_ray.media.marking.xmp import DIGITAL_SOURCE_TYPE

MARK_TAG: Final = "DIGITAL_SOURCE_TYPE"
"""The tag's name; exiftool prints it as DigitalSourceType."""

_HEADER, _SEGMENT, _VOID = 0x1A45DFA3, 0x18538067, 0xEC
_SEEK_HEAD, _SEEK, _SEEK_ID, _SEEK_POSITION = 0x114D9B74, 0x4DBB, 0x53AB, 0x53AC
_TRACKS, _CLUSTER = 0x1654AE6B, 0x1F43B675
_CUES, _CUE_TRACK_POSITIONS, _CUE_POINT, _CUE_CLUSTER = 0x1C53BB6B, 0xB7, 0xBB, 0xF1
_TAGS, _TAG, _TARGETS, _SIMPLE, _NAME, _TEXT = 0x1254C367, 0x7373, 0x63C0, 0x67C8, 0x45A3, 0x4487
_CRC: Final = 0xBF


@dataclass(frozen=True)
class _Element:
    kind: int
    start: int
    body: bytes
    raw: bytes
    """The element as it is in the file, with id and length."""


def read(content: bytes) -> tuple[str, bytes]:
    """(The note, the mark's tag); empty where there is none."""
    texts: dict[str, bytes] = {}
    for element in _elements(_segment(content)[1].body):
        if element.kind == _TAGS:
            for tag in _elements(element.body):
                if _is_of_file(tag):
                    texts |= _texts(tag)
    return texts.get("COMMENT", b"").decode("utf-8", "replace"), texts.get(MARK_TAG, b"")


def write(content: bytes, note: str) -> bytes:
    """The file with the mark and this note; the places in its table of contents and index are those of the new file."""
    header, segment = _segment(content)
    kept = [element for element in _elements(segment.body) if element.kind not in (_SEEK_HEAD, _VOID, _CRC)]
    tags = [tag.raw for each in kept if each.kind == _TAGS for tag in _elements(each.body) if not _is_of_file(tag)]
    kept = [element for element in kept if element.kind != _TAGS]
    first = next(i for i, element in enumerate(kept) if element.kind == _CLUSTER)
    own = _Element(_TAGS, -1, b"", _element(_TAGS, _tag(note) + b"".join(tags)))
    kept[first:first] = [own]
    # Positions have 8 bytes each, so that no length depends on a value.
    parts = [_with_places(element, dict.fromkeys((each.start for each in kept), 0)) for element in kept]
    contents = list(dict.fromkeys(element.kind for element in kept if element.kind != _CLUSTER))
    at = len(_seek_head(dict.fromkeys(contents, 0)))
    places = list(accumulate(map(len, parts), initial=at))[:-1]
    clusters = {element.start: place for element, place in zip(kept, places, strict=True)}
    first_places = {element.kind: place for element, place in reversed(list(zip(kept, places, strict=True)))}
    parts = [_with_places(element, clusters) for element in kept]
    body = _seek_head({kind: first_places[kind] for kind in contents}) + b"".join(parts)
    return header.raw + _element(_SEGMENT, body)


def _segment(content: bytes) -> tuple[_Element, _Element]:
    header, *rest = _elements(content)
    if header.kind != _HEADER or not rest or rest[0].kind != _SEGMENT:
        raise ValueError("it is not a webm")
    return header, rest[0]


def _is_of_file(tag: _Element) -> bool:
    """Whether a tag speaks of the whole file, not of a track."""
    return tag.kind == _TAG and all(not target.body for target in _elements(tag.body) if target.kind == _TARGETS)


def _texts(tag: _Element) -> dict[str, bytes]:
    simple = [
        {part.kind: part.body for part in _elements(each.body)} for each in _elements(tag.body) if each.kind == _SIMPLE
    ]
    return {each[_NAME].decode("utf-8", "replace"): each.get(_TEXT, b"") for each in simple if _NAME in each}


def _tag(note: str) -> bytes:
    """The tag of the whole file."""
    texts = {MARK_TAG: DIGITAL_SOURCE_TYPE, **({"COMMENT": note} if note else {})}
    simple = [
        _element(_SIMPLE, _element(_NAME, name.encode()) + _element(_TEXT, text.encode()))
        for name, text in texts.items()
    ]
    return _element(_TAG, _element(_TARGETS, b"") + b"".join(simple))


def _seek_head(places: dict[int, int]) -> bytes:
    entries = [
        _element(_SEEK, _element(_SEEK_ID, _id(kind)) + _element(_SEEK_POSITION, place.to_bytes(8, "big")))
        for kind, place in places.items()
    ]
    return _element(_SEEK_HEAD, b"".join(entries))


def _with_places(element: _Element, clusters: dict[int, int]) -> bytes:
    """The element's bytes; in the index with the new places of clusters, by their old ones."""
    if element.kind == _CUE_CLUSTER:
        old = int.from_bytes(element.body, "big")
        return _element(_CUE_CLUSTER, clusters[old].to_bytes(8, "big"))
    if element.kind in (_CUES, _CUE_POINT, _CUE_TRACK_POSITIONS):
        return _element(element.kind, b"".join(_with_places(each, clusters) for each in _elements(element.body)))
    return element.raw


def _elements(content: bytes) -> Iterator[_Element]:
    at = 0
    while at < len(content):
        start, width = at, 9 - content[at].bit_length()
        kind = int.from_bytes(content[at : at + width], "big")
        at += width
        width = 9 - content[at].bit_length()
        size = int.from_bytes(content[at : at + width], "big") & ((1 << 7 * width) - 1)
        at += width
        if width > 8 or at + size > len(content):
            raise ValueError("it is cut off")
        yield _Element(kind, start, content[at : at + size], content[start : at + size])
        at += size


def _id(kind: int) -> bytes:
    return kind.to_bytes((kind.bit_length() + 7) // 8, "big")


def _element(kind: int, body: bytes) -> bytes:
    """An element whose length has as few bytes as it needs."""
    width = next(width for width in range(1, 9) if len(body) < (1 << 7 * width) - 1)
    return _id(kind) + (len(body) | 1 << 7 * width).to_bytes(width, "big") + body
