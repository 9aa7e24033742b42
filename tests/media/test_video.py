from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pia_ray.animation import Animation
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import VideoError
from pia_ray.media import video
from tests.videos import decode_frames

FORMATS = list(video.MIME)
PROVENANCE = {
    "id": 'é"\\\n\r\t\x00\x85𝄞 </rdf:li> &amp; ]]>',
    "seed": str(2**64 - 1),
    "params": {"prompt": "ein Bär 🐻\n" * 1500, "guidance_scale": 7.5, "eta": 0.0, "clip_skip": None},
    "model": "demo",
}


def moving(num_frames: int = 6, height: int = 48, width: int = 64) -> np.ndarray:
    """A disc that crosses a gradient."""
    y, x = np.mgrid[0:height, 0:width]
    frames = []
    for i in range(num_frames):
        frame = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], -1).astype(np.uint8)
        frame[(x - width * (i + 1) / (num_frames + 1)) ** 2 + (y - height / 2) ** 2 < (height / 5) ** 2] = 230, 60, 40
        frames.append(frame)
    return np.stack(frames)


def boxes(content: bytes) -> list[bytes]:
    names, at = [], 0
    while at < len(content):
        names.append(content[at + 4 : at + 8])
        at += int.from_bytes(content[at : at + 4], "big")
    return names


@pytest.mark.parametrize("video_format", FORMATS)
@pytest.mark.parametrize(
    ("num_frames", "fps"), [(1, 8), (1, 30), (2, 1), (6, 8), (16, 12), (7, 24), (11, 30), (5, 50), (3, 7)]
)
def test_number_size_and_duration_of_frames_are_exact_in_every_format(video_format, num_frames, fps):
    encoded = video.encode(moving(num_frames), fps=fps, format=video_format, provenance={})
    video.verify(encoded)
    facts = video.probe(encoded.content)
    assert (facts.format, facts.num_frames, facts.width, facts.height) == (video_format, num_frames, 64, 48)
    tick_s = {"mp4": 1e-9, "gif": 0.0051, "webp": 0.00051, "webm": 0.00101}[video_format]
    assert facts.num_frames / facts.fps == pytest.approx(num_frames / fps, abs=tick_s)


@pytest.mark.parametrize("video_format", FORMATS)
def test_frames_come_back_as_they_went_in(video_format):
    frames = moving(4, 128, 128)
    decoded = decode_frames(video.encode(frames, fps=8, format=video_format, provenance={}).content)
    assert decoded.dtype == np.uint8
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(float) - frames).mean(axis=(1, 2, 3)).max() < 6


@pytest.mark.parametrize("video_format", FORMATS)
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (12, 200, 99), (40, 8, 90)])
def test_flat_colours_keep_their_values(video_format, colour):
    frames = np.full((3, 32, 32, 3), colour, np.uint8)
    decoded = decode_frames(video.encode(frames, fps=8, format=video_format, provenance={}).content)
    assert np.abs(decoded.astype(int) - frames).max() <= 3


@pytest.mark.parametrize("video_format", FORMATS)
def test_equal_frames_are_not_merged(video_format):
    still = np.repeat(moving(1), 9, axis=0)
    facts = video.probe(video.encode(still, fps=8, format=video_format, provenance={}).content)
    assert facts.num_frames == 9
    assert facts.num_frames / facts.fps == pytest.approx(9 / 8, abs=0.0051)


@pytest.mark.parametrize("video_format", FORMATS)
def test_provenance_of_any_text_and_20_kilobytes_reads_back_as_it_was(video_format, tmp_path):
    content = video.encode(moving(2), fps=8, format=video_format, provenance=PROVENANCE).content
    assert video.probe(content).provenance == PROVENANCE
    path = tmp_path / f"a.{video_format}"
    path.write_bytes(content)
    assert video.probe(path).provenance == video.probe(str(path)).provenance == PROVENANCE


@pytest.mark.parametrize("video_format", FORMATS)
def test_a_lone_surrogate_in_an_id_reads_back(video_format):
    content = video.encode(moving(1), fps=8, format=video_format, provenance={"id": "a\ud800b"}).content
    assert video.probe(content).provenance == {"id": "a\ud800b"}


