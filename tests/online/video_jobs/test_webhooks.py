"""Webhooks against a real HTTPS receiver: signed so that others can verify, tried again, to public addresses only."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pia_ray import storage
from pia_ray.config.knobs import AnimationParams
from pia_ray.errors import AddressRefused, ConfigError, FetchError, FetchUnavailable, JobNotFound
from pia_ray.online.rendering.renderer import RenderRequest
from pia_ray.online.video_jobs import JobStore, VideoJob
from pia_ray.online.video_jobs.dispatcher import Dispatcher
from pia_ray.online.video_jobs.webhook_outbox import TryResult
from pia_ray.online.video_jobs.webhook_sender import PER_HOST
from pia_ray.online.video_jobs.webhooks import Webhooks
from tests.online.video_jobs.test_dispatcher import QUICK, ScriptedRenderer, ended, run, running
from tests.storage.test_https import certificate

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Receiver(ThreadingHTTPServer):
    """Answers the statuses of its script, then 204; keeps what it got."""

    daemon_threads = True

    def __init__(self, pem: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []
        secured = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        secured.load_cert_chain(pem)
        self.socket = secured.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://pictures.test:{self.server_address[1]}/hook"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are refused ones


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(({name.lower(): value for name, value in self.headers.items()}, content))
        self.send_response(self.server.script.pop(0) if self.server.script else 204)
        self.send_header("Location", "https://pictures.test/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def receiver(pem: Path) -> Iterator[Receiver]:
    server = Receiver(pem)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def resolve(host: str, port: int) -> Sequence[str]:
    if host == "pictures.test":
        return ["127.0.0.1"]
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def webhooks(pem: Path) -> Webhooks:
    return Webhooks(
        SECRET,
        retry_delays_s=(0.1, 0.1),
        allowed_networks=("127.0.0.1/32",),
        resolve=resolve,
        ssl_context=ssl.create_default_context(cafile=str(pem)),
    )


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    return JobStore(str(tmp_path / "serve"))


def create(jobs: JobStore, url: str | None, prompt: str = "a boat", *, owner: str = "ann") -> VideoJob:
    request = RenderRequest("", AnimationParams(prompt=prompt), b"picture")
    return jobs.create(request, owner=owner, model="demo", seconds="2", size="64x64", webhook_url=url)


def cancelled(jobs: JobStore, url: str, *, owner: str = "ann") -> VideoJob:
    return jobs.cancel(owner, create(jobs, url, owner=owner).id)


async def settled(jobs: JobStore, job: VideoJob) -> VideoJob:
    while (now := await asyncio.to_thread(jobs.get, job.owner, job.id)).webhook_state not in ("delivered", "failed"):
        await asyncio.sleep(0.02)
    while any(entry.id == job.id for entry in jobs.outbox.entries()):  # removed after the document says so
        await asyncio.sleep(0.02)
    return now


def test_a_receiver_can_verify_who_sent_it_and_when(jobs: JobStore, receiver: Receiver, webhooks: Webhooks) -> None:
    job = cancelled(jobs, receiver.url)
    webhooks.send(job)
    headers, body = receiver.got[0]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    event = json.loads(body)
    assert headers["webhook-id"] == event["id"]
    assert event["object"] == "event"
    assert (event["type"], event["data"]) == ("video.failed", {"id": job.id})


def test_the_openai_client_accepts_the_signature_and_refuses_a_changed_body(
    jobs: JobStore, receiver: Receiver, webhooks: Webhooks
) -> None:
    from openai import InvalidWebhookSignatureError, OpenAI

    webhooks.send(cancelled(jobs, receiver.url))
    headers, body = receiver.got[0]
    with OpenAI(api_key="none", webhook_secret=SECRET) as client:
        client.webhooks.verify_signature(body, headers)
        assert client.webhooks.unwrap(body, headers).type == "video.failed"
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body + b" ", headers)


def test_each_job_sends_one_event_of_its_end(jobs: JobStore, receiver: Receiver, webhooks: Webhooks) -> None:
    async def work() -> None:
        made = [create(jobs, receiver.url) for _ in range(3)]
        create(jobs, None)
        taken_back = cancelled(jobs, receiver.url)
        dispatchers = [Dispatcher(ScriptedRenderer(), jobs, webhooks=webhooks, **QUICK) for _ in range(2)]
        async with running(*dispatchers):
            for job in (*made, taken_back):
                now = await settled(jobs, job)
                assert now.webhook_state == "delivered"
                assert now.webhook_attempts == 1
        told = sorted((json.loads(body)["data"]["id"], json.loads(body)["type"]) for _, body in receiver.got)
        wanted = [(job.id, "video.completed") for job in made] + [(taken_back.id, "video.failed")]
        assert told == sorted(wanted)
        assert jobs.outbox.entries() == ()

    run(work)


def test_a_webhook_that_is_not_taken_is_tried_again_under_the_same_id(
    jobs: JobStore, receiver: Receiver, webhooks: Webhooks
) -> None:
    async def work() -> None:
        receiver.script = [503, 302]
        job = create(jobs, receiver.url)
        async with running(Dispatcher(ScriptedRenderer(), jobs, webhooks=webhooks, **QUICK)):
            now = await settled(jobs, job)
        assert (now.webhook_state, now.webhook_attempts) == ("delivered", 3)
        assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
        assert {body for _, body in receiver.got} == {receiver.got[0][1]}

    run(work)


@pytest.mark.parametrize(("script", "tries"), [([500] * 9, 3), ([410], 1)])
def test_a_refused_webhook_is_given_up_and_the_job_stays(
    jobs: JobStore, receiver: Receiver, webhooks: Webhooks, script: list[int], tries: int
) -> None:
    async def work() -> None:
        receiver.script = list(script)
        job = create(jobs, receiver.url)
        async with running(Dispatcher(ScriptedRenderer(), jobs, webhooks=webhooks, **QUICK)):
            assert (await ended(jobs, job)).status == "completed"
            now = await settled(jobs, job)
            assert (now.webhook_state, len(receiver.got), now.status) == ("failed", tries, "completed")
            assert now.webhook_status == script[0]
            assert jobs.outbox.entries() == ()
            receiver.script = []
            jobs.outbox.redeliver("ann", job.id)
            assert (await settled(jobs, job)).webhook_state == "delivered"
        assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1

    run(work)


def test_a_webhook_left_by_a_dead_dispatcher_is_sent_by_the_next(
    tmp_path: Path, receiver: Receiver, webhooks: Webhooks
) -> None:
    async def work() -> None:
        jobs = JobStore(str(tmp_path / "serve"), lease_s=0.5)
        job = cancelled(jobs, receiver.url)
        jobs.outbox.claim(jobs.outbox.read(jobs.outbox.entries()[0]), worker="dead")
        async with running(Dispatcher(ScriptedRenderer(), jobs, webhooks=webhooks, **QUICK)):
            assert (await settled(jobs, job)).webhook_attempts == 2
        assert len(receiver.got) == 1

    run(work)


def test_a_receiver_that_does_not_answer_delays_no_other(
    jobs: JobStore, receiver: Receiver, webhooks: Webhooks
) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
            dead = [cancelled(jobs, f"https://pictures.test:{silent.getsockname()[1]}/") for _ in range(12)]
            other = cancelled(jobs, receiver.url)
            async with running(Dispatcher(ScriptedRenderer(), jobs, webhooks=webhooks, **QUICK)):
                assert (await settled(jobs, other)).webhook_state == "delivered"
                begun = [jobs.get("ann", job.id).webhook_attempts for job in dead]
        assert sum(begun) <= PER_HOST  # none of their tries has ended

    run(work)


def test_the_entry_of_a_webhook_says_when_it_is_due(jobs: JobStore) -> None:
    cancelled(jobs, "https://example.com/")
    outbox = jobs.outbox
    outbox.postpone(outbox.claim(outbox.read(next(outbox.due())), worker="me"), TryResult(503), delay_s=100)
    assert list(outbox.due()) == []
    (entry,) = outbox.entries()
    assert entry.rank == pytest.approx(jobs.now() + 100, abs=5)


def test_an_entry_of_an_earlier_version_is_due_and_gets_its_time(jobs: JobStore, tmp_path: Path) -> None:
    job = cancelled(jobs, "https://example.com/")
    outbox, folder = jobs.outbox, str(tmp_path / "serve" / "webhooks")
    outbox.postpone(outbox.claim(outbox.read(next(outbox.due())), worker="me"), TryResult(503), delay_s=100)
    (named,) = outbox.entries()
    earlier = storage.join(folder, named.uri.rpartition("/")[2].partition("-")[2])
    storage.create_bytes(earlier, b"")
    storage.delete(named.uri)
    (entry,) = outbox.due()
    assert outbox.read(entry).document.id == job.id
    assert [each.uri for each in outbox.entries()] == [named.uri]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://127.0.0.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://[::ffff:127.0.0.1]/",
        "https://169.254.169.254/latest",
        "https://user:secret@example.com/",
        "https://localhost/",
        "https://example.com:22/",
        "file:///etc/passwd",
        "https://",
    ],
)
def test_an_address_that_is_not_public_receives_no_request(jobs: JobStore, url: str) -> None:
    with pytest.raises(FetchError) as caught:
        Webhooks(SECRET).send(cancelled(jobs, url))
    assert not caught.value.retryable
    assert "secret" not in caught.value.message


def test_redirects_are_not_followed(jobs: JobStore, receiver: Receiver, webhooks: Webhooks) -> None:
    receiver.script = [307]
    with pytest.raises(FetchUnavailable, match="answered 307"):
        webhooks.send(cancelled(jobs, receiver.url))
    assert len(receiver.got) == 1


def test_a_name_that_changes_its_address_after_the_first_lookup_is_refused(
    jobs: JobStore, receiver: Receiver, pem: Path
) -> None:
    answers = iter([["8.8.8.8", "127.0.0.1"]])
    hook = Webhooks(SECRET, resolve=lambda host, port: next(answers))
    with pytest.raises(AddressRefused, match="not public"):
        hook.send(cancelled(jobs, receiver.url))
    assert receiver.got == []


def test_a_silent_receiver_is_given_up_in_time(jobs: JobStore, webhooks: Webhooks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.closing(silent):
        begun = time.monotonic()
        with pytest.raises(FetchUnavailable, match="took too long"):
            webhooks.send(cancelled(jobs, f"https://pictures.test:{silent.getsockname()[1]}/"))
        assert time.monotonic() - begun < 30


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!", "whsec_" + base64.b64encode(b"short").decode()])
def test_an_invalid_secret_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Webhooks(secret)
    assert "short" not in caught.value.message
    assert "!!" not in caught.value.message


def test_a_job_without_a_webhook_leaves_nothing_to_send(jobs: JobStore, tmp_path: Path) -> None:
    jobs.cancel("ann", create(jobs, None).id)
    assert jobs.outbox.entries() == ()
    job = cancelled(jobs, "https://example.com/")
    entry = jobs.outbox.entries()[0]
    jobs.delete("ann", job.id)
    with pytest.raises(JobNotFound):
        jobs.outbox.read(entry)
    assert not list(storage.list_objects(str(tmp_path / "serve" / "webhooks")))
