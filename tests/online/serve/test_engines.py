"""Engines behind real Ray Serve: events, errors, deaths, options, scale to zero. Animators are fakes."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from ray import serve
from starlette.types import Message, Receive, Scope, Send

from pia_ray.config.knobs import AnimationParams
from pia_ray.config.serve import ServeConfig, load_serve
from pia_ray.errors import ConfigError, NonFiniteFrames, PiaRayError, Timeout, WorkerDied
from pia_ray.media import video
from pia_ray.online.rendering.renderer import VIDEO_JOB, Event, Rendered, RenderRequest, StepDone
from pia_ray.online.serve import RayRenderer, build_app, proxy_middlewares
from pia_ray.online.serve.deployments import bind_engines, engine_options, ingress_options
from pia_ray.online.serve.engines import STATUS_S
from pia_ray.testing import make_fake_engine
from tests.online.serve.prompt import prompt_serve

heavy = pytest.mark.heavy
# Ray's client code of 2.60 leaves sockets and event loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def png() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(out, "PNG")
    return out.getvalue()


def ask(prompt: str = "a cat", request_id: str = "r", **how: Any) -> RenderRequest:
    knobs = {"num_frames": 4, "num_inference_steps": 3, "width": 64, "height": 64, **how.pop("knobs", {})}
    return RenderRequest(request_id, AnimationParams(prompt=prompt, **knobs), png(), **how)


@pytest.fixture
def engines(address: str, tmp_path: Path) -> Iterator[Callable[..., RayRenderer]]:
    """Starts engines by their settings; a renderer of this process on them."""

    def start(**settings: Any) -> RayRenderer:
        config = ServeConfig.model_validate({"batch_size": 2, "graceful_shutdown_s": 1, **prompt_serve(settings)})
        make = partial(make_fake_engine, marks=tmp_path, log=tmp_path / "log.jsonl")
        handle = serve.run(bind_engines(config, make_animator=make), name="test", route_prefix=None)
        return RayRenderer(handle, config)

    yield start
    serve.delete("test")


async def outcome(renderer: RayRenderer, request: RenderRequest) -> list[Event] | PiaRayError:
    """All events, or the error."""
    try:
        return [event async for event in renderer.render(request)]
    except PiaRayError as error:
        return error


def begun(folder: Path) -> list[dict[str, Any]]:
    """The rows that engines have begun."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@heavy
def test_an_engine_in_another_process_has_the_events_and_errors_of_a_local_one_and_a_job_fails_where_it_dies(
    engines: Callable[..., RayRenderer], tmp_path: Path
):
    renderer = engines()

    async def work() -> None:
        events = await outcome(renderer, ask())
        assert events[:-1] == [StepDone(1, 3), StepDone(2, 3), StepDone(3, 3)]
        assert isinstance(events[-1], Rendered)
        assert video.probe(events[-1].content).num_frames == 4
        assert isinstance(await outcome(renderer, ask("nan")), NonFiniteFrames)
        assert isinstance(await outcome(renderer, ask("hang", deadline_s=0.3)), Timeout)
        load = await renderer.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert [model.name for model in load.models] == ["demo"]
        # A call is made by another engine: test_one_endpoint.
        assert isinstance(await outcome(renderer, ask("die", "job", priority=VIDEO_JOB)), WorkerDied)
        assert [row["id"] for row in begun(tmp_path)] == ["r", "r", "r", "job"]

    asyncio.run(work())


@heavy
def test_a_request_wakes_engines_that_were_scaled_to_zero(engines: Callable[..., RayRenderer]):
    renderer = engines(min_replicas=0, upscale_delay_s=0)

    async def work() -> None:
        load = await renderer.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert "Engine" in serve.status().applications["test"].deployments
        assert not serve.status().applications["test"].deployments["Engine"].replica_states
        await renderer.check_ready()  # raises nothing
        assert isinstance((await outcome(renderer, ask()))[-1], Rendered)

    asyncio.run(work())