@pytest.mark.parametrize("video_format", FORMATS)
def test_the_same_frames_and_provenance_give_the_same_bytes(video_format):
    one, other = (
        video.encode(moving(), fps=8, format=video_format, provenance=provenance)
        for provenance in ({"id": "a", "seed": "1"}, {"seed": "1", "id": "a"})
    )
    assert one == other
    assert one.size_bytes == len(one.content)


def test_an_mp4_does_not_depend_on_what_lay_in_memory_before():
    # glibc fills what it hands out with the byte of MALLOC_PERTURB_; x264's AVX-512 code reads unwritten memory.
    program = """
import hashlib, numpy as np
from pia_ray.media import video
for size in (48, 62), (40, 200), (64, 64), (64, 96), (96, 80), (96, 112), (192, 320), (512, 448):
    for num_frames in 4, 8:
        frames = np.random.default_rng(0).integers(60, 200, (num_frames, *size, 3), dtype=np.uint8)
        made = video.encode(frames, fps=8, format="mp4", provenance={})
        print(size, num_frames, hashlib.sha256(made.content).hexdigest())
"""
    made = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "MALLOC_PERTURB_": fill},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.splitlines()
        for fill in ("0", "85", "170", "255")
    ]
    assert len(made[0]) == 16
    assert [lines for lines in zip(*made, strict=True) if len(set(lines)) > 1] == []


def test_mp4_is_h264_with_its_index_first_and_its_colours_named():
    content = video.encode(moving(16), fps=8, format="mp4", provenance=PROVENANCE).content
    names = boxes(content)
    assert names.index(b"moov") < names.index(b"mdat")
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
        assert stream.duration * stream.time_base == Fraction(2)
        context = stream.codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)


def test_webm_is_vp9_with_its_colours_named():
    with av.open(io.BytesIO(video.encode(moving(), fps=8, format="webm", provenance={}).content), "r") as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("vp9", "yuv420p")
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)


def test_gif_and_webp_loop_for_ever():
    for video_format in ("gif", "webp"):
        with Image.open(io.BytesIO(video.encode(moving(), fps=8, format=video_format, provenance={}).content)) as image:
            assert image.info["loop"] == 0


def test_gif_delays_that_do_not_divide_are_spread():
    with Image.open(io.BytesIO(video.encode(moving(6), fps=30, format="gif", provenance={}).content)) as image:
        delays = []
        for i in range(image.n_frames):
            image.seek(i)
            delays.append(image.info["duration"])
    assert delays == [30, 40, 30, 30, 40, 30]


@pytest.mark.parametrize("video_format", ["gif", "webp", "webm"])
@pytest.mark.parametrize("size", [(33, 47), (17, 9), (1, 1)])
def test_odd_sizes_are_kept(video_format, size):
    encoded = video.encode(moving(3, *size), fps=8, format=video_format, provenance={})
    video.verify(encoded)
    assert decode_frames(encoded.content).shape == (3, *size, 3)


def test_odd_sizes_are_refused_by_mp4_with_advice():
    with pytest.raises(VideoError, match=r"even sides and 47x33 is odd: use webm, webp or gif, or 48x34"):
        video.encode(moving(3, 33, 47), fps=8, format="mp4", provenance={})


def test_a_gif_faster_than_browsers_play_is_refused_before_any_work():
    with pytest.raises(VideoError, match="gif cannot play 60"):
        video.require_encodable("gif", width=64, height=64, fps=60)
    video.require_encodable("webp", width=63, height=64, fps=60)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 4), np.uint8),
        np.zeros((1, 8, 8, 3), np.float32),
    ],
)
def test_what_is_not_frames_is_refused(frames):
    with pytest.raises(VideoError, match="uint8"):
        video.encode(frames, fps=8, format="mp4", provenance={})


@pytest.mark.parametrize("video_format", FORMATS)
def test_a_file_cut_anywhere_does_not_verify(video_format):
    content = video.encode(moving(), fps=8, format=video_format, provenance={"id": "x" * 300}).content
    cuts = random.Random(7).sample(range(len(content)), 60)
    for cut in [0, 1, 12, len(content) - 1, *cuts]:
        with pytest.raises(VideoError):
            video.probe(content[:cut])


@pytest.mark.parametrize("video_format", FORMATS)
def test_damage_is_a_video_error_or_goes_unnoticed_but_nothing_else(video_format):
    content = video.encode(moving(), fps=8, format=video_format, provenance={"id": "x"}).content
    chance = random.Random(3)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            video.probe(bytes(damaged))
        except VideoError:
            refused += 1
    assert refused


