"""nginx with the settings of cluster/k8s/components/ingress-nginx before the endpoint, as a cluster has it.

ingress-nginx makes directives of its annotations; `DIRECTIVES` says which, and an annotation that is not there fails.
It keeps connections to the endpoint open, and so does this one.
The nginx is Debian's (nginx-light). PIA_RAY_REQUIRE_NGINX=1 forbids to skip where there is none.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import httpx2
import pytest

from pia_ray.config.serve import ServeConfig
from pia_ray.online.http.event_streams import KEEP_ALIVE_S
from pia_ray.online.routes.video_events import STREAM_S
from tests.cluster.manifests import COMPONENTS, Mapping, documents
from tests.cluster.networks import free_port, until
from tests.online.video_server import QUICK, png, serve_videos
from tests.storage.test_https import certificate

CALL_S = 1.5
"""Seconds of each call: three steps of the fake animator."""
SHORT_S = 1
"""The bound between two reads of the second port, below a call's seconds."""
FIELDS: Final = {name: str(value) for name, value in QUICK.items()} | {"prompt": "a quiet sea"}
DIRECTIVES: Final = {
    "proxy-body-size": "client_max_body_size {}",
    "proxy-read-timeout": "proxy_read_timeout {}s",
    "proxy-send-timeout": "proxy_send_timeout {}s",
    "proxy-connect-timeout": "proxy_connect_timeout {}s",
    "proxy-buffering": "proxy_buffering {}",
    "proxy-request-buffering": "proxy_request_buffering {}",
    "proxy-http-version": "proxy_http_version {}",
    "ssl-redirect": "",  # the server at the plain port
}


def settings() -> dict[str, str]:
    """Values of the component's annotations, by their names without the prefix."""
    (ingress,) = documents(COMPONENTS / "ingress-nginx" / "ingress.yaml")
    annotations = ingress["metadata"]["annotations"]
    return {name.removeprefix("nginx.ingress.kubernetes.io/"): value for name, value in annotations.items()}


class Nginx(NamedTuple):
    """Where nginx listens: with the component's settings, with a short read timeout, and without TLS."""

    url: str
    short_url: str
    plain_url: str
    client: httpx2.Client


