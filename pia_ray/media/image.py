"""Bytes of any common picture to an upright sRGB image, and images to the size a model works at.

Damage that decoders pass over in silence is met here: hidden colour under alpha, 16-bit pictures that turn white, wide
gamuts taken for sRGB, sideways phone pictures, decompression bombs. Reads no files and no URLs.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageColor,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pia_ray.errors import BadParameter, ImageTooLarge, ImageTooSmall, ImageTruncated, UnsupportedImage
from pia_ray.media.file_kinds import sniff

MAX_SIDE: Final = 16_384
MAX_ASPECT: Final = 20
MIN_SIDE: Final = 32
"""Sides in px, and the longest over the shortest side, that an input picture may have."""

_ADVICE: Final = "Save it as JPEG, PNG or WebP."


@dataclass(frozen=True)
class DecodedImage:
    """An input picture as people see it, and what was noticed on the way."""

    rgb: Image.Image
    """Mode RGB, sRGB, upright, without metadata."""
    original_width: int
    original_height: int
    """Size of the upright picture before any fitting, in px."""
    sha256: str
    """Of the bytes, in hex."""
    notes: tuple[str, ...]
    """Any of: animated_input (its first frame is used), multi_picture (its first picture is used), alpha_composited,
    transparency_ignored, rescaled_16_bit, icc_converted, icc_ignored, exif_ignored."""


def decode(
    content: bytes, *, background: str = "#ffffff", max_bytes: int = 50_000_000, max_pixels: int = 64_000_000
) -> DecodedImage:
    """The picture in these bytes: JPEG, PNG, WebP, GIF, TIFF or BMP, by the content and not by a name.

    Transparent parts show `background`. All caps are checked before any pixel is decoded.

    Raises:
        UnsupportedImage: not a picture, or of a format or mode that is not read.
        ImageTruncated: cut off or damaged.
        ImageTooLarge: over `max_bytes`, `max_pixels`, MAX_SIDE or MAX_ASPECT.
        ImageTooSmall: a side under MIN_SIDE.
        BadParameter: `background` is not a colour.
    """
    colour = _colour(background)
    if len(content) > max_bytes:
        raise ImageTooLarge(f"The picture has {len(content):,} bytes; the limit is {max_bytes:,}.")
    kind = sniff(content)
    if kind not in _OPENERS:
        advice = _KIND_ADVICE.get(kind, _ADVICE)
        raise UnsupportedImage(f"This is {kind}, not a picture that can be read. {advice}")
    notes: list[str] = []
    with _decoder_faults(f"The {kind} picture"):
        # Not Image.open: its bomb check warns or raises, by a global setting, before the size can be checked.
        image = _OPENERS[kind](BytesIO(content))
        _check_size(image.size, max_pixels)
        _check_kind(image, content, notes)
        image.load()
        upright = _upright(image, notes)
        rgb = _flatten(upright, colour, notes)
    return DecodedImage(
        rgb=rgb,
        original_width=rgb.width,
        original_height=rgb.height,
        sha256=hashlib.sha256(content).hexdigest(),
        notes=tuple(notes),
    )


def as_rgb(image: Image.Image | np.ndarray[Any, Any], *, background: str = "#ffffff") -> Image.Image:
    """An RGB copy of what Python code hands in: an upright PIL image of any mode `decode` takes, or a uint8 array.

    Arrays are [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA. Orientation, colour profile and transparency of a PIL image
    are treated as in `decode`.

    Raises:
        BadParameter: anything else.
        ImageError: a lazily opened PIL image that turns out to be damaged.
    """
    colour = _colour(background)
    if isinstance(image, np.ndarray):
        layout = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not layout or 0 in image.shape:
            raise BadParameter(
                f"image is an array of {image.dtype} {list(image.shape)}; it must be uint8 [H, W], [H, W, 3] or "
                "[H, W, 4] with values 0 to 255.",
                "image",
            )
        image = Image.fromarray(np.ascontiguousarray(image))
    elif not isinstance(image, Image.Image):
        raise BadParameter(f"image must be a PIL image or a numpy array, not {type(image).__name__}.", "image")
    if 0 in image.size:
        raise BadParameter("image has no pixels.", "image")
    try:
        with _decoder_faults("The image"):
            image.load()
            return _flatten(_upright(image, []), colour, [])
    except UnsupportedImage as error:
        raise BadParameter(f"image: {error}", "image") from None


def thumbnail(image: Image.Image, *, max_edge: int = 256) -> bytes:
    """A small WebP of an RGB image; its longer side is at most `max_edge` px."""
    small = image.copy()
    small.thumbnail((max_edge, max_edge), Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = BytesIO()
    small.save(out, "WEBP", quality=80, method=4)
    return out.getvalue()


_KIND_ADVICE: Final[Mapping[str, str]] = {
    "an empty file": "Write it again; an upload may have broken off.",
    "a web page (HTML)": "The reference leads to a page about the picture; give the address of the picture itself.",
    "a Git LFS pointer": "Fetch the file itself with git lfs pull.",
}

_OPENERS: Final[Mapping[str, Callable[[BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}

# Pillow's decoders let all of these out for damaged files, by no rule: over its own 1,067 test images OSError 96 times,
# ValueError 9, NotImplementedError 3, TypeError 2, SyntaxError 1, and the others from fuzzing. Warning stands here for
# programs that turn warnings into errors. A bug of ours in the lines they guard would be taken for a bad picture, so
# those lines are few.
_DECODER_FAULTS: Final = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    Warning,
    struct.error,
    zlib.error,
)
_UNSUPPORTED_WORDS: Final = (
    "unsupported",
    "not supported",
    "not available",
    "cannot handle",
    "unknown pixel",
    "unknown d",
)


@contextmanager
def _decoder_faults(what: str) -> Iterator[None]:
    """Turns what Pillow raises on bad input into an ImageError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(f"{what} declares far more pixels than it should. {_ADVICE}") from None
    except MemoryError as error:
        raise ImageTooLarge(f"{what} does not fit into memory while it is decoded. Make it smaller.") from error
    except _DECODER_FAULTS as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        if isinstance(error, NotImplementedError) or any(word in reason.lower() for word in _UNSUPPORTED_WORDS):
            raise UnsupportedImage(f"{what} uses a variant that is not read ({reason}). {_ADVICE}") from error
        raise ImageTruncated(f"{what} is cut off or damaged ({reason}). Upload it again.") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if max(size) > MAX_SIDE or width * height > max_pixels:
        raise ImageTooLarge(
            f"The picture is {width} x {height} px; the limits are {MAX_SIDE} px a side and {max_pixels:,} px in all."
        )
    if min(size) < MIN_SIDE:
        raise ImageTooSmall(f"The picture is {width} x {height} px; each side must have {MIN_SIDE} px or more.")
    if max(size) > MAX_ASPECT * min(size):
        raise ImageTooLarge(f"The picture is {width} x {height} px; no side may be over {MAX_ASPECT} times the other.")


def _check_kind(image: ImageFile.ImageFile, content: bytes, notes: list[str]) -> None:
    """Refuses a damaged file by checks of its format, before the pixels are decoded."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        # Decoding skips the checksums of the pixels: of 2,400 PNGs with one flipped bit, 172 passed as pictures with
        # wrong pixels. verify reads them all, and uses its instance up.
        PngImagePlugin.PngImageFile(BytesIO(content)).verify()
        if content[24] == 16 and image.mode == "RGB" and image.info.pop("transparency", None) is not None:
            notes.append("transparency_ignored")  # Pillow keeps a 16-bit key colour for pixels it cuts to 8 bit
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_TIFF_SUBFILE_TYPE, 0) & 1:
        raise UnsupportedImage(f"The first page is a preview, as in camera raw files. {_ADVICE}")
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        if "mpoffset" in image.info:
            notes.append("multi_picture")
    elif getattr(image, "is_animated", False):
        notes.append("animated_input")


_TIFF_SUBFILE_TYPE: Final = 254
_TIFF_PHOTOMETRIC: Final = 262
_EXIF_ORIENTATION: Final = 0x0112
_TURNS: Final[Mapping[int, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """The loaded image turned as its EXIF orientation says; broken EXIF is ignored."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except _DECODER_FAULTS:
        notes.append("exif_ignored")
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _flatten(image: Image.Image, background: tuple[int, int, int], notes: list[str]) -> Image.Image:
    """A fresh sRGB image without alpha and metadata."""
    profile = image.info.get("icc_profile")
    colour, alpha = _split(image, notes)
    rgb = _to_srgb(colour, profile, notes) if profile else colour.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes.append("alpha_composited")
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    if rgb is image:
        rgb = rgb.copy()
    rgb.info = {}  # else a WebP saved from it would carry the input's profile and orientation
    return rgb


def _split(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Colour in one of the modes L, RGB, CMYK, LAB or YCbCr, and alpha in mode L if the image has any."""
    mode = image.mode
    if mode == "F":
        raise UnsupportedImage(
            "The picture has floating-point pixels, whose white is not defined. Save it as 8 or 16 bit."
        )
    if mode == "I" or mode.startswith("I;16"):
        notes.append("rescaled_16_bit")
        return _eight_bit(image)
    if mode in ("LA", "La"):
        grey = image.convert("LA")
        return grey.getchannel("L"), grey.getchannel("A")
    if mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if mode in ("RGB", "CMYK", "LAB", "YCbCr", "L"):
        return image, None
    if mode == "1":
        return image.convert("L"), None
    if mode in ("P", "RGBX", "HSV"):
        return image.convert("RGB"), None
    raise UnsupportedImage(f"The picture has pixels of mode {mode}, which are not read. {_ADVICE}")


def _eight_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey as 8-bit grey. Pillow's own conversion saturates it: every value over 255 becomes white."""
    values = np.asarray(image)  # [H, W], uint16 of either byte order, or int32
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise UnsupportedImage(
            f"The picture has integer pixels from {low} to {high}, whose white is not defined. Save it as 8 or 16 bit."
        )
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
        grey = 255 - grey  # zero is white, which Pillow sees to up to 8 bits and not above
    key = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    return Image.fromarray(grey), alpha


def _to_srgb(colour: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """`colour` converted from its ICC profile, or as it is where the profile is broken or of another kind."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = (source.profile.xcolor_space or "").strip()
        if space == "RGB" and colour.mode in ("L", "YCbCr"):
            colour = colour.convert("RGB")
        if _PROFILE_MODES.get(space) == colour.mode:
            transform = ImageCms.buildTransform(
                source,
                ImageCms.createProfile("sRGB"),
                colour.mode,
                "RGB",
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            converted = ImageCms.applyTransform(colour, transform)
            if converted is not None:
                notes.append("icc_converted")
                return converted
    except (ImageCms.PyCMSError, *_DECODER_FAULTS):
        pass  # said by the note below: a broken profile does not cost the picture
    notes.append("icc_ignored")
    return colour.convert("RGB")


_PROFILE_MODES: Final[Mapping[str, str]] = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}


def _colour(background: str) -> tuple[int, int, int]:
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError:
        raise BadParameter(f'"{background}" is not a colour; write it as #rrggbb or a name.', "background") from None
    return red, green, blue
