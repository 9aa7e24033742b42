"""Buckets of others: public ones are read without credentials, and those where the requester pays at its own cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from pia_ray import storage
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ConfigError, StorageDenied
from pia_ray.manifest import open_manifest
from pia_ray.testing import FakeAnimator, make_catalog
from tests.chaos_proxy import ChaosProxy, chaos
from tests.s3_server import S3Server, s3_server

__all__ = ["chaos", "s3_server"]  # fixtures

DEMO = ModelConfig.named("demo").model_copy(update={"long_edge": 64})


def upload(folder: Path, bucket: str) -> str:
    """The URI of a catalogue of two rows."""
    manifest = make_catalog(folder / "in", rows=2)
    for path in sorted((folder / "in").rglob("*.*")):
        storage.upload_file(path, f"{bucket}/{path.relative_to(folder / 'in')}")
    return f"{bucket}/{manifest.name}"


def config_of(folder: Path, manifest: str, **settings: str) -> CatalogConfig:
    return build(CatalogConfig, {"manifest": manifest, "output": str(folder / "out"), "model": DEMO, **settings})


def test_public_buckets_are_read_without_credentials(
    chaos: ChaosProxy, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, bucket = upload(tmp_path, chaos.bucket), chaos.bucket.removeprefix("s3://")
    s3_server.client().put_bucket_acl(Bucket=bucket, ACL="public-read")
    for found in storage.list_objects(chaos.bucket):
        key = found.uri.removeprefix(f"{chaos.bucket}/")
        s3_server.client().put_object_acl(Bucket=bucket, Key=key, ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage.forget_clients()
    with pytest.raises(StorageDenied, match="no usable AWS credentials"):
        storage.read_bytes(manifest)
    chaos.headers.clear()
    config = config_of(tmp_path, manifest, s3_anonymous=bucket)
    with FakeAnimator(DEMO, batch_size=4) as animator:
        assert run_local(config, animator=animator).exit_code == 0
    assert chaos.headers
    assert not any("authorization" in fields for fields in chaos.headers)


def test_reads_of_other_buckets_stay_signed_and_requesters_pay_where_they_say_so(
    chaos: ChaosProxy, tmp_path: Path
) -> None:
    manifest = upload(tmp_path, chaos.bucket)
    bucket = chaos.bucket.removeprefix("s3://")
    open_manifest(config_of(tmp_path, manifest, s3_anonymous="someone-else", s3_requester_pays=bucket))
    chaos.headers.clear()
    storage.read_bytes(manifest)
    storage.head(manifest)
    list(storage.list_objects(chaos.bucket))
    storage.copy_to_file(manifest, tmp_path / "copy")
    assert {fields.get("x-amz-request-payer") for fields in chaos.headers} == {"requester"}
    assert all("authorization" in fields for fields in chaos.headers)


def test_buckets_are_named_without_scheme_and_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names of buckets"):
        config_of(tmp_path, "m.csv", s3_anonymous="s3://laion/part")
