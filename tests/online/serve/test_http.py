"""The endpoint over HTTP through Ray Serve's own proxy, with settings of its own in each test. Animators are fakes."""

from __future__ import annotations

import io
import json
import os
import re
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
from PIL import Image
from ray import cloudpickle, serve
from ray.serve.schema import ServeDeploySchema

from pia_ray.animation import RowAnimator
from pia_ray.config.serve import ServeConfig, load_serve
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


def deploy(folder: Path, *, step_s: float = 0.0, held_back_by: Path | None = None, **settings: Any) -> None:
    """Deploys the application `test`, or deploys it anew, whose fakes leave what they did in the folder.

    Engines load nothing as long as there is a file `held_back_by`.
    """
    config = ServeConfig.model_validate(
        {"batch_size": 2, "graceful_shutdown_s": 1, "storage": str(folder / "jobs"), **prompt_serve(settings)}
    )
    make: MakeAnimator = partial(make_fake_engine, seconds_per_step=step_s, marks=folder, log=folder / "log.jsonl")
    if held_back_by is not None:
        make = partial(make_when_let, make, held_back_by)
    serve.run(build_endpoint(config, make_animator=make), name="test", route_prefix="/")


def make_when_let(make: MakeAnimator, held_back_by: Path, config: ServeConfig, cpu_threads: int) -> RowAnimator:
    """An engine's animator, once that file is not there."""
    while held_back_by.exists():
        time.sleep(0.05)
    return make(config, cpu_threads)


@pytest.fixture
def endpoint(address: str, tmp_path: Path) -> Iterator[Callable[..., httpx2.Client]]:
    """Starts an endpoint by its settings; a client of it."""
    with ExitStack() as clients:

        def start(**settings: Any) -> httpx2.Client:
            deploy(tmp_path, **settings)
            return clients.enter_context(httpx2.Client(base_url=address, timeout=100))

        yield start
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
        time.sleep(0.2)  # who asks more often keeps the processes of the endpoint busy


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


def test_what_serve_refuses_has_the_shape_of_all_errors_and_a_call_ends_at_its_deadline_whatever_its_headers(
    endpoint: Callable[..., httpx2.Client],
):
    one_call = {"max_ongoing_requests": 1, "max_queued_requests": 1}
    client = endpoint(step_s=0.3, sync_timeout_s=10, ingress_deployment_config=one_call)
    answers = crowd(client, 8)
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        assert len(answer.headers.get_list("x-request-id", split_commas=True)) == 1
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert (error["code"], error["type"], error["param"]) == ("busy", "rate_limit_error", None)
    answer = animate(client, fields={"prompt": "hang"}, headers={"x-request-timeout-seconds": "-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


def crowd(client: httpx2.Client, num: int, *, picture: bytes | None = None) -> list[httpx2.Response]:
    """The answers to so many calls at once."""
    limits = httpx2.Limits(max_connections=num, max_keepalive_connections=num)
    with httpx2.Client(base_url=client.base_url, timeout=300, limits=limits) as together:
        with ThreadPoolExecutor(num) as threads:
            calls = [threads.submit(animate, together, picture=picture) for _ in range(num)]
        return [call.result() for call in calls]


def test_calls_of_several_ingresses_for_two_models_share_the_engines(
    endpoint: Callable[..., httpx2.Client], tmp_path: Path
):
    two = {"min_replicas": 2, "max_replicas": 2, "ingress_deployment_config": {"num_replicas": 2}}
    endpoint(step_s=0.1, models="plain=demo,other=demo", **two)
    answers: list[int] = []

    def call(style: str) -> None:
        with httpx2.Client(base_url="http://" + serve_address(), timeout=100) as client:
            answers.append(animate(client, fields={"style": style}).status_code)

    deadline, engines = time.monotonic() + 60, set[int]()
    while len(engines) < 2:  # an ingress hears of the second engine some time after the first
        assert time.monotonic() < deadline
        threads = [threading.Thread(target=call, args=(style,)) for style in ("default", "other") * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(answers) == {200}
        engines = {row["pid"] for row in begun(tmp_path)}


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
