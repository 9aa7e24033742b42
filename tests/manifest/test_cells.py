"""Pictures inside Parquet manifests: each column is read from its store about once, in whatever order rows come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import storage
from pia_ray.errors import ImageNotFound, StorageNotFound
from pia_ray.manifest import read_image_cell
from tests.chaos_proxy import ChaosProxy, chaos
from tests.s3_server import s3_server

__all__ = ["chaos", "s3_server"]  # fixtures

ROWS = 1200
SIZE = 60_000


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [rng.bytes(SIZE) for _ in range(ROWS)]


@pytest.fixture(scope="module")
def one_group(contents: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of one row group with 72 MB of pictures, as pandas and pyarrow write it."""
    path = tmp_path_factory.mktemp("cells") / "m.parquet"
    structs = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({"other": ["x" * 1000] * ROWS, "image": structs}), path, row_group_size=ROWS)
    return path


@pytest.fixture
def stored(chaos: ChaosProxy, one_group: Path) -> Iterator[str]:
    """The same in a store that counts; its memory of cells is of this test alone."""
    uri = f"{chaos.bucket}/m.parquet"
    storage.upload_file(one_group, uri)
    chaos.answered_bytes = 0
    yield uri


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_a_column_of_one_row_group_is_asked_of_the_store_once(
    chaos: ChaosProxy, stored: str, contents: list[bytes], order: str
) -> None:
    rows = list(range(ROWS))
    if order == "shuffled":
        random.Random(1).shuffle(rows)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: read_image_cell(f"{stored}#row={row + 1}&column=image"), rows))
    assert found == [contents[row] for row in rows]
    assert chaos.answered_bytes < 1.2 * ROWS * SIZE


def test_the_first_pictures_of_a_large_group_cost_only_what_lies_before_them(
    chaos: ChaosProxy, stored: str, contents: list[bytes]
) -> None:
    assert read_image_cell(f"{stored}#row=3&column=image") == contents[2]
    assert chaos.answered_bytes < 0.95 * ROWS * SIZE


def test_shuffled_rows_of_many_groups_read_each_group_once(
    chaos: ChaosProxy, contents: list[bytes], tmp_path: Path
) -> None:
    path, uri = tmp_path / "m.parquet", f"{chaos.bucket}/groups.parquet"
    pq.write_table(pa.table({"image": contents[:200]}), path, row_group_size=10)
    storage.upload_file(path, uri)
    chaos.answered_bytes = 0
    rows = random.Random(2).sample(range(200), 200)
    assert [read_image_cell(f"{uri}#row={row + 1}&column=image") for row in rows] == [contents[row] for row in rows]
    assert chaos.answered_bytes < 1.2 * 200 * SIZE


def test_a_stream_that_breaks_off_goes_on_where_it_was(chaos: ChaosProxy, stored: str, contents: list[bytes]) -> None:
    assert read_image_cell(f"{stored}#row=1&column=image") == contents[0]
    chaos.faults.extend(["cut body", "reset"])
    assert read_image_cell(f"{stored}#row=1200&column=image") == contents[-1]


def test_a_manifest_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    for content in (b"one", b"other"):
        pq.write_table(pa.table({"image": [content]}), path)
        assert read_image_cell(f"{path}#row=1&column=image") == content
    path.unlink()
    with pytest.raises(StorageNotFound, match="not there any more"):
        read_image_cell(f"{path}#row=1&column=image")


def test_cells_of_text_lists_and_nulls_keep_their_values(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    latents = np.ones((4, 1, 8, 8), np.float32).tolist()
    pq.write_table(
        pa.table({"image": ["data:;base64,aGk=", None, "data:;base64,aGk="], "latents": [latents] * 3}), path
    )
    with pytest.raises(ImageNotFound, match="no image bytes"):
        read_image_cell(f"{path}#row=2&column=image")
    assert read_image_cell(f"{path}#row=3&column=image") == b"hi"
    assert len(read_image_cell(f"{path}#row=2&column=latents")) > 4 * 64 * 4
