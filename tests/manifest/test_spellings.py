"""References as browsers, Hadoop, Windows and other file systems write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import manifest, storage
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import BadParameter, ImageNotFound
from pia_ray.manifest import open_manifest
from pia_ray.manifest.inputs import read_image, read_references
from pia_ray.manifest.references import locate
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures


def items_of(source: Path) -> list[dict[str, Any]]:
    config = build(CatalogConfig, {"manifest": str(source), "output": "out", "model": "demo"})
    return [
        item for table in manifest.plan(open_manifest(config), config, model_version="v1") for item in table.to_pylist()
    ]


@pytest.mark.parametrize(
    ("written", "uri"),
    [
        ("//cdn.example.com/a.jpg", "https://cdn.example.com/a.jpg"),
        ("//cdn.example.com:443/a.jpg?w=1", "https://cdn.example.com:443/a.jpg?w=1"),
        ("www.shop.com/a.jpg", "https://www.shop.com/a.jpg"),
        ("WWW.Shop.com/a.jpg", "https://WWW.Shop.com/a.jpg"),
        ("s3a://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("s3n://bucket/a b.jpg", "s3://bucket/a b.jpg"),
        ("https://x.org/a?w=1&amp;h=2", "https://x.org/a?w=1&h=2"),
        (
            "https://drive.google.com/file/d/1a_B-c/view?usp=sharing",
            "https://drive.google.com/uc?export=download&id=1a_B-c",
        ),
        ("https://drive.google.com/open?id=1a_B-c", "https://drive.google.com/uc?export=download&id=1a_B-c"),
        ("https://www.dropbox.com/s/ab12/a.jpg?dl=0", "https://www.dropbox.com/s/ab12/a.jpg?dl=1"),
        ("https://www.dropbox.com/s/ab12/a.jpg", "https://www.dropbox.com/s/ab12/a.jpg?dl=1"),
        (
            "https://www.dropbox.com/scl/fi/ab12/a.jpg?rlkey=k&dl=0",
            "https://www.dropbox.com/scl/fi/ab12/a.jpg?rlkey=k&dl=1",
        ),
        ("https://drive.google.com/drive/folders/1a", "https://drive.google.com/drive/folders/1a"),
        ("//mnt/a.jpg", "//mnt/a.jpg"),
    ],
)
def test_references_get_the_scheme_and_file_that_a_browser_finds(written: str, uri: str, tmp_path: Path) -> None:
    assert locate(written, f"{tmp_path}/")[0] == uri


def test_a_folder_that_is_named_as_a_host_stays_one(tmp_path: Path, s3: str) -> None:
    for folder in (str(tmp_path), s3):
        storage.write_bytes(f"{folder}/www.shop.com/a.jpg", b"x")
        assert locate("www.shop.com/a.jpg", f"{folder}/") == (f"{folder}/www.shop.com/a.jpg", "www.shop.com/a.jpg")


@pytest.mark.parametrize("written", [r"C:\pics\a.jpg", "c:/pics/a.jpg", r"\\server\share\a.jpg"])
def test_a_windows_path_is_refused_with_what_to_write(written: str, tmp_path: Path) -> None:
    with pytest.raises(BadParameter, match="path of a Windows machine: write it relative to the manifest"):
        locate(written, f"{tmp_path}/")


def test_a_signature_behind_an_html_ampersand_is_no_part_of_the_identity(tmp_path: Path) -> None:
    uri, identity = locate("https://x.org/a?v=1&amp;X-Amz-Signature=s", f"{tmp_path}/")
    assert (uri, identity) == ("https://x.org/a?v=1&X-Amz-Signature=s", "https://x.org/a?v=1")


@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize(
    ("written", "there"),
    [
        (r"sub\a.jpg", "sub/a.jpg"),
        (r".\sub\a.jpg", "sub/a.jpg"),
        ("a%20b.jpg", "a b.jpg"),
        ("a&amp;b.jpg", "a&b.jpg"),
        (r"sub\a%20b.jpg", "sub/a b.jpg"),
        (unicodedata.normalize("NFC", "größe.jpg"), unicodedata.normalize("NFD", "größe.jpg")),
        (unicodedata.normalize("NFD", "größe.jpg"), unicodedata.normalize("NFC", "größe.jpg")),
        ("gr%C3%B6%C3%9Fe.jpg", unicodedata.normalize("NFD", "größe.jpg")),
    ],
)
def test_a_file_is_found_under_its_other_spellings(
    place: str, written: str, there: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(tmp_path) if place == "disk" else request.getfixturevalue("s3")
    storage.write_bytes(f"{folder}/{there}", b"other")
    uri, identity = locate(written, f"{folder}/")
    assert identity == written
    assert read_image(uri, max_bytes=9) == b"other"
    if place == "disk":
        (tmp_path / written).parent.mkdir(exist_ok=True)
        (tmp_path / written).write_bytes(b"plain")
        assert read_image(uri, max_bytes=9) == b"plain"


def test_an_array_that_is_not_there_is_not_called_an_image(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="latents: there is no array"):
        read_references({"latents": f"{tmp_path}/a.npy"}, background="#000000", max_bytes=9, max_pixels=9)
    with pytest.raises(ImageNotFound, match="end_image: there is no image"):
        read_references({"end_image": f"{tmp_path}/a.png"}, background="#000000", max_bytes=9, max_pixels=9)


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_paths_in_a_binary_column_are_read_as_text(kind: str, tmp_path: Path) -> None:
    paths = [b"pics/a.jpg", "größe.jpg".encode(), b"https://x.org/a.jpg", b"BMW/a.jpg"]
    images = pa.array(paths) if kind == "binary" else pa.array([{"bytes": path, "path": None} for path in paths])
    pq.write_table(
        pa.table({"image": images, "prompt": ["p"] * 4, "mask_image": [b"m.png"] * 4}), tmp_path / "m.parquet"
    )
    pq.write_table(
        pa.table({"image": [path.decode() for path in paths], "prompt": ["p"] * 4, "mask_image": ["m.png"] * 4}),
        tmp_path / "n.parquet",
    )
    assert items_of(tmp_path / "m.parquet") == items_of(tmp_path / "n.parquet")
