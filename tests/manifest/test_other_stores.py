"""Manifests and pictures in stores that fsspec reads."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import manifest
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ManifestError
from pia_ray.manifest import inputs
from pia_ray.manifest.references import locate, redacted
from pia_ray.testing import draw_picture

PNG = draw_picture((64, 48), seed=0)


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder of fsspec's store in memory."""
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    store = fsspec.filesystem("memory")
    if store.exists(f"/{name}"):
        store.rm(f"/{name}", recursive=True)


def put(uri: str, content: bytes | str) -> None:
    data = content.encode() if isinstance(content, str) else content
    fsspec.filesystem("memory").pipe(uri.removeprefix("memory:/"), data)


def items(source: str | list[str], **settings: Any) -> list[dict[str, Any]]:
    config = build(CatalogConfig, {"manifest": source, "output": "/nowhere", "model": "demo", **settings})
    opened = manifest.open_manifest(config)
    return [row for table in manifest.plan(opened, config, model_version="0") for row in table.to_pylist()]


def test_references_of_a_manifest_in_a_store_are_below_it_or_whole(memory: str) -> None:
    put(f"{memory}/in/m.csv", f"id,image,prompt\na,../b/a.png,p\nb,{memory}/c.png,p\nc,/etc/passwd,p\n")
    first, second, third = items(f"{memory}/in/m.csv")
    assert (first["image"], first["image_identity"]) == (f"{memory}/b/a.png", "../b/a.png")
    assert (second["image"], second["image_identity"]) == (f"{memory}/c.png", f"{memory}/c.png")
    assert "cannot name files of one machine" in third["error_message"]


def test_a_local_manifest_names_pictures_in_a_store(memory: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"id,image,prompt\na,{memory}/a.png,p\n")
    (row,) = items(str(tmp_path / "m.csv"))
    put(f"{memory}/a.png", PNG)
    assert inputs.read_image(row["image"], max_bytes=10_000) == PNG


def test_folders_and_globs_in_a_store_are_found(memory: str) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/3.png", "b/notes.doc"):
        put(f"{memory}/{name}", PNG)
    put(f"{memory}/a/1.txt", "a caption")
    folder = items(memory + "/a", defaults={"prompt": "p"})
    assert [(row["image"], row["prompt"]) for row in folder] == [
        (f"{memory}/a/1.png", "a caption"),
        (f"{memory}/a/2.jpg", "p"),
    ]
    globbed = items(memory + "/**/*.png", defaults={"prompt": "p"})
    assert [row["image"] for row in globbed] == [f"{memory}/a/1.png", f"{memory}/b/3.png"]


def test_changed_pictures_in_a_store_are_planned_anew(memory: str) -> None:
    put(f"{memory}/m.csv", "id,image,prompt\na,a.png,p\nb,b.png,p\n")
    put(f"{memory}/a.png", PNG)
    put(f"{memory}/b.png", PNG)
    before = items(f"{memory}/m.csv", detect_changes=True)
    assert [row["work_key"] for row in items(f"{memory}/m.csv", detect_changes=True)] == [
        row["work_key"] for row in before
    ]
    put(f"{memory}/b.png", draw_picture((64, 48), seed=1))
    after = items(f"{memory}/m.csv", detect_changes=True)
    assert [a["work_key"] == b["work_key"] for a, b in zip(after, before, strict=True)] == [True, False]


def test_pictures_inside_parquet_in_a_store_are_read(memory: str) -> None:
    noise = [bytes(draw_picture((30, 30), seed=seed)) for seed in range(20)]
    sink = BytesIO()
    pq.write_table(pa.table({"id": [str(n) for n in range(20)], "image": noise, "prompt": ["p"] * 20}), sink)
    put(f"{memory}/m.parquet", sink.getvalue())
    rows = items(f"{memory}/m.parquet")
    assert [inputs.read_image(row["image"], max_bytes=10**7) for row in rows] == noise


def test_a_manifest_whose_package_is_missing_is_refused_with_the_package() -> None:
    with pytest.raises(ManifestError, match=r"oci:// is not read without the package ocifs: pip install ocifs"):
        items("oci://bucket/m.csv")


def test_a_manifest_that_is_not_in_its_store_is_refused(memory: str) -> None:
    for source in (f"{memory}/m.csv", f"{memory}/*.csv", memory):
        with pytest.raises(ManifestError):
            items(source)


def test_passwords_in_uris_are_in_no_item_and_no_message(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,image,prompt\na,sftp://me:hunter2@host/a.png,p\nb,memory://me:hunter2@h/a,p\n")
    assert "hunter2" not in str(items(str(tmp_path / "m.csv")))
    with pytest.raises(ManifestError) as raised:
        items("memory://me:hunter2@host/m.csv")
    assert "hunter2" not in raised.value.message
    assert redacted("abfs://box@me.dfs.core.windows.net/a.png") == "abfs://box@me.dfs.core.windows.net/a.png"


def test_a_signature_in_the_uri_of_a_store_is_no_part_of_the_identity() -> None:
    uri = "memory://box/a.png?sig=hidden&sv=1"
    assert locate(uri, "/") == (uri, "memory://box/a.png")
    assert redacted(uri) == "memory://box/a.png"
