"""An endpoint in a process of its own for the soak: `python -m tests.online.soak_server FOLDER KEY ...` prints its URL.

Its engine is a fake one. Its webhooks go to a receiver on this machine that never answers, and the servers of pictures
never answer either.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time

import uvicorn

from pia_ray.config.serve import ServeConfig
from pia_ray.errors import FetchUnavailable
from pia_ray.online.allocator import return_large_blocks, share_arenas
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.requests.request_reader import FormReader
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore
from pia_ray.online.video_jobs.webhooks import Webhooks
from pia_ray.testing import FakeAnimator
from tests.online.video_server import hash_of

SECRET = "whsec_" + "A" * 44


def unanswered(url: str, _: int) -> bytes:
    """Waits as long as a picture's server that does not answer."""
    time.sleep(5)
    raise FetchUnavailable(f"{url} does not answer")


async def serve(folder: str, keys: list[str], bound: socket.socket) -> None:
    """Serves until the process is ended."""
    values = {
        "storage": folder,
        "batch_size": 4,
        "api_keys": [hash_of(key) for key in keys],
        "requests_per_minute": 100_000,
        "job_ttl_s": 60.0,
        "webhook_secret": SECRET,
    }
    config = ServeConfig.model_validate(values)
    webhooks = Webhooks(
        SECRET, retry_delays_s=(1.0,), allowed_networks=("127.0.0.1/32",), resolve=lambda *_: ["127.0.0.1"]
    )
    with FakeAnimator(config.default_model_config, styles=config.models, batch_size=4) as animator:
        renderer, jobs = LocalRenderer(animator, config), JobStore(folder, job_ttl_s=config.job_ttl_s)
        forms = FormReader(config, fetch_url=unanswered)
        app = create_endpoint(renderer, jobs, config, forms=forms, webhooks=webhooks, poll_s=0.5)
        await uvicorn.Server(uvicorn.Config(app, log_level="error")).serve(sockets=[bound])


if __name__ == "__main__":
    share_arenas()
    return_large_blocks()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        sys.stdout.write(f"http://127.0.0.1:{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        asyncio.run(serve(sys.argv[1], sys.argv[2:], listener))
