"""Frames to mp4, gif, webp or webm with their provenance inside, and back: probe, verify, decode, thumbnails.

Owns av (mp4 and webm, with colour tags and metadata that imageio's writer does not reach) and imageio (reads frames of
every format). Pillow quantises gif and compresses single webp frames; the two animated containers are written here,
since Pillow merges equal frames, and then neither their number nor their times are those that were asked for.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, cast

import av
import imageio.v3 as iio
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image

from pia_ray.errors import VideoError
from pia_ray.params import VideoFormat
from pia_ray.types import EncodedVideo

if TYPE_CHECKING:
    from av.video.stream import VideoStream

Frames = np.ndarray[Any, np.dtype[np.uint8]]
"""uint8 [T, H, W, 3], RGB."""

MIME: Final[Mapping[VideoFormat, str]] = MappingProxyType(
    {"mp4": "video/mp4", "gif": "image/gif", "webp": "image/webp", "webm": "video/webm"}
)
"""Content type of each format."""

THUMBNAIL_BYTES: Final = 150_000
"""What `thumbnail` lowers its quality for."""

_DAMAGE = (
    av.FFmpegError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    struct.error,
)
"""What the readers raise for a damaged file."""

_TICK_S: Final[Mapping[VideoFormat, float]] = {"mp4": 1e-3, "gif": 1e-2, "webp": 1e-3, "webm": 1e-3}
"""Steps in which each container counts time: a duration can be off by half of one, or by one where both ends round."""

_BT709 = (ColorPrimaries.BT709, ColorTrc.BT709, Colorspace.ITU709, ColorRange.MPEG)


@dataclass(frozen=True)
class VideoFacts:
    """What a video file holds, by decoding it."""

    format: VideoFormat
    num_frames: int
    """Frames that were decoded, whatever the header says."""
    width: int
    height: int
    fps: float
    """Frames by duration; off the asked-for rate by as much as the container rounds times."""
    provenance: dict[str, Any]
    """What `encode` put in; empty for a file from elsewhere."""


def require_encodable(format: VideoFormat, *, width: int, height: int, fps: int) -> None:  # noqa: A002 - the field's word
    """Refuses before any work what `encode` would refuse after it.

    Raises:
        VideoError: the format cannot hold this size or speed; says which can.
    """
    if width < 1 or height < 1 or max(width, height) > 16383:
        raise VideoError(f"a video of {width}x{height} cannot be written: sides go from 1 to 16383")
    if fps < 1 or fps > 1000:
        raise VideoError(f"a video of {fps} frames/s cannot be written: choose 1 to 60")
    if format == "mp4" and (width % 2 or height % 2):
        even = f"{width + width % 2}x{height + height % 2}"
        raise VideoError(f"mp4 needs even sides and {width}x{height} is odd: use webm, webp or gif, or {even}")
    if format == "gif" and fps > 50:
        raise VideoError(f"gif cannot play {fps} frames/s (browsers slow down above 50): use mp4, webm or webp")


def encode(
    frames: Frames,
    *,
    fps: int,
    format: VideoFormat,  # noqa: A002 - the field's word
    provenance: Mapping[str, Any],
) -> EncodedVideo:
    """One video file. The same frames and provenance give the same bytes, on the same versions of the encoders.

    `frames` is uint8 [T, H, W, 3], RGB; they are neither scaled nor padded. mp4 and webm hold 4:2:0 colour, so mp4
    takes even sides only; vp9 takes odd ones. gif counts in 1/100 s and webp in ms: delays that do not divide are
    spread so that the whole lasts right. `provenance` is JSON; large integers such as seeds belong in it as strings.

    Raises:
        VideoError: the format cannot hold the size or speed, or the encoder failed.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VideoError(f"frames must be uint8 [T, H, W, 3] with T > 0, not {frames.dtype} {list(frames.shape)}")
    if format not in MIME:
        raise VideoError(f'there is no video format "{format}": use one of {", ".join(MIME)}')
    num_frames, height, width = frames.shape[:3]
    require_encodable(format, width=width, height=height, fps=fps)
    note = _canonical(provenance)
    try:
        if format == "gif":
            content = _gif(frames, _delays(num_frames, fps, ticks=100), note)
        elif format == "webp":
            content = _webp(frames, _delays(num_frames, fps, ticks=1000), note, quality=85, method=4)
        else:
            content = _libav(frames, fps, format, note)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"encoding {num_frames} frames of {width}x{height} as {format} failed: {error}") from error
    return EncodedVideo(
        content=content,
        format=format,
        num_frames=num_frames,
        width=width,
        height=height,
        fps=fps,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def probe(video: bytes | str | Path) -> VideoFacts:
    """What the file holds, found by decoding every frame.

    Raises:
        VideoError: unreadable, damaged, cut off, or of a format that is not ours.
    """
    content = _read(video)
    video_format = _format_of(content)
    look = _probe_image if video_format in ("gif", "webp") else _probe_libav
    try:
        facts = look(content, video_format)
        whole = _ends(content, video_format)
    except _DAMAGE as error:
        raise VideoError(f"the {video_format} is damaged: {error}") from error
    if not whole:
        raise VideoError(f"the {video_format} is cut off after {facts.num_frames} frames")
    return facts


def verify(video: EncodedVideo) -> None:
    """Decodes the file and holds it against what it should be.

    Raises:
        VideoError: it cannot be decoded, or frames, size or speed differ.
    """
    facts = probe(video.content)
    for name in ("format", "num_frames", "width", "height"):
        if getattr(facts, name) != getattr(video, name):
            raise VideoError(
                f"the finished {video.format} has {name} {getattr(facts, name)} instead of {getattr(video, name)}"
            )
    duration_s, wanted_s = facts.num_frames / facts.fps, video.num_frames / video.fps
    if abs(duration_s - wanted_s) > 1.01 * _TICK_S[video.format]:
        raise VideoError(f"the finished {video.format} lasts {duration_s:.3f} s instead of {wanted_s:.3f} s")


def decode_frames(video: bytes | Path) -> Frames:
    """All frames: uint8 [T, H, W, 3], RGB.

    Raises:
        VideoError: as `probe`.
    """
    content = _read(video)
    facts = probe(content)
    plugin, mode = ("pillow", {"mode": "RGB"}) if facts.format in ("gif", "webp") else ("pyav", {})
    try:
        return np.stack(list(iio.imiter(content, plugin=plugin, extension=f".{facts.format}", **mode)))
    except _DAMAGE as error:
        raise VideoError(f"the {facts.format} is damaged: {error}") from error


def thumbnail(frames: Frames, *, fps: int, max_edge: int = 256) -> bytes:
    """A small animated webp of the whole video, its long edge at most `max_edge`, mostly under 150 KB.

    Raises:
        VideoError: the encoder failed.
    """
    num_frames, height, width = frames.shape[:3]
    scale = min(1.0, max_edge / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in frames])
    delays = _delays(num_frames, fps, ticks=1000)
    content = b""
    try:
        for quality in (75, 55, 30):
            content = _webp(small, delays, "", quality=quality, method=2)
            if len(content) <= THUMBNAIL_BYTES:
                break
    except OSError as error:
        raise VideoError(f"the thumbnail could not be written: {error}") from error
    return content


