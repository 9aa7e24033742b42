"""The online endpoint under load: its throughput beside batch mode of the same animator, latencies, refusals.

The endpoint and its clients are one process, over HTTP on a free port, without Ray. Prints a card and, last, one JSON
line. Run: `.venv/bin/python benchmarks/online.py [--animator demo] [--clients N] [--requests N] [--rounds N]`
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import count

import card
import httpx2
import uvicorn
from PIL import Image

from pia_ray.animation import Animation, RowAnimator, provenance_of
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig
from pia_ray.media import video
from pia_ray.online.rendering.local_renderer import LocalRenderer, decode
from pia_ray.online.rendering.renderer import RenderRequest
from pia_ray.online.service import create_endpoint
from pia_ray.online.video_jobs import JobStore

ROWS_AT_ONCE = 4
STATUS_BUSY = 429


class Load:
    """The requests of a run, each with a seed of its own, so that none is another one's duplicate."""

    def __init__(self, *, side: int, frames: int, steps: int) -> None:
        out = io.BytesIO()
        Image.linear_gradient("L").resize((side, side)).convert("RGB").save(out, "PNG")
        self.picture = out.getvalue()
        self.knobs = {
            "prompt": "waves roll to the shore",
            "width": side,
            "height": side,
            "num_frames": frames,
            "num_inference_steps": steps,
        }
        self._url = f"data:image/png;base64,{base64.b64encode(self.picture).decode()}"
        self._seeds = count()

    def body(self) -> dict[str, object]:
        """The next request, as the endpoint takes it."""
        return {**self.knobs, "seed": next(self._seeds), "image": self._url}

    def request(self) -> RenderRequest:
        """The next request, as batch mode takes it."""
        params = AnimationParams.model_validate({**self.knobs, "seed": next(self._seeds)})
        return RenderRequest(id=f"row-{params.seed}", params=params, image=self.picture)


