"""Folders and globs: what is there and what is planned agree, on a disk and in S3."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import manifest, storage
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ManifestError
from pia_ray.manifest import open_manifest
from pia_ray.testing import FakeAnimator, draw_picture
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

PNG = draw_picture((64, 48), seed=1)

Place = Callable[..., str]


def config_of(source: str, **settings: Any) -> CatalogConfig:
    values = {"output": "out", "model": "demo", "defaults": {"prompt": "p"}, **settings}
    return build(CatalogConfig, {"manifest": source, **values})


def items_of(source: str, **settings: Any) -> list[dict[str, Any]]:
    config = config_of(source, **settings)
    tables = manifest.plan(open_manifest(config), config, model_version="v1")
    return [item for table in tables for item in table.to_pylist()]


def names_of(source: str) -> list[str]:
    return [item["image_identity"] for item in items_of(source)]


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Writes files by name, PNG where no content is given, and gives their folder."""
    root = str(tmp_path / "f") if request.param == "disk" else f"{request.getfixturevalue('s3')}/f"

    def write(*names: str, **contents: bytes) -> str:
        for name in names:
            content = next((each for part, each in contents.items() if part in name.replace(".", "_")), PNG)
            storage.write_bytes(f"{root}/{name}", content)
        return root

    return write


def table(*ids: str) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {"id": list(ids), "image": [f"{name}.png" for name in ids], "prompt": ["p"] * len(ids)}
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


def test_every_file_that_may_be_a_picture_is_an_item_and_the_rest_is_counted_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [
        "a.jpg",
        "b.jfif",
        "c.HEIC",
        "d.avif",
        "e",
        "f.jpg_large",
        "g.JPG!w600",
        "h.2024",
        "_DSC01.JPG",
        "i.jxl",
    ]
    folder = place(*pictures, "m.mp4", "n.MP4", "notes.txt", ".DS_Store", "._a.jpg", "__MACOSX/a.jpg", "_SUCCESS")
    assert names_of(folder) == sorted(pictures)
    assert caplog.text.count("WARNING") == 1
    assert "left out are 2 .mp4, 1 .txt" in caplog.text


def test_a_picture_that_cannot_be_read_is_a_failed_row(tmp_path: Path) -> None:
    contents = {"a.png": PNG, "b.jxl": b"\xff\x0a" + bytes(40), "c": b"no picture", "d.svg": b"<svg></svg>"}
    (tmp_path / "f").mkdir()
    for name, content in contents.items():
        (tmp_path / "f" / name).write_bytes(content)
    config = config_of(str(tmp_path / "f"), output=str(tmp_path / "out"))
    summary = run_local(config, animator=FakeAnimator(ModelConfig.named("demo")))
    assert summary.progress.num_items == 4
    assert summary.errors == {"unsupported_image": 3}


