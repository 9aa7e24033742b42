"""The endpoint outlives its head where Ray keeps the cluster's state in Redis, as by the component `redis`.

The Redis is Debian's (redis-server). PIA_RAY_REQUIRE_REDIS=1 forbids to skip where there is none.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from pia_ray.online.serve.server import PROXY_CALLBACK
from tests.cluster.manifests import COMPONENTS, documents
from tests.cluster.networks import Network, free_port, open_network, until
from tests.cluster.nodes import ON_CPU, PATIENCE_S, Nodes
from tests.cluster.test_serve_deploy import FIELDS, Endpoint, created, ended
from tests.online.serve.prompt import PROMPT
from tests.online.video_server import png
from tests.s3_server import S3Server, point_at

pytestmark = [
    pytest.mark.heavy,
    # Ray's client code of 2.60 leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

RECONNECT_S = "600"
"""Seconds that a node waits for a new head: KubeRay's for clusters with Redis."""


@contextmanager
def redis(network: Network, folder: Path, password: str) -> Iterator[str]:
    """The address of a Redis that runs by the component's command line, for as long as the block lasts."""
    (container,) = documents(COMPONENTS / "redis" / "redis.yaml")[0]["spec"]["template"]["spec"]["containers"]
    port = free_port()
    shell, flag, command = container["command"]
    command = command.replace("--dir /data", f"--dir {folder} --bind {network.host} --port {port}")
    process = subprocess.Popen(
        [shell, flag, command], env={**os.environ, "REDIS_PASSWORD": password}, stdout=subprocess.DEVNULL
    )
    try:
        yield f"{network.host}:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.fixture
def network() -> Iterator[Network]:
    if shutil.which("redis-server") is None:
        reason = "there is no redis-server (Debian: redis-server)"
        if os.environ.get("PIA_RAY_REQUIRE_REDIS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    found = open_network()
    if found.shared:
        pytest.skip(f"nobody answers beside the head: {found.shared}")
    yield found


@pytest.fixture
def endpoint(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """The endpoint on a head without engines and two workers, its videos on S3."""
    server, password = S3Server(network.host), secrets.token_hex(16)
    point_at(monkeypatch, server.environment, tmp_path)
    environment = {
        **server.environment,
        PROXY_CALLBACK: "pia_ray.online.serve:proxy_middlewares",
        "RAY_gcs_rpc_server_reconnect_timeout_s": RECONNECT_S,
    }
    with redis(network, tmp_path, password) as address:
        nodes = Nodes(
            network,
            environment=environment,
            log=tmp_path / "ray.log",
            head_environment={"RAY_REDIS_ADDRESS": address},
            head_arguments=(f"--redis-password={password}",),
        )
        try:
            nodes.start()
            nodes.bring_up(num_workers=2)
            found = Endpoint(nodes, tmp_path)
            found.deploy(
                models={"demo": ON_CPU},
                storage=f"s3://{server.new_bucket()}/endpoint",
                cpus_per_replica=1,
                min_replicas=1,
                max_replicas=1,
                deployment_config=PROMPT,
            )
            yield found
        finally:
            nodes.close()
            server.stop()


def test_the_endpoint_answers_and_makes_its_jobs_while_its_head_dies_and_another_one_takes_over(endpoint: Endpoint):
    nodes = endpoint.nodes
    endpoint.url = f"http://{nodes.workers[0].place.address}:{nodes.http_port}"
    engines = replicas(endpoint)
    assert len(engines) == 1
    with endpoint.client() as client:
        jobs = [created(client) for _ in range(4)]
        head = nodes.head
        head.kill()
        assert animate(client).status_code == 200  # nobody is there to scale or to replace; what works goes on
        jobs += [created(client) for _ in range(2)]
        nodes.start(head.place)
        until(lambda: len(nodes.alive()) == 3, seconds=PATIENCE_S, what="the workers are with the new head")
        until(
            lambda: endpoint.application().get("status") == "RUNNING",
            seconds=PATIENCE_S,
            what="the new head has the application",
        )
        assert replicas(endpoint) == engines  # the same one, which has not loaded its model again
        for job in jobs:
            until(lambda job=job: ended(client, job), seconds=PATIENCE_S, what=f"{job} has ended")
        assert animate(client).status_code == 200


def replicas(endpoint: Endpoint) -> set[str]:
    """The ids of the engines that are up."""
    found = endpoint.application()["deployments"]["Engine"]["replicas"]
    return {each["replica_id"] for each in found if each["state"] == "RUNNING"}


def animate(client: httpx2.Client) -> httpx2.Response:
    return client.post("/v1/animations", data=FIELDS, files={"image": ("picture.png", png())})
