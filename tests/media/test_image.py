"""Pictures of every format and mode come out upright, in sRGB and undamaged, or as one of the image errors."""

import hashlib
import random
import struct
import zlib
from io import BytesIO
from threading import Thread

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageFile, PngImagePlugin, TiffImagePlugin

from pia_ray.errors import BadParameter, ImageError, ImageTooLarge, ImageTooSmall, ImageTruncated, UnsupportedImage
from pia_ray.media.image import as_rgb, decode, thumbnail
from pia_ray.media.sizes import buckets, choose_size, fit

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
SIZE = (64, 48)


def saved(image: Image.Image, format: str, **options) -> bytes:  # noqa: A002 - Pillow's word
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def plain(mode: str, colour) -> Image.Image:
    return Image.new(mode, SIZE, colour)


def near(actual, expected, tolerance: int = 3) -> bool:
    return len(actual) == len(expected) and all(abs(a - b) <= tolerance for a, b in zip(actual, expected, strict=True))


def middle(content: bytes, **options) -> tuple[int, int, int]:
    rgb = decode(content, **options).rgb
    assert rgb.mode == "RGB"
    return rgb.getpixel((rgb.width // 2, rgb.height // 2))


def palette(mode: str = "P") -> Image.Image:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 255, 255, 0, 0] + [0] * 762)
    return image if mode == "P" else image.convert("RGBA").quantize(4).convert(mode)


