"""`make soak`: 50 clients, dead receivers and dead picture servers for `PIA_RAY_SOAK_S` seconds leave memory flat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.chaos.memory import slope
from tests.online.video_server import png
from tests.processes import num_descriptors, private_bytes

CLIENTS = 50
ROOT = Path(__file__).parents[2]
FIELDS = {"num_frames": "2", "num_inference_steps": "2", "width": "32", "height": "32"}
PICTURE = png(32, 32)
MOST_BYTES_PER_S = 10_000
"""Growth of the server's memory after the first half. Its indexes on disk grow by more than that."""

Action = Callable[[httpx2.AsyncClient, int], Awaitable[str]]


async def made(client: httpx2.AsyncClient, hook: int, *, every: int = 8) -> str:
    """A job from its creation to its download and deletion; each eighth has a webhook to the dead receiver."""
    fields = {**FIELDS, "prompt": "a boat"}
    if random.randrange(every) == 0:
        fields["webhook_url"] = f"https://dead-{random.randrange(40)}.test:{hook}/hook"
    answer = await client.post("/v1/videos", data=fields, files={"image": PICTURE})
    if answer.status_code == 429:
        await asyncio.sleep(1)
        return "429"
    path = f"/v1/videos/{answer.raise_for_status().json()['id']}"
    while (video := (await client.get(path)).raise_for_status().json())["status"] not in ("completed", "failed"):
        await asyncio.sleep(0.5)
    assert video["status"] == "completed", video
    assert (await client.get(f"{path}/content")).raise_for_status().content
    if "webhook_url" not in fields:
        (await client.delete(path)).raise_for_status()
    return "made"


async def abandoned(client: httpx2.AsyncClient, _: int) -> str:
    """A call and a stream of events whose caller hangs up."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(random.uniform(0.01, 0.3)):
            await client.post("/v1/animations", data={**FIELDS, "prompt": "gone"}, files={"image": PICTURE})
    answer = await client.post("/v1/videos", data={**FIELDS, "prompt": "left"}, files={"image": PICTURE})
    if answer.status_code == 200:
        async with client.stream("GET", f"/v1/videos/{answer.json()['id']}/events") as stream:
            await anext(stream.aiter_bytes(), b"")
        await client.delete(f"/v1/videos/{answer.json()['id']}")
    return "abandoned"


async def without_picture(client: httpx2.AsyncClient, _: int) -> str:
    """A job whose picture's server does not answer."""
    fields = {**FIELDS, "prompt": "never", "image": f"https://dead-{random.randrange(40)}.test/a.png"}
    answer = await client.post("/v1/videos", json=fields)
    assert answer.status_code in (429, 502), answer.text
    await asyncio.sleep(0.5)
    return "without picture"


async def client_of(url: str, key: str, hook: int, until: float, counts: Counter[str]) -> None:
    """Acts as one client until that time."""
    actions: list[Action] = [made, made, made, made, abandoned, without_picture]
    settings: dict[str, Any] = {"base_url": url, "headers": {"authorization": f"Bearer {key}"}, "timeout": 120}
    # Idle connections end before the server ends them after 5 s, else a request may come as it does so.
    settings["limits"] = httpx2.Limits(keepalive_expiry=1)
    async with httpx2.AsyncClient(**settings) as client:
        while time.monotonic() < until:
            counts[await random.choice(actions)(client, hook)] += 1


async def watched(server: int, until: float) -> list[tuple[float, int, int]]:
    """Seconds, memory and descriptors of the server, every second."""
    samples, began = [], time.monotonic()
    while time.monotonic() < until:
        samples.append((time.monotonic() - began, private_bytes(server), num_descriptors(server)))
        await asyncio.sleep(1)
    return samples


@pytest.mark.soak
def test_fifty_clients_with_dead_receivers_and_picture_servers_leave_the_memory_flat(tmp_path: Path) -> None:
    seconds = float(os.environ.get("PIA_RAY_SOAK_S", "600"))
    keys = [f"key-{number}" for number in range(CLIENTS)]
    command = [sys.executable, "-m", "tests.online.soak_server", str(tmp_path / "serve"), *keys]
    counts = Counter[str]()

    async def work(url: str, server: int, hook: int) -> list[tuple[float, int, int]]:
        until = time.monotonic() + seconds
        clients = [client_of(url, key, hook, until, counts) for key in keys]
        samples, *_ = await asyncio.gather(watched(server, until), *clients)
        return samples

    with (
        socket.create_server(("127.0.0.1", 0), backlog=256) as dead,
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            samples = asyncio.run(work(url, process.pid, dead.getsockname()[1]))
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        finally:
            process.terminate()
    settled = [each for each in samples if each[0] > seconds / 2]
    growth = slope([each[:2] for each in settled])
    facts = {"counts": dict(counts), "bytes per s": round(growth), "samples": samples[:: max(1, len(samples) // 12)]}
    sys.stdout.write(json.dumps(facts) + "\n")
    assert counts["made"] > CLIENTS
    assert growth < MOST_BYTES_PER_S
    assert settled[-1][2] <= max(each[2] for each in settled[: len(settled) // 2]) + CLIENTS
