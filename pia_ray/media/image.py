"""Bytes of any common picture to an upright sRGB image, and images to the size a model works at.

Damage that decoders pass over in silence is met here: hidden colour under alpha, 16-bit pictures that turn white, wide
gamuts taken for sRGB, sideways phone pictures, decompression bombs. Reads no files and no URLs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageColor,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from pia_ray.errors import BadParameter, ImageTooLarge, ImageTooSmall, UnsupportedImage
from pia_ray.media.byte_budget import ByteBudget
from pia_ray.media.colour import flatten, is_white_zero
from pia_ray.media.decoder_faults import ADVICE, DECODER_FAULTS, decoder_faults
from pia_ray.media.file_kinds import sniff
from pia_ray.media.png_colour import png_profile
from pia_ray.media.shrinking import decoding_bytes, draft, shrink_factor, shrunk

MAX_SIDE: Final = 16_384
MAX_ASPECT: Final = 20
MIN_SIDE: Final = 32
"""Sides in px, and the longest over the shortest side, that an input picture may have where nothing else is said."""

DECODING: Final = ByteBudget(2**30)
"""The memory of all pictures that this process decodes at one time, by estimate. A larger one is decoded alone."""


LEFT_OUT: Final = frozenset(
    {
        "animated_input",
        "multi_picture",
        "transparency_ignored",
        "icc_ignored",
        "cicp_ignored",
        "exif_ignored",
    }
)
"""The notes of a `DecodedImage` that say what of the file was not used."""


@dataclass(frozen=True)
class DecodedImage:
    """An input picture as people see it, and what was noticed on the way."""

    rgb: Image.Image
    """Mode RGB, sRGB, upright, without metadata; of a very large picture smaller than the original."""
    original_width: int
    original_height: int
    """Size of the upright picture before any fitting, in px."""
    sha256: str
    """Of the bytes, in hex."""
    notes: tuple[str, ...]
    """Any of: animated_input (its first frame is used), multi_picture (its first picture is used), alpha_composited,
    transparency_ignored, rescaled_16_bit, icc_converted (by a profile, or what a PNG says instead of one), icc_ignored,
    cicp_ignored, exif_ignored."""


def decode(
    content: bytes,
    *,
    background: str = "#ffffff",
    max_bytes: int = 50_000_000,
    max_pixels: int = 64_000_000,
    max_side: int = MAX_SIDE,
    max_aspect: float = MAX_ASPECT,
) -> DecodedImage:
    """The picture in these bytes: JPEG, PNG, WebP, HEIC, AVIF, GIF, TIFF or BMP, by the content and not by a name.

    Transparent parts show `background`. All caps are checked before any pixel is decoded. A picture whose shorter side
    is 4,096 px or more, and a panorama of more than 16 megapixels, is divided by a whole number first (`shrinking`).

    Raises:
        UnsupportedImage: not a picture, or of a format or mode that is not read.
        ImageTruncated: cut off or damaged.
        ImageTooLarge: over `max_bytes`, `max_pixels`, `max_side` or `max_aspect`.
        ImageTooSmall: a side under MIN_SIDE.
        BadParameter: `background` is not a colour.
    """
    colour = _colour(background)
    if len(content) > max_bytes:
        raise ImageTooLarge(f"The picture has {len(content):,} bytes; the limit is {max_bytes:,}.")
    kind = _readable_kind(content)
    notes: list[str] = []
    with decoder_faults(f"The {kind} picture"):
        # Not Image.open: its bomb check warns or raises, by a global setting, before the size can be checked.
        image = _OPENERS[kind](BytesIO(content))
        original = image.size
        _check_size(original, max_pixels, max_side=max_side, max_aspect=max_aspect)
        factor = shrink_factor(original)
        with DECODING.taken(decoding_bytes(image, factor)):
            _check_kind(image, content, notes)
            factor = draft(image, factor)
            image.load()
            if isinstance(image, PngImagePlugin.PngImageFile):
                image.info["icc_profile"] = png_profile(image, content, notes)
            turn = _turn_of(image, notes)
            pixels = shrunk(image, factor, notes, white_is_zero=is_white_zero(image)) if factor > 1 else image
            del image
            rgb = flatten(_turned(pixels, turn), colour, notes)
    width, height = original if turn not in _SIDEWAYS else original[::-1]
    return DecodedImage(
        rgb=rgb,
        original_width=width,
        original_height=height,
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
        with decoder_faults("The image"):
            image.load()
            return flatten(_turned(image, _turn_of(image, [])), colour, [])
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
    "a web page (HTML)": "A page about a picture is not the picture; give the picture itself, or its own address.",
    "a Git LFS pointer": "Fetch the file itself with git lfs pull.",
}


def _open_heic(stream: BytesIO) -> ImageFile.ImageFile:
    from pi_heif import HeifImageFile

    opened: ImageFile.ImageFile = HeifImageFile(stream)
    return opened


def _open_avif(stream: BytesIO) -> ImageFile.ImageFile:
    if not features.check("avif"):
        raise UnsupportedImage(f"This is AVIF, which this build of Pillow does not read. {ADVICE}")
    return AvifImagePlugin.AvifImageFile(stream)


_OPENERS: Final[Mapping[str, Callable[[BytesIO], ImageFile.ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "HEIC": _open_heic,
    "AVIF": _open_avif,
}


def _check_size(size: tuple[int, int], max_pixels: int, *, max_side: int, max_aspect: float) -> None:
    width, height = size
    if max(size) > max_side or width * height > max_pixels:
        raise ImageTooLarge(
            f"The picture is {width} x {height} px; the limits are {max_side} px a side and {max_pixels:,} px in all."
        )
    if min(size) < MIN_SIDE:
        raise ImageTooSmall(f"The picture is {width} x {height} px; each side must have {MIN_SIDE} px or more.")
    if max(size) > max_aspect * min(size):
        raise ImageTooLarge(
            f"The picture is {width} x {height} px; no side may be over {max_aspect:g} times the other."
        )


def _readable_kind(content: bytes) -> str:
    """The kind of a picture that is read.

    Raises:
        UnsupportedImage: it is something else.
    """
    kind = sniff(content)
    if kind not in _OPENERS:
        advice = _KIND_ADVICE.get(kind, ADVICE)
        raise UnsupportedImage(f"This is {kind}, not a picture that can be read. {advice}")
    return kind


def _check_kind(image: ImageFile.ImageFile, content: bytes, notes: list[str]) -> None:
    """Refuses a damaged file by checks of its format, before the pixels are decoded."""
    if isinstance(image, PngImagePlugin.PngImageFile):
        # Decoding skips the checksums of the pixels: of 2,400 PNGs with one flipped bit, 172 passed as pictures with
        # wrong pixels. verify reads them all, and uses its instance up.
        PngImagePlugin.PngImageFile(BytesIO(content)).verify()
        if content[24] == 16 and image.mode == "RGB" and image.info.pop("transparency", None) is not None:
            notes.append("transparency_ignored")  # Pillow keeps a 16-bit key colour for pixels it cuts to 8 bit
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_TIFF_SUBFILE_TYPE, 0) & 1:
        raise UnsupportedImage(f"The first page is a preview, as in camera raw files. {ADVICE}")
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        if "mpoffset" in image.info:
            notes.append("multi_picture")
    elif getattr(image, "is_animated", False):
        notes.append("animated_input")
        if isinstance(image, PngImagePlugin.PngImageFile) and image.default_image:
            image.seek(1)  # the default image is for programs that know no APNG, and may be a logo


_TIFF_SUBFILE_TYPE: Final = 254
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


_SIDEWAYS: Final = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def _turn_of(image: Image.Image, notes: list[str]) -> Image.Transpose | None:
    """The turn that the EXIF of a loaded image asks for; broken EXIF is ignored, and so is XMP, as browsers do."""
    try:
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            exif = Image.Exif()  # Pillow's own getexif takes the orientation from XMP where EXIF has none
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        orientation = exif.get(_EXIF_ORIENTATION)
    except DECODER_FAULTS:
        notes.append("exif_ignored")
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _colour(background: str) -> tuple[int, int, int]:
    try:
        red, green, blue = ImageColor.getrgb(background)[:3]
    except ValueError:
        raise BadParameter(f'"{background}" is not a colour; write it as #rrggbb or a name.', "background") from None
    return red, green, blue