PICTURES = {
    "JPEG RGB": (saved(plain("RGB", RED), "JPEG"), (254, 0, 0)),
    "JPEG L": (saved(plain("L", 128), "JPEG"), (128, 128, 128)),
    "JPEG CMYK, red is red": (saved(plain("CMYK", (0, 255, 255, 0)), "JPEG"), RED),
    "JPEG CMYK, cyan is cyan": (saved(plain("CMYK", (255, 0, 0, 0)), "JPEG"), (0, 255, 255)),
    "JPEG CMYK, black is black": (saved(plain("CMYK", (0, 0, 0, 255)), "JPEG"), BLACK),
    "JPEG progressive": (saved(plain("RGB", BLUE), "JPEG", progressive=True), (0, 0, 254)),
    "PNG RGB": (saved(plain("RGB", GREEN), "PNG"), GREEN),
    "PNG 1": (saved(plain("1", 1), "PNG"), WHITE),
    "PNG L": (saved(plain("L", 77), "PNG"), (77, 77, 77)),
    "PNG LA": (saved(plain("LA", (77, 255)), "PNG"), (77, 77, 77)),
    "PNG P": (saved(palette(), "PNG"), RED),
    "PNG P with an opaque tRNS": (saved(palette(), "PNG", transparency=0), RED),
    "PNG P whose colour is the tRNS one": (saved(palette(), "PNG", transparency=1), WHITE),
    "PNG RGB with a tRNS colour": (saved(plain("RGB", RED), "PNG", transparency=RED), WHITE),
    "PNG L with a tRNS grey": (saved(plain("L", 9), "PNG", transparency=9), WHITE),
    "PNG RGBA opaque": (saved(plain("RGBA", (*BLUE, 255)), "PNG"), BLUE),
    "PNG RGBA half": (saved(plain("RGBA", (*BLACK, 128)), "PNG"), (127, 127, 127)),
    "PNG RGBA, colour under alpha 0 stays hidden": (saved(plain("RGBA", (*RED, 0)), "PNG"), WHITE),
    "PNG 16-bit mid grey": (saved(plain("I;16", 32_768), "PNG"), (128, 128, 128)),
    "PNG 16-bit dark grey": (saved(plain("I;16", 257 * 10), "PNG"), (10, 10, 10)),
    "PNG 16-bit white": (saved(plain("I;16", 65_535), "PNG"), WHITE),
    "WebP lossless": (saved(plain("RGB", RED), "WEBP", lossless=True), RED),
    "WebP lossy": (saved(plain("RGB", RED), "WEBP"), (254, 0, 0)),
    "WebP RGBA hidden": (saved(plain("RGBA", (*RED, 0)), "WEBP", lossless=True, exact=True), WHITE),
    "GIF": (saved(palette(), "GIF"), RED),
    "GIF transparent": (saved(palette(), "GIF", transparency=1), WHITE),
    "BMP RGB": (saved(plain("RGB", GREEN), "BMP"), GREEN),
    "BMP P": (saved(palette(), "BMP"), RED),
    "BMP 1": (saved(plain("1", 1), "BMP"), WHITE),
    "TIFF RGB": (saved(plain("RGB", GREEN), "TIFF"), GREEN),
    "TIFF 1": (saved(plain("1", 0), "TIFF"), BLACK),
    "TIFF P": (saved(palette(), "TIFF"), RED),
    "TIFF RGBA": (saved(plain("RGBA", (*RED, 0)), "TIFF"), WHITE),
    "TIFF LA": (saved(plain("LA", (3, 0)), "TIFF"), WHITE),
    "TIFF PA": (saved(plain("RGBA", (*RED, 255)).quantize(4).convert("PA"), "TIFF"), RED),
    "TIFF CMYK": (saved(plain("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "TIFF YCbCr": (saved(plain("RGB", RED).convert("YCbCr"), "TIFF"), RED),
    "TIFF LAB": (saved(plain("LAB", (255, 128, 128)), "TIFF"), WHITE),
    "TIFF LZW": (saved(plain("RGB", BLUE), "TIFF", compression="tiff_lzw"), BLUE),
    "TIFF JPEG": (saved(plain("RGB", BLUE), "TIFF", compression="jpeg"), (0, 0, 254)),
    "TIFF I;16": (saved(plain("I;16", 32_768), "TIFF"), (128, 128, 128)),
    "TIFF I;16B": (saved(plain("I;16B", 257 * 200), "TIFF"), (200, 200, 200)),
    "TIFF I": (saved(plain("I", 257 * 50), "TIFF"), (50, 50, 50)),
    "TIFF I;16 where zero is white": (
        saved(plain("I;16", 257 * 55), "TIFF", tiffinfo={262: 0}),
        (200, 200, 200),
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_each_format_and_mode_keeps_its_colour(name):
    content, expected = PICTURES[name]
    assert near(middle(content), expected), middle(content)


def test_facts_about_the_input_are_reported():
    content = saved(plain("RGB", RED), "PNG")
    picture = decode(content)
    assert (picture.original_width, picture.original_height) == SIZE == picture.rgb.size
    assert picture.sha256 == hashlib.sha256(content).hexdigest()
    assert picture.notes == ()


def test_transparent_parts_show_the_background_that_was_asked_for():
    content = saved(plain("RGBA", (*RED, 0)), "PNG")
    assert middle(content, background="#102030") == (16, 32, 48)
    assert decode(content).notes == ("alpha_composited",)
    assert decode(saved(plain("RGBA", (*RED, 255)), "PNG")).notes == ()
    with pytest.raises(BadParameter) as caught:
        decode(content, background="bluish")
    assert caught.value.field == "background"


def test_a_key_colour_of_a_16_bit_grey_png_is_transparent():
    assert middle(png(SIZE, 16, 0, struct.pack(">H", 500) * 64, trns=struct.pack(">H", 500))) == WHITE
    assert middle(png(SIZE, 16, 0, struct.pack(">H", 500) * 64, trns=struct.pack(">H", 501))) == (2, 2, 2)


def test_a_key_colour_of_a_16_bit_rgb_png_does_not_hide_its_neighbours():
    row = struct.pack(">HHH", 5, 5, 5) * 64
    picture = decode(png(SIZE, 16, 2, row, trns=struct.pack(">HHH", 0, 0, 0)))
    assert picture.rgb.getpixel((5, 5)) == BLACK
    assert picture.notes == ("transparency_ignored",)


def test_16_bit_pictures_are_scaled_and_not_saturated():
    ramp = np.linspace(0, 65_535, 64 * 48).astype(np.uint16).reshape(48, 64)
    for format_ in ("PNG", "TIFF"):
        picture = decode(saved(Image.fromarray(ramp), format_))
        grey = np.asarray(picture.rgb)[..., 0].astype(float)
        assert np.abs(grey - ramp / 257).max() <= 0.51
        assert picture.notes == ("rescaled_16_bit",)


@pytest.mark.parametrize(
    "frames", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})], ids=lambda pair: pair[0]
)
def test_of_an_animation_the_first_frame_is_taken_and_noted(frames):
    format_, options = frames
    rest = [plain("RGB", GREEN), plain("RGB", BLUE)]
    picture = decode(saved(plain("RGB", RED), format_, save_all=True, append_images=rest, **options))
    assert near(picture.rgb.getpixel((5, 5)), RED)
    assert picture.notes == ("animated_input",)


def test_of_a_multi_picture_jpeg_the_first_is_taken():
    content = saved(plain("RGB", RED), "MPO", save_all=True, append_images=[plain("RGB", BLUE)])
    picture = decode(content)
    assert near(picture.rgb.getpixel((5, 5)), RED)
    assert picture.notes == ("multi_picture",)


def marked() -> Image.Image:
    """Upright: 96 x 64, red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (96, 64), WHITE)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 47, 31), fill=RED)
    draw.rectangle((48, 0, 95, 31), fill=GREEN)
    draw.rectangle((0, 32, 47, 63), fill=BLUE)
    return image


TO_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int, format_: str) -> bytes:
    turn = TO_STORED.get(orientation)
    stored = marked() if turn is None else marked().transpose(turn)
    if format_ == "TIFF":
        return saved(stored, "TIFF", tiffinfo={274: orientation})
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "PNG": {}}[format_]
    return saved(stored, format_, exif=exif.tobytes(), **options)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TO_STORED)
def test_every_exif_orientation_is_turned_upright(orientation, format_):
    picture = decode(turned(orientation, format_))
    assert (picture.original_width, picture.original_height) == (96, 64)
    corners = [picture.rgb.getpixel(place) for place in ((8, 8), (88, 8), (8, 56), (88, 56))]
    assert all(near(corner, colour, 6) for corner, colour in zip(corners, (RED, GREEN, BLUE, WHITE), strict=True))
    assert not picture.rgb.getexif()


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_an_exif_orientation_out_of_range_is_harmless(orientation):
    assert decode(turned(orientation, "JPEG")).rgb.size == (96, 64)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")  # said by Pillow
def test_broken_exif_is_harmless():
    content = saved(marked(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffjunk")
    assert decode(content).rgb.size == (96, 64)


# --- ICC: profiles made by hand, since no profile files may be relied on


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65_536))


def icc_profile(space: bytes, kind: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    header = struct.pack(">I", offset + len(body)) + b"\0\0\0\0" + b"\x02\x40\0\0" + kind + space + connection
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642) + s15(1.0) + s15(0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz(values: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(s15(value) for value in values)


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def text_tags() -> dict[bytes, bytes]:
    words = b"made by hand\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", len(words)) + words + b"\0" * 78
    return {b"desc": desc, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz((0.9642, 1.0, 0.8249))}


SRGB_COLUMNS = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
ADOBE_LIKE_COLUMNS = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


def rgb_profile(columns, exponent: float = 2.2) -> bytes:
    colours = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, columns), strict=True))
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma(exponent))
    return icc_profile(b"RGB ", b"mntr", {**text_tags(), **colours, **curves})


def grey_profile(exponent: float) -> bytes:
    return icc_profile(b"GRAY", b"mntr", {**text_tags(), b"kTRC": gamma(exponent)})


def cmyk_profile() -> bytes:
    """A printer whose inks have swapped places: its "cyan" plate prints yellow and its "yellow" plate cyan."""
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    corners = []
    for index in range(16):
        c, m, y, k = (index >> shift & 1 for shift in (3, 2, 1, 0))
        # The plates named c, m, y, k take away blue, green, red and everything.
        rgb = tuple(255 * (1 - ink) * (1 - k) for ink in (y, m, c))
        pixel = ImageCms.applyTransform(Image.new("RGB", (1, 1), rgb), to_lab).getpixel((0, 0))
        corners.append(struct.pack(">HHH", *(value * 256 for value in pixel)))
    identity = b"".join(s15(value) for value in (1, 0, 0, 0, 1, 0, 0, 0, 1))
    straight = struct.pack(">HH", 0, 65_535)
    lut = b"mft2\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + struct.pack(">HH", 2, 2)
    lut += straight * 4 + b"".join(corners) + straight * 3
    return icc_profile(b"CMYK", b"prtr", {**text_tags(), b"A2B0": lut, b"A2B1": lut}, b"Lab ")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_profile_with_swapped_primaries_swaps_the_colours(format_):
    swapped = rgb_profile((SRGB_COLUMNS[1], SRGB_COLUMNS[0], SRGB_COLUMNS[2]))
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(format_, {})
    picture = decode(saved(plain("RGB", RED), format_, icc_profile=swapped, **options))
    assert near(picture.rgb.getpixel((5, 5)), GREEN, 8)
    assert picture.notes == ("icc_converted",)
    assert "icc_profile" not in picture.rgb.info


def test_a_wide_gamut_profile_makes_colours_as_vivid_as_they_were_meant():
    content = saved(plain("RGB", (200, 100, 100)), "PNG", icc_profile=rgb_profile(ADOBE_LIKE_COLUMNS))
    red, green, blue = middle(content)
    # Worked out with the matrices above and the sRGB curve: the same colour has more red in sRGB.
    linear = (np.array([200, 100, 100]) / 255) ** 2.2
    wanted = np.linalg.inv(np.array(SRGB_COLUMNS).T) @ np.array(ADOBE_LIKE_COLUMNS).T @ linear
    encoded = 255 * np.where(wanted > 0.0031308, 1.055 * np.abs(wanted) ** (1 / 2.4) - 0.055, 12.92 * wanted)
    assert near((red, green, blue), tuple(encoded.round()), 4)
    assert red > 210


def test_an_srgb_profile_changes_next_to_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    rgb = np.asarray(decode(saved(Image.fromarray(noise), "PNG", icc_profile=srgb)).rgb)
    assert np.abs(rgb.astype(int) - noise).max() <= 1


def test_a_grey_profile_is_honoured_for_grey_pictures():
    linear = saved(plain("L", 55), "PNG", icc_profile=grey_profile(1.0))
    assert near(middle(linear), (128, 128, 128), 2)  # 55/255 of the light is mid grey


def test_a_grey_picture_with_an_rgb_profile_is_converted():
    picture = decode(saved(plain("L", 128), "JPEG", icc_profile=rgb_profile(SRGB_COLUMNS, 1.0)))
    assert near(picture.rgb.getpixel((5, 5)), (188, 188, 188), 2)
    assert picture.notes == ("icc_converted",)


@pytest.mark.parametrize("format_", ["JPEG", "TIFF"])
def test_a_cmyk_picture_goes_through_its_own_profile(format_):
    profile = cmyk_profile()
    cyan_plate = saved(plain("CMYK", (255, 0, 0, 0)), format_, icc_profile=profile)
    assert near(middle(cyan_plate), (255, 255, 0), 8)  # the profile says that this plate prints yellow
    assert decode(cyan_plate).notes == ("icc_converted",)
    assert near(middle(saved(plain("CMYK", (0, 0, 0, 0)), format_, icc_profile=profile)), WHITE)


def test_alpha_survives_a_colour_profile():
    swapped = rgb_profile((SRGB_COLUMNS[1], SRGB_COLUMNS[0], SRGB_COLUMNS[2]))
    image = Image.new("RGBA", SIZE, (*RED, 255))
    image.paste((*RED, 0), (0, 0, 32, 48))
    picture = decode(saved(image, "PNG", icc_profile=swapped))
    assert picture.rgb.getpixel((5, 5)) == WHITE
    assert near(picture.rgb.getpixel((60, 5)), GREEN, 8)
    assert picture.notes == ("icc_converted", "alpha_composited")


@pytest.mark.parametrize(
    "profile", [b"junk" * 50, rgb_profile(SRGB_COLUMNS)[:200], grey_profile(2.2)], ids=["junk", "cut", "grey"]
)
def test_a_broken_or_foreign_profile_is_ignored_and_noted(profile):
    picture = decode(saved(plain("RGB", RED), "PNG", icc_profile=profile))
    assert picture.rgb.getpixel((5, 5)) == RED
    assert picture.notes == ("icc_ignored",)


# --- errors


def noisy(format_: str, **options) -> bytes:
    noise = np.random.default_rng(7).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), format_, **options)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_picture_becomes_an_image_truncated_error(format_, part):
    content = noisy(format_)
    assert decode(content).rgb.size == (96, 96)
    with pytest.raises(ImageTruncated, match="cut off or damaged"):
        decode(content[: int(len(content) * part)])


@pytest.mark.parametrize("compress_level", [0, 1, 6])
def test_a_flipped_bit_among_the_pixels_of_a_png_is_found(compress_level):
    # Pillow alone passes about one in fourteen of these as a picture with wrong pixels.
    ramp = (np.mgrid[0:96, 0:96].sum(axis=0)[..., None] * np.array([1, 0.7, 0.4])).astype(np.uint8)
    content = saved(Image.fromarray(ramp), "PNG", compress_level=compress_level)
    chance = random.Random(compress_level)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chance.randrange(45, len(content) - 12)] ^= 1 << chance.randrange(8)
        with pytest.raises(ImageTruncated):
            decode(bytes(damaged))


FOREIGN = {
    "an empty file": b"",
    "a web page (HTML)": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "a PDF document": b"%PDF-1.7\n%\xe2\xe3",
    "JPEG XL": b"\xff\x0a\xfa\x7f",
    "JPEG 2000": b"\xff\x4f\xff\x51\0\x2f",
    "a video (MP4 or MOV)": b"\0\0\0\x20ftypisom\0\0\2\0",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "JSON text": b'{"error": "no such image"}',
    "text": b"hello there",
    "a RIFF file (audio or video)": b"RIFF\0\0\0\0WAVEfmt ",
    "a gzip archive": b"\x1f\x8b\x08\0\0\0\0\0",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
    "a file of unknown kind": bytes(range(200)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_picture_is_refused_by_what_it_is(kind):
    with pytest.raises(UnsupportedImage) as caught:
        decode(FOREIGN[kind])
    assert f"This is {kind}," in str(caught.value)
    assert "no such image" not in str(caught.value)  # the content itself is not repeated


def test_floating_point_pixels_are_refused():
    with pytest.raises(UnsupportedImage, match="float"):
        decode(saved(Image.new("F", SIZE, 0.5), "TIFF"))


@pytest.mark.parametrize("value", [-5, 70_000])
def test_integers_beyond_16_bit_are_refused(value):
    with pytest.raises(UnsupportedImage, match="not defined"):
        decode(saved(Image.new("I", SIZE, value), "TIFF"))


def test_the_preview_page_of_a_camera_raw_file_is_not_taken_for_the_picture():
    with pytest.raises(UnsupportedImage, match="preview"):
        decode(saved(plain("RGB", RED), "TIFF", tiffinfo={254: 1}))


def png(size: tuple[int, int], depth: int, colour: int, row: bytes, trns: bytes = b"") -> bytes:
    """A PNG of equal rows, made by hand; the rows may be left out to claim pixels that are not there."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))]
    chunks += [(b"tRNS", trns)] if trns else []
    chunks += [(b"IDAT", zlib.compress((b"\0" + row) * size[1])), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(13_000, 13_000), (16_385, 100), (100, 16_385), (9_000, 8_000), (2_000, 99)])
def test_pictures_over_a_cap_are_refused_before_they_are_decoded(size):
    # The rows are far too short: decoding would fail as truncated.
    with pytest.raises(ImageTooLarge, match=f"{size[0]} x {size[1]}"):
        decode(png(size, 1, 0, b""))


def test_caps_can_be_set():
    content = saved(plain("RGB", RED), "PNG")
    assert decode(content, max_bytes=len(content), max_pixels=64 * 48).rgb.size == SIZE
    with pytest.raises(ImageTooLarge, match="bytes"):
        decode(content, max_bytes=len(content) - 1)
    with pytest.raises(ImageTooLarge, match="px"):
        decode(content, max_pixels=64 * 48 - 1)


def test_a_gif_frame_far_larger_than_its_screen_is_refused():
    content = bytearray(saved(palette(), "GIF"))
    frame = content.index(b",\0\0\0\0")
    content[frame + 5 : frame + 9] = struct.pack("<HH", 65_535, 65_535)
    with pytest.raises(ImageTooLarge):
        decode(bytes(content))


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)])
def test_tiny_pictures_are_refused(size):
    with pytest.raises(ImageTooSmall, match=f"{size[0]} x {size[1]}"):
        decode(saved(Image.new("RGB", size), "PNG"))
    assert decode(saved(Image.new("RGB", (32, 32)), "PNG")).rgb.size == (32, 32)


