"""Catalogues as the world has them, each checked with its pictures and animated."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pia_ray import storage
from pia_ray.catalog.local import run_local
from pia_ray.catalog.validate import validate
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.ledger import read_results
from pia_ray.testing import FakeAnimator
from tests.manifest.catalogues import CATALOGUES
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

DOCS = Path(__file__).parents[2] / "docs" / "manifest.md"

IN_STORES = ("shopify", "img2dataset", "hf_parquet", "hf_save_to_disk", "spark", "workbook", "weekly_files")
"""Catalogues that are also read from a store: one of each way that files are found and cells are read."""

IN_MEMORY = ("img2dataset", "hf_parquet", "hf_save_to_disk", "weekly_files")
"""Those that are also read through fsspec."""

Upload = Callable[[Path], str]


@pytest.fixture(scope="module")
def animator() -> Iterator[FakeAnimator]:
    with FakeAnimator(ModelConfig.named("demo")) as animator:
        yield animator


@pytest.fixture
def in_s3(s3: str) -> Upload:
    """Copies a folder into a bucket; the prefix there."""

    def upload(folder: Path) -> str:
        for path in folder.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"{s3}/in/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{s3}/in"

    return upload


@pytest.fixture
def in_memory() -> Iterator[Upload]:
    """Copies a folder into fsspec's store in memory; the folder there."""
    name = uuid.uuid4().hex
    store = fsspec.filesystem("memory")

    def upload(folder: Path) -> str:
        store.put(f"{folder}/", f"/{name}/", recursive=True)
        return f"memory://{name}"

    yield upload
    store.rm(f"/{name}", recursive=True)


def animate(name: str, root: str, output: Path, animator: FakeAnimator) -> None:
    """Checks every row and picture of a catalogue below `root`, and animates it."""
    catalogue = CATALOGUES[name]
    defaults = {"num_frames": 2, **catalogue.settings.get("defaults", {})}
    manifests = [f"{root}/{each}" if each else root for each in catalogue.manifests]
    values = {**catalogue.settings, "manifest": manifests, "output": str(output), "model": "demo", "defaults": defaults}
    config = build(CatalogConfig, values)
    findings = list(validate(config, fetch=True))
    assert [(found.message, found.prompt) for found in findings] == [(None, prompt) for prompt in catalogue.prompts]
    assert run_local(config, animator=animator).exit_code == 0
    results = read_results(config.output)
    assert results["status"].to_pylist() == ["succeeded"] * len(catalogue.prompts)
    assert results["prompt"].to_pylist() == list(catalogue.prompts)


@pytest.mark.parametrize("name", CATALOGUES)
def test_a_catalogue_on_disk_is_checked_and_animated(name: str, tmp_path: Path, animator: FakeAnimator) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    CATALOGUES[name].write(folder)
    animate(name, str(folder), tmp_path / "out", animator)


@pytest.mark.parametrize(
    ("name", "store"),
    [*((name, "in_s3") for name in IN_STORES), *((name, "in_memory") for name in IN_MEMORY)],
)
def test_a_catalogue_in_a_store_is_checked_and_animated(
    name: str, store: str, tmp_path: Path, animator: FakeAnimator, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    CATALOGUES[name].write(folder)
    upload: Upload = request.getfixturevalue(store)
    animate(name, upload(folder), tmp_path / "out", animator)


def test_the_documents_name_the_test_of_each_catalogue() -> None:
    assert set(re.findall(r"`test_catalogues\.py\[(\w+)\]`", DOCS.read_text("utf-8"))) == set(CATALOGUES)
