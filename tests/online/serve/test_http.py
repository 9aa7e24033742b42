"""The endpoint over HTTP through Ray Serve's own proxy: videos, refusals, hang-ups, deaths. Animators are fakes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from openai import OpenAI
from PIL import Image
from ray import cloudpickle, serve
from ray.serve.schema import ServeDeploySchema

from pia_ray.animation import RowAnimator
from pia_ray.config.serve import ServeConfig, load_serve
from pia_ray.media import video
from pia_ray.online.serve import build_endpoint
from pia_ray.online.serve.deployments import ingress_options
from pia_ray.online.serve.engines import MakeAnimator
from pia_ray.testing import make_fake_engine
from tests.online.serve.prompt import prompt_serve

pytestmark = [
    pytest.mark.heavy,
    # Ray's client code of 2.60 leaves sockets and event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas import what they use of this module, not all

KNOBS = {"prompt": "a cat", "num_frames": "4", "num_inference_steps": "3", "width": "64", "height": "64"}


def noise(width: int = 64, height: int = 64) -> bytes:
    out = io.BytesIO()
    Image.frombytes("RGB", (width, height), os.urandom(3 * width * height)).save(out, "PNG", compress_level=0)
    return out.getvalue()


def make_when_let(make: MakeAnimator, held_back_by: Path, config: ServeConfig, cpu_threads: int) -> RowAnimator:
    """An engine's animator, once that file is not there."""
    while held_back_by.exists():
        time.sleep(0.05)
    return make(config, cpu_threads)


@pytest.fixture
def endpoint(address: str, tmp_path: Path) -> Iterator[Callable[..., httpx2.Client]]:
    """Starts an endpoint by its settings; a client of it."""
    clients = []

    def start(step_s: float = 0.0, held_back_by: Path | None = None, **settings: Any) -> httpx2.Client:
        config = ServeConfig.model_validate(
            {"batch_size": 2, "graceful_shutdown_s": 1, "storage": str(tmp_path / "jobs"), **prompt_serve(settings)}
        )
        make = partial(make_fake_engine, seconds_per_step=step_s, marks=tmp_path, log=tmp_path / "log.jsonl")
        if held_back_by is not None:
            make = partial(make_when_let, make, held_back_by)
        serve.run(build_endpoint(config, make_animator=make), name="test", route_prefix="/")
        clients.append(httpx2.Client(base_url=address, timeout=100))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    serve.delete("test")


def animate(client: httpx2.Client, *, picture: bytes | None = None, **how: Any) -> httpx2.Response:
    fields = {**KNOBS, **how.pop("fields", {})}
    return client.post("/v1/animations", data=fields, files={"image": ("upload", picture or noise())}, **how)


