"""The HTTP interface over a renderer without a model: answers, events, errors, who is let in, who hangs up."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import io
import json
import logging
import re
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, Request
from fastapi.testclient import TestClient
from PIL import Image

from pia_ray import storage
from pia_ray.config.serve import ServeConfig
from pia_ray.errors import (
    BadParameter,
    Busy,
    Cancelled,
    DeviceLost,
    FetchUnavailable,
    NonFiniteFrames,
    OutOfMemory,
    PiaRayError,
    StorageUnavailable,
    Timeout,
    UnexpectedError,
)
from pia_ray.online.app import create_app
from pia_ray.online.http.middleware import request_id
from pia_ray.online.rendering.local_renderer import LocalRenderer
from pia_ray.online.rendering.renderer import Event, Load, Queued, RenderRequest, StepDone
from pia_ray.testing import FakeAnimator
from tests.videos import decode_frames

KEY, OTHER_KEY = "sk-first", "sk-second"
SMALL = {"num_frames": "4", "num_inference_steps": "3", "width": "64", "height": "48"}


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def png(width: int = 64, height: int = 48) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(out, "PNG")
    return out.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


class ScriptedRenderer:
    """A renderer with given events and then a given error; keeps its requests."""

    def __init__(self, *events: Event, error: BaseException | None = None, wait: bool = False) -> None:
        self.events, self.error, self.wait = events, error, wait
        self.requests: list[RenderRequest] = []
        self.closed = 0

    async def render(self, request: RenderRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        try:
            for event in self.events:
                yield event
            if self.wait:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1

    async def load(self) -> Load:
        if self.error is not None:
            raise self.error
        return Load(0, 0, None, ())

    async def check_ready(self) -> None:
        if self.error is not None:
            raise self.error


def client_of(renderer: Any, *, routers: tuple[APIRouter, ...] = (), **settings: Any) -> TestClient:
    config = ServeConfig.model_validate(settings)
    app = create_app(renderer, config, routers=routers)
    return TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000), raise_server_exceptions=False)


@pytest.fixture
def client() -> Iterator[TestClient]:
    config = ServeConfig.model_validate({"models": {"demo": "demo", "other": "demo"}, "batch_size": 1})
    animator = FakeAnimator(config.models["demo"], styles=config.models)
    made = TestClient(
        create_app(LocalRenderer(animator, config), config),
        base_url="http://127.0.0.1:8000",
        client=("127.0.0.1", 50000),
    )
    with made, animator:
        yield made


def animate(client: TestClient, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    files = {"image": ("upload", png(), "application/octet-stream")}
    return client.post(
        "/v1/animations", files=files, data={"prompt": "a cat", **SMALL, **fields}, headers=headers or {}
    )


def events_of(text: str) -> list[tuple[str, Any]]:
    events = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        events.append((lines["event"], json.loads(lines["data"])))
    return events


# One call


def test_an_upload_becomes_an_mp4_with_its_facts_in_the_headers(client: TestClient):
    answer = animate(client, seed="7")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "video/mp4"
    assert decode_frames(answer.content).shape == (4, 48, 64, 3)
    assert answer.headers["x-animation-seed"] == "7"
    assert json.loads(answer.headers["x-animation-params"])["num_inference_steps"] == 3
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'


def test_a_json_request_with_a_data_url_gives_the_video_of_the_same_upload(client: TestClient):
    uploaded = animate(client, seed="7")
    fields = {"image": data_url(png()), "prompt": "a cat", "seed": 7, "size": "64x48", "num_frames": 4}
    sent = client.post("/v1/animations", json={**fields, "num_inference_steps": 3})
    assert sent.status_code == 200, sent.text
    assert sent.headers["x-animation-params"] == uploaded.headers["x-animation-params"]


def test_requests_without_a_seed_get_seeds_of_their_own(client: TestClient):
    seeds = {animate(client).headers["x-animation-seed"] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/gif", "image/gif"),
        ("video/webm;q=0.5, image/webp", "image/webp"),
        ("video/*", "video/mp4"),
        ("*/*, video/mp4;q=0", "image/gif"),
        ("text/html, */*;q=0.1", "video/mp4"),
    ],
)
def test_accept_chooses_the_format(client: TestClient, accept: str, kind: str):
    answer = animate(client, {"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


def test_a_format_field_decides_among_what_is_accepted(client: TestClient):
    assert animate(client, format="gif").headers["content-type"] == "image/gif"
    refused = animate(client, {"accept": "video/mp4"}, format="gif")
    assert (refused.status_code, refused.json()["error"]["code"]) == (406, "not_acceptable")


def test_an_accept_header_without_any_video_is_refused_before_the_body_is_read():
    renderer = ScriptedRenderer()
    with client_of(renderer) as client:
        answer = client.post("/v1/animations", content=b"never read", headers={"accept": "application/pdf"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (406, "not_acceptable")


def test_a_model_is_chosen_by_name(client: TestClient):
    answer = animate(client, model="other")
    assert json.loads(answer.headers["x-animation-params"])["style"] == "other"
    wrong = animate(client, model="othr")
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "model"
    assert 'Did you mean "other"?' in wrong.json()["error"]["message"]


# Events


def test_events_tell_every_step_and_end_with_the_video(client: TestClient):
    answer = animate(client, {"accept": "text/event-stream"}, seed=str(2**64 - 1))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [value for name, value in events if name == "step"] == [{"done": n, "total": 3} for n in (1, 2, 3)]
    name, made = events[-1]
    assert (name, made["seed"], made["params"]["prompt"]) == ("completed", str(2**64 - 1), "a cat")
    content = base64.b64decode(made["video"].removeprefix("data:video/mp4;base64,"))
    assert hashlib.sha256(content).hexdigest() == made["sha256"]
    assert decode_frames(content).shape == (4, 48, 64, 3)


UNEVEN = {"prompt": "uneven", "seed": "50", "accept": "flicker<=0.0005"}
"""The fields of a request whose video flickers, and misses its bound."""


def test_a_video_that_misses_its_bounds_is_animated_again(client: TestClient):
    answer = animate(client, **UNEVEN, retakes="2")
    facts = {name: answer.headers[f"x-animation-{name}"] for name in ("accepted", "take", "takes")}
    assert facts.pop("take") in ("0", "1", "2")
    assert facts == {"accepted": "false", "takes": "3"}
    described = events_of(animate(client, {"accept": "text/event-stream"}, **UNEVEN, retakes="2").text)[-1][1]
    assert described["accepted"] is False
    assert [take["take"] for take in described["takes"]] == [0, 1, 2]
    assert described["seed"] == described["takes"][described["take"]]["seed"] == answer.headers["x-animation-seed"]


def test_a_video_none_of_whose_takes_is_accepted_is_refused_where_the_request_says_fail(client: TestClient):
    answer = animate(client, **UNEVEN, retakes="1", unaccepted="fail")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_accepted")


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"accept": "flickr<=1"}, "accept", "Did you mean"),
        ({"accept": "flicker>=0.5; flicker<=0.1"}, "accept", "cannot be met by any video"),
        ({"accept": "flicker<=1;" * 200}, "accept", "1000 characters"),
        ({"accept": "flicker<=1", "retakes": "5"}, "retakes", "from 0 to 4 at this endpoint"),
        ({"accept": "flicker<=1", "retakes": "half"}, "retakes", "whole number"),
        ({"accept": "flicker<=1", "unaccepted": "drop"}, "unaccepted", "keep or fail"),
    ],
)
def test_a_policy_that_is_not_valid_is_refused(client: TestClient, fields: dict[str, str], field: str, words: str):
    answer = animate(client, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert words in answer.json()["error"]["message"]


def test_the_position_in_the_queue_is_the_first_event():
    renderer = ScriptedRenderer(Queued(3), StepDone(1, 2), error=NonFiniteFrames("NaN in frame 2"))
    with client_of(renderer) as client:
        events = events_of(animate(client, {"accept": "text/event-stream"}).text)
    assert events[:2] == [("queued", {"position": 3}), ("step", {"done": 1, "total": 2})]
    assert events[2][0] == "error"
    assert events[2][1]["error"]["code"] == "nan_frames"


def test_a_refusal_is_a_status_also_for_a_stream_of_events():
    with client_of(ScriptedRenderer(error=Busy("9 requests wait", 7.2))) as client:
        answer = animate(client, {"accept": "text/event-stream"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "8")


# Errors


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry"),
    [
        (BadParameter("no such thing", "lora"), 400, "invalid_request_error", None),
        (Busy("many wait", 0.2), 429, "rate_limit_error", "true"),
        (FetchUnavailable("it answered 503"), 502, "server_error", "true"),
        (NonFiniteFrames("NaN"), 500, "server_error", "false"),
        (OutOfMemory("too large"), 507, "server_error", "true"),
        (Timeout("too slow"), 504, "server_error", "true"),
        (Cancelled("the engine ends"), 503, "server_error", "true"),
        (DeviceLost("CUDA error in /opt/secret"), 503, "server_error", "false"),
        (StorageUnavailable("s3://secret-bucket"), 503, "server_error", "true"),
        (UnexpectedError('Traceback: File "/opt/secret.py"'), 500, "server_error", "true"),
        (RuntimeError('File "/opt/secret.py"'), 500, "server_error", "true"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_error_has_a_status_a_type_and_no_secrets(error: Exception, status: int, kind: str, retry: str | None):
    with client_of(ScriptedRenderer(error=error)) as client:
        answer = animate(client, {"x-request-id": "from-the-gateway"})
    told = answer.json()["error"]
    assert (answer.status_code, told["type"], answer.headers.get("x-should-retry")) == (status, kind, retry)
    assert told["code"] == (error.code if isinstance(error, PiaRayError) else "unexpected")
    assert told["message"]
    assert answer.headers["x-request-id"] == "from-the-gateway"
    assert "secret" not in answer.text
    assert "secret" not in str(answer.headers)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/animations", 405, "method_not_allowed"),
        ("GET", "/v1/models/nobody", 404, "not_found"),
        ("POST", "/v1/animations", 415, "unsupported_body"),
    ],
)
def test_what_routing_refuses_has_the_same_shape(client: TestClient, method: str, path: str, status: int, code: str):
    answer = client.request(method, path)
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], set(told)) == (status, code, {"message", "type", "param", "code"})
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_wrong_query_parameter_names_its_field():
    routes = APIRouter()

    @routes.get("/v1/numbers")
    async def numbers(limit: int) -> dict[str, int]:
        return {"limit": limit}

    with client_of(ScriptedRenderer(), routers=(routes,)) as client:
        answer = client.get("/v1/numbers?limit=many")
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "limit")
    assert answer.json()["error"]["message"] == "limit must be a whole number"


def test_a_request_id_that_does_not_fit_a_log_is_replaced(client: TestClient):
    answer = client.get("/healthz", headers={"x-request-id": "two words"})
    assert answer.headers["x-request-id"].startswith("req_")


def test_the_log_line_has_the_id_and_neither_prompt_nor_line_breaks(
    client: TestClient, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, "pia_ray.online"):
        animate(client, {"x-request-id": "mine"}, prompt="a secret cat")
        client.get("/v1/a%0aforged line")
    lines = [record.getMessage() for record in caplog.records if record.name == "pia_ray.online.http.middleware"]
    assert lines[0].startswith("mine POST /v1/animations 200 ")
    assert "\n" not in lines[1]
    assert "secret" not in caplog.text


# Who is let in


def locked(renderer: Any = None, **settings: Any) -> TestClient:
    return client_of(renderer or ScriptedRenderer(), api_keys=(sha256(KEY), sha256(OTHER_KEY)), **settings)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/openapi.json", "/v1/nothing", "/metricsx"])
def test_without_its_key_no_path_but_health_says_anything(path: str):
    with locked() as client:
        for headers in ({}, bearer("sk-wrong"), {"authorization": f"Basic {KEY}"}, bearer(sha256(KEY))):
            answer = client.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert client.get(path, headers=bearer(OTHER_KEY)).status_code in (200, 404)
        assert client.get("/healthz").status_code == 200


def test_anonymous_callers_are_let_in_beside_keys_only_where_the_config_says_so():
    with locked(allow_anonymous=True) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers=bearer("sk-wrong")).status_code == 401


def test_each_key_is_an_owner_of_its_own():
    routes = APIRouter()

    @routes.get("/v1/me")
    async def me(request: Request) -> list[str]:
        return [request.state.owner, request_id(request)]

    with locked(routers=(routes,)) as client:
        first, again, other = (client.get("/v1/me", headers=bearer(key)).json()[0] for key in (KEY, KEY, OTHER_KEY))
    assert first == again != other
    assert sha256(KEY)[:16] not in first


def test_a_page_of_another_origin_cannot_use_an_open_endpoint():
    with client_of(ScriptedRenderer()) as client:
        refused = client.get("/v1/models", headers={"origin": "https://evil.example"})
        own = client.get("/v1/models", headers={"origin": "http://127.0.0.1:8000"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert own.status_code == 200
    assert not [name for name in own.headers if name.startswith("access-control")]


def test_a_name_that_is_led_to_this_machine_is_refused_by_an_open_endpoint():
    with client_of(ScriptedRenderer()) as client:
        assert client.get("/v1/models", headers={"host": "rebound.example"}).status_code == 403
        assert client.get("/v1/models", headers={"host": "[::1]:8000"}).status_code == 200
        assert client.get("/healthz", headers={"host": "10.1.2.3:8000"}).status_code == 200
    with client_of(ScriptedRenderer(), host="0.0.0.0", allow_anonymous=True) as client:
        assert client.get("/v1/models", headers={"host": "anything.example"}).status_code == 200


def test_answers_say_what_is_left_of_the_calls_a_minute_and_a_status_costs_little():
    with client_of(ScriptedRenderer(), requests_per_minute=60) as made:
        first = made.get("/v1/models").headers
        assert (first["x-ratelimit-limit-requests"], first["x-ratelimit-remaining-requests"]) == ("60", "59")
        assert first["x-ratelimit-reset-requests"].endswith(("ms", "s"))
        for _ in range(20):
            last = made.get("/v1/videos/video_1").headers
        assert int(last["x-ratelimit-remaining-requests"]) >= 56
        refused = [made.get("/v1/models") for _ in range(70)][-1]
        assert refused.status_code == 429
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-ratelimit-limit-requests" not in made.get("/healthz").headers


def test_callers_behind_a_trusted_proxy_have_calls_of_their_own_and_cannot_lend_themselves_an_address():
    with client_of(ScriptedRenderer(), requests_per_minute=2, trusted_proxies=["127.0.0.0/8"]) as made:

        def call(forwarded: str) -> int:
            return int(made.get("/v1/models", headers={"x-forwarded-for": forwarded}).status_code)

        assert [call("198.51.100.1") for _ in range(3)] == [200, 200, 429]
        assert call("6.6.6.6, 198.51.100.1") == 429
        assert call("198.51.100.2") == 200


def test_metrics_are_for_this_machine_or_for_the_token(client: TestClient):
    assert animate(client).status_code == 200
    text = client.get("/metrics").text
    assert 'pia_ray_http_requests_total{method="POST",replica="",route="/v1/animations",status="200"} 1.0' in text
    assert 'pia_ray_videos_total{model="demo",outcome="succeeded",replica=""} 1.0' in text
    assert client.get("/metrics", headers={"x-forwarded-for": "203.0.113.9"}).status_code == 403
    with client_of(ScriptedRenderer(), metrics_token="scrape") as guarded:
        assert guarded.get("/metrics").status_code == 403
        assert guarded.get("/metrics", headers=bearer("scrape")).status_code == 200
    elsewhere = TestClient(guarded.app, base_url="http://127.0.0.1:8000", client=("10.0.0.9", 1))
    assert elsewhere.get("/metrics", headers=bearer("scrap\u00e9".encode())).status_code == 403


# Limits


def test_more_calls_than_a_key_may_make_are_refused_until_a_stated_time():
    with locked(requests_per_minute=2) as client:
        statuses = [client.get("/v1/models", headers=bearer(KEY)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        refused = client.get("/v1/models", headers=bearer(KEY))
        assert (refused.json()["error"]["code"], int(refused.headers["retry-after"]) >= 1) == ("rate_limited", True)
        assert client.get("/v1/models", headers=bearer(OTHER_KEY)).status_code == 200


def test_wrong_keys_of_an_address_are_held_to_the_rate_of_a_key():
    with locked(requests_per_minute=2) as client:
        statuses = [client.get("/v1/models", headers=bearer(f"sk-{n}")).status_code for n in range(3)]
        assert statuses == [401, 401, 429]
        assert client.get("/v1/models", headers=bearer(KEY)).status_code == 200


def test_a_compressed_body_is_refused_as_such():
    with client_of(ScriptedRenderer()) as client:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = client.post("/v1/animations", content=gzip.compress(b"{}"), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_body")


def test_an_answer_about_the_method_names_the_methods_once():
    with client_of(ScriptedRenderer()) as client:
        answer = client.delete("/v1/animations")
        assert (answer.status_code, answer.headers.get_list("allow")) == (405, ["POST"])


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused_before_it_is_parsed(announced: bool):
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    renderer = ScriptedRenderer()
    with client_of(renderer, max_body_bytes=1000) as client:
        for kind in ("application/json", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
            content = b"x" * 2000 if announced else chunks()
            answer = client.post("/v1/animations", content=content, headers={"content-type": kind})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert not renderer.requests


@pytest.mark.parametrize(
    "headers",
    [
        {"x-request-timeout-seconds": "-1"},
        {"x-request-timeout-seconds": "0"},
        {"x-request-timeout-seconds": "nan"},
        {"x-request-timeout-seconds": "1e9"},
        {"x-request-disconnect-disabled": "?1"},
    ],
)
def test_headers_that_switch_off_serves_timeout_or_cancel_are_refused(headers: dict[str, str]):
    renderer = ScriptedRenderer()
    with client_of(renderer) as client:
        answer = animate(client, headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(headers)))
    assert not renderer.requests


def test_headers_for_serve_do_not_reach_the_routes():
    routes = APIRouter()

    @routes.get("/v1/headers")
    async def headers(request: Request) -> list[str]:
        return list(request.headers)

    with client_of(ScriptedRenderer(), routers=(routes,)) as client:
        sent = {"x-request-timeout-seconds": "30", "x-request-disconnect-disabled": "?0", "x-mine": "1"}
        seen = client.get("/v1/headers", headers=sent).json()
    assert "x-mine" in seen
    assert not {"x-request-timeout-seconds", "x-request-disconnect-disabled"} & set(seen)


def test_a_call_that_takes_too_long_is_given_up_and_its_render_closed():
    renderer = ScriptedRenderer(StepDone(1, 9), wait=True)
    with client_of(renderer, sync_timeout_s=0.2) as client:
        answer = animate(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert renderer.closed == 1


# Who hangs up


def hang_up(app: Any, *, accept: str, body: bytes, after: str) -> list[dict[str, Any]]:
    """What the app sends to a caller that leaves: "body" when half the body is sent, "step" once a step was heard."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/animations",
        "raw_path": b"/v1/animations",
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1:8000"),
            (b"content-type", b"application/json"),
            (b"accept", accept.encode()),
        ],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }

    async def call() -> list[dict[str, Any]]:
        heard: list[dict[str, Any]] = []
        leave = asyncio.Event()
        parts = [body[: len(body) // 2], body[len(body) // 2 :]]

        async def receive() -> dict[str, Any]:
            if after == "body" and len(parts) == 1:
                return {"type": "http.disconnect"}
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            heard.append(message)
            if b"event: step" in message.get("body", b""):
                leave.set()

        if accept != "text/event-stream":
            asyncio.get_running_loop().call_later(0.3, leave.set)
        async with asyncio.timeout(20):
            await app(scope, receive, send)
        return heard

    return asyncio.run(call())


def test_a_hang_up_is_no_fault_of_the_endpoint_in_the_metrics():
    app = create_app(ScriptedRenderer(StepDone(1, 9), wait=True), ServeConfig.model_validate({}))
    body = json.dumps({"image": data_url(png()), "prompt": "a cat"}).encode()
    hang_up(app, accept="video/mp4", body=body, after="step")
    text = TestClient(app, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 50000)).get("/metrics").text
    counted = [line for line in text.splitlines() if line.startswith("pia_ray_http_requests_total{")]
    assert [line for line in counted if 'status="499"' in line]
    assert not [line for line in counted if 'status="5' in line]


@pytest.mark.parametrize("accept", ["video/mp4", "text/event-stream"])
def test_hanging_up_ends_the_render(accept: str):
    renderer = ScriptedRenderer(StepDone(1, 9), wait=True)
    app = create_app(renderer, ServeConfig.model_validate({}))
    body = json.dumps({"image": data_url(png()), "prompt": "a cat"}).encode()
    hang_up(app, accept=accept, body=body, after="step")
    assert (len(renderer.requests), renderer.closed) == (1, 1)


def test_hanging_up_in_the_middle_of_the_body_starts_no_render(caplog: pytest.LogCaptureFixture):
    renderer = ScriptedRenderer(StepDone(1, 9), wait=True)
    app = create_app(renderer, ServeConfig.model_validate({}))
    hang_up(app, accept="video/mp4", body=b'{"prompt": "a cat"}', after="body")
    assert not renderer.requests
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# What there is


def test_models_are_listed_and_found_by_name(client: TestClient):
    listed = client.get("/v1/models").json()
    assert [(model["id"], model["object"], model["default"]) for model in listed["data"]] == [
        ("demo", "model", True),
        ("other", "model", False),
    ]
    assert client.get("/v1/models/other").json() == listed["data"][1]


def test_ready_is_said_only_while_engines_answer():
    with client_of(ScriptedRenderer()) as client:
        assert client.get("/readyz").status_code == 200
    with client_of(ScriptedRenderer(error=DeviceLost("gone"))) as client:
        assert client.get("/healthz").status_code == 200
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "device_lost")