def test_a_compressed_text_bomb_in_a_png_is_an_image_error():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("k", "a" * 80_000_000, zip=True)
    with pytest.raises(ImageError):
        decode(saved(plain("RGB", RED), "PNG", pnginfo=notes))


SEEDS = {
    "JPEG": noisy("JPEG"),
    "PNG": noisy("PNG"),
    "WEBP": noisy("WEBP"),
    "GIF": noisy("GIF"),
    "TIFF": noisy("TIFF", compression="tiff_lzw"),
    "BMP": noisy("BMP"),
    "EXIF": turned(6, "JPEG"),
    "ICC": saved(plain("CMYK", (9, 9, 9, 9)), "JPEG", icc_profile=cmyk_profile()),
    "APNG": saved(plain("RGB", RED), "PNG", save_all=True, append_images=[plain("RGB", BLUE)]),
}


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_pictures_never_raise_anything_but_image_errors(name):
    chance = random.Random(name)
    refused = 0
    for _ in range(150):
        content = bytearray(SEEDS[name])
        for _ in range(chance.choice((1, 4, 40))):
            # Headers and tables lie in front, so half of the damage goes there.
            content[chance.randrange(min(len(content), chance.choice((300, len(content)))))] = chance.randrange(256)
        if chance.random() < 0.2:
            del content[chance.randrange(len(content)) :]
        try:
            assert decode(bytes(content), max_pixels=1_000_000).rgb.mode == "RGB"
        except ImageError:
            refused += 1
    assert refused


