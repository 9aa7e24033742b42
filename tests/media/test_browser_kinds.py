"""Pictures as browsers show them: HEIC and AVIF, what a PNG says of its colour, the first frame of an APNG."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from pia_ray.errors import ImageTooLarge, ImageTruncated
from pia_ray.media.image import decode
from pia_ray.testing.catalogs import draw_picture

SIZE = (64, 48)
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this build of Pillow has no AVIF")
PHOTO = Image.open(BytesIO(draw_picture(SIZE, seed=1, extension="png"))).convert("RGB")


def written(kind: str, image: Image.Image = PHOTO, **how: Any) -> bytes:
    out = BytesIO()
    if kind == "HEIC":
        import pillow_heif

        pillow_heif.from_pillow(image).save(out, quality=-1, **how)
    else:
        image.save(out, kind, **how)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["HEIC", pytest.param("AVIF", marks=needs_avif)])
def test_what_phones_and_cdns_write_is_read(kind: str) -> None:
    found = decode(written(kind)).rgb
    assert found.size == SIZE
    assert np.abs(np.asarray(found, np.int16) - np.asarray(PHOTO, np.int16)).mean() < 6


@pytest.mark.parametrize("kind", ["HEIC", pytest.param("AVIF", marks=needs_avif)])
def test_transparent_ones_show_the_background(kind: str) -> None:
    image = Image.new("RGBA", SIZE, (0, 0, 255, 0))
    found = decode(written(kind, image), background="#ff0000").rgb.getpixel((30, 20))
    assert np.abs(np.subtract(found, (255, 0, 0))).max() < 12


@pytest.mark.parametrize("kind", ["HEIC", pytest.param("AVIF", marks=needs_avif)])
def test_damaged_ones_are_truncated_and_large_ones_refused(kind: str) -> None:
    content = written(kind)
    with pytest.raises(ImageTruncated):
        decode(content[: len(content) // 2])
    with pytest.raises(ImageTooLarge):
        decode(content, max_pixels=64 * 48 - 1)


def test_a_turned_heic_is_upright_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # as phones write it, beside the turn of the container
    found = decode(written("HEIC", exif=exif.tobytes()))
    assert (found.original_width, found.original_height) == (48, 64)


@needs_avif
def test_an_avif_under_the_common_brand_is_known_by_its_others() -> None:
    content = bytearray(written("AVIF"))
    content[8:12] = b"mif1"
    assert decode(bytes(content)).rgb.size == SIZE


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(image: Image.Image, *chunks: bytes) -> bytes:
    """A PNG with these chunks after its header."""
    content = written("PNG", image)
    return content[:33] + b"".join(chunks) + content[33:]


def gamma(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(value * 100_000)))


P3 = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
GREY = Image.new("RGB", SIZE, (128, 128, 128))
GREEN = Image.new("RGB", SIZE, (60, 200, 60))


def shown(content: bytes) -> tuple[int, ...]:
    pixel = decode(content).rgb.getpixel((5, 5))
    assert isinstance(pixel, tuple)
    return tuple(int(value) for value in pixel)


@pytest.mark.parametrize(
    ("content", "colour"),
    [
        (png(GREY, gamma(1.0)), (188, 188, 188)),  # linear light
        (png(GREY.convert("L"), gamma(1.0)), (188, 188, 188)),
        (png(GREY, gamma(0.45455)), (128, 128, 128)),
        (png(GREY, gamma(1.0), chunk(b"sRGB", b"\0")), (128, 128, 128)),  # sRGB goes first
        (png(GREY, chunk(b"cICP", bytes((1, 8, 0, 1)))), (188, 188, 188)),
        (png(GREY, chunk(b"cICP", bytes((1, 13, 0, 1))), gamma(1.0)), (128, 128, 128)),  # cICP goes first
        (png(GREEN), (60, 200, 60)),
        (png(GREEN, gamma(0.45455), P3), (0, 205, 0)),  # greener than sRGB can show
        (png(GREEN, chunk(b"cICP", bytes((12, 13, 0, 1)))), (0, 203, 11)),
        (png(GREEN, P3), (60, 200, 60)),  # alone it says nothing
    ],
    ids=range(10),
)
def test_colour_that_a_png_states_is_shown_as_browsers_show_it(content: bytes, colour: tuple[int, ...]) -> None:
    assert np.abs(np.subtract(shown(content), colour)).max() <= 6


@pytest.mark.parametrize("codes", [(9, 16, 0, 1), (9, 18, 0, 1), (1, 13, 1, 1), (250, 13, 0, 1)])
def test_colour_beyond_white_or_unknown_is_noted(codes: tuple[int, ...]) -> None:
    found = decode(png(GREY, chunk(b"cICP", bytes(codes))))
    assert found.notes == ("cicp_ignored",)


@pytest.mark.parametrize("damaged", [gamma(0), chunk(b"cHRM", bytes(32)), chunk(b"gAMA", b"\xff" * 4)])
def test_colour_that_cannot_be_is_ignored(damaged: bytes) -> None:
    assert decode(png(GREY, gamma(0.7), damaged)).rgb.size == SIZE


def test_the_first_frame_of_an_apng_is_shown_and_not_its_default_image() -> None:
    red, green, blue = (Image.new("RGB", SIZE, colour) for colour in ("red", "lime", "blue"))
    alone = written("PNG", red, save_all=True, append_images=[green, blue], default_image=True)
    assert shown(alone) == (0, 255, 0)
    first = written("PNG", red, save_all=True, append_images=[green, blue])
    assert shown(first) == (255, 0, 0)
