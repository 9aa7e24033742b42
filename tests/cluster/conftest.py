"""The cluster that the tests of this package share, and a catalogue's place on an S3 server which its nodes reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from pia_ray import storage
from pia_ray.online.serve.server import PROXY_CALLBACK
from tests.cluster import redis_server
from tests.cluster.networks import open_network
from tests.cluster.nodes import Nodes
from tests.s3_server import S3Server, point_at

RECONNECT_S = "600"
"""Seconds that a node waits for a new head: KubeRay's for clusters with Redis."""


@pytest.fixture(scope="package")
def shared_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nodes, S3Server]]:
    """The cluster and the server. Ray keeps the cluster's state in Redis where this machine has one."""
    network = open_network()
    server = S3Server(network.host)
    # Serve's proxies are to drop two headers: see docs/endpoint.md.
    environment = {
        **server.environment,
        PROXY_CALLBACK: "pia_ray.online.serve:proxy_middlewares",
        "RAY_gcs_rpc_server_reconnect_timeout_s": RECONNECT_S,
    }
    with ExitStack() as stack:
        stack.callback(server.stop)
        redis = None
        if redis_server.is_there():
            redis = stack.enter_context(redis_server.open_redis(network, tmp_path_factory.mktemp("redis")))
        log = tmp_path_factory.mktemp("nodes") / "ray.log"
        nodes = stack.enter_context(closing(Nodes(network, environment=environment, log=log, redis=redis)))
        nodes.start()
        yield nodes, server


@pytest.fixture
def nodes(shared_nodes: tuple[Nodes, S3Server]) -> Nodes:
    """A head and two workers, also where the test before has killed one."""
    found, _ = shared_nodes
    found.bring_up(num_workers=2)
    return found


@pytest.fixture
def bucket(
    shared_nodes: tuple[Nodes, S3Server], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """`s3://<a new bucket>` on a server that the nodes reach, and this process too."""
    _, server = shared_nodes
    point_at(monkeypatch, server.environment, tmp_path_factory.mktemp("settings"))
    yield f"s3://{server.new_bucket()}"
    storage.forget_clients()
