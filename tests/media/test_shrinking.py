"""Very large pictures: they pass, look as they did, and take bounded memory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pia_ray.errors import ImageTooLarge
from pia_ray.media.byte_budget import ByteBudget
from pia_ray.media.image import as_rgb, decode
from pia_ray.media.shrinking import shrink_factor, shrunk
from pia_ray.media.sizes import fit

PHONE = {"max_pixels": 200_000_000, "max_side": 65_535}


def drawn(mode: str, size: tuple[int, int]) -> Image.Image:
    """Smooth waves in each channel; alpha goes from nothing to all."""
    width, height = size
    x, y = np.arange(width) / width, np.arange(height)[:, None] / height
    channels = [np.sin(6 * x * (n + 1) + 5 * y) * 127 + 128 for n in range(len(mode))]
    return Image.merge(mode, [Image.fromarray(channel.astype(np.uint8)) for channel in channels])


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        ((4095, 4095), 1),
        ((4096, 4096), 2),
        ((8000, 8000), 3),
        ((12_000, 9000), 4),
        ((16_320, 12_240), 5),
        ((30_000, 4000), 3),
        ((20_000, 1000), 1),
        ((6000, 4000), 1),
        ((64, 48), 1),
    ],
)
def test_pictures_are_divided_as_long_as_more_is_left_than_a_video_shows(size: tuple[int, int], factor: int) -> None:
    assert shrink_factor(size) == shrink_factor(size[::-1]) == factor


def test_a_phone_picture_of_108_megapixels_passes_with_its_own_size() -> None:
    content = saved(Image.new("L", (12_000, 9000), 90), "JPEG")
    found = decode(content, **PHONE)
    assert (found.original_width, found.original_height, found.rgb.size) == (12_000, 9000, (3000, 2250))
    with pytest.raises(ImageTooLarge):
        decode(content)


def test_a_panorama_passes_and_its_side_and_aspect_are_settings() -> None:
    content = saved(Image.new("L", (33_000, 1500), 90), "PNG")
    with pytest.raises(ImageTooLarge, match="20 times"):
        decode(content, **PHONE)
    assert decode(content, max_aspect=22, **PHONE).original_width == 33_000
    with pytest.raises(ImageTooLarge, match="16384 px a side"):
        decode(content, max_aspect=22)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK"])
def test_a_shrunk_picture_looks_as_the_whole_one(mode: str) -> None:
    image = drawn(mode, (900, 840))
    whole = np.asarray(fit(as_rgb(image), (150, 140)), np.int16)
    found = as_rgb(shrunk(image, 3, [], white_is_zero=False))
    assert found.size == (300, 280)
    assert np.abs(np.asarray(fit(found, (150, 140)), np.int16) - whole).max() <= 4


def test_a_jpeg_is_shrunk_while_it_is_decoded() -> None:
    content = saved(drawn("RGB", (4400, 4120)), "JPEG")
    whole = np.asarray(Image.open(BytesIO(content)).resize((150, 140), Image.Resampling.BOX), np.int16)
    found = decode(content).rgb
    assert found.size == (2200, 2060)
    assert np.abs(np.asarray(found.resize((150, 140), Image.Resampling.BOX), np.int16) - whole).max() <= 4


def test_hidden_colour_under_alpha_does_not_bleed_where_a_picture_is_shrunk() -> None:
    image = Image.new("RGBA", (4200, 4100), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 2101, 4100))
    rgb = np.asarray(decode(saved(image, "PNG", compress_level=1)).rgb)
    assert (rgb[:, :, 0] == rgb[:, :, 1]).all()  # white and blue alone


def test_a_large_16_bit_picture_keeps_its_white_and_a_turned_one_its_turn() -> None:
    values = np.full((4100, 4200), 65_535, np.uint16)
    values[:2050] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    found = decode(saved(Image.fromarray(values), "PNG", exif=exif, compress_level=1))
    assert (found.original_width, found.original_height) == (4100, 4200)
    rgb = np.asarray(found.rgb)
    assert (rgb[:, -1].min(), rgb[:, -1].max(), rgb[:, 0].min()) == (0, 0, 255)


def test_threads_share_a_budget_and_what_is_larger_has_it_alone() -> None:
    budget, lock, now, most = ByteBudget(100), threading.Lock(), [0], [0]

    def take(size: int) -> None:
        with budget.taken(size):
            with lock:
                now[0] += min(size, 100)
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            with lock:
                now[0] -= min(size, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [30, 40, 500, 60, 100, 10] * 5))
    assert most[0] == 100


PEAK = """
import resource, sys
from pathlib import Path
from pia_ray.media.image import decode
content = Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(content)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.heavy
def test_64_megapixels_with_alpha_and_a_profile_take_less_than_half_a_gibibyte(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = tmp_path / "a.png"
    Image.new("RGBA", (8000, 8000), (10, 20, 30, 128)).save(path, compress_level=1, icc_profile=profile)
    ended = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 512
