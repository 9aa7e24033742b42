"""The busy share of an engine that sleeps, over a store whose every answer takes a given time, and requests per row.

The store is a dictionary behind boto3 in this process, so that a request costs its latency and boto3's CPU time alone.
Pictures are in the store too. Prints a card and, last, one JSON line.
Run: `.venv/bin/python benchmarks/storage_latency.py [--rows N] [--prefetch N]`
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import card
from botocore.awsrequest import AWSResponse

from pia_ray import storage
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.storage.client import s3_client
from pia_ray.testing import FakeAnimator, make_catalog

CASES: Final = ((2.0, 0.0), (2.0, 0.05), (2.0, 0.15), (0.2, 0.0), (0.2, 0.05), (0.2, 0.15))
"""Seconds of a row in the engine, and of an answer of the store."""
STEPS: Final = 4


class SlowStore:
    """Answers S3 requests of one bucket from memory, each after `latency_s`; a handler of botocore's `before-send`."""

    def __init__(self) -> None:
        self.latency_s = 0.0
        self._objects: dict[str, tuple[bytes, dict[str, str]]] = {}

    def __call__(self, request: Any, **_: object) -> AWSResponse:
        """The answer to the request."""
        time.sleep(self.latency_s)
        address = urlsplit(request.url)
        key = unquote(address.path).split("/", 2)[2] if address.path.count("/") > 1 else ""
        status, headers, body = self._answer(request, key, parse_qs(address.query))
        headers = {"Date": formatdate(usegmt=True), **headers}
        return AWSResponse(request.url, status, headers, _Raw(b"" if request.method == "HEAD" else body))

    def _answer(self, request: Any, key: str, query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        if request.method == "PUT":
            if "If-None-Match" in request.headers and key in self._objects:
                return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
            body = request.body if isinstance(request.body, bytes) else request.body.read()
            kept = {name: _text(value) for name, value in request.headers.items() if name.lower().startswith("x-amz-m")}
            self._objects[key] = bytes(body), kept
            return 200, {"ETag": '"0"'}, b""
        if request.method == "DELETE":
            self._objects.pop(key, None)
            return 204, {}, b""
        if not key:
            return 200, {}, self._listing(query.get("prefix", [""])[0])
        if key not in self._objects:
            return 404, {}, b"<Error><Code>NoSuchKey</Code></Error>"
        content, kept = self._objects[key]
        facts = {"ETag": '"0"', "Last-Modified": formatdate(usegmt=True), "Content-Length": str(len(content)), **kept}
        return 200, facts, content

    def _listing(self, prefix: str) -> bytes:
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(content)}</Size><ETag>0</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, (content, _) in sorted(self._objects.copy().items())  # other threads write meanwhile
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()


class _Raw:
    """A body, as urllib3 gives it to botocore."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def stream(self, *_: object, **__: object) -> Any:
        yield self.read()

    def read(self, size: int | None = None) -> bytes:
        """The next bytes, or all that are left."""
        size = len(self._body) if size is None else size
        piece, self._body = self._body[:size], self._body[size:]
        return piece

    def close(self) -> None:
        """Nothing."""


def main() -> None:
    """Runs one catalogue for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60, help="rows of 0.2 s; a third as many of 2 s (60)")
    parser.add_argument("--prefetch", help="as the setting of a run; left out: its default")
    arguments = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "-", "AWS_SECRET_ACCESS_KEY": "-", "AWS_ENDPOINT_URL": "http://store.invalid"}
    store = SlowStore()
    s3_client().meta.events.register("before-send.s3", store)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = pictures_in_store(Path(folder), arguments.rows)
        for number, (row_s, latency_s) in enumerate(CASES):
            store.latency_s = 0.0
            rows = arguments.rows if row_s < 1 else arguments.rows // 3
            settings = {} if arguments.prefetch is None else {"prefetch": arguments.prefetch}
            results.append(measured(store, manifest, rows, row_s, latency_s, output=f"out{number}", settings=settings))
    report(results)


def pictures_in_store(folder: Path, rows: int) -> Path:
    """A manifest of pictures that are in the store."""
    path = make_catalog(folder, rows=rows, sizes=[(64, 64)], format="jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        uri = f"s3://bench/{line['image']}"
        storage.write_bytes(uri, (folder / line["image"]).read_bytes())
        line["image"] = uri
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def measured(
    store: SlowStore,
    manifest: Path,
    rows: int,
    row_s: float,
    latency_s: float,
    *,
    output: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The numbers of one run."""
    model = ModelConfig.named("demo").model_copy(update={"long_edge": 64})
    values = {"manifest": str(manifest), "output": f"s3://bench/{output}", "model": model, "limit": rows}
    defaults = {"num_inference_steps": STEPS, "width": 64, "height": 64}
    config = build(CatalogConfig, {**values, "defaults": defaults, "batch_size": 1, **settings})
    before, cpu_s, started = Counter(storage.usage().requests), process_cpu_s(), time.monotonic()
    store.latency_s = latency_s
    with FakeAnimator(model, seconds_per_step=row_s / STEPS) as animator:
        summary = run_local(config, animator=animator)
    assert summary.exit_code == 0, summary
    seconds, cpu_s = time.monotonic() - started, process_cpu_s() - cpu_s
    requests = Counter(storage.usage().requests) - before
    return {
        "row_s": row_s,
        "latency_s": latency_s,
        "rows": rows,
        "busy_share": round(summary.progress.busy_share or 0.0, 4),
        "seconds": round(seconds, 2),
        "cpu_ms_per_row": round(1000 * cpu_s / rows, 1),
        "requests": dict(sorted(requests.items())),
        "requests_per_row": round(sum(requests.values()) / rows, 2),
    }


def process_cpu_s() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def report(results: list[dict[str, Any]]) -> None:
    """Prints the card and the JSON line."""
    print("storage_latency: run_local with an engine that sleeps, one row at a time; pictures and output in the store")
    print("  s in the engine   s an answer   rows   busy share   requests a row   CPU ms a row")
    for result in results:
        print(
            f"  {result['row_s']:15.2f} {result['latency_s']:13.2f} {result['rows']:6d} {result['busy_share']:12.1%}"
            f" {result['requests_per_row']:16.2f} {result['cpu_ms_per_row']:14.1f}"
        )
    facts = card.machine("boto3")
    print(f"  {card.line(facts)}")
    print(json.dumps({"benchmark": "storage_latency", "cases": results, **facts}))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    main()
