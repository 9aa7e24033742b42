"""An S3 server that keeps its objects in memory, for benchmarks and tests that count requests to many objects.

It knows what video jobs use: objects with conditional writes, and lists with prefix, delimiter, start and length, each
in time that grows with its answer. It checks no signatures. Run alone it prints its port and serves until it is ended.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MOST_KEYS: Final = 1000


@dataclass(frozen=True)
class _Stored:
    content: bytes
    metadata: Mapping[str, str]
    modified_at: datetime

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content + self.modified_at.isoformat().encode()).hexdigest()}"'  # noqa: S324


@dataclass
class Bucket:
    """Objects by key, and their keys in order."""

    objects: dict[str, _Stored] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def put(self, key: str, stored: _Stored) -> None:
        if key not in self.objects:
            bisect.insort(self.keys, key)
        self.objects[key] = stored

    def delete(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            del self.keys[bisect.bisect_left(self.keys, key)]

    def load(self, objects: Mapping[str, str]) -> None:
        """Puts all these objects there."""
        now = datetime.now(UTC)
        self.objects |= {key: _Stored(content.encode(), {}, now) for key, content in objects.items()}
        self.keys = sorted(self.objects)

    def page(self, *, prefix: str, delimiter: str, after: str, most: int) -> tuple[list[str], list[str], str | None]:
        """Keys, common prefixes, and where the next page begins, None for the last one."""
        keys: list[str] = []
        folders: list[str] = []
        last = after
        at = max(bisect.bisect_right(self.keys, after), bisect.bisect_left(self.keys, prefix))
        if delimiter and after.endswith(delimiter):
            at = max(at, bisect.bisect_left(self.keys, after + "\U0010ffff"))
        while at < len(self.keys) and self.keys[at].startswith(prefix):
            if len(keys) + len(folders) >= most:
                return keys, folders, last
            key = self.keys[at]
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if found:
                last = f"{prefix}{head}{delimiter}"
                folders.append(last)
                at = bisect.bisect_left(self.keys, last + "\U0010ffff")
            else:
                last = key
                keys.append(key)
                at += 1
        return keys, folders, None


class S3Memory(ThreadingHTTPServer):
    """The server, on a free port of this machine."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, Bucket] = {}
        self.lock = threading.Lock()

    def bucket(self, name: str) -> Bucket:
        """A bucket, which is there as soon as somebody asks for it."""
        with self.lock:
            return self.buckets.setdefault(name, Bucket())

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server."""
        keys = {"AWS_ACCESS_KEY_ID": "memory", "AWS_SECRET_ACCESS_KEY": "memory", "AWS_DEFAULT_REGION": "us-east-1"}
        return {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_port}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: S3Memory

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        bucket, key, query = self._address()
        if not key:
            self._list(bucket, query)
        elif (stored := bucket.objects.get(key)) is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
        else:
            self._answer(200, stored.content, self._headers(stored))

    def do_HEAD(self) -> None:
        bucket, key, _ = self._address()
        stored = bucket.objects.get(key)
        if stored is None:
            self._answer(404 if key else 200)
        else:
            self._answer(200, b"", {**self._headers(stored), "Content-Length": str(len(stored.content))})

    def do_PUT(self) -> None:
        bucket, key, query = self._address()
        content = self._body()
        with self.server.lock:
            if "load" in query:
                bucket.load(json.loads(content))
            elif key:
                now = bucket.objects.get(key)
                wanted = self.headers.get("If-Match")
                if wanted is not None and now is None:
                    return self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
                if (now is not None and self.headers.get("If-None-Match")) or (now and wanted not in (None, now.etag)):
                    return self._answer(
                        412, b"<Error><Code>PreconditionFailed</Code><Message>changed</Message></Error>"
                    )
                metadata = {
                    name: value for name, value in self.headers.items() if name.lower().startswith("x-amz-meta-")
                }
                stored = _Stored(content, metadata, datetime.now(UTC))
                bucket.put(key, stored)
                return self._answer(200, b"", {"ETag": stored.etag})
        return self._answer(200)

    def do_DELETE(self) -> None:
        bucket, key, _ = self._address()
        with self.server.lock:
            bucket.delete(key)
        self._answer(204)

    def _list(self, bucket: Bucket, query: Mapping[str, list[str]]) -> None:
        if "uploads" in query:
            return self._answer(200, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        with self.server.lock:
            keys, folders, token = bucket.page(
                prefix=prefix,
                delimiter=delimiter,
                after=after,
                most=min(MOST_KEYS, int(query.get("max-keys", ["1000"])[0])),
            )
            found = [(key, bucket.objects[key]) for key in keys]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{each.modified_at:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
            f"<ETag>{escape(each.etag)}</ETag><Size>{len(each.content)}</Size></Contents>"
            for key, each in found
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders)
        more = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token is not None else ""
        truncated = "true" if token is not None else "false"
        return self._answer(
            200,
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>{truncated}</IsTruncated>{entries}{common}{more}</ListBucketResult>".encode(),
        )

    def _address(self) -> tuple[Bucket, str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        name, _, key = unquote(parts.path).lstrip("/").partition("/")
        return self.server.bucket(name), key, parse_qs(parts.query, keep_blank_values=True)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _headers(self, stored: _Stored) -> dict[str, str]:
        modified = format_datetime(stored.modified_at, usegmt=True)
        return {"ETag": stored.etag, "Last-Modified": modified, **stored.metadata}

    def _answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)


if __name__ == "__main__":
    server = S3Memory()
    print(server.server_port, flush=True)
    server.serve_forever()
