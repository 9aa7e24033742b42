"""Workbooks, Arrow files, several manifests at once, and folders of pictures with captions."""

from __future__ import annotations

import csv
import logging
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import manifest
from pia_ray.catalog.local import run_local
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig, load
from pia_ray.config.model import build
from pia_ray.errors import ConfigError, ManifestError
from pia_ray.ledger import read_results
from pia_ray.manifest import open_manifest, read_image_cell
from pia_ray.testing import FakeAnimator, draw_picture
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

ROWS = [
    {"id": "a", "image": "a.png", "prompt": "süß, ein Boot", "motion_scale": 2, "sku": 7},
    {"id": "b", "image": "b.png", "prompt": "tree; wind", "motion_scale": None, "sku": 8},
]


def config_of(*sources: Path | str, **settings: Any) -> CatalogConfig:
    values = {"manifest": [str(source) for source in sources], "output": "out", "model": "demo"}
    return build(CatalogConfig, {**values, **settings})


def items_of(*sources: Path | str, **settings: Any) -> list[dict[str, Any]]:
    config = config_of(*sources, **settings)
    tables = manifest.plan(open_manifest(config), config, model_version="v1")
    return [item for table in tables for item in table.to_pylist()]


def write_csv(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_workbook(path: Path, *rows: list[Any], **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for name, others in sheets.items():
        sheet = book.create_sheet(name)
        for row in others:
            sheet.append(row)
    book.save(path)
    return path


def write_ipc(path: Path, table: pa.Table, *, stream: bool = False, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


# Workbooks


def test_a_workbook_gives_the_rows_of_the_same_csv(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "m.xlsx", list(ROWS[0]), *(list(row.values()) for row in ROWS), [None], ["", " "])
    assert items_of(path) == items_of(write_csv(tmp_path / "m.csv", *ROWS))


def test_numbers_and_days_of_a_workbook_are_text_as_a_person_sees_them(tmp_path: Path) -> None:
    from datetime import datetime

    header = ["id", "image", "prompt", "price", "day", "at", "sold", None]
    cells = [12.0, "a.png", "p", 1.5, datetime(2024, 1, 2), datetime(2024, 1, 2, 3, 4), True]
    (item,) = items_of(write_workbook(tmp_path / "m.xlsx", header, cells))
    assert [item[name] for name in ("id", "price", "day", "at", "sold")] == [
        *("12", "1.5", "2024-01-02", "2024-01-02 03:04:00", "true"),
    ]


def test_a_row_longer_than_the_header_is_a_bad_row(tmp_path: Path) -> None:
    path = write_workbook(tmp_path / "m.xlsx", ["image", "prompt"], ["a.png", "p", "x"], ["b.png", "p"])
    assert [item["error_message"] for item in items_of(path)] == ["row 1 of m.xlsx has 3 cells, the header 2", None]


def test_the_other_sheets_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_workbook(tmp_path / "m.xlsx", ["image", "prompt"], ["a.png", "p"], Prices=[["a", 1]])
    with caplog.at_level(logging.WARNING):
        assert len(items_of(path)) == 1
    assert caplog.messages == ['m.xlsx: the sheet "Sheet" is read; left out are Prices']


def test_a_workbook_that_is_none_or_empty_says_so(tmp_path: Path) -> None:
    (tmp_path / "m.xlsx").write_bytes(b"image,prompt\n")
    with pytest.raises(ManifestError, match=r"m\.xlsx is damaged or not an xlsx file"):
        items_of(tmp_path / "m.xlsx")
    with pytest.raises(ManifestError, match=r"no header"):
        items_of(write_workbook(tmp_path / "n.xlsx"))
    with pytest.raises(ManifestError, match=r"has no rows"):
        items_of(write_workbook(tmp_path / "o.xlsx", ["image", "prompt"]))


def test_without_openpyxl_one_line_says_which_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_workbook(tmp_path / "m.xlsx", ["image", "prompt"], ["a.png", "p"])
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ManifestError, match=r"pip install 'pia-ray\[xlsx\]'") as caught:
        items_of(path)
    assert "\n" not in caught.value.message


# Arrow


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_an_arrow_file_gives_the_rows_of_the_same_parquet(
    stream: bool, compression: str | None, tmp_path: Path
) -> None:
    table = pa.table({name: [row[name] for row in ROWS] * 4 for name in ROWS[0]})
    table = table.set_column(0, "id", pa.array([f"r{number}" for number in range(8)]))
    path = write_ipc(tmp_path / "m.arrow", table, stream=stream, compression=compression)
    pq.write_table(table, tmp_path / "m.parquet")
    assert items_of(path) == items_of(tmp_path / "m.parquet")


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_inside_an_arrow_file_are_read_in_any_order(stream: bool, tmp_path: Path) -> None:
    contents = [b"\x89PNG" + bytes([number]) for number in range(10)]
    images = [{"bytes": content, "path": None} for content in contents]
    path = write_ipc(tmp_path / "m.arrow", pa.table({"image": images, "prompt": ["p"] * 10}), stream=stream)
    uris = [item["image"] for item in items_of(path)]
    for number in [9, 0, 1, 2, 8, 3, 7, 7, 4, 6, 5]:
        assert read_image_cell(uris[number]) == contents[number]


def test_feather_of_the_first_version_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "m.feather").write_bytes(b"FEA1" + bytes(64) + b"FEA1")
    with pytest.raises(ManifestError, match=r"m\.feather is damaged or not of the kind arrow: Feather of version 1"):
        items_of(tmp_path / "m.feather")


# Several manifests


def test_several_manifests_are_one_and_keep_their_work_keys(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "a.csv", ROWS[0])
    pq.write_table(
        pa.table({name: [value] for name, value in ROWS[1].items() if name != "sku"}), tmp_path / "b.parquet"
    )
    found = items_of(first, tmp_path / "b.parquet")
    assert [item["work_key"] for item in found] == [
        item["work_key"] for source in (first, tmp_path / "b.parquet") for item in items_of(source)
    ]
    assert [item["sku"] for item in found] == ["7", None]


def test_files_of_one_name_in_several_folders_have_pictures_and_ids_of_their_own(tmp_path: Path) -> None:
    rows = {"image": "0.png", "prompt": "p"}
    sources = [write_csv(tmp_path / day / "m.csv", rows) for day in ("monday", "tuesday")]
    found = items_of(*sources)
    assert [item["image"] for item in found] == [str(tmp_path / day / "0.png") for day in ("monday", "tuesday")]
    assert found == items_of(tmp_path / "*" / "m.csv")


def test_an_id_in_two_manifests_names_both(tmp_path: Path) -> None:
    sources = [write_csv(tmp_path / day / "m.csv", ROWS[0]) for day in ("monday", "tuesday")]
    with pytest.raises(ManifestError, match=r'"a": row 1 of monday/m\.csv, row 1 of tuesday/m\.csv'):
        items_of(*sources)


def test_folders_of_pictures_and_tables_go_together(tmp_path: Path) -> None:
    for name in ("x/a.png", "y/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    table = write_csv(tmp_path / "m.csv", {"image": "x/b.png", "prompt": "own", "sku": "1"})
    found = items_of(tmp_path / "x", table, tmp_path / "y", defaults={"prompt": "run's"})
    assert [(Path(item["image"]).relative_to(tmp_path).as_posix(), item["prompt"], item["sku"]) for item in found] == [
        ("x/a.png", "run's", None),
        ("x/b.png", "own", "1"),
        ("y/a.png", "run's", None),
    ]


def test_a_config_file_lists_manifests(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("manifest: [a.csv, b.parquet]\noutput: out\nmodel: demo\n")
    assert load(tmp_path / "run.yaml", {}).manifests == ("a.csv", "b.parquet")
    assert load(tmp_path / "run.yaml", {"manifest": ["c.csv"]}).manifest == "c.csv"
    with pytest.raises(ConfigError, match="manifest"):
        load(None, {"manifest": [], "output": "out"})


def test_the_command_line_takes_several_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(write_csv(tmp_path / f"{row['id']}.csv", row)) for row in ROWS]
    assert main(["validate", *sources, "--model", "demo"]) == 0
    assert "2 work items, 0 bad" in capsys.readouterr().out
    assert main(["estimate", "--model", "demo", "--width", "64", "--height", "64", *sources]) == 0
    assert "2 in the manifest" in capsys.readouterr().out


# Captions


def test_the_text_file_of_a_picture_is_its_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jpg", "b.png", "c.webp", "d.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("\ufeffa boat,\n on a lake \n", "utf-8")
    (tmp_path / "b.caption").write_text("a tree")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "notes.txt").write_text("not a caption")
    with caplog.at_level(logging.WARNING):
        found = items_of(tmp_path, defaults={"prompt": "run's"})
    assert [item["prompt"] for item in found] == ["a boat, on a lake", "a tree", "run's", "run's"]
    assert caplog.messages == [f"{tmp_path}: left out are 1 .txt"]


def test_a_picture_without_caption_is_a_bad_row_where_the_run_has_no_prompt(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("a boat")
    (tmp_path / "b.txt").write_bytes(b"s\xfc\xdf")
    found = items_of(tmp_path)
    assert [item["error_code"] for item in found] == [None, "bad_manifest_row", "bad_parameter"]
    assert "b.txt that is not UTF-8" in found[1]["error_message"]


def test_a_folder_without_captions_says_both_ways_to_give_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"--prompt for all, or each picture a text file"):
        items_of(tmp_path)


def test_captions_lie_in_s3_too(s3: str, tmp_path: Path) -> None:
    from pia_ray import storage

    for name in ("a.png", "b.png"):
        storage.write_bytes(f"{s3}/shots/{name}", draw_picture((64, 64), seed=1))
    storage.write_bytes(f"{s3}/shots/a.txt", b"a boat")
    config = config_of(f"{s3}/shots", output=str(tmp_path / "out"), defaults={"prompt": "run's"})
    with FakeAnimator(config.model) as animator:
        assert run_local(config, animator=animator).exit_code == 0
    assert read_results(config.output)["prompt"].to_pylist() == ["a boat", "run's"]
