"""The static parts of the endpoint's page: the API reference and the example picture."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx2
from PIL import Image

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


def answers(folder: Path, *paths: str) -> list[httpx2.Response]:
    """What an endpoint with keys answers to a caller without one."""
    keys = [hashlib.sha256(b"key").hexdigest()]
    config = ServeConfig.model_validate({"storage": str(folder), "api_keys": keys})

    async def work() -> list[httpx2.Response]:
        with FakeAnimator(config.models["demo"], styles=config.models) as animator:
            app = create_endpoint(LocalRenderer(animator, config), JobStore(config.storage), config)
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
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
