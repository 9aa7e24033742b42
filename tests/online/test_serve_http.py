"""The endpoint over HTTP through Ray Serve's own proxy: videos, refusals, hang-ups, deaths. Animators are fakes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from PIL import Image
from ray import serve
from ray.serve.schema import ServeDeploySchema

from pia_ray import video
from pia_ray.config import ServeConfig, load_serve
from pia_ray.online.serve import build_endpoint, proxy_middlewares
from pia_ray.online.serve.deployments import ingress_options
from pia_ray.online.serve.server import PROXY_CALLBACK
from pia_ray.testing import make_fake_engine

pytestmark = [
    pytest.mark.heavy,
    # Ray's client code of 2.60 leaves sockets and event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

KNOBS = {"prompt": "a cat", "num_frames": "4", "num_inference_steps": "3", "width": "64", "height": "64"}


def png() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster whose proxies are set up as those of `pia-ray serve`, and where they listen."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ[PROXY_CALLBACK] = f"pia_ray.online.serve:{proxy_middlewares.__name__}"
    try:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            logging_level="ERROR",
        )
    finally:
        del os.environ[PROXY_CALLBACK]
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()  # whatever happened: the next module starts a cluster of its own


@pytest.fixture
def endpoint(address: str, tmp_path: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Starts an endpoint by its settings; a client of it."""
    clients = []

    def start(step_s: float = 0.0, **settings: Any) -> httpx.Client:
        config = ServeConfig.model_validate(
            {"batch_size": 2, "graceful_shutdown_s": 1, "storage": str(tmp_path / "jobs"), **settings}
        )
        make = partial(make_fake_engine, seconds_per_step=step_s, marks=tmp_path, log=tmp_path / "log.jsonl")
        serve.run(build_endpoint(config, make_animator=make), name="test", route_prefix="/")
        clients.append(httpx.Client(base_url=address, timeout=100))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    serve.delete("test")


def animate(client: httpx.Client, **how: Any) -> httpx.Response:
    fields = {**KNOBS, **how.pop("fields", {})}
    return client.post("/v1/animations", data=fields, files={"image": ("upload", png())}, **how)


def begun(folder: Path) -> list[dict[str, Any]]:
    log = folder / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_picture_becomes_a_video_and_a_wrong_knob_an_error_that_names_it(endpoint: Callable[..., httpx.Client]):
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


def test_a_call_survives_the_death_of_its_engine(endpoint: Callable[..., httpx.Client], tmp_path: Path):
    client = endpoint()
    answer = animate(client, fields={"prompt": "die-once"})
    assert answer.status_code == 200
    assert video.probe(answer.content).num_frames == 4
    assert len({row["pid"] for row in begun(tmp_path)}) == 2


