"""Queues of other makers with the calls of video jobs: SQLite, and Celery with Redis where these are installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count

_DOCUMENT = json.dumps({"prompt": "waves", "params": {"num_inference_steps": 25}, "size": "64x64", "seconds": "2"})


def installed(folder: str, num_jobs: int) -> Iterator[tuple[str, Mapping[str, Callable[[], object]]]]:
    """Each queue with that many waiting jobs, and its calls; a line says what is not installed."""
    yield "sqlite", _sqlite(f"{folder}/{num_jobs}.sqlite", num_jobs)
    if not shutil.which("redis-server") or not importlib.util.find_spec("celery"):
        print("celery and redis are left out: redis-server, or celery[redis], is not installed")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--dir", folder, "--appendonly", "yes", "--appendfsync", "always"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            yield "celery + redis", _celery(f"redis://127.0.0.1:{port}/0", num_jobs)
        finally:
            server.kill()


def _sqlite(path: str, num_jobs: int) -> Mapping[str, Callable[[], object]]:
    db = sqlite3.connect(path, isolation_level=None)
    db.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
        "CREATE TABLE jobs (id INTEGER PRIMARY KEY, owner TEXT, status TEXT, lease REAL DEFAULT 0, document TEXT);"
        "CREATE INDEX waiting ON jobs (status, id); CREATE INDEX owners ON jobs (owner, id);"
    )
    rows = ((f"owner-{number % 100}", "queued", _DOCUMENT) for number in range(num_jobs))
    ended = (("archive", "failed", _DOCUMENT) for _ in range(num_jobs))
    insert = "INSERT INTO jobs (owner, status, document) VALUES (?, ?, ?)"
    for each in (rows, ended):
        db.execute("BEGIN")
        db.executemany(insert, each)
        db.execute("COMMIT")
    numbers = count(2 * num_jobs + 1)
    claim = (
        "UPDATE jobs SET status = 'claimed', lease = ? WHERE id = "
        "(SELECT id FROM jobs WHERE status = 'queued' ORDER BY id LIMIT 1) RETURNING document"
    )
    return {
        "create": lambda: db.execute(insert, ("owner-0", "queued", _DOCUMENT)),
        "claim": lambda: db.execute(claim, (time.time() + 20,)).fetchall(),
        "status": lambda: db.execute("SELECT document FROM jobs WHERE id = ?", (num_jobs,)).fetchall(),
        "newest page": lambda: db.execute(
            "SELECT document FROM jobs WHERE owner = 'archive' ORDER BY id DESC LIMIT 21"
        ).fetchall(),
        "cancel": lambda: db.execute("UPDATE jobs SET status = 'failed' WHERE id = ?", (next(numbers),)),
    }


def _celery(url: str, num_jobs: int) -> Mapping[str, Callable[[], object]]:
    """The calls that Celery has. It lists no jobs of an owner, and what it calls revoking stops no job that runs."""
    from celery import Celery

    app = Celery("jobs", broker=url, backend=url)
    for _ in range(100):
        try:
            app.backend.client.ping()
            break
        except Exception:  # noqa: BLE001 - the server is starting
            time.sleep(0.05)
    app.backend.client.config_set("appendfsync", "no")
    made = [app.send_task("render", (_DOCUMENT,)).id for _ in range(num_jobs)]
    app.backend.client.config_set("appendfsync", "always")
    channel = app.connection().channel()

    def claim() -> None:
        message = channel.basic_get("celery", no_ack=False)
        channel.basic_ack(message.delivery_tag)

    return {
        "create": lambda: app.send_task("render", (_DOCUMENT,)),
        "claim": claim,
        "status": lambda: app.AsyncResult(made[0]).state,
        "cancel": lambda: app.control.revoke(made[0]),
    }