def test_random_bytes_never_raise_anything_but_image_errors():
    chance = random.Random(5)
    starts = [content[:12] for content in SEEDS.values()] + [b""]
    for _ in range(1500):
        content = chance.choice(starts) + chance.randbytes(chance.randrange(400))
        with pytest.raises(ImageError):
            decode(content, max_pixels=1_000_000)


def test_many_threads_decode_at_once():
    wrong: list[object] = []

    def work() -> None:
        for _ in range(10):
            for name, (content, expected) in PICTURES.items():
                if not near(middle(content), expected):
                    wrong.append(name)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- sizes


def test_buckets_have_the_long_edge_and_both_orientations():
    assert buckets(64, 16) == ((64, 32), (64, 48), (64, 64), (48, 64), (32, 64))
    sizes = buckets(512, 64)
    assert len(sizes) == len(set(sizes)) == 9
    assert all(max(size) == 512 and min(size) >= 256 and min(size) % 64 == 0 for size in sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)


@pytest.mark.parametrize(
    ("original", "size"),
    [
        ((1000, 1000), (512, 512)),
        ((640, 480), (512, 384)),
        ((480, 640), (384, 512)),
        ((1920, 1080), (512, 320)),
        ((1080, 1920), (320, 512)),
        ((300, 900), (256, 512)),
        ((5000, 300), (512, 256)),
        ((40, 40), (512, 512)),
    ],
)
def test_the_bucket_of_the_nearest_aspect_ratio_is_chosen(original, size):
    assert choose_size(original, long_edge=512, size_step=64, width=None, height=None) == size


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (320, None, (320, 240)),
        (None, 320, (424, 320)),
        (200, 312, (200, 312)),
        (8, None, (8, 8)),
        (None, 2048, (2048, 2048)),
    ],
)
def test_explicit_sides_are_honoured_and_the_other_follows_the_picture(width, height, size):
    assert choose_size((640, 480), long_edge=512, size_step=64, width=width, height=height) == size