def spritesheet(frames: Frames, *, max_edge: int = 192) -> bytes:
    """All frames in one still webp, row by row from the top left, each with its long edge at most `max_edge`.

    The sheet has as many columns as rows, or one more; places after the last frame are black.

    Raises:
        VideoError: the encoder failed.
    """
    num_frames, height, width = frames.shape[:3]
    scale = min(1.0, max_edge / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = math.ceil(math.sqrt(num_frames))
    sheet = Image.new("RGB", (columns * size[0], math.ceil(num_frames / columns) * size[1]))
    for index, frame in enumerate(frames):
        small = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
        sheet.paste(small, (index % columns * size[0], index // columns * size[1]))
    out = io.BytesIO()
    try:
        sheet.save(out, "WEBP", quality=80, method=2)
    except OSError as error:
        raise VideoError(f"the spritesheet could not be written: {error}") from error
    return out.getvalue()


def _canonical(provenance: Mapping[str, Any]) -> str:
    """One line of JSON. A lone surrogate, which no container holds, becomes the JSON escape that reads back as it."""
    text = json.dumps(dict(provenance), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _provenance(note: str | bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(note or "")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _delays(num_frames: int, fps: int, *, ticks: int) -> list[int]:
    """How long each frame stands, in 1/ticks s, so that every frame begins at the tick nearest to its time."""
    starts = [(2 * i * ticks + fps) // (2 * fps) for i in range(num_frames + 1)]
    return [max(1, after - start) for start, after in itertools.pairwise(starts)]


def _read(video: bytes | str | Path) -> bytes:
    if isinstance(video, bytes):
        return video
    try:
        return Path(video).read_bytes()
    except OSError as error:
        raise VideoError(f"cannot read {video}: {error.strerror or error}") from error


def _format_of(content: bytes) -> VideoFormat:
    if content[4:8] == b"ftyp":
        return "mp4"
    if content[:4] == b"GIF8":
        return "gif"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    if content[:4] == b"\x1a\x45\xdf\xa3":
        return "webm"
    raise VideoError("the file is empty or not an mp4, gif, webp or webm")


def _ends(content: bytes, video_format: VideoFormat) -> bool:
    """Whether the last byte that the file promises is there; readers show what they can of a file that is cut off."""
    if video_format == "gif":
        return content.endswith(b"\x3b")
    if video_format == "webp":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    if video_format == "webm":
        at, size = _ebml(content, 4)  # the header
        at, size = _ebml(content, at + size + 4)  # the segment, which is the rest
        return len(content) >= at + size
    return True  # the index of an mp4 counts its frames


def _ebml(content: bytes, at: int) -> tuple[int, int]:
    """A length in Matroska, as (where it ends, its value). Source: EBML, RFC 8794, section 4."""
    width = 9 - content[at].bit_length()
    return at + width, int.from_bytes(content[at : at + width], "big") & ((1 << 7 * width) - 1)


# --- mp4 and webm, by libav -------------------------------------------------------------------------------------------


def _libav(frames: Frames, fps: int, video_format: VideoFormat, note: str) -> bytes:
    num_frames, height, width = frames.shape[:3]
    if video_format == "mp4":
        codec, options = "libx264", {"crf": "18", "preset": "medium", **_x264_instructions()}
        # The index goes before the frames, so that players start before the whole file is there. libav writes it
        # into room kept for it; a second pass over the file (faststart) would need a file on disk. Without the note
        # the index took 0.8 KB for 1 frame, 1.5 KB for 60 and 3.1 KB for 200. Times in 1/(1000 fps) s make durations
        # exact for every fps.
        room = len(note.encode()) + 2048 + 32 * num_frames
        timescale = str(1000 * fps)
        container = {"moov_size": str(room), "movie_timescale": timescale, "video_track_timescale": timescale}
    else:
        # 16 noisy frames of 512x512, one thread of a shared 2-core machine: cpu-used 5 took 0.4 s for 79 KiB, 2 took
        # 0.7 s for 94 KiB, 1 took 1.0 s for 97 KiB. Quality at those sizes was not compared.
        codec, options = "libvpx-vp9", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "5"}
        container = {}
    file = io.BytesIO()
    # bitexact leaves out dates, random ids and versions.
    with av.open(file, "w", format=video_format, options={"fflags": "+bitexact", **container}) as output:
        output.metadata["comment"] = note
        stream = cast("VideoStream", output.add_stream(codec, rate=fps, options={**options, "flags": "+bitexact"}))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.thread_count = 1  # workers encode several videos side by side; threads would also change the bytes
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = _BT709
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                dst_colorspace=Colorspace.ITU709,
                interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
            )
            picture.pts, picture.time_base = i, Fraction(1, fps)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return file.getvalue()


@cache
def _x264_instructions() -> dict[str, str]:
    """Keeps x264 from its AVX-512 code.

    For the macroblock tree that takes in memory that nobody wrote, unless frames are 256 or 512 px wide: one video came
    out in ten versions. Without the tree files would be right, too, and 1.4 to 2.7 times as large.
    """
    try:
        has_it = "avx512" in Path("/proc/cpuinfo").read_text()
    except OSError:
        has_it = False
    return {"x264-params": "asm=AVX2,BMI2,FMA3"} if has_it else {}


def _probe_libav(content: bytes, video_format: VideoFormat) -> VideoFacts:
    with av.open(io.BytesIO(content), "r") as container:
        if not container.streams.video:
            raise VideoError(f"the {video_format} holds no video")
        stream = container.streams.video[0]
        num_frames = sum(1 for _ in container.decode(stream))
        if not num_frames or (stream.frames and stream.frames != num_frames):
            raise VideoError(f"the {video_format} is cut off: {num_frames} of {stream.frames or 'its'} frames decode")
        if stream.duration and stream.time_base:
            fps = float(num_frames / (stream.duration * stream.time_base))
        elif container.duration:
            fps = num_frames * av.time_base / container.duration
        else:
            raise VideoError(f"the {video_format} does not say how long it lasts")
        note = {key.lower(): value for key, value in container.metadata.items()}.get("comment")
        return VideoFacts(video_format, num_frames, stream.width, stream.height, fps, _provenance(note))


# --- gif and webp -----------------------------------------------------------------------------------------------------


def _probe_image(content: bytes, video_format: VideoFormat) -> VideoFacts:
    with Image.open(io.BytesIO(content), formats=[video_format]) as image:
        num_frames = getattr(image, "n_frames", 1)
        note = image.info.get("comment") if video_format == "gif" else _xmp_note(image.info.get("xmp", b""))
        duration_ms = 0.0
        for i in range(num_frames):
            image.seek(i)
            image.load()
            duration_ms += image.info.get("duration", 0)
        if not duration_ms:
            raise VideoError(f"the {video_format} does not say how long it lasts")
        return VideoFacts(
            video_format, num_frames, image.width, image.height, num_frames * 1000 / duration_ms, _provenance(note)
        )


def _gif(frames: Frames, delays: Sequence[int], note: str) -> bytes:
    """Source: GIF89a specification, CompuServe 1990. One palette for all frames, so that still parts do not flicker."""
    height, width = frames.shape[1:3]
    palette = _palette(frames)
    colours = bytes(palette.getpalette("RGB") or b"")[:768].ljust(768, b"\0")
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    parts = [b"GIF89a", size, b"\xf7\0\0", colours]  # 256 colours
    parts += [b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"]  # loops for ever
    parts += [b"\x21\xfe", *_sub_blocks(note.encode()), b"\0"]
    for frame, delay in zip(frames, delays, strict=True):
        indices = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        parts += [b"\x21\xf9\x04\x04", delay.to_bytes(2, "little"), b"\0\0"]  # leave the frame in place
        parts += [b"\x2c\0\0\0\0", size, b"\0", _lzw(np.asarray(indices))]
    return b"".join([*parts, b"\x3b"])


def _palette(frames: Frames) -> Image.Image:
    """256 colours for all frames, from some 20,000 of their pixels.

    On 16 noisy frames of 512x512, with error diffusion: squared error 96, the palette made in 0.3 s; median cut 243 in
    0.1 s; libav's palettegen and paletteuse 155, in 8.6 s for the whole gif. Shared 2-core machine, one run each.
    """
    step = max(1, round((frames[..., 0].size / 20_000) ** 0.5))
    pixels = frames[:, step // 2 :: step, step // 2 :: step].reshape(1, -1, 3)
    if not pixels.size:
        pixels = frames.reshape(1, -1, 3)
    return Image.fromarray(pixels).quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)


def _lzw(indices: np.ndarray[Any, Any]) -> bytes:
    """The compressed pixels of one frame, taken out of a gif of that frame alone."""
    file = io.BytesIO()
    Image.fromarray(indices).save(file, "GIF", optimize=False, interlace=0)
    content = file.getvalue()
    at = 13 + (3 << (content[10] & 7) + 1)
    while content[at] == 0x21:  # extensions, in sub-blocks
        at += 2
        while content[at]:
            at += content[at] + 1
        at += 1
    flags = content[at + 9]
    return content[at + 10 + ((3 << (flags & 7) + 1) if flags & 0x80 else 0) : -1]


def _sub_blocks(content: bytes) -> list[bytes]:
    return [bytes([len(part := content[i : i + 255])]) + part for i in range(0, len(content), 255)]


def _webp(frames: Frames, delays: Sequence[int], note: str, *, quality: int, method: int) -> bytes:
    """Source: WebP container specification, Google. Every frame is whole, so none depends on another or is merged."""
    height, width = frames.shape[1:3]
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    has_xmp = 0x04 if note else 0
    chunks = [
        _chunk(b"VP8X", bytes([0x02 | has_xmp, 0, 0, 0]) + sides),
        _chunk(b"ANIM", b"\xff\xff\xff\xff\0\0"),  # white below; loops for ever
    ]
    for frame, delay in zip(frames, delays, strict=True):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "WEBP", quality=quality, method=method)
        head = b"\0\0\0\0\0\0" + sides + delay.to_bytes(3, "little") + b"\x02"  # at 0, 0; replaces what was there
        chunks.append(_chunk(b"ANMF", head + file.getvalue()[12:]))
    if note:
        chunks.append(_chunk(b"XMP ", _xmp(note)))
    return _chunk(b"RIFF", b"WEBP" + b"".join(chunks))


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)


_XMP_START: Final = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
    '<rdf:li xml:lang="x-default">'
)
_XMP_END: Final = "</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"


def _xmp(note: str) -> bytes:
    text = note.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{_XMP_START}{text}{_XMP_END}".encode()


def _xmp_note(xmp: bytes) -> str:
    """The note in a packet of ours, by its exact frame: no XML parser is fed with a file from elsewhere."""
    found = re.search(re.escape(_XMP_START) + "(.*?)" + re.escape(_XMP_END), xmp.decode("utf-8", "replace"), re.DOTALL)
    return found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") if found else ""
