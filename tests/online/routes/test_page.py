"""The static parts of the endpoint's page: the API reference and the example picture."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

from pia_ray.config.model import ModelConfig
from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.testing import FakeAnimator


class Elements(HTMLParser):
    """The ids of a page, what it refers to, and the kinds of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.addresses: set[str] = set()
        self.kinds: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.add(tag)
        self.ids |= {value for name, value in attrs if name == "id" and value}
        self.addresses |= {value for name, value in attrs if name in ("href", "src") and value}


def answers(folder: Path, *paths: str, key: str | None = None, **settings: Any) -> list[httpx2.Response]:
    """What an endpoint with keys answers to a caller without one, or with `key`."""
    keys = [hashlib.sha256(b"key").hexdigest()]
    config = ServeConfig.model_validate({"storage": str(folder), "api_keys": keys, **settings})
    headers = {} if key is None else {"authorization": f"Bearer {key}"}

    async def work() -> list[httpx2.Response]:
        with FakeAnimator(config.default_model_config, styles=config.models) as animator:
            app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config)
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
                return [await client.get(path) for path in paths]

    return asyncio.run(work())


def test_the_reference_describes_every_call_and_object_and_loads_nothing_of_other_sites(tmp_path: Path) -> None:
    (answer,) = answers(tmp_path, "/page/reference.html")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    page = Elements(answer.text)
    assert {"create_animation", "create_video", "stream_video_events", "schema-VideoObject"} <= page.ids
    assert not page.kinds & {"script", "img", "iframe"}
    outside = {address for address in page.addresses if not address.startswith("#")}
    assert outside == {"page.css", "data:,"}
    assert {address.removeprefix("#") for address in page.addresses - outside} <= page.ids
    for knob in ("motion_scale", "num_inference_steps", "webhook_url"):
        assert f"<code>{knob}</code>" in answer.text
    assert not re.search(r"&lt;class|\{&#x27;|>None<", answer.text)


def test_the_example_picture_and_the_page_s_link_to_the_reference_need_no_key(tmp_path: Path) -> None:
    page, example = answers(tmp_path, "/", "/page/example.jpg")
    assert "page/reference.html" in Elements(page.text).addresses
    with Image.open(io.BytesIO(example.content)) as picture:
        assert (picture.format, example.headers["content-type"]) == ("JPEG", "image/jpeg")


def test_a_model_says_what_its_requests_may_choose_and_the_public_settings_name_none_of_it(tmp_path: Path) -> None:
    demo = ModelConfig.named("demo").model_dump()
    loras = {"pixar": {"path": "p.safetensors", "weight": 0.8}, "inside": {"path": "i.safetensors", "merge": True}}
    look = {"ip_adapter": "a.safetensors", "image_encoder": "encoder"}
    defaults = {**demo["defaults"], "end_image": "/private/end.png", "seed": 2**63}
    models = {"plain": "demo", "styled": {**demo, **look, "loras": loras, "defaults": defaults}}
    listed, settings = answers(tmp_path, "/v1/models", "/page/settings.json", key="key", models=models)
    plain, styled = listed.json()["data"]
    assert (plain["loras"], plain["pictures"]) == ({}, ["end_image", "mask_image"])
    assert (styled["loras"], styled["pictures"]) == ({"pixar": 0.8}, ["end_image", "mask_image", "ip_adapter_image"])
    assert styled["defaults"]["num_inference_steps"] == demo["defaults"]["num_inference_steps"]
    assert "private" not in listed.text and "seed" not in styled["defaults"]
    assert "pixar" not in settings.text
    (unknown,) = answers(tmp_path, "/page/other.js")
    assert unknown.status_code == 404
