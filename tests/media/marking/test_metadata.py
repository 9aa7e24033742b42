from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pia_ray.errors import VideoError
from pia_ray.media import video
from pia_ray.media.marking import DIGITAL_SOURCE_TYPE, is_marked, strip_provenance
from tests.videos import decode_frames

FORMATS = list(video.MIME)
PUBLIC = {"model": "demo@1", "work_key": "ab" * 16}
FULL = {"id": "shoes/1", "image_uri": "/pictures/ann/a.jpg", "worker": "host:12", **PUBLIC}
SECRETS = (b"shoes/1", b"/pictures/ann", b"host:12")
EARLIER = Path(__file__).parents[2] / "data" / "output-0.1.0" / "output" / "videos"


def moving(num_frames: int = 6) -> np.ndarray:
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([np.stack([x * 3, y * 5, (x + y + 20 * i) % 256], -1).astype(np.uint8) for i in range(num_frames)])


def encoded(video_format, provenance=FULL, *, num_frames=6, fps=8) -> bytes:
    return video.encode(moving(num_frames), fps=fps, format=video_format, provenance=provenance).content


@pytest.fixture(scope="session")
def exiftool() -> str:
    found = shutil.which("exiftool")
    if found is None:
        reason = "exiftool is not installed (Debian: libimage-exiftool-perl)"
        if os.environ.get("PIA_RAY_REQUIRE_EXIFTOOL") == "1":
            pytest.fail(f"PIA_RAY_REQUIRE_EXIFTOOL is 1, but {reason}")
        pytest.skip(reason)
    return found


def test_exiftool_reads_from_every_file_that_it_is_generated(exiftool, tmp_path):
    contents = {f"video.{name}": encoded(name) for name in FORMATS}
    contents["thumbnail.webp"] = video.thumbnail(moving(), fps=8)
    contents["sheet.webp"] = video.spritesheet(moving())
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    printed = subprocess.run(
        [exiftool, "-json", "-G", "-warning", "-digitalsourcetype", *contents],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    ).stdout
    found = {each.pop("SourceFile"): each for each in json.loads(printed)}
    group = {name: "Matroska" if name.endswith("webm") else "XMP" for name in contents}
    assert found == {name: {f"{group[name]}:DigitalSourceType": DIGITAL_SOURCE_TYPE} for name in contents}


@pytest.mark.parametrize("video_format", FORMATS)
def test_a_public_file_tells_the_model_and_the_work_key_alone(video_format):
    content = encoded(video_format)
    public = strip_provenance(content, video_format, "public")
    assert video.probe(public).provenance == PUBLIC
    assert not any(secret in public for secret in SECRETS)
    assert public == encoded(video_format, PUBLIC)
    assert is_marked(public, video_format)


@pytest.mark.parametrize("video_format", FORMATS)
def test_a_file_without_provenance_still_says_that_it_is_generated(video_format):
    bare = strip_provenance(encoded(video_format), video_format, "none")
    assert (video.probe(bare).provenance, is_marked(bare, video_format)) == ({}, True)
    assert bare == encoded(video_format, {})


@pytest.mark.parametrize("video_format", FORMATS)
@pytest.mark.parametrize("level", ["full", "public", "none"])
def test_frames_and_times_are_not_touched(video_format, level):
    content = encoded(video_format)
    stripped = strip_provenance(content, video_format, level)
    before, after = video.probe(content), video.probe(stripped)
    assert (after.num_frames, after.fps) == (before.num_frames, before.fps)
    assert np.array_equal(decode_frames(stripped), decode_frames(content))


@pytest.mark.parametrize("video_format", FORMATS)
@pytest.mark.parametrize("level", ["full", "public", "none"])
def test_a_file_that_tells_no_more_comes_back_as_it_is(video_format, level):
    stripped = strip_provenance(encoded(video_format), video_format, level)
    assert strip_provenance(stripped, video_format, level) is stripped


def test_a_video_of_an_earlier_version_is_marked_and_keeps_what_it_tells():
    old = next(EARLIER.rglob("*.mp4")).read_bytes()
    assert not is_marked(old, "mp4")
    marked = strip_provenance(old, "mp4", "full")
    assert is_marked(marked, "mp4")
    assert video.probe(marked).provenance == video.probe(old).provenance != {}
    assert set(video.probe(strip_provenance(old, "mp4", "public")).provenance) == {"model", "work_key"}


@pytest.mark.parametrize("video_format", ["mp4", "webm"])
def test_players_find_every_frame_by_its_time(video_format):
    content = strip_provenance(encoded(video_format, num_frames=14, fps=1), video_format, "public")
    with av.open(io.BytesIO(content)) as container:
        for second in (12, 7, 0):
            container.seek(second * av.time_base)
            pictures = (frame for frame in container.decode(video=0) if frame.time >= second)
            found = next(pictures).to_ndarray(format="rgb24")
            assert np.array_equal(found, decode_frames(content)[second])


def test_the_index_of_an_mp4_stays_before_its_frames():
    content = encoded("mp4")
    kinds, at = [], 0
    while at < len(content):
        kinds.append(content[at + 4 : at + 8])
        at += int.from_bytes(content[at : at + 4], "big")
    assert kinds == [b"ftyp", b"moov", b"uuid", b"mdat"]


def test_another_comment_is_not_kept_in_a_public_file():
    with io.BytesIO() as file:
        image = Image.fromarray(moving()[0])
        image.save(file, "GIF", comment=b"by Ann", save_all=True, append_images=[image.rotate(90)])
        content = strip_provenance(file.getvalue(), "gif", "public")
    assert b"Ann" not in content
    assert is_marked(content, "gif")


@pytest.mark.parametrize("video_format", FORMATS)
def test_a_file_that_is_cut_off_or_of_another_format_is_refused(video_format):
    content = encoded(video_format)
    other = encoded("gif" if video_format != "gif" else "mp4")
    for broken in (content[: len(content) // 3], other, b""):
        with pytest.raises(VideoError, match=f"the {video_format} is damaged"):
            strip_provenance(broken, video_format, "public")
