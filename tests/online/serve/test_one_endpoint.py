"""One endpoint through Ray Serve's own proxy: videos, refusals, a crowd, and deaths, after which it is as before."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI
from ray import serve

from pia_ray.media import video
from tests.online.serve.test_http import KNOBS, animate, begun, crowd, deploy, noise, replicas, until

pytestmark = [
    pytest.mark.heavy,
    # Ray's client code of 2.60 leaves sockets and event loops to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


MAX_WAITING = 6


@dataclass(frozen=True)
class Endpoint:
    """What runs, and the folder in which its fakes leave what they did."""

    client: httpx2.Client
    folder: Path


@pytest.fixture(scope="module")
def running(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    deploy(folder, step_s=0.2, held_back_by=folder / "held", max_waiting=MAX_WAITING, max_body_bytes=3_500_000)
    with httpx2.Client(base_url=address, timeout=100) as client:
        yield Endpoint(client, folder)
    serve.delete("test")


@pytest.fixture
def endpoint(running: Endpoint) -> Endpoint:
    """The endpoint when it is ready, whatever the test before did to it; its fakes have begun nothing."""
    until(lambda: is_ready(running.client), seconds=120)
    (running.folder / "log.jsonl").unlink(missing_ok=True)
    return running


def is_ready(client: httpx2.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False  # an ingress that was killed


def test_a_picture_becomes_a_video_and_a_wrong_knob_an_error_that_names_it(endpoint: Endpoint):
    client = endpoint.client
    answer = animate(client)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert video.probe(answer.content).num_frames == 4
    assert len(answer.headers.get_list("x-request-id", split_commas=True)) == 1
    refused = animate(client, fields={"motion_scale": "99"})
    assert refused.status_code in (400, 422)
    assert refused.json()["error"]["param"] == "motion_scale"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
    assert client.get("/readyz").status_code == 200


def test_urls_that_lead_inside_are_refused_behind_serves_proxy_too(endpoint: Endpoint):
    client = endpoint.client
    stored = client.get("/v1/videos").json()["data"]
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
    assert begun(endpoint.folder) == []
    assert client.get("/v1/videos").json()["data"] == stored


def test_a_hundred_clients_are_answered_or_refused_with_a_time_in_bounded_memory(endpoint: Endpoint):
    client = endpoint.client
    assert animate(client).status_code == 200
    processes = [*replicas("Ingress"), *replicas("Engine")]
    before = [memory(pid, "VmRSS") for pid in processes]
    answers = crowd(client, 100, picture=noise(1000, 1000))  # 3 MB each: 300 MB in all
    assert len(answers) == 100
    assert {answer.status_code for answer in answers} == {200, 429}
    made = [answer for answer in answers if answer.status_code == 200]
    assert len(made) >= MAX_WAITING, "and two more where the engine takes the first ones before the others come"
    assert all(video.probe(answer.content).num_frames == 4 for answer in made)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"busy"}
    assert [*replicas("Ingress"), *replicas("Engine")] == processes
    grown = [memory(pid, "VmHWM") - size for pid, size in zip(processes, before, strict=True)]
    assert max(grown) < 256_000_000, grown  # 130 MB measured: eight of the largest bodies, and copies of them


def memory(pid: int, what: str) -> int:
    """Bytes that a process has in memory (VmRSS), or at most had (VmHWM)."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def test_a_call_survives_one_death_of_its_engine_and_a_second_is_an_error_and_not_a_loop(endpoint: Endpoint):
    client = endpoint.client
    answer = animate(client, fields={"prompt": "die-once"})
    assert answer.status_code == 200
    assert video.probe(answer.content).num_frames == 4
    assert len({row["pid"] for row in begun(endpoint.folder)}) == 2
    before = len(begun(endpoint.folder))
    answer = animate(client, fields={"prompt": "die"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "worker_died"
    assert len(begun(endpoint.folder)) == before + 2


def test_an_endpoint_is_not_ready_while_its_engine_loads_or_warms_up_which_gets_no_call_before(endpoint: Endpoint):
    """An engine's animator is loaded and warmed up by `make_animator`, which is held back here."""
    client = endpoint.client
    assert client.get("/readyz").status_code == 200
    (endpoint.folder / "held").touch()
    for pid in replicas("Engine"):
        os.kill(pid, signal.SIGKILL)
    until(lambda: client.get("/readyz").status_code == 503, seconds=120)
    answer = client.get("/readyz")
    assert answer.json()["error"]["code"] == "not_ready"
    assert client.get("/healthz").status_code == 200
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(animate, client)
        assert not wait([call], timeout=1).done
        assert not begun(endpoint.folder)
        (endpoint.folder / "held").unlink()
        until(lambda: client.get("/readyz").status_code == 200, seconds=120)
        assert call.result().status_code == 200


@pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")
@pytest.mark.parametrize("deployment", ["Engine", "Ingress"])
def test_a_video_of_the_openai_client_survives_kill_9_of_the_process_that_makes_it(endpoint: Endpoint, deployment: str):
    client = endpoint.client
    url = str(client.base_url.join("/v1"))
    with OpenAI(base_url=url, api_key="none", timeout=60, max_retries=20) as caller:
        knobs = {name: value for name, value in KNOBS.items() if name != "prompt"} | {"num_inference_steps": 20}
        asked = caller.videos.create(prompt="a cat", input_reference=noise(), extra_body=knobs)
        until(lambda: len(begun(endpoint.folder)) == 1, seconds=60)
        killed = replicas(deployment)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        made = caller.videos.poll(asked.id)
        assert (made.status, made.progress) == ("completed", 100)
        assert not set(replicas(deployment)) & set(killed)
        assert video.probe(caller.videos.download_content(made.id).content).num_frames == 4
        assert [each.id for each in caller.videos.list()].count(made.id) == 1
    assert {row["id"] for row in begun(endpoint.folder)} == {asked.id}