def test_files_without_extension_are_pictures_but_where_there_are_tables(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    assert names_of(place("one/0a1b", "one/ff00")) == ["one/0a1b", "one/ff00"]
    folder = place("three/LICENSE", "three/m.parquet", "three/1.png", m_parquet=table("1"))
    caplog.clear()
    assert [item["id"] for item in items_of(f"{folder}/three")] == ["1"]
    assert "1 without extension" in caplog.text
    assert "1 picture, items only where a row names them" in caplog.text


def test_links_to_files_that_are_gone_are_items_and_tables_and_not_passed_over(tmp_path: Path) -> None:
    for folder in ("pictures", "tables"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(PNG)
    (tmp_path / "pictures" / "b.png").symlink_to("gone.png")
    (tmp_path / "pictures" / "c.png").symlink_to("c.png")
    os.mkfifo(tmp_path / "pictures" / "d.png")
    assert names_of(f"{tmp_path}/pictures") == names_of(f"{tmp_path}/pictures/*.png") == ["a.png", "b.png", "c.png"]
    (tmp_path / "tables" / "a.parquet").write_bytes(table("1"))
    (tmp_path / "tables" / "b.csv").symlink_to("gone.csv")
    for source in ("tables", "tables/*", "tables/b.csv"):
        with pytest.raises(ManifestError, match=r"cannot read b\.csv: No such file"):
            items_of(f"{tmp_path}/{source}")
    with pytest.raises(ManifestError, match="is a pipe or device, which can be read once only"):
        items_of(f"{tmp_path}/pictures/d.png")


def test_links_of_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("f/x/a.png", "f/.hidden/b.png", "elsewhere/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    for link, to in {"x/up": "..", "x/self": ".", "y": "../elsewhere"}.items():
        (tmp_path / "f" / link).symlink_to(to)
    (tmp_path / "elsewhere" / "back").symlink_to("../f")
    for source in ("f", "f/**/*", "f/**", "**/f/**/*.png"):
        assert [Path(name).name for name in names_of(f"{tmp_path}/{source}")] == ["a.png", "c.png"]


def test_pictures_in_subfolders_are_counted_where_those_in_the_folder_are_taken(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    folder = place("a.png", "x/b.png", "x/c.heic")
    assert names_of(folder) == ["a.png"]
    assert "2 files in its subfolders (a glob with ** takes them too)" in caplog.text
    assert names_of(f"{folder}/**/*") == ["a.png", "x/b.png", "x/c.heic"]


def test_markers_of_folders_in_s3_are_no_pictures(s3: str) -> None:
    for name in ("f/", "f/x/", "f/x_$folder$", "f/x/a.png"):
        bucket, _, key = f"{s3}/{name}".removeprefix("s3://").partition("/")
        storage.write_bytes(f"s3://{bucket}/{key}", PNG if name.endswith("png") else b"")
    assert names_of(f"{s3}/f") == ["x/a.png"]


@pytest.mark.parametrize(
    ("log", "name"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta Lake table"),
        ("metadata/v1.metadata.json", "an Apache Iceberg table"),
        (".hoodie/hoodie.properties", "an Apache Hudi table"),
        ("_versions/1.manifest", "a Lance table"),
    ],
)
def test_a_table_with_a_log_is_refused_by_name(place: Place, log: str, name: str) -> None:
    data = ("part-0.parquet", "part-1.parquet", "day=1/part-2.parquet")
    folder = place(*data, log, parquet=table("1"))
    for source in (folder, f"{folder}/*.parquet", f"{folder}/**/*.parquet", folder.removesuffix("/f")):
        with pytest.raises(ManifestError) as caught:
            items_of(source)
        assert name in caught.value.message
        assert "Parquet file first" in caught.value.message


def test_pictures_beside_a_table_with_a_log_are_read(place: Place) -> None:
    folder = place("a.png", "t/part-0.parquet", "t/_delta_log/0.json")
    assert names_of(folder) == ["a.png"]


def test_hive_partitions_pass_through(place: Place) -> None:
    names = ["day=2024-01-01/shop=a%20b/p.parquet", "day=2024-01-02/shop=__HIVE_DEFAULT_PARTITION__/style=x/q.parquet"]
    folder = place(*names, p_parquet=table("1", "2"), q_parquet=table("3"))
    for source in (folder, f"{folder}/**/*.parquet"):
        rows = [(i["id"], i["day"], i["shop"], i["manifest_style"], i["error_code"]) for i in items_of(source)]
        assert rows == [
            ("1", "2024-01-01", "a b", None, None),
            ("2", "2024-01-01", "a b", None, None),
            ("3", "2024-01-02", None, "x", None),
        ]


def test_a_column_of_the_file_goes_before_a_partition_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "f" / "sku=folder" / "m.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"id": "1", "image": "1.png", "sku": "own"}) + "\n")
    assert [item["sku"] for item in items_of(str(tmp_path / "f"))] == ["own"]