def test_an_engine_that_always_dies_is_an_error_and_not_a_loop(endpoint: Callable[..., httpx.Client], tmp_path: Path):
    client = endpoint()
    answer = animate(client, fields={"prompt": "die"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "worker_died"
    assert len(begun(tmp_path)) == 2


def created(client: httpx.Client, **fields: str) -> str:
    answer = client.post("/v1/videos", data={**KNOBS, **fields}, files={"input_reference": ("upload", png())})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def ended(client: httpx.Client, job: str, *, seconds: float) -> dict[str, Any]:
    document: dict[str, Any] = {}

    def look() -> bool:
        try:
            answer = client.get(f"/v1/videos/{job}")
        except httpx.TransportError:
            return False  # an ingress that was killed
        if answer.status_code == 200:
            document.update(answer.json())
        return document.get("status") in ("completed", "failed")

    until(look, seconds=seconds)
    return document


def test_a_video_job_survives_the_death_of_its_engine(endpoint: Callable[..., httpx.Client], tmp_path: Path):
    client = endpoint()
    job = created(client, prompt="die-once")
    document = ended(client, job, seconds=90)
    assert (document["status"], document["progress"]) == ("completed", 100)
    assert video.probe(client.get(f"/v1/videos/{job}/content").content).num_frames == 4
    assert [row["id"] for row in begun(tmp_path)] == [job, job]


def test_a_video_job_survives_the_death_of_its_ingress(endpoint: Callable[..., httpx.Client], tmp_path: Path):
    client = endpoint(step_s=0.2)
    job = created(client, num_inference_steps="20")
    until(lambda: len(begun(tmp_path)) == 1, seconds=30)
    killed = replicas("Ingress")
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    document = ended(client, job, seconds=180)
    assert document["status"] == "completed"
    assert not set(replicas("Ingress")) & set(killed)
    assert video.probe(client.get(f"/v1/videos/{job}/content").content).num_frames == 4


def replicas(deployment: str) -> list[int]:
    """Process ids of a deployment's replicas on this machine; Ray writes the names of actors over command lines."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and f"ServeReplica:test:{deployment}" in (process / "cmdline").read_text():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("headers", [{}, {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "-1"}])
def test_a_client_that_hangs_up_frees_the_engine_whatever_its_headers(
    endpoint: Callable[..., httpx.Client], tmp_path: Path, headers: dict[str, str]
):
    client = endpoint(step_s=0.3, batch_size=1, max_waiting=0, max_steps=1000)
    with pytest.raises(httpx.ReadTimeout):
        animate(client, fields={"num_inference_steps": "1000"}, headers=headers, timeout=4)
    until(lambda: len(begun(tmp_path)) == 1, seconds=20)
    until(lambda: animate(client).status_code == 200, seconds=60)  # of the other's 300 s


def test_a_call_ends_at_the_endpoints_deadline_whatever_its_headers(endpoint: Callable[..., httpx.Client]):
    client = endpoint(sync_timeout_s=1.5)
    answer = animate(client, fields={"prompt": "hang"}, headers={"x-request-timeout-seconds": "-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def test_a_hundred_clients_are_answered_or_told_when_to_come_again(endpoint: Callable[..., httpx.Client]):
    client = endpoint(step_s=0.2, max_waiting=6)
    answers: list[httpx.Response] = []
    with httpx.Client(
        base_url=client.base_url, timeout=200, limits=httpx.Limits(max_connections=100, max_keepalive_connections=100)
    ) as crowd:
        threads = [threading.Thread(target=lambda: answers.append(animate(crowd))) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 100
    assert {answer.status_code for answer in answers} == {200, 429}
    made = [answer for answer in answers if answer.status_code == 200]
    assert len(made) >= 8
    assert all(video.probe(answer.content).num_frames == 4 for answer in made)
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in answers if answer.status_code == 429)


def test_calls_of_several_ingresses_share_the_engines(endpoint: Callable[..., httpx.Client], tmp_path: Path):
    endpoint(ingress_deployment_config={"num_replicas": 2}, max_replicas=2, min_replicas=2, step_s=0.1)
    client_url = "http://" + serve_address()
    answers: list[int] = []

    def call() -> None:
        with httpx.Client(base_url=client_url, timeout=100) as client:
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


def test_the_command_serves_the_demo_model_and_ends_on_a_signal(tmp_path: Path):
    command = [Path(sys.executable).parent / "pia-ray", "serve", "--port", "0", "--storage", tmp_path / "jobs"]
    with (tmp_path / "errors").open("wb") as errors:
        server = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        url = re.search(r"Serving demo at (http://127\.0\.0\.1:\d+/)", server.stdout.readline())[1]
        with httpx.Client(base_url=url, timeout=100) as client:
            answer = animate(client)
            assert (answer.status_code, answer.headers["x-animation-frames"]) == (200, "4")
            assert answer.headers["x-animation-model"].startswith("demo@")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (tmp_path / "errors").read_text()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_the_endpoint_file_of_the_guide_is_one_that_serve_takes():
    guide = (Path(__file__).parents[2] / "docs" / "endpoint.md").read_text("utf-8")
    text = re.search(r"```yaml\n(http_options:.*?)```", guide, re.DOTALL)[1]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    assert application.import_path == "pia_ray.online.serve:build_app"
    config = load_serve(None, application.args)
    assert (config.default_model, config.max_replicas) == ("photo", 4)
    assert ingress_options(config)["num_replicas"] == 2
