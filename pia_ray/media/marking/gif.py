"""Metadata in gif: the note is a comment, the mark an XMP extension. Source: GIF89a; XMP specification part 3."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Final

from pia_ray.media.marking.xmp import mark_packet

_COMMENT: Final = b"\x21\xfe"
_APPLICATION: Final = b"\x21\xff"
_XMP: Final = b"\x21\xff\x0bXMP DataXMP"
_C2PA: Final = b"\x21\xff\x0bC2PA_GIF"
_TRAILER: Final = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
"""Ends the packet for readers that take its bytes as lengths of blocks, wherever they land in it."""


def read(content: bytes) -> tuple[str, bytes]:
    """(The note, the XMP packet); empty where there is none."""
    note = packet = b""
    for block in _blocks(content):
        if block.startswith(_COMMENT):
            note = note or _joined(block)
        elif block.startswith(_XMP):
            packet = block[len(_XMP) : -len(_TRAILER)]
    return note.decode("utf-8", "replace"), packet


def write(content: bytes, note: str) -> bytes:
    """The file with the mark and this note, after the extension that says how often it plays."""
    kept = [block for block in _blocks(content) if not block.startswith((_COMMENT, _XMP, _C2PA))]
    own = [_XMP + mark_packet() + _TRAILER]
    if note:
        own.append(_COMMENT + _sub_blocks(note.encode()))
    at = 1 + len(list(takewhile(lambda block: block.startswith(_APPLICATION), kept[1:])))
    return b"".join([*kept[:at], *own, *kept[at:]])


def _blocks(content: bytes) -> Iterator[bytes]:
    """The header with the palette, then each extension, each image and the end, as they are in the file."""
    if content[:4] != b"GIF8":
        raise ValueError("it is not a gif")
    at = 13 + _palette_bytes(content[10])
    yield content[:at]
    while content[at] != 0x3B:
        if content[at] == 0x21:
            end = _end_of_sub_blocks(content, at + 2)
        elif content[at] == 0x2C:
            end = _end_of_sub_blocks(content, at + 11 + _palette_bytes(content[at + 9]))
        else:
            raise ValueError(f"there is no block 0x{content[at]:02x}")
        yield content[at:end]
        at = end
    yield content[at:]


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _end_of_sub_blocks(content: bytes, at: int) -> int:
    while content[at]:
        at += content[at] + 1
    return at + 1


def _joined(block: bytes) -> bytes:
    """The bytes of a comment's sub-blocks."""
    parts, at = [], 2
    while block[at]:
        parts.append(block[at + 1 : at + 1 + block[at]])
        at += block[at] + 1
    return b"".join(parts)


def _sub_blocks(text: bytes) -> bytes:
    parts = (text[i : i + 255] for i in range(0, len(text), 255))
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
