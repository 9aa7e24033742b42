"""Pixels of any mode to sRGB without alpha, by their colour profile and over a background."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from pia_ray.errors import UnsupportedImage
from pia_ray.media.decoder_faults import ADVICE, DECODER_FAULTS

_TIFF_PHOTOMETRIC: Final = 262


def is_white_zero(image: Image.Image) -> bool:
    """Whether zero is white, which Pillow sees to up to 8 bits and not above."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0


def flatten(image: Image.Image, background: tuple[int, int, int], notes: list[str]) -> Image.Image:
    """A fresh sRGB image without alpha and metadata."""
    profile = image.info.get("icc_profile")
    colour, alpha = split(image, notes, white_is_zero=is_white_zero(image))
    rgb = _to_srgb(colour, profile, notes) if profile else colour.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes.append("alpha_composited")
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    if rgb is image:
        rgb = rgb.copy()
    rgb.info = {}  # else a WebP saved from it would carry the input's profile and orientation
    return rgb


def split(
    image: Image.Image, notes: list[str], *, white_is_zero: bool = False
) -> tuple[Image.Image, Image.Image | None]:
    """Colour in one of the modes L, RGB, CMYK, LAB or YCbCr, and alpha in mode L if the image has any.

    `white_is_zero` is what `is_white_zero` says of the file.
    """
    mode = image.mode
    if mode == "F":
        raise UnsupportedImage(
            "The picture has floating-point pixels, whose white is not defined. Save it as 8 or 16 bit."
        )
    if mode == "I" or mode.startswith("I;16"):
        notes.append("rescaled_16_bit")
        return _eight_bit(image, white_is_zero=white_is_zero)
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
    raise UnsupportedImage(f"The picture has pixels of mode {mode}, which are not read. {ADVICE}")


def _eight_bit(image: Image.Image, *, white_is_zero: bool) -> tuple[Image.Image, Image.Image | None]:
    """16-bit grey as 8-bit grey. Pillow's own conversion saturates it: every value over 255 becomes white."""
    values = np.asarray(image)  # [H, W], uint16 of either byte order, or int32
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise UnsupportedImage(
            f"The picture has integer pixels from {low} to {high}, whose white is not defined. Save it as 8 or 16 bit."
        )
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
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
    except (ImageCms.PyCMSError, *DECODER_FAULTS):
        pass  # said by the note below: a broken profile does not cost the picture
    notes.append("icc_ignored")
    return colour.convert("RGB")


_PROFILE_MODES: Final[Mapping[str, str]] = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