def test_serve_gets_the_options_that_follow_from_the_config():
    options = engine_options(load_serve(None, {"min_replicas": 0, "max_replicas": 3, "gpus_per_replica": 1}))
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (0, 3, 4)
    assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert options["graceful_shutdown_timeout_s"] >= 3900 + 10  # what is given back must get through


def test_options_of_the_user_go_over_ours_and_a_misspelt_one_is_refused():
    config = load_serve(
        None,
        {
            "deployment_config": {"num_replicas": 2, "ray_actor_options": {"num_cpus": 3}},
            "ingress_deployment_config": {"num_replica": 2},
        },
    )
    options = engine_options(config)
    assert options["num_replicas"] == 2
    assert "autoscaling_config" not in options
    assert options["ray_actor_options"]["num_cpus"] == 3
    assert "num_gpus" in options["ray_actor_options"]
    with pytest.raises(ConfigError, match='Did you mean "num_replicas"'):
        ingress_options(config)


def test_the_builder_takes_plain_settings_and_refuses_wrong_ones():
    assert isinstance(build_app({"model": "demo", "gpus_per_replica": "0"}), serve.Application)
    with pytest.raises(ConfigError, match='no model "demmo"'):
        build_app({"model": "demmo"})


def through_the_proxy(*messages: Message) -> tuple[int | None, dict[str, str], bytes]:
    """Status, headers and body that a caller gets where what is behind Serve's proxies sends these messages."""
    sent: list[Message] = []

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    app: Any = behind
    for each in proxy_middlewares():
        app = each.cls(app, *each.args, **each.kwargs)
    asyncio.run(app({"type": "http", "headers": []}, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:])


def says(status: int, content: bytes, *headers: tuple[bytes, bytes]) -> list[Message]:
    start = {"type": "http.response.start", "status": status, "headers": list(headers)}
    return [start, {"type": "http.response.body", "body": content}]


PLAIN = (b"content-type", b"text/plain; charset=utf-8")


def test_what_serve_itself_refuses_has_the_shape_of_the_endpoints_errors():
    status, headers, body = through_the_proxy(*says(429, b"dropped", PLAIN, (b"retry-after", b"7")))
    assert (status, headers["retry-after"], headers["content-type"]) == (429, "7", "application/json")
    assert json.loads(body)["error"]["code"] == "busy"
    status, headers, body = through_the_proxy(*says(503, b"unavailable", PLAIN))
    assert (status, json.loads(body)["error"]["code"], headers["x-should-retry"]) == (503, "not_ready", "true")
    status, _, body = through_the_proxy()
    assert (status, json.loads(body)["error"]["code"]) == (500, "worker_died")


def test_what_other_applications_say_passes_serves_proxy_as_it_is():
    for status in (200, 404, 429):
        asked = says(status, b"own words", PLAIN, (b"content-length", b"9"))
        assert through_the_proxy(*asked)[::2] == (status, b"own words")
    assert through_the_proxy(*says(200, b"streamed", PLAIN))[::2] == (200, b"streamed")


def test_readiness_asks_serve_once_at_a_time_however_long_it_takes(monkeypatch: pytest.MonkeyPatch):
    asked: list[float] = []
    answers = threading.Event()

    def status() -> Any:
        asked.append(time.monotonic())
        answers.wait(60)
        engines = SimpleNamespace(replica_states={"RUNNING": 1}, status="HEALTHY")
        return SimpleNamespace(applications={"app": SimpleNamespace(deployments={"Engine": engines})})

    async def work() -> None:
        handle: Any = SimpleNamespace(app_name="app", deployment_name="Engine")
        handle.options = lambda **_: handle
        renderer = RayRenderer(handle, ServeConfig())
        checks = [asyncio.create_task(renderer.check_ready())]
        await asyncio.sleep(STATUS_S + 0.1)
        checks += [asyncio.create_task(renderer.check_ready()) for _ in range(3)]
        await asyncio.sleep(0.1)
        answers.set()
        await asyncio.gather(*checks)  # none raises
        assert len(asked) == 1

    monkeypatch.setattr(serve, "status", status)
    try:
        asyncio.run(work())
    finally:
        answers.set()
