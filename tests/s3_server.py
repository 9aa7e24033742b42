"""A real S3 server over HTTP for tests: moto's, in a process of its own on a free port of this machine.

`s3` is a fixture to import: the URI of a new, empty bucket, with the environment pointed at the server.
"""

from __future__ import annotations

import atexit
import os
import re
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import pytest

from pia_ray import storage

PAGE_KEYS = 100
"""Objects in an answer to a listing, of which S3 itself gives 1,000."""

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


SERVE = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(sys.argv[1], port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """A moto server. It checks no signatures, and rights only after `enforce_rights`."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment["MOTO_S3_DEFAULT_MAX_KEYS"] = str(PAGE_KEYS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, host],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        port = self.process.stdout.readline().strip()
        assert port, "the S3 server does not start"
        self.url = f"http://{host}:{port}"
        atexit.register(self.stop)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this server."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    def client(self, service: str = "s3", *, url: str | None = None) -> Any:
        """A plain boto3 client with all rights that the server knows."""
        return boto3.client(
            service,
            endpoint_url=url or self.url,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )

    def new_bucket(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def new_user(self, policy: str) -> dict[str, str]:
        """Environment variables with the keys of a new IAM user that has `policy` (JSON)."""
        iam, name = self.client("iam"), f"user-{uuid.uuid4().hex[:8]}"
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def enforce_rights(self, *, yes: bool) -> None:
        """From now on (or no longer), requests need a user whose policy allows them."""
        count = b"0" if yes else b"1000000000"
        request = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth", data=count, headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request, timeout=10).close()

    def stop(self) -> None:
        """Ends the server."""
        self.process.kill()
        self.process.communicate()


@cache
def shared_server() -> S3Server:
    """One server for all tests of this process; ends with it."""
    return S3Server()


@pytest.fixture(scope="session")
def s3_server() -> S3Server:
    """The server that all tests of this process share."""
    return shared_server()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """`s3://<a new bucket>`, with this process's environment set to reach it."""
    point_at(monkeypatch, s3_server.environment, tmp_path)
    yield f"s3://{s3_server.new_bucket()}"
    storage.forget_clients()


def point_at(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], tmp_path: Path) -> None:
    """Gives this process exactly these AWS settings, and nothing of the machine's own."""
    for name in list(os.environ):
        if re.match("AWS_|BOTO_", name):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "no such file"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
