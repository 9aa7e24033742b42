"""Metadata in webp: the mark and the note share one XMP chunk. Source: WebP container specification, Google."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pia_ray.media.marking.xmp import mark_packet, note_in

_XMP, _C2PA = b"XMP ", b"C2PA"
_HAS_XMP: Final = 0x04


def read(content: bytes) -> tuple[str, bytes]:
    """(The note, the XMP packet); empty where there is none."""
    packet = next((body for name, body in _chunks(content) if name == _XMP), b"")
    return note_in(packet), packet


def write(content: bytes, note: str) -> bytes:
    """The file with the mark and this note."""
    kept = [(name, body) for name, body in _chunks(content) if name not in (_XMP, _C2PA)]
    first, header = kept[0]
    if first != b"VP8X":
        raise ValueError("it has no extended header")
    kept[0] = (first, bytes([header[0] | _HAS_XMP]) + header[1:])
    body = b"".join(_chunk(name, body) for name, body in [*kept, (_XMP, mark_packet(note))])
    return _chunk(b"RIFF", b"WEBP" + body)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        raise ValueError("it is not a webp")
    at, end = 12, 8 + int.from_bytes(content[4:8], "little")
    if end > len(content):
        raise ValueError("it is cut off")
    while at + 8 <= end:
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        yield content[at : at + 4], content[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)