@pytest.mark.parametrize("original", [(900, 300), (300, 900), (5000, 4000), (40, 50), (64, 64)])
@pytest.mark.parametrize("size", [(64, 64), (64, 48), (48, 64)])
def test_fit_gives_the_size_and_a_circle_stays_a_circle(original, size):
    y, x = np.ogrid[: original[1], : original[0]]
    distance = np.hypot(x - (original[0] - 1) / 2, y - (original[1] - 1) / 2)
    disc = np.clip(distance - min(original) * 0.3 + 0.5, 0, 1) * 255  # black on white, with a smooth edge
    fitted = fit(Image.fromarray(disc.astype(np.uint8)).convert("RGB"), size)
    assert fitted.size == size
    ink = 255 - np.asarray(fitted, dtype=float)[..., 0]
    across, down = (ink.sum(axis=axis).max() / 255 for axis in (1, 0))
    assert across == pytest.approx(down, rel=0.06)
    rows, columns = np.indices(ink.shape)
    assert (columns * ink).sum() / ink.sum() == pytest.approx((size[0] - 1) / 2, abs=0.2)
    assert (rows * ink).sum() / ink.sum() == pytest.approx((size[1] - 1) / 2, abs=0.2)


def test_fit_leaves_an_image_of_the_right_size_alone():
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    assert fit(noise, (64, 48)).tobytes() == noise.tobytes()