def begun(folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_picture_becomes_a_video_and_a_wrong_knob_an_error_that_names_it(endpoint: Callable[..., httpx2.Client]):
    client = endpoint()
    answer = animate(client)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert video.probe(answer.content).num_frames == 4
    assert len(answer.headers.get_list("x-request-id", split_commas=True)) == 1
    refused = animate(client, fields={"motion_scale": "99"})
    assert refused.status_code in (400, 422)
    assert refused.json()["error"]["param"] == "motion_scale"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
    assert client.get("/readyz").status_code == 200


def test_a_call_survives_one_death_of_its_engine_and_a_second_is_an_error_and_not_a_loop(
    endpoint: Callable[..., httpx2.Client], tmp_path: Path
):
    client = endpoint()
    answer = animate(client, fields={"prompt": "die-once"})
    assert answer.status_code == 200
    assert video.probe(answer.content).num_frames == 4
    assert len({row["pid"] for row in begun(tmp_path)}) == 2
    before = len(begun(tmp_path))
    answer = animate(client, fields={"prompt": "die"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "worker_died"
    assert len(begun(tmp_path)) == before + 2


def test_an_engine_whose_device_hangs_is_replaced_and_its_call_and_job_are_made_by_the_next(
    endpoint: Callable[..., httpx2.Client], tmp_path: Path
):
    client = endpoint(stall_timeout_s=8)
    answer = animate(client, fields={"prompt": "hang-once"})
    assert answer.status_code == 200, answer.text
    job = created(client, prompt="hang-once")
    assert ended(client, job, seconds=180)["status"] == "completed"
    rows = begun(tmp_path)
    assert len(rows) == 4
    assert len({row["pid"] for row in rows}) == 3  # the second engine made the call and hung in the job


def test_an_endpoint_is_not_ready_while_its_engines_are_away(endpoint: Callable[..., httpx2.Client], tmp_path: Path):
    client = endpoint(held_back_by=tmp_path / "held")
    assert client.get("/readyz").status_code == 200
    (tmp_path / "held").touch()  # the next engine waits here, as one that loads a model
    for pid in replicas("Engine"):
        os.kill(pid, signal.SIGKILL)
    until(lambda: client.get("/readyz").status_code == 503, seconds=120)
    answer = client.get("/readyz")
    assert answer.json()["error"]["code"] == "not_ready"
    assert client.get("/healthz").status_code == 200
    (tmp_path / "held").unlink()
    until(lambda: client.get("/readyz").status_code == 200, seconds=120)
    assert animate(client).status_code == 200


def created(client: httpx2.Client, **fields: str) -> str:
    answer = client.post("/v1/videos", data={**KNOBS, **fields}, files={"input_reference": ("upload", noise())})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def ended(client: httpx2.Client, job: str, *, seconds: float) -> dict[str, Any]:
    document: dict[str, Any] = {}

    def look() -> bool:
        try:
            answer = client.get(f"/v1/videos/{job}")
        except httpx2.TransportError:
            return False  # an ingress that was killed
        if answer.status_code == 200:
            document.update(answer.json())
        return document.get("status") in ("completed", "failed")

    until(look, seconds=seconds)
    return document


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
@pytest.mark.parametrize("deployment", ["Engine", "Ingress"])
def test_a_video_of_the_openai_client_survives_kill_9_of_the_process_that_makes_it(
    endpoint: Callable[..., httpx2.Client], tmp_path: Path, deployment: str
):
    client = endpoint(step_s=0.2)
    url = str(client.base_url.join("/v1"))
    with OpenAI(base_url=url, api_key="none", timeout=60, max_retries=20) as caller:
        knobs = {name: value for name, value in KNOBS.items() if name != "prompt"} | {"num_inference_steps": 20}
        asked = caller.videos.create(prompt="a cat", input_reference=noise(), extra_body=knobs)
        until(lambda: len(begun(tmp_path)) == 1, seconds=60)
        killed = replicas(deployment)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        made = caller.videos.poll(asked.id)
        assert (made.status, made.progress) == ("completed", 100)
        assert not set(replicas(deployment)) & set(killed)
        assert video.probe(caller.videos.download_content(made.id).content).num_frames == 4
        assert [each.id for each in caller.videos.list()] == [made.id]
    assert {row["id"] for row in begun(tmp_path)} == {asked.id}


def replicas(deployment: str) -> list[int]:
    """Process ids of a deployment's replicas, children of a raylet that this process has started.

    Ray writes the names of actors over command lines.
    """
    name, found = f"ServeReplica:test:{deployment}", []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if name in (process / "cmdline").read_text() and parent_of(parent_of(int(process.name))) == os.getpid():
                found.append(int(process.name))
    return sorted(found)


def parent_of(pid: int) -> int:
    return int(re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1])


def test_a_client_that_hangs_up_frees_the_engine_whatever_its_headers(
    endpoint: Callable[..., httpx2.Client], tmp_path: Path
):
    client = endpoint(step_s=0.3, batch_size=1, max_waiting=0, max_steps=1000)
    fields = {**KNOBS, "num_inference_steps": "1000"}
    headers_of_serve = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "-1"}
    for headers in ({}, headers_of_serve):
        before = len(begun(tmp_path))
        call = client.build_request("POST", "/v1/animations", data=fields, files={"image": noise()}, headers=headers)
        head = "".join(f"{name}: {value}\r\n" for name, value in call.headers.items())
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as connection:
            connection.sendall(f"POST /v1/animations HTTP/1.1\r\n{head}\r\n".encode() + call.read())
            until(lambda before=before: len(begun(tmp_path)) > before, seconds=100)
        until(lambda: animate(client).status_code == 200, seconds=100)  # of the other's 300 s


def test_a_call_ends_at_the_endpoints_deadline_whatever_its_headers(endpoint: Callable[..., httpx2.Client]):
    client = endpoint(sync_timeout_s=1.5)
    answer = animate(client, fields={"prompt": "hang"}, headers={"x-request-timeout-seconds": "-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_a_hundred_clients_are_answered_or_refused_with_a_time_in_bounded_memory(
    endpoint: Callable[..., httpx2.Client],
):
    client = endpoint(step_s=0.2, max_waiting=6, max_body_bytes=3_500_000)
    assert animate(client).status_code == 200
    processes = [*replicas("Ingress"), *replicas("Engine")]
    before = [memory(pid, "VmRSS") for pid in processes]
    answers = crowd(client, 100, picture=noise(1000, 1000))  # 3 MB each: 300 MB in all
    assert len(answers) == 100
    assert {answer.status_code for answer in answers} == {200, 429}
    made = [answer for answer in answers if answer.status_code == 200]
    assert len(made) >= 8
    assert all(video.probe(answer.content).num_frames == 4 for answer in made)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"busy"}
    assert [*replicas("Ingress"), *replicas("Engine")] == processes
    grown = [memory(pid, "VmHWM") - size for pid, size in zip(processes, before, strict=True)]
    assert max(grown) < 256_000_000, grown  # 130 MB measured: eight of the largest bodies, and copies of them


def test_what_serve_refuses_by_itself_has_the_shape_of_all_errors(endpoint: Callable[..., httpx2.Client]):
    client = endpoint(step_s=0.3, ingress_deployment_config={"max_ongoing_requests": 1, "max_queued_requests": 1})
    answers = crowd(client, 8)
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        assert len(answer.headers.get_list("x-request-id", split_commas=True)) == 1
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert (error["code"], error["type"], error["param"]) == ("busy", "rate_limit_error", None)


def crowd(client: httpx2.Client, num: int, *, picture: bytes | None = None) -> list[httpx2.Response]:
    """The answers to so many calls at once."""
    limits = httpx2.Limits(max_connections=num, max_keepalive_connections=num)
    with httpx2.Client(base_url=client.base_url, timeout=300, limits=limits) as together:
        with ThreadPoolExecutor(num) as threads:
            calls = [threads.submit(animate, together, picture=picture) for _ in range(num)]
        return [call.result() for call in calls]


def memory(pid: int, what: str) -> int:
    """Bytes that a process has in memory (VmRSS), or at most had (VmHWM)."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def half_a_call(client: httpx2.Client, *, announced: int, sent: bytes) -> socket.socket:
    """A connection on which a call for a video has begun, with that much of its body."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)
    head = (
        f"POST /v1/animations HTTP/1.1\r\nHost: 127.0.0.1:{client.base_url.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {announced}\r\n\r\n"
    )
    connection.sendall(head.encode() + sent)
    return connection


def answer_on(connection: socket.socket) -> bytes:
    """All that comes until the server is silent for a second after an answer, or hangs up."""
    content = b""
    while b"}}" not in content and (chunk := connection.recv(65536)):
        content += chunk
    return content


def test_slow_and_broken_clients_are_given_up_and_delay_no_others(
    endpoint: Callable[..., httpx2.Client], tmp_path: Path
):
    client = endpoint(batch_size=1, max_waiting=0, body_timeout_s=6)
    port = client.base_url.port
    with ExitStack() as open_ones:
        slow = [open_ones.enter_context(half_a_call(client, announced=10_000, sent=b'{"prompt": "')) for _ in range(20)]
        headless = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        headless.sendall(b"POST /v1/animations HTTP/1.1\r\nHost: 127")
        for _ in range(20):
            half_a_call(client, announced=10_000, sent=b'{"prompt": "').close()
        assert animate(client).status_code == 200  # the one place of the engine is free
        for each in slow:
            answer = answer_on(each)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"slow_body"' in answer
        flood = open_ones.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        flood.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        with suppress(ConnectionError):  # the server hangs up in the midst of it
            for number in range(2_000):
                flood.sendall(b"x-flood-%d: %s\r\n" % (number, b"y" * 1000))
            flood.sendall(b"\r\n")
        with suppress(ConnectionError):
            answer = flood.recv(65536)
            assert not answer or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
        assert animate(client).status_code == 200
    assert len(begun(tmp_path)) == 2
    assert client.get("/readyz").status_code == 200


def test_urls_that_lead_inside_are_refused_behind_serves_proxy_too(
    endpoint: Callable[..., httpx2.Client], tmp_path: Path
):
    client = endpoint()
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.1)
        port = trap.getsockname()[1]
        hosts = ["127.0.0.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "localhost", "user:hush@127.0.0.1"]
        urls = [f"https://{host}:{port}/a.png" for host in hosts] + ["file:///etc/passwd", "https://169.254.169.254/"]
        for url in urls:
            for route, field in (("/v1/animations", "image"), ("/v1/videos", "input_reference")):
                answer = client.post(route, data={**KNOBS, field: url})
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "address_refused"), url
        with pytest.raises(TimeoutError):
            trap.accept()
    assert begun(tmp_path) == []
    assert client.get("/v1/videos").json()["data"] == []


def test_calls_of_several_ingresses_share_the_engines(endpoint: Callable[..., httpx2.Client], tmp_path: Path):
    endpoint(ingress_deployment_config={"num_replicas": 2}, max_replicas=2, min_replicas=2, step_s=0.1)
    client_url = "http://" + serve_address()
    answers: list[int] = []

    def call() -> None:
        with httpx2.Client(base_url=client_url, timeout=100) as client:
            answers.append(animate(client).status_code)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 6
    assert len({row["pid"] for row in begun(tmp_path)}) == 2


def serve_address() -> str:
    client = serve.context._get_global_client()
    return f"{client.http_config.host}:{client.http_config.port}"


def test_the_endpoint_file_of_the_guide_is_one_that_serve_takes():
    guide = (Path(__file__).parents[3] / "docs" / "endpoint.md").read_text("utf-8")
    text = re.search(r"```yaml\n(http_options:.*?)```", guide, re.DOTALL)[1]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "pia_ray.online.serve:build_app"
    config = load_serve(None, application.args)
    assert (config.default_model, config.max_replicas) == ("photo", 4)
    assert ingress_options(config)["num_replicas"] == 2
