"""Fields of every kind become one checked request, or a message that names the field."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from pia_ray.config.knobs import KNOBS, AnimationParams
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import (
    AddressRefused,
    BadParameter,
    Busy,
    ImageError,
    ImageTooLarge,
    ImageTruncated,
    UnsupportedImage,
)
from pia_ray.media.sizes import buckets
from pia_ray.online.requests import request_limits
from pia_ray.online.requests.bodies import parse_json, unfold
from pia_ray.online.requests.request_reader import Form, FormReader

CONFIG = ServeConfig.model_validate(
    {
        "models": {
            "demo": "demo",
            "lively": {"base": "embedded", "defaults": {"fps": 4}, "loras": {"pixar": {"path": "x.safetensors"}}},
        },
        "max_image_bytes": 200_000,
        "max_image_pixels": 100_000,
        "max_frames": 24,
        "max_steps": 50,
    }
)


def picture(width: int = 64, height: int = 48, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(out, kind)
    return out.getvalue()


PNG = picture()


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def parse(fields: dict[str, Any], **reader: Any) -> Form:
    async def read() -> Form:
        return await FormReader(CONFIG, **reader).parse({"prompt": "a cat", "image": PNG, **fields}, owner="ann")

    return asyncio.run(read())


def refused(fields: dict[str, Any], **reader: Any) -> BadParameter:
    with pytest.raises(BadParameter) as raised:
        parse(fields, **reader)
    return raised.value


# Every knob, from text and from JSON


VALUES = {
    "prompt": "waves",
    "negative_prompt": "",
    "seed": 2**64 - 1,
    "motion_scale": 4,
    "affinity": [1.0, 0.9, 0.85],
    "condition_frame": 2,
    "seam": "keep",
    "num_frames": 8,
    "fps": 12,
    "num_inference_steps": 9,
    "guidance_scale": 3.5,
    "image_guidance_scale": 2.0,
    "strength": 0.75,
    "scheduler": "unipc",
    "eta": 0.5,
    "clip_skip": 1,
    "width": 64,
    "height": 80,
    "preset": "fast",
    "lora": "none",
    "lora_scale": 0.5,
    "playback_fps": 24,
    "interpolate": "blend",
    "repeat": 2,
    "min_duration": 4.5,
    "repeat_mode": "there-and-back",
    "aspect": "4:5",
    "focus": [0.25, 0.75],
    "pad_colour": "#ffffff",
    "poster": "webp",
}


@pytest.mark.parametrize("name", VALUES)
def test_a_knob_is_taken_as_json_and_as_the_text_of_a_form(name: str):
    value = VALUES[name]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    beside = {"affinity": "1,.5", "num_frames": "8"} if name == "condition_frame" else {}
    from_json, from_text = (getattr(parse({name: v, **beside}).params, name) for v in (value, text))
    assert from_json == from_text == (tuple(value) if isinstance(value, list) else value)


def test_every_knob_without_a_value_of_its_own_here_is_known_as_a_field():
    for name in KNOBS:
        if name in ("prompt", "style"):
            continue
        try:
            parse({name: object()})
        except BadParameter as error:
            assert "there is no" not in error.message, name


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"promt": "a"}, "promt"),
        ({"num_frames": True}, "num_frames"),
        ({"num_frames": "many"}, "num_frames"),
        ({"num_frames": 25}, "num_frames"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"num_videos": 2}, "num_videos"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"strength": 0}, "strength"),
        ({"width": 65}, "width"),
        ({"size": "64"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"size": "64x48", "width": 64}, "size"),
        ({"size": 64}, "size"),
        ({"seconds": "long"}, "seconds"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": "nan"}, "seconds"),
        ({"seconds": True}, "seconds"),
        ({"seconds": 1, "num_frames": 8}, "seconds"),
        ({"format": "avi"}, "format"),
        ({"format": "gif", "fps": 60}, "format"),
        ({"format": "gif", "playback_fps": 60}, "format"),
        ({"playback_fps": 4}, "playback_fps"),
        ({"fps": 8, "min_duration": 240}, "min_duration"),  # 1,920 frames
        ({"num_frames": 24, "repeat": 76}, "repeat"),
        ({"fit": "pad"}, "fit"),
        ({"model": "nobody"}, "model"),
        ({"model": 3}, "model"),
        ({"style": "nobody"}, "style"),
        ({"model": "demo", "style": "lively"}, "style"),
        ({"lora": "pixar"}, "lora"),
        ({"lora": {"pixar": True}}, "lora"),
        ({"lora": "{"}, "lora"),
        ({"lora": ["pixar"]}, "lora"),
        ({"condition_frame": 99}, "condition_frame"),
        ({"seam": "drop"}, "seam"),
        ({"image": None}, "image"),
        ({"image": "cat.png"}, "image"),
        ({"image": 7}, "image"),
        ({"image": {"file_id": "file_1"}}, "image"),
        ({"image": {"image_url": "x", "detail": "low"}}, "image"),
        ({"image": data_url(PNG)[:-1] + "*"}, "image"),
        ({"image": "data:image/png;base64"}, "image"),
        ({"input_reference": PNG}, "input_reference"),
        ({"latents": [[1, 2], [3]]}, "latents"),
        ({"latents": b"not safetensors"}, "latents"),
        ({"\ud800": 1}, "\ud800"),
        ({"x" * 1_000_000: 1}, "x" * 77 + "..."),
    ],
)
def test_what_is_wrong_is_refused_by_the_name_of_its_field(fields: dict[str, Any], field: str):
    error = refused(fields)
    assert error.field == field
    assert len(error.message) < 500


def test_a_misspelt_field_hears_of_the_nearest():
    assert 'Did you mean "input_reference"?' in refused({"input_referense": "x"}).message
    assert 'Did you mean "motion_scale"?' in refused({"motionscale": 1}).message


def test_model_and_style_name_the_same_thing():
    assert parse({}).params.style == parse({"style": "default"}).model == "demo"
    assert parse({"model": "lively"}).params.style == parse({"style": "lively"}).params.style == "lively"


def test_size_and_seconds_are_spelt_out_at_the_models_speed():
    form = parse({"size": "128x64", "seconds": "4", "model": "lively"})
    assert (form.params.width, form.params.height, form.params.num_frames) == (128, 64, 16)
    assert (form.size, form.seconds) == ("128x64", "4")
    assert parse({"seconds": 2, "fps": "10"}).params.num_frames == 20


def test_seconds_that_no_number_of_frames_covers_say_how_many_would_be_needed():
    error = refused({"seconds": "90"})
    assert "720 frames" in error.message


def test_the_size_of_the_video_is_known_before_it_is_made():
    form = parse({"image": picture(300, 100), "height": 64})
    assert form.size == f"{form.resolved.width}x64"
    assert form.params.width is None


@pytest.mark.parametrize("lora", ["pixar:0.5", {"pixar": 0.5}, '{"pixar": 0.5}', {"pixar": "0.5"}])
def test_loras_are_taken_as_text_object_and_json_text(lora: object):
    assert parse({"model": "lively", "lora": lora}).params.lora == "pixar:0.5"


def test_requests_that_mean_the_same_are_read_alike_and_others_not():
    asked = {"seed": 7, "size": "64x48"}
    assert parse(asked) == parse({"seed": "7", "width": "64", "height": "48"})
    for more in ({"seed": 8}, {"format": "gif"}, {"image": picture(65, 48)}):
        assert parse({**asked, **more}) != parse(asked)


# Pictures


@pytest.mark.parametrize("field", ["image", "input_reference", "image_url"])
@pytest.mark.parametrize("how", ["bytes", "data", "object", "nested"])
def test_a_picture_comes_under_each_name_and_in_each_way(field: str, how: str):
    url = data_url(PNG)
    value = {"bytes": PNG, "data": url, "object": {"image_url": url}, "nested": {"image_url": {"url": url}}}[how]
    assert parse({"image": None, field: value}).image == PNG


def test_a_url_is_fetched_within_the_limit():
    asked = []

    def fetched(url: str, max_bytes: int) -> bytes:
        asked.append((url, max_bytes))
        return PNG

    form = parse({"image": None, "input_reference": {"image_url": "https://example.com/a.png"}}, fetch_url=fetched)
    assert form.image == PNG
    assert asked == [("https://example.com/a.png", CONFIG.max_image_bytes)]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        " file:///etc/passwd",
        "s3://bucket/key",
        "ftp://example.com/a.png",
        "gopher://127.0.0.1/",
        "https://user:secret@example.com/a.png",
        "https://127.0.0.1/a.png",
        "https://2130706433/a.png",
        "https://0x7f.1/a.png",
        "https://[::ffff:127.0.0.1]/a.png",
        "https://[::1]:8443/a.png",
        "https://169.254.169.254/latest/meta-data/",
        "https://example.com:22/a.png",
    ],
)
@pytest.mark.parametrize("field", ["image", "mask_image"])
def test_urls_that_lead_inside_are_refused_for_every_picture(url: str, field: str):
    with pytest.raises(AddressRefused) as raised:
        parse({field: url})
    assert raised.value.message.startswith(f"{field}: ")
    assert "secret" not in raised.value.message


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedImage),
        (b"", UnsupportedImage),
        (PNG[:-200], ImageTruncated),
        (picture(400, 300, "JPEG"), ImageTooLarge),
        (PNG + bytes(200_000), ImageTooLarge),
    ],
    ids=["svg", "empty", "truncated", "pixels", "bytes"],
)
def test_a_picture_is_judged_by_its_content(content: bytes, error: type[ImageError]):
    for value in (content, data_url(content)):
        with pytest.raises(error, match=r"^image"):
            parse({"image": value})


def test_other_pictures_and_arrays_come_with_their_hashes_in_the_knobs():
    noise = np.random.default_rng(0).standard_normal((4, 16, 6, 8)).astype(np.float32)
    form = parse({"end_image": data_url(PNG), "mask_image": PNG, "latents": save({"latents": noise})})
    assert set(form.inputs) == {"end_image", "mask_image", "latents"}
    assert form.params.end_image == form.resolved.mask_image
    assert str(form.params.end_image).startswith("sha256:")
    nested = parse({"latents": noise.tolist()})
    assert nested.inputs["latents"]
    with pytest.raises(UnsupportedImage, match=r"^end_image: "):
        parse({"end_image": b"no picture"})


# Forms and JSON


def test_flattened_names_are_unfolded():
    pairs: list[tuple[str, str | bytes]] = [
        ("lora[a]", "1"),
        ("lora[b]", "2"),
        ("affinity[]", "1"),
        ("affinity[]", "0"),
    ]
    assert unfold(pairs) == {"lora": {"a": "1", "b": "2"}, "affinity": ["1", "0"]}
    assert unfold([("input_reference[image_url]", "u")]) == {"input_reference": {"image_url": "u"}}


@pytest.mark.parametrize(
    "names", [("a", "a"), ("a[]", "a"), ("a", "a[]"), ("a[b]", "a[b]"), ("a[b]", "a[]"), ("a", "a[b]")]
)
def test_a_field_that_occurs_twice_is_refused(names: tuple[str, str]):
    with pytest.raises(BadParameter, match="twice"):
        unfold([(name, "1") for name in names])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(text: bytes):
    with pytest.raises(BadParameter):
        parse_json(text)


def test_slow_servers_of_one_key_refuse_its_next_url_and_hold_no_other_key():
    answer = threading.Event()

    def fetch_url(url: str, max_bytes: int) -> bytes:
        assert "slow" not in url or answer.wait(20)
        return PNG

    async def work() -> None:
        reader = FormReader(CONFIG, fetch_url=fetch_url, patience_s=0.01)

        def parse(owner: str, url: str) -> Coroutine[Any, Any, Form]:
            return reader.parse({"prompt": "a cat", "image": url}, owner=owner)

        slow = [asyncio.create_task(parse("bob", f"https://{n}.slow.test/a.png")) for n in range(20)]
        while sum(each.done() for each in slow) < 12:
            await asyncio.sleep(0.01)
        assert {type(each.exception()) for each in slow if each.done()} == {Busy}
        assert (await parse("ann", "https://quick.test/a.png")).image == PNG
        line = await reader.parse({"prompt": "a", "image": "https://quick.test/"}, owner="bob", is_line=True)
        assert line.image == PNG
        answer.set()
        await asyncio.gather(*slow, return_exceptions=True)

    asyncio.run(work())


def test_seconds_beyond_the_endpoints_limit_are_answered_about_seconds():
    error = refused({"seconds": "6", "fps": 8})
    assert (error.field, error.message) == ("seconds", "seconds must be at most 3 at this endpoint and 8 frames/s")
    assert refused({"num_frames": 48}).field == "num_frames"


def test_the_bound_of_steps_is_the_endpoints_whatever_is_asked_for():
    for steps in (0, 51, 1000, 5000, "half"):
        error = refused({"num_inference_steps": steps})
        assert "must be a whole number from 1 to 50 at this endpoint" in error.message
    assert "must be a whole number from 1 to 24 at this endpoint" in refused({"num_frames": 5000}).message
    assert "num_frames goes from 1 to 24 at this endpoint" in refused({"seconds": "90"}).message


def test_a_video_that_costs_too_much_is_refused_before_its_picture_is_fetched_and_hears_what_to_lower():
    asked: list[str] = []
    large = {"image": "https://example.com/a.png", "width": 2048, "height": 2048, "num_frames": 64}
    limits = {"max_frames": 64, "max_steps": 100}

    def refusal(fields: dict[str, Any], **settings: Any) -> BadParameter:
        config = ServeConfig.model_validate({**limits, **settings})
        reader = FormReader(config, fetch_url=lambda url, _: asked.append(url) or PNG)
        with pytest.raises(BadParameter) as raised:
            asyncio.run(reader.parse({"prompt": "a cat", **fields}, owner="ann"))
        return raised.value

    assert "lower width, height or size" in refusal({**large, "num_inference_steps": 100}).message
    costly = refusal({**large, "width": 1024, "height": 1024, "num_inference_steps": 100})
    assert costly.message.endswith("lower num_inference_steps to 59 or num_frames to 38 or width and height")
    assert asked == []
    by_picture = refusal({"image": PNG, "num_frames": 64, "num_inference_steps": 100}, max_pixel_steps=1_000_000)
    assert "frames x pixels x steps" in by_picture.message


def test_the_default_limits_take_the_default_video_of_every_named_model():
    config = ServeConfig.model_validate({})
    for edge in (512, 768, 1024, 1280):
        for width, height in buckets(edge, 64):
            params = AnimationParams(prompt="-", width=width, height=height)
            request_limits.check_cost(params, config)


def test_an_uploaded_web_page_is_answered_as_one():
    with pytest.raises(UnsupportedImage) as raised:
        parse({"image": b"<!DOCTYPE html><html></html>"})
    assert "web page" in raised.value.message
    assert "give the picture itself" in raised.value.message


def test_size_and_seconds_of_a_finished_video_are_those_of_its_file():
    form = parse({"num_frames": 8, "playback_fps": 24, "repeat": 3, "aspect": "9:16", "fit": "pad", "width": 64})
    assert (form.size, form.seconds) == ("64x114", "3")
    assert (form.resolved.width, form.resolved.height) == (64, 48)