def test_fit_of_a_big_picture_equals_plain_lanczos():
    noise = np.random.default_rng(3).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((2400, 1800), Image.Resampling.BICUBIC)
    exact = picture.resize((64, 48), Image.Resampling.LANCZOS)
    difference = np.asarray(fit(picture, (64, 48)), dtype=int) - np.asarray(exact, dtype=int)
    assert np.abs(difference).max() <= 4


# --- what Python code hands in


def test_arrays_and_images_are_taken():
    grey = np.full((40, 50), 9, dtype=np.uint8)
    assert as_rgb(grey).getpixel((0, 0)) == (9, 9, 9)
    assert as_rgb(np.stack([grey, grey * 2, grey * 3], axis=-1)).getpixel((0, 0)) == (9, 18, 27)
    rgba = np.zeros((40, 50, 4), dtype=np.uint8)
    assert as_rgb(rgba).getpixel((0, 0)) == WHITE
    assert as_rgb(rgba, background="#ff0000").getpixel((0, 0)) == RED
    assert as_rgb(rgba[::-1, ::2]).size == (25, 40)
    for mode, colour in [("1", 1), ("L", 5), ("P", 0), ("CMYK", (0, 255, 255, 0)), ("I;16", 5), ("LA", (5, 5))]:
        assert as_rgb(Image.new(mode, SIZE, colour)).mode == "RGB"