@pytest.mark.parametrize("content", [b"", b"no video", b"\x89PNG\r\n\x1a\n" + bytes(40), b"RIFF\0\0\0\0WAVE"])
def test_what_is_no_video_is_refused(content):
    with pytest.raises(VideoError, match="not an mp4"):
        video.probe(content)


def test_a_missing_file_is_a_video_error(tmp_path):
    with pytest.raises(VideoError, match="cannot read"):
        video.probe(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    "wrong", [{"num_frames": 5}, {"width": 66}, {"height": 50}, {"fps": 9}, {"format": "webm"}], ids=str
)
def test_a_file_that_is_not_what_it_should_be_does_not_verify(wrong):
    encoded = video.encode(moving(), fps=8, format="mp4", provenance={})
    claimed = type(encoded)(**{**encoded.__dict__, **wrong})
    with pytest.raises(VideoError, match="instead of"):
        video.verify(claimed)


def test_a_file_from_elsewhere_has_no_provenance():
    file = io.BytesIO()
    Image.fromarray(moving(1)[0]).save(
        file,
        "GIF",
        save_all=True,
        append_images=[Image.fromarray(moving(3)[2])],
        duration=100,
        comment=b"made by hand",
    )
    facts = video.probe(file.getvalue())
    assert (facts.num_frames, facts.fps, facts.provenance) == (2, 10, {})


def test_a_thumbnail_is_small_and_has_every_frame():
    noise = np.random.default_rng(0).integers(0, 255, (16, 320, 512, 3)).astype(np.uint8)
    for frames, cap in ((moving(16, 320, 512), 60_000), (noise, 400_000)):
        content = video.thumbnail(frames, fps=8)
        facts = video.probe(content)
        assert (facts.format, facts.num_frames, facts.width, facts.height, facts.fps) == ("webp", 16, 256, 160, 8)
        assert len(content) < cap


@pytest.mark.parametrize(("num_frames", "columns", "rows"), [(1, 1, 1), (6, 3, 2), (16, 4, 4), (17, 5, 4)])
def test_a_spritesheet_holds_every_frame_in_reading_order(num_frames, columns, rows):
    frames = moving(num_frames, 96, 128)
    with Image.open(io.BytesIO(video.spritesheet(frames, max_edge=64))) as sheet:
        assert (sheet.format, sheet.size) == ("WEBP", (columns * 64, rows * 48))
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for index, frame in enumerate(frames):
        top, left = index // columns * 48, index % columns * 64
        small = np.asarray(Image.fromarray(frame).resize((64, 48), Image.Resampling.LANCZOS))
        assert np.abs(pixels[top : top + 48, left : left + 64] - small).mean() < 6


def test_a_thumbnail_is_never_larger_than_the_video():
    assert decode_frames(video.thumbnail(moving(2, 20, 30), fps=8)).shape == (2, 20, 30, 3)


def animation(**params) -> Animation:
    return Animation(
        frames=moving(),
        params=AnimationParams(prompt="a red disc", seed=2**64 - 1, **params),
        model="demo@1",
        id="disc 1",
        gpu_s=0.1,
        animate_s=0.2,
        motion=0.3,
    )


@pytest.mark.parametrize("video_format", FORMATS)
def test_an_animation_saves_by_extension_with_its_provenance(video_format, tmp_path):
    path = tmp_path / f"disc.{video_format.upper()}"
    animation(fps=12).save(path)
    facts = video.probe(path)
    assert (facts.format, facts.num_frames) == (video_format, 6)
    assert facts.fps == pytest.approx(12, rel=0.02)
    assert facts.provenance["id"] == "disc 1"
    assert facts.provenance["model"] == "demo@1"
    assert facts.provenance["seed"] == facts.provenance["params"]["seed"] == str(2**64 - 1)
    assert facts.provenance["params"]["prompt"] == "a red disc"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_an_unknown_extension_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(VideoError, match=r"\.mp4, \.gif, \.webp, \.webm"):
        animation().save(tmp_path / "disc.avi")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_a_video_error(tmp_path):
    with pytest.raises(VideoError, match="cannot write"):
        animation().save(tmp_path / "none" / "disc.mp4")
