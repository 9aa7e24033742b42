"""Metadata in mp4: the note is the comment of the index, the mark an XMP box between index and frames.

Source: ISO/IEC 14496-12; XMP specification part 3; the QuickTime file format for the comment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pia_ray.media.marking.xmp import mark_packet

_XMP: Final = UUID("be7acfcb-97a9-42e8-9c71-999491e3afac").bytes
_C2PA: Final = UUID("d8fec3d6-1b0e-483c-9297-5828877ec481").bytes
_ON_THE_WAY: Final = (b"trak", b"mdia", b"minf", b"stbl")
"""The boxes between the index and its tables of chunks."""

_COMMENT: Final = (b"udta", b"meta", b"ilst", b"\xa9cmt", b"data")
_HANDLER: Final = b"\0\0\0\0\0\0\0\0mdirappl" + b"\0" * 9


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int
    body: int
    """Where its content begins."""
    end: int


def read(content: bytes) -> tuple[str, bytes]:
    """(The note, the XMP packet); empty where there is none."""
    note = packet = b""
    for box in _boxes(content, 0, len(content)):
        if box.kind == b"moov":
            note = _comment_in(content, box)
        elif content[box.body : box.body + 16] == _XMP and box.kind == b"uuid":
            packet = content[box.body + 16 : box.end]
    return note.decode("utf-8", "replace"), packet


def write(content: bytes, note: str) -> bytes:
    """The file with the mark and this note; room that was kept free for a longer index is given back."""
    boxes = [box for box in _boxes(content, 0, len(content)) if not _is_left_out(content, box)]
    kinds = [box.kind for box in boxes]
    if kinds.count(b"moov") != 1 or b"moof" in kinds:
        raise ValueError("it has not one index")
    index = bytearray(_index(content, boxes[kinds.index(b"moov")], note))
    parts: list[bytes | bytearray] = []
    moved: list[tuple[int, int, int]] = []
    """(Start, end, bytes by which it moves) of each box of the old file."""
    at = 0
    for box in boxes:
        moved.append((box.start, box.end, at - box.start))
        own: list[bytes | bytearray] = (
            [index, _box(b"uuid", _XMP + mark_packet())] if box.kind == b"moov" else [content[box.start : box.end]]
        )
        parts += own
        at += sum(map(len, own))
    _move_chunks(index, moved)
    return b"".join(parts)


def _is_left_out(content: bytes, box: _Box) -> bool:
    is_ours = box.kind == b"uuid" and content[box.body : box.body + 16] in (_XMP, _C2PA)
    return is_ours or box.kind in (b"free", b"skip")


def _index(content: bytes, index: _Box, note: str) -> bytes:
    """The index with this note in place of its metadata."""
    children = _boxes(content, index.body, index.end)
    kept = [content[child.start : child.end] for child in children if child.kind not in (b"udta", b"free")]
    if note:
        data = _box(b"data", b"\0\0\0\x01\0\0\0\0" + note.encode())  # 1: UTF-8
        items = _box(b"ilst", _box(b"\xa9cmt", data))
        kept.append(_box(b"udta", _box(b"meta", b"\0\0\0\0" + _box(b"hdlr", _HANDLER) + items)))
    return _box(b"moov", b"".join(kept))


def _comment_in(content: bytes, index: _Box) -> bytes:
    box = index
    for kind in _COMMENT:
        start = box.body + 4 if box.kind == b"meta" else box.body
        found = next((child for child in _boxes(content, start, box.end) if child.kind == kind), None)
        if found is None:
            return b""
        box = found
    return content[box.body + 8 : box.end]


def _move_chunks(index: bytearray, moved: list[tuple[int, int, int]]) -> None:
    """Adds to the place of every chunk the way that its box moved."""

    def shifted(place: int) -> int:
        return place + next((by for start, end, by in moved if start <= place < end), 0)

    def walk(start: int, end: int) -> None:
        for box in _boxes(bytes(index), start, end):
            if box.kind in _ON_THE_WAY:
                walk(box.body, box.end)
            elif box.kind in (b"stco", b"co64"):
                (count,) = struct.unpack_from(">I", index, box.body + 4)
                entries = f">{count}{'I' if box.kind == b'stco' else 'Q'}"
                places = struct.unpack_from(entries, index, box.body + 8)
                struct.pack_into(entries, index, box.body + 8, *map(shifted, places))

    walk(8, len(index))


def _boxes(content: bytes, at: int, end: int) -> Iterator[_Box]:
    while at + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, at)
        body = at + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, body)
            body += 8
        stop = end if size == 0 else at + size
        if stop > end or stop < body:
            raise ValueError("it is cut off")
        yield _Box(kind, at, body, stop)
        at = stop


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body