def test_an_opened_phone_picture_is_taken_upright():
    assert as_rgb(Image.open(BytesIO(turned(6, "JPEG")))).size == (96, 64)


def test_the_callers_image_is_not_shared():
    mine = plain("RGB", RED)
    copy = as_rgb(mine)
    mine.paste(BLUE, (0, 0, *SIZE))
    assert copy.getpixel((5, 5)) == RED


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), dtype=np.float32),
        np.zeros((4, 4, 2), dtype=np.uint8),
        np.zeros((2, 4, 4, 3), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.int64),
        "picture.png",
        None,
        Image.new("F", SIZE),
        Image.new("RGB", (0, 5)),
    ],
    ids=["floats", "two channels", "a video", "no rows", "integers", "a path", "nothing", "mode F", "no width"],
)
def test_other_inputs_are_a_bad_parameter(wrong):
    with pytest.raises(BadParameter) as caught:
        as_rgb(wrong)
    assert caught.value.field == "image"


def test_a_lazily_opened_broken_image_is_an_image_error():
    content = noisy("JPEG")
    with pytest.raises(ImageTruncated):
        as_rgb(Image.open(BytesIO(content[: len(content) // 2])))


def test_a_thumbnail_is_a_small_webp():
    small = Image.open(BytesIO(thumbnail(marked().resize((960, 640)), max_edge=96)))
    assert (small.format, small.size) == ("WEBP", (96, 64))
    assert near(small.convert("RGB").getpixel((8, 8)), RED, 12)
    assert Image.open(BytesIO(thumbnail(marked()))).size == (96, 64)  # never enlarged


def test_no_global_pillow_state_is_changed():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, TiffImagePlugin.READ_LIBTIFF)
    for content, _ in PICTURES.values():
        decode(content)
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, TiffImagePlugin.READ_LIBTIFF)
    assert after == before


def test_xmp_does_not_turn_a_jpeg_because_browsers_do_not():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(saved(plain("RGB", RED), "JPEG", xmp=xmp)).rgb.size == SIZE
