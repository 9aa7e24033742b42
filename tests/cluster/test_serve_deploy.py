"""The endpoint of cluster/ by `serve deploy` on several nodes: load brings a second engine, on another node, and its
end takes one away again, while every call is answered. Video jobs and their videos are on S3. The endpoint outlives its
head where Ray keeps the cluster's state in Redis; PIA_RAY_REQUIRE_REDIS=1 forbids to skip where there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from pia_ray.media import video
from tests.cluster.networks import until
from tests.cluster.nodes import ON_CPU, PATIENCE_S, ROOT, Nodes
from tests.online.serve.prompt import PROMPT
from tests.online.video_server import QUICK, hash_of, png
from tests.s3_server import S3Server

pytestmark = [
    pytest.mark.heavy,
    # Ray's client code of 2.60 leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

KEY = "a key of the tests"
FIELDS = {**{name: str(value) for name, value in QUICK.items()}, "prompt": "a quiet sea"}


class Endpoint:
    """The deployed endpoint."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes = nodes
        self._folder = folder
        self.url = f"http://{nodes.head.place.address}:{nodes.http_port}"
        self.answers: list[tuple[int, str]] = []
        """Status and the beginning of what is wrong, of all calls in `callers`."""

    def client(self) -> httpx2.Client:
        """A client with the key, which waits as long as the endpoint may take."""
        return httpx2.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=PATIENCE_S)

    def deploy(self, **args: Any) -> None:
        """Deploys the RayService's config with these settings over its own, by Serve's command line."""
        (service,) = yaml.safe_load_all((ROOT / "cluster" / "k8s" / "rayservice.yaml").read_text())
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        config["http_options"]["port"] = self.nodes.http_port
        if self.nodes.network.shared:
            config["proxy_location"] = "HeadOnly"  # at one address one proxy can listen
        (application,) = config["applications"]
        application["import_path"] = "tests.cluster.fake_endpoint:build_app"
        keys = self._folder / "keys"
        keys.write_text(f"{hash_of(KEY)}\n")
        application["args"] |= {"api_keys": str(keys), **args}
        application["args"]["ingress_deployment_config"] |= PROMPT
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [Path(sys.executable).parent / "serve", "deploy", path, "--address", self.nodes.dashboard]
        ended = subprocess.run(
            command, env=self.nodes.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert ended.returncode == 0, ended.stderr
        state: dict[str, Any] = {}

        def is_deployed() -> bool:
            state.update(self.application())
            return state.get("status") in ("RUNNING", "DEPLOY_FAILED")

        until(is_deployed, seconds=PATIENCE_S, what="it is deployed")
        assert state["status"] == "RUNNING", state

    def application(self) -> dict[str, Any]:
        """What Serve says of it; nothing while nobody answers."""
        answer = self.nodes.ask("/api/serve/applications/") or {}
        found: dict[str, Any] = answer.get("applications", {}).get("pia-ray", {})
        return found

    def engines(self) -> set[str]:
        """The nodes whose engines are up."""
        return {replica["node_id"] for replica in self._engines()}

    def replicas(self) -> set[str]:
        """The ids of the engines that are up."""
        return {replica["replica_id"] for replica in self._engines()}

    def _engines(self) -> list[dict[str, Any]]:
        replicas = self.application().get("deployments", {}).get("Engine", {}).get("replicas", [])
        return [replica for replica in replicas if replica["state"] == "RUNNING"]

    @contextmanager
    def callers(self, num: int, *, pause_s: float = 0.0) -> Iterator[None]:
        """So many who call again and again, one call after the other each, until the block ends."""
        stop = threading.Event()

        def call() -> None:
            with self.client() as client:
                while not stop.is_set():
                    try:
                        answer = animate(client)
                    except httpx2.TransportError as error:
                        self.answers.append((0, repr(error)))
                        return
                    told = "" if answer.status_code == 200 else answer.text[:200]
                    self.answers.append((answer.status_code, told))
                    stop.wait(pause_s)

        threads = [threading.Thread(target=call) for _ in range(num)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.fixture(scope="module")
def deployed(shared_nodes: tuple[Nodes, S3Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The endpoint on a head without engines and two workers, with one engine or two of fakes."""
    nodes, server = shared_nodes
    nodes.bring_up(num_workers=2)
    found = Endpoint(nodes, tmp_path_factory.mktemp("endpoint"))
    found.deploy(
        models={"demo": ON_CPU},
        storage=f"s3://{server.new_bucket()}/endpoint",
        cpus_per_replica=1,
        batch_size=2,
        max_replicas=2,
        upscale_delay_s=1,
        downscale_delay_s=2,
        # Serve measures the load every second, in place of ten, and takes the mean of three.
        deployment_config={**PROMPT, "autoscaling_config": {"metrics_interval_s": 1, "look_back_period_s": 3}},
        requests_per_minute=100_000,
    )
    yield found
    httpx2.delete(f"{nodes.dashboard}/api/serve/applications/", headers=nodes.bearer, timeout=PATIENCE_S)


@pytest.fixture
def endpoint(deployed: Endpoint) -> Endpoint:
    """The endpoint with one engine, as it is without load."""
    until(lambda: len(deployed.engines()) == 1, seconds=PATIENCE_S, what="one engine is up")
    return deployed


def test_load_brings_a_second_engine_and_its_end_takes_it_away_while_every_call_is_answered(endpoint: Endpoint):
    with endpoint.client() as client, endpoint.callers(1, pause_s=0.5):
        with endpoint.callers(5):
            until(lambda: len(endpoint.engines()) == 2, seconds=PATIENCE_S, what="a second engine is up")
            jobs = [created(client) for _ in range(4)]
        until(lambda: len(endpoint.engines()) == 1, seconds=PATIENCE_S, what="one engine has gone")
        for job in jobs:
            until(lambda job=job: ended(client, job), seconds=PATIENCE_S, what=f"{job} has ended")
            content = client.get(f"/v1/videos/{job}/content", follow_redirects=True)  # to S3, presigned
            assert video.probe(content.content).num_frames == QUICK["num_frames"]
    assert len(endpoint.answers) > 6
    assert set(endpoint.answers) == {(200, "")}


def test_the_endpoint_answers_and_makes_its_jobs_while_its_head_dies_and_another_one_takes_over(endpoint: Endpoint):
    nodes = endpoint.nodes
    if nodes.redis is None:
        reason = "there is no redis-server (Debian: redis-server)"
        if os.environ.get("PIA_RAY_REQUIRE_REDIS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    if nodes.network.shared:
        pytest.skip(f"nobody answers beside the head: {nodes.network.shared}")
    endpoint.url = f"http://{nodes.workers[0].place.address}:{nodes.http_port}"
    engines = endpoint.replicas()
    with endpoint.client() as client:
        # At no moment more than an engine is meant to have: the load is to bring no second one.
        jobs = [created(client) for _ in range(2)]
        nodes.head.kill()
        assert animate(client).status_code == 200  # nobody is there to scale or to replace; what works goes on
        jobs.append(created(client))
        for job in jobs:
            until(lambda job=job: ended(client, job), seconds=PATIENCE_S, what=f"{job} has ended")
        nodes.start(nodes.head.place)
        until(lambda: len(nodes.alive()) == 3, seconds=PATIENCE_S, what="the workers are with the new head")
        until(
            lambda: endpoint.application().get("status") == "RUNNING",
            seconds=PATIENCE_S,
            what="the new head has the application",
        )
        assert endpoint.replicas() == engines  # the same one, which has not loaded its model again
        assert animate(client).status_code == 200
        job = created(client)
        until(lambda: ended(client, job), seconds=PATIENCE_S, what=f"{job} has ended")


def animate(client: httpx2.Client) -> httpx2.Response:
    """The answer to one call."""
    return client.post("/v1/animations", data=FIELDS, files={"image": ("picture.png", png())})


def created(client: httpx2.Client) -> str:
    """The id of a new video job."""
    answer = client.post("/v1/videos", data=FIELDS, files={"input_reference": ("picture.png", png())})
    assert answer.status_code == 200, answer.text
    job: str = answer.json()["id"]
    return job


def ended(client: httpx2.Client, job: str) -> bool:
    """Whether the job has come to a video; no other end is right."""
    document = client.get(f"/v1/videos/{job}").raise_for_status().json()
    assert document["status"] in ("queued", "in_progress", "completed"), document
    return document["status"] == "completed"