def config(folder: Path, upstream: str, pem: Path, ports: list[int]) -> str:
    """nginx.conf with the component's settings at the first port."""
    given = settings()

    def server(port: int, values: dict[str, str]) -> str:
        lines = [f"{DIRECTIVES[name].format(value)};" for name, value in values.items() if DIRECTIVES[name]]
        return f"""server {{
            listen 127.0.0.1:{port} ssl;
            ssl_certificate {pem}; ssl_certificate_key {pem};
            {" ".join(lines)}
            location / {{
                proxy_pass http://endpoint;
                proxy_set_header Connection "";
                proxy_set_header Host $http_host;
                proxy_set_header X-Forwarded-For $remote_addr;
            }}
        }}"""

    paths = [f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    return f"""worker_processes 1;
        daemon off;
        pid {folder}/pid;
        error_log stderr warn;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ worker_connections 64; }}
        http {{
            access_log off;
            {" ".join(paths)}
            upstream endpoint {{ server {upstream}; keepalive 16; }}
            {server(ports[0], given)}
            {server(ports[1], given | {"proxy-read-timeout": str(SHORT_S)})}
            server {{
                listen 127.0.0.1:{ports[2]};
                return {"308 https://$http_host$request_uri" if given["ssl-redirect"] == "true" else "404"};
            }}
        }}"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        reason = "there is no nginx (Debian: nginx-light)"
        if os.environ.get("PIA_RAY_REQUIRE_NGINX") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("nginx")
    pem = certificate(folder)
    ports = [free_port() for _ in range(3)]
    with (
        serve_videos(str(folder / "storage"), step_s=CALL_S / 3) as server,
        httpx2.Client(verify=ssl.create_default_context(cafile=str(pem)), timeout=60) as client,
    ):
        path = folder / "nginx.conf"
        path.write_text(config(folder, server.url.removeprefix("http://"), pem, ports))
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([program, "-c", str(path), "-p", str(folder)], stderr=log)
        urls = [f"https://127.0.0.1:{ports[0]}", f"https://127.0.0.1:{ports[1]}", f"http://127.0.0.1:{ports[2]}"]
        try:
            until(lambda: answers(client, urls[2]), seconds=30, what="nginx answers")
            yield Nginx(*urls, client)
        finally:
            process.terminate()
            process.wait(30)
        assert "[emerg]" not in (folder / "log").read_text()


def answers(client: httpx2.Client, url: str) -> bool:
    try:
        client.get(url)
    except httpx2.TransportError:
        return False
    return True


def upload(nginx: Nginx, size_bytes: int) -> httpx2.Response:
    """The answer to a body of that many bytes, a file of lines."""
    edge = "x"
    head = (
        f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
    ).encode()
    tail = f"\r\n--{edge}--\r\n".encode()
    content = head + b" " * (size_bytes - len(head) - len(tail)) + tail
    headers = {"content-type": f"multipart/form-data; boundary={edge}"}
    return nginx.client.post(f"{nginx.url}/v1/files", content=content, headers=headers)


def animate(nginx: Nginx, url: str) -> httpx2.Response:
    return nginx.client.post(f"{url}/v1/animations", data=FIELDS, files={"image": ("picture.png", png())})


def seconds(duration: str) -> int:
    return int(duration.removesuffix("m")) * 60


def test_bounds_of_the_proxies_lie_above_those_of_the_endpoint():
    endpoint, given = ServeConfig(), settings()
    assert int(given["proxy-body-size"].removesuffix("m")) * 2**20 > endpoint.max_body_bytes
    for name in ("proxy-read-timeout", "proxy-send-timeout"):
        assert int(given[name]) > max(endpoint.sync_timeout_s, KEEP_ALIVE_S)
    route: Mapping = documents(COMPONENTS / "gateway" / "httproutes.yaml")[0]
    (rule,) = route["spec"]["rules"]
    longest = max(STREAM_S, endpoint.body_timeout_s + endpoint.sync_timeout_s)
    assert {seconds(each) > longest for each in rule["timeouts"].values()} == {True}


def test_the_largest_body_passes_and_a_larger_one_hears_so_from_the_endpoint(nginx: Nginx):
    limit = ServeConfig().max_body_bytes
    taken = upload(nginx, limit)
    assert taken.status_code == 200, taken.text
    assert taken.json()["bytes"] > limit - 1000
    refused = upload(nginx, limit + 1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


def test_a_call_that_sends_nothing_until_its_end_is_waited_for_as_long_as_the_settings_say(nginx: Nginx):
    answer = animate(nginx, nginx.url)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    # With the same settings but for the time between two reads nginx gives up.
    assert animate(nginx, nginx.short_url).status_code == 504


def test_events_arrive_one_by_one_while_the_video_is_made(nginx: Nginx):
    arrived: list[float] = []
    names: list[str] = []
    with nginx.client.stream(
        "POST",
        f"{nginx.url}/v1/animations",
        data=FIELDS,
        files={"image": ("picture.png", png())},
        headers={"accept": "text/event-stream"},
    ) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
                arrived.append(time.monotonic())
    assert names[-1] == "completed"
    steps = [at for at, name in zip(arrived, names, strict=True) if name == "step"]
    assert len(steps) >= 2
    assert steps[-1] - steps[0] > CALL_S / 3 / 2  # a step lies between them; from a buffer they come at once


def test_a_caller_without_tls_is_sent_to_where_there_is_some(nginx: Nginx):
    answer = nginx.client.get(f"{nginx.plain_url}/v1/models")
    assert (answer.status_code, answer.headers["location"][:8]) == (308, "https://")