def test_every_answer_forbids_sniffing_storing_and_embedding(client: TestClient):
    for path in ("/healthz", "/v1/nothing", "/v1/models"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]


def test_the_openapi_document_has_every_field_example_and_error(client: TestClient):
    from pia_ray.config.knobs import KNOBS

    document = client.get("/openapi.json").json()
    route = document["paths"]["/v1/animations"]["post"]
    for kind in ("multipart/form-data", "application/json"):
        schema = route["requestBody"]["content"][kind]["schema"]
        assert {*KNOBS, "image", "input_reference", "model", "format", "size", "seconds"} <= set(schema["properties"])
        assert all(field.get("description") for field in schema["properties"].values())
        assert schema["additionalProperties"] is False
    (folded,) = route["requestBody"]["content"]["multipart/form-data"]["schema"]["patternProperties"]
    for name in ("lora[pixar]", "image[image_url]", "affinity[]"):
        assert re.search(folded, name)
    for name in ("tags[]", "image[path]", "lora", "prompt[x]"):
        assert not re.search(folded, name)
    assert {"400", "401", "413", "415", "429", "500", "503"} <= set(route["responses"])
    assert route["security"] == [{"api_key": []}]
    assert document["components"]["schemas"]["Error"]["required"] == ["error"]
    for path in document["paths"].values():
        for operation in path.values():
            assert operation["summary"]
            assert operation["operationId"]


def test_a_file_of_keys_that_cannot_be_read_stops_the_start(tmp_path: Path):
    from pia_ray.errors import ConfigError

    with pytest.raises(ConfigError, match="api_keys"):
        client_of(ScriptedRenderer(), api_keys=str(tmp_path / "none"))
    storage.write_bytes(str(tmp_path / "keys"), b"sk-plain-text-key\n")
    with pytest.raises(ConfigError, match="line 1") as raised:
        client_of(ScriptedRenderer(), api_keys=str(tmp_path / "keys"))
    assert "plain" not in str(raised.value)