def main() -> None:
    """Batch mode and the endpoint by turns, then the endpoint with more callers than it has places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--animator", choices=("fake", "demo"), default="fake", help="fake: sleeps for each step")
    parser.add_argument("--clients", type=int, default=12, help="clients that each wait for their video (12)")
    parser.add_argument("--requests", type=int, default=48, help="videos in each round, in each mode (48)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median of their ratios counts (3)")
    parser.add_argument("--overload", type=int, default=60, help="callers at once in the last part (60)")
    parser.add_argument("--side", type=int, default=64, help="px of the square frames (64)")
    parser.add_argument("--frames", type=int, default=16, help="frames of each video (16)")
    parser.add_argument("--steps", type=int, default=10, help="inference steps of each video (10)")
    parser.add_argument("--step-s", type=float, default=0.02, help="seconds of a step of the fake animator (0.02)")
    asyncio.run(measure(parser.parse_args()))


async def measure(arguments: argparse.Namespace) -> None:
    """Takes all times and prints them."""
    load = Load(side=arguments.side, frames=arguments.frames, steps=arguments.steps)
    batch_rates: list[float] = []
    online_rates: list[float] = []
    latencies: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = ServeConfig.model_validate(
            {
                "storage": folder,
                "batch_size": ROWS_AT_ONCE,
                "max_waiting": max(16, 2 * (arguments.clients - ROWS_AT_ONCE)),
                "requests_per_minute": 10**9,
                "max_requests_per_key": 10**9,
            }
        )
        animator = animator_of(arguments.animator, config, step_s=arguments.step_s)
        async with endpoint(animator, config) as client:
            await asyncio.to_thread(batch, animator, load, config, ROWS_AT_ONCE)  # warms up, as the next line does
            await clients(client, load, num_clients=ROWS_AT_ONCE, num_requests=ROWS_AT_ONCE)
            for turn in range(arguments.rounds):
                for mode in ("batch", "online")[:: -1 if turn % 2 else 1]:
                    if mode == "batch":
                        seconds = await asyncio.to_thread(batch, animator, load, config, arguments.requests)
                        batch_rates.append(arguments.requests / seconds)
                    else:
                        seconds, answered = await clients(
                            client, load, num_clients=arguments.clients, num_requests=arguments.requests
                        )
                        online_rates.append(arguments.requests / seconds)
                        latencies += answered
            statuses, served_s = await overload(client, load, num_callers=arguments.overload)
    report(arguments, config, batch_rates, online_rates, latencies, statuses, served_s)


def report(
    arguments: argparse.Namespace,
    config: ServeConfig,
    batch_rates: list[float],
    online_rates: list[float],
    latencies: list[float],
    statuses: Counter[int],
    served_s: list[float],
) -> None:
    """The card and the JSON line."""
    ratios = [online / batched for online, batched in zip(online_rates, batch_rates, strict=True)]
    p50, p95, p99 = percentiles(latencies)
    places = config.max_batch_size + config.max_waiting - config.max_waiting // 4  # the last ones are for other callers
    refused = statuses[STATUS_BUSY] / arguments.overload
    others = {status: number for status, number in statuses.items() if status not in (200, STATUS_BUSY)}
    print(
        f"online: {arguments.animator} animator, {arguments.side} x {arguments.side} px, {arguments.frames} frames, "
        f"{arguments.steps} steps, {config.max_batch_size} rows at once; {arguments.rounds} rounds by turns of "
        f"{arguments.requests} videos"
    )
    print("                                        videos per s, medians")
    print(f"  batch mode                            {statistics.median(batch_rates):8.2f}")
    print(
        f"  endpoint, {arguments.clients:3} clients                 {statistics.median(online_rates):8.2f}   "
        f"{statistics.median(ratios):.2f} of batch mode ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(f"  latency of a video, s                 p50 {p50:.2f}   p95 {p95:.2f}   p99 {p99:.2f}")
    print(
        f"  overload: {arguments.overload} callers at once, {places} places: {refused:.0%} refused with 429, "
        f"{statuses[200]} served, {sum(others.values())} answered otherwise"
    )
    if served_s:
        print(f"  latency of those served, s            p50 {percentiles(served_s)[0]:.2f}   max {max(served_s):.2f}")
    facts = card.machine("torch", "fastapi", "uvicorn")
    print(f"  {card.line(facts)}")
    result = {
        "benchmark": "online",
        **{name: value for name, value in vars(arguments).items() if name != "step_s" or arguments.animator == "fake"},
        "max_batch_size": config.max_batch_size,
        "max_waiting": config.max_waiting,
        "batch_per_s": round(statistics.median(batch_rates), 3),
        "online_per_s": round(statistics.median(online_rates), 3),
        "online_to_batch": round(statistics.median(ratios), 4),
        "online_to_batch_rounds": [round(ratio, 4) for ratio in ratios],
        "latency_s": {"p50": round(p50, 4), "p95": round(p95, 4), "p99": round(p99, 4)},
        "overload_refused": round(refused, 4),
        "overload_statuses": {str(status): number for status, number in sorted(statuses.items())},
        **facts,
    }
    print(json.dumps(result))


def animator_of(name: str, config: ServeConfig, *, step_s: float) -> RowAnimator:
    """The animator of both modes."""
    model = config.models[config.default_model]
    if name == "demo":
        from pia_ray.pia.animator import Animator  # torch takes seconds, and the fake one does without

        return Animator(model, styles=config.models, batch_size=config.max_batch_size)
    from pia_ray.testing import FakeAnimator

    return FakeAnimator(model, styles=config.models, batch_size=config.max_batch_size, seconds_per_step=step_s)


def batch(animator: RowAnimator, load: Load, config: ServeConfig, num_rows: int) -> float:
    """Seconds of that many rows, all handed over at once, with the decoding and encoding that the endpoint does."""
    requests = [load.request() for _ in range(num_rows)]
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:  # as many as encode behind the endpoint
        rows = [animator.submit(decode(request, config, deadline_s=None)) for request in requests]
        for encoded in [threads.submit(encode, row.result()) for row in rows]:
            encoded.result()
    return time.perf_counter() - started


def encode(animation: Animation) -> None:
    """The files that an endpoint makes of a row."""
    fps = animation.params.fps
    video.verify(video.encode(animation.frames, fps=fps, format="mp4", provenance=provenance_of(animation)))
    video.thumbnail(animation.frames, fps=fps)
    video.spritesheet(animation.frames)


async def clients(
    client: httpx2.AsyncClient, load: Load, *, num_clients: int, num_requests: int
) -> tuple[float, list[float]]:
    """Seconds of that many requests, and of each; every client sends its next one when it has its video."""
    left: Iterator[int] = iter(range(num_requests))
    latencies: list[float] = []

    async def one_client() -> None:
        for _ in left:  # shared: who is free takes the next
            status, seconds = await ask(client, load)
            if status != 200:
                raise SystemExit(f"a request was answered with {status} while there were places")
            latencies.append(seconds)

    started = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(num_clients)))
    return time.perf_counter() - started, latencies


async def overload(client: httpx2.AsyncClient, load: Load, *, num_callers: int) -> tuple[Counter[int], list[float]]:
    """Answers to so many callers at once, none of whom tries again, and the seconds of those that were served."""
    answers = await asyncio.gather(*(ask(client, load) for _ in range(num_callers)))
    return Counter(status for status, _ in answers), [seconds for status, seconds in answers if status == 200]


async def ask(client: httpx2.AsyncClient, load: Load) -> tuple[int, float]:
    """Status and seconds of one call."""
    body = load.body()
    started = time.perf_counter()
    answer = await client.post("/v1/animations", json=body)
    return answer.status_code, time.perf_counter() - started


@asynccontextmanager
async def endpoint(animator: RowAnimator, config: ServeConfig) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the whole endpoint on a free port, as long as the block lasts. Closes the animator."""
    renderer = LocalRenderer(animator, config)
    app = create_endpoint(renderer, JobStore(config.storage, job_ttl_s=config.job_ttl_s), config)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(1024)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        unlimited = httpx2.Limits(max_connections=None)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            async with httpx2.AsyncClient(base_url=url, timeout=600, limits=unlimited) as client:
                yield client
        finally:
            server.should_exit = True
            await serving
            await renderer.close()


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """The 50th, 95th and 99th."""
    if len(seconds) < 2:
        return (seconds[0],) * 3
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]


if __name__ == "__main__":
    main()
