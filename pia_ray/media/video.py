"""Frames to mp4, gif, webp or webm with their provenance inside; probe, verify, thumbnails.

Owns av (mp4 and webm). Pillow quantises gif and compresses single webp frames; the two animated containers are written
here, since Pillow merges equal frames, and then neither their number nor their times are those that were asked for.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, cast

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
from PIL import Image

from pia_ray.config.knob_types import VideoFormat
from pia_ray.errors import VideoError
from pia_ray.media.animated_images import probe_animated_image, write_gif, write_webp
from pia_ray.media.marking import mark_packet, write_metadata
from pia_ray.media.video_facts import Frames, VideoFacts, canonical_json, frame_delays, read_provenance
from pia_ray.types import EncodedVideo

if TYPE_CHECKING:
    from av.video.stream import VideoStream


MIME: Final[Mapping[VideoFormat, str]] = MappingProxyType(
    {"mp4": "video/mp4", "gif": "image/gif", "webp": "image/webp", "webm": "video/webm"}
)
"""Content type of each format."""

THUMBNAIL_BYTES: Final = 150_000
"""Bytes above which `thumbnail` lowers its quality."""

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
"""The errors that the readers raise for a damaged file."""

_TICK_S: Final[Mapping[VideoFormat, float]] = {"mp4": 1e-3, "gif": 1e-2, "webp": 1e-3, "webm": 1e-3}
"""Steps in which each container counts time: a duration can be off by half of one, or by one where both ends round."""

_BT709 = (ColorPrimaries.BT709, ColorTrc.BT709, Colorspace.ITU709, ColorRange.MPEG)


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


def require_frames(frames: Frames) -> None:
    """Refuses what is not the frames of a video, uint8 [T, H, W, 3].

    Raises:
        VideoError: that is so.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VideoError(f"frames must be uint8 [T, H, W, 3] with T > 0, not {frames.dtype} {list(frames.shape)}")


def encode(
    frames: Frames,
    *,
    fps: int,
    format: VideoFormat,  # noqa: A002 - the field's word
    provenance: Mapping[str, Any],
    order: Sequence[int] | None = None,
) -> EncodedVideo:
    """One video file that says that it is generated.

    The same frames and provenance give the same bytes, on the same versions of the encoders.

    `frames` is uint8 [T, H, W, 3], RGB; they are neither scaled nor padded. The file shows them by their index in
    `order`, where one may stand several times; left out: each once. mp4 and webm hold 4:2:0 colour, so mp4
    takes even sides only; vp9 takes odd ones. gif counts in 1/100 s and webp in ms: delays that do not divide are
    spread so that the whole lasts right. `provenance` is JSON; large integers such as seeds belong in it as strings.
    Where it is empty, the file tells nothing of how it was made.

    Raises:
        VideoError: the format cannot hold the size or speed, or the encoder failed.
    """
    require_frames(frames)
    if format not in MIME:
        raise VideoError(f'there is no video format "{format}": use one of {", ".join(MIME)}')
    order = range(len(frames)) if order is None else order
    num_frames, (height, width) = len(order), frames.shape[1:3]
    require_encodable(format, width=width, height=height, fps=fps)
    try:
        if format == "gif":
            content = write_gif(frames, frame_delays(num_frames, fps, ticks=100), order=order)
        elif format == "webp":
            delays = frame_delays(num_frames, fps, ticks=1000)
            content = write_webp(frames, delays, order=order, quality=85, method=4)
        else:
            content = _libav(frames, order, fps, format)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"encoding {num_frames} frames of {width}x{height} as {format} failed: {error}") from error
    content = write_metadata(content, format, note=canonical_json(provenance) if provenance else "")
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
    """The facts of a video file. Every frame is decoded.

    Raises:
        VideoError: unreadable, damaged, cut off, or of a format that is not ours.
    """
    content = _read(video)
    video_format = _format_of(content)
    read = probe_animated_image if video_format in ("gif", "webp") else _probe_libav
    try:
        facts = read(content, video_format)
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


def thumbnail(frames: Frames, *, fps: int, max_edge: int = 256) -> bytes:
    """A small animated webp of the whole video, its long edge at most `max_edge`, mostly under 150 KB.

    It says that it is generated, as the video does, and nothing of how.

    Raises:
        VideoError: the encoder failed.
    """
    num_frames, height, width = frames.shape[:3]
    scale = min(1.0, max_edge / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Whole factors by means of squares: for 512 px an eighth of the CPU time of Lanczos alone.
    small = np.stack(
        [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS, reducing_gap=1.0)) for f in frames]
    )
    delays = frame_delays(num_frames, fps, ticks=1000)
    content = b""
    try:
        for quality in (75, 55, 30):
            content = write_webp(small, delays, order=range(num_frames), quality=quality, method=2)
            if len(content) <= THUMBNAIL_BYTES:
                break
    except OSError as error:
        raise VideoError(f"the thumbnail could not be written: {error}") from error
    return write_metadata(content, "webp", note="")


def spritesheet(frames: Frames, *, max_edge: int = 192) -> bytes:
    """All frames in one still webp, row by row from the top left, each with its long edge at most `max_edge`.

    The sheet has as many columns as rows, or one more; tiles after the last frame are black.

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
        sheet.save(out, "WEBP", quality=80, method=2, xmp=mark_packet())
    except OSError as error:
        raise VideoError(f"the spritesheet could not be written: {error}") from error
    return out.getvalue()


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


def _libav(frames: Frames, order: Sequence[int], fps: int, video_format: VideoFormat) -> bytes:
    num_frames, (height, width) = len(order), frames.shape[1:3]
    if video_format == "mp4":
        codec, options = "libx264", {"crf": "18", "preset": "medium", **_x264_instructions()}
        # The index goes before the frames, so that players start before the whole file is there. libav writes it
        # into room kept for it, of which `write_metadata` leaves none; a second pass over the file (faststart) would
        # need a file on disk. The index took 0.8 KB for 1 frame, 1.5 KB for 60 and 3.1 KB for 200. Times in
        # 1/(1000 fps) s make durations exact for every fps.
        room = 2048 + 32 * num_frames
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
        stream = cast("VideoStream", output.add_stream(codec, rate=fps, options={**options, "flags": "+bitexact"}))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.thread_count = 1  # workers encode several videos side by side; threads would also change the bytes
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = _BT709
        reformatter = VideoReformatter()  # one of each frame sets its tables up anew, half of the time at 64 px
        for i, index in enumerate(order):
            picture = reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[index]), format="rgb24"),
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
        return VideoFacts(video_format, num_frames, stream.width, stream.height, fps, read_provenance(note))


# --- gif and webp -----------------------------------------------------------------------------------------------------
