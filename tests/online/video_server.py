"""The whole endpoint over HTTP on a free port, with a fake animator behind it, and real openai clients for it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from openai import OpenAI
from PIL import Image

from pia_ray.config.serve import ServeConfig
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.testing import FakeAnimator

QUICK = {"num_frames": 4, "num_inference_steps": 3, "width": 64, "height": 64, "fps": 4}
"""Knobs of a video that takes little encoding."""


def png(width: int = 64, height: int = 64, *, shade: int = 0) -> bytes:
    """A picture."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).point(lambda v: (v + shade) % 256).convert("RGB").save(
        out, "PNG"
    )
    return out.getvalue()


def data_url(content: bytes) -> str:
    """The picture as a URL of itself."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def hash_of(key: str) -> str:
    """How a config names an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


def batch_lines(*bodies: dict[str, Any]) -> bytes:
    """An input file of a batch with these bodies; custom ids are line-0, line-1 ..."""
    lines = [
        {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/videos", "body": body}
        for number, body in enumerate(bodies)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class VideoServer:
    """An endpoint that is up."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._clients: list[OpenAI] = []

    def client(self, key: str = "anyone", **settings: Any) -> OpenAI:
        """An openai client with that API key, which gives up within seconds."""
        given = {"base_url": f"{self.url}/v1", "api_key": key, "timeout": 20, "max_retries": 0, **settings}
        self._clients.append(OpenAI(**given))
        return self._clients[-1]

    def hang_up(self) -> None:
        """Closes the clients' connections."""
        for client in self._clients:
            client.close()


@contextmanager
def serve_videos(storage_uri: str, *, step_s: float = 0.0, **settings: Any) -> Iterator[VideoServer]:
    """An endpoint over that storage, for as long as the block lasts."""
    given = {"storage": storage_uri, "batch_size": 2, "graceful_shutdown_s": 0.1, **settings}
    config = ServeConfig.model_validate(given)
    started, stop = threading.Event(), threading.Event()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(128)

        async def main() -> None:
            animator = FakeAnimator(
                config.models[config.default_model], styles=config.models, batch_size=2, seconds_per_step=step_s
            )
            renderer = LocalRenderer(animator, config)
            jobs = JobStore(config.storage, job_ttl_s=config.job_ttl_s, lease_s=5.0)
            app = create_endpoint(renderer, jobs, config, poll_s=0.1)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            started.set()
            while not stop.is_set() and not serving.done():
                await asyncio.sleep(0.05)
            server.should_exit = True
            await serving
            await renderer.close()

        thread = threading.Thread(target=lambda: asyncio.run(main()), name="endpoint")
        thread.start()
        try:
            assert started.wait(30)
            server = VideoServer(bound.getsockname()[1])
            yield server
            server.hang_up()
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()
