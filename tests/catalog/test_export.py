"""Exports: names are safe and unique, copies whole and made once, and the feed says what a shop needs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import ledger, storage
from pia_ray.catalog.export.export import Exported, ExportOptions, export_output
from pia_ray.catalog.export.names import check_name, export_name
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ConfigError, OutputError
from pia_ray.media.marking import is_marked
from pia_ray.media.video import probe
from tests.catalog.test_local import configure, go, rows_of, videos_of, write
from tests.s3_server import s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

ROWS = [
    {"id": "r1", "image": "r1.png", "prompt": "a", "num_frames": 2, "sku": "A 1", "price": 9.5, "tags": ["x", "y"]},
    {"id": "r2", "image": "r2.png", "prompt": "b", "num_frames": 2, "sku": "a/2", "price": float("nan"), "tags": []},
    {"id": "r3", "image": "gone", "prompt": "c", "num_frames": 2, "sku": "C3", "price": None, "tags": None},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> CatalogConfig:
    """An output with two videos and a row that failed, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    config = configure(write(folder, ROWS), folder / "out")
    go(config)
    return config


@pytest.fixture
def out(made: CatalogConfig, tmp_path: Path) -> str:
    """A copy of that output under another name, to be changed."""
    shutil.copytree(made.output, tmp_path / "moved")
    return str(tmp_path / "moved")


def export(output: str, target: Any, **options: Any) -> Exported:
    return export_output(output, str(target), options=ExportOptions(**options))


def names_in(folder: Path) -> set[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in files if not name.startswith((".", "feed."))}


def replace_results(output: str, **columns: list[Any]) -> None:
    """Writes other values into columns of the results table."""
    path = Path(output) / "results.parquet"
    table = pq.read_table(path)
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table(table, path)


def test_succeeded_videos_are_copied_whole_under_names_of_the_catalogue(made: CatalogConfig, tmp_path: Path) -> None:
    exported = export(made.output, tmp_path / "shop", name="{sku|lower}-{video_index}", provenance="full")
    assert (exported.num_videos, exported.num_copied, exported.num_left_out) == (2, 4, 1)
    videos = {"a 1-0.mp4", "a-2-0.mp4"}
    assert names_in(tmp_path / "shop") == videos | {"a 1-0-thumbnail.webp", "a-2-0-thumbnail.webp"}
    originals = {Path(uri).read_bytes() for uri in videos_of(made)}
    assert {(tmp_path / "shop" / name).read_bytes() for name in videos} == originals


def test_a_second_export_copies_only_what_changed(out: str, tmp_path: Path) -> None:
    def num_copied() -> int:
        return export(out, tmp_path / "shop", provenance="full").num_copied

    assert (num_copied(), num_copied()) == (4, 0)
    (tmp_path / "shop" / "r1-0.mp4").unlink()
    assert num_copied() == 1
    (tmp_path / "shop" / "r1-0.mp4").write_bytes(b"cut off")
    assert num_copied() == 1
    rows = pq.read_table(Path(out) / "results.parquet")
    replace_results(out, sha256=[None if sha is None else "0" * 64 for sha in rows["sha256"].to_pylist()])
    assert num_copied() == 4


def test_a_damaged_record_costs_a_copy_and_no_more(out: str, tmp_path: Path) -> None:
    export(out, tmp_path / "shop")
    (tmp_path / "shop" / ".pia-ray-export.json").write_text('{"files": [1')
    assert (export(out, tmp_path / "shop").num_copied, export(out, tmp_path / "shop").num_copied) == (4, 0)


def test_the_feed_has_urls_facts_and_the_catalogues_own_columns(made: CatalogConfig, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    options = {"name": "{sku}", "feed": "both", "base_url": "https://cdn.example/v"}
    exported = export(made.output, shop, **options)
    assert exported.feeds == [str(shop / "feed.csv"), str(shop / "feed.jsonl")]
    lines = [json.loads(line) for line in (shop / "feed.jsonl").read_text("utf-8").splitlines()]
    assert [line["video_url"] for line in lines] == ["https://cdn.example/v/A%201.mp4", "https://cdn.example/v/a-2.mp4"]
    assert lines[0] == {
        "id": "r1",
        "video_index": 0,
        "video_file": "A 1.mp4",
        "video_url": "https://cdn.example/v/A%201.mp4",
        "poster_url": None,
        "thumbnail_url": "https://cdn.example/v/A%201-thumbnail.webp",
        "width": 64,
        "height": 48,
        "fps": 8,
        "duration_s": 0.25,
        "sku": "A 1",
        "price": 9.5,
        "tags": ["x", "y"],
    }
    assert lines[1]["price"] is None  # JSON has no NaN
    with (shop / "feed.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(lines[0])] * 2
    assert rows[0]["tags"] == '["x", "y"]'


def test_a_poster_goes_out_beside_its_video(tmp_path: Path) -> None:
    rows = [{"id": "a", "image": "a.png", "prompt": "a", "num_frames": 2, "poster": "jpg"}]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    go(config)
    export(config.output, tmp_path / "shop", name="{id}", feed="jsonl")
    assert names_in(tmp_path / "shop") == {"a.mp4", "a-poster.jpg", "a-thumbnail.webp"}
    assert json.loads((tmp_path / "shop" / "feed.jsonl").read_text())["poster_url"] == "a-poster.jpg"


def test_the_column_of_the_ids_has_its_own_name_too(tmp_path: Path) -> None:
    rows = [{"sku": "A1", "image": "a.png", "prompt": "a", "num_frames": 2}]
    config = configure(write(tmp_path, rows), tmp_path / "out", id_col="sku")
    go(config)
    export(config.output, tmp_path / "shop", name="{sku}")
    assert "A1.mp4" in names_in(tmp_path / "shop")
    assert (tmp_path / "shop" / "feed.csv").read_text().splitlines()[0].endswith(",sku")


@pytest.mark.parametrize("name", ["{status}", "same"])
def test_a_name_of_two_rows_is_refused_with_both_and_copies_nothing(
    made: CatalogConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["export", made.output, "--to", str(tmp_path / "shop"), "--name", name]) == 2
    said = capsys.readouterr().err
    assert '"r1" (0) and "r2" (0)' in said
    assert not (tmp_path / "shop").exists()


def test_names_that_differ_in_case_alone_are_one_name_on_disk_and_two_in_s3(s3: str, tmp_path: Path) -> None:
    rows = [{"id": name, "image": "a.png", "prompt": "a", "num_frames": 2} for name in ("Ab", "aB")]
    config = configure(write(tmp_path, rows), tmp_path / "out")
    go(config)
    with pytest.raises(ConfigError, match='"Ab" \\(0\\) and "aB" \\(0\\)'):
        export(config.output, tmp_path / "shop", name="{id}")
    assert export(config.output, f"{s3}/shop", name="{id}").num_videos == 2


def test_a_name_that_is_the_thumbnail_of_another_row_is_refused(tmp_path: Path) -> None:
    rows = [{"id": name, "image": "a.png", "prompt": "a", "num_frames": 2} for name in ("x", "x-thumbnail")]
    config = configure(write(tmp_path, rows), tmp_path / "out", format="webp")
    go(config)
    with pytest.raises(ConfigError, match='thumbnail of "x"'):
        export(config.output, tmp_path / "shop", name="{id}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{skuu}", 'Did you mean "sku"'),
        ("{sku|upper}", "is not a filter"),
        ("{sku", "has no partner"),
        ("../{sku}", "not a path below the target"),
        ("/{sku}", "not a path below the target"),
        ("{sku}/", "not a path below the target"),
        ("{price}", 'is empty in "r2"'),
    ],
)
def test_a_template_that_cannot_name_every_video_is_refused(out: str, tmp_path: Path, name: str, said: str) -> None:
    replace_results(out, price=[1.0, None, None])
    with pytest.raises(ConfigError, match=said):
        export(out, tmp_path / "shop", name=name)
    assert not (tmp_path / "shop").exists()


def test_results_without_own_columns_say_where_these_come_from(out: str, tmp_path: Path) -> None:
    shutil.rmtree(Path(out) / "_ledger" / "runs")
    ledger.rebuild(out)
    with pytest.raises(ConfigError, match="no columns of the catalogue's own"):
        export(out, tmp_path / "shop", name="{sku}")


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("../../etc/passwd", "_-..-etc-passwd"),
        ("a\\b:c*?", "a-b-c--"),
        ("..", "_"),
        ("con", "_con"),
        ("NUL.txt", "_NUL.txt"),
        (".hidden", "_hidden"),
        ("tail. ", "tail"),
        ("e\u0301t\u00e9\u202e\x00", "\u00e9t\u00e9--"),
        ("\u7279\u4fa1", "\u7279\u4fa1"),
        ("\U0001f600" * 90, "\U0001f600" * 50),
        (7, "7"),
    ],
)
def test_a_cell_never_leaves_its_part_of_the_path(cell: Any, name: str) -> None:
    assert export_name("f/{cell}", {"cell": cell}) == f"f/{name}"


def test_a_part_in_brackets_is_left_out_where_its_cell_is_empty() -> None:
    template = "[{brand}/]{sku}"
    check_name(template, names=["brand", "sku"], where="the results")
    assert export_name(template, {"brand": "B", "sku": "s"}) == "B/s"
    assert export_name(template, {"brand": None, "sku": "s"}) == "s"


def test_only_accepted_videos_go_out_where_only_these_are_wanted(out: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no video of these results was held against bounds"):
        export(out, tmp_path / "shop", accepted=True)
    replace_results(out, accepted=[False, True, None])
    assert export(out, tmp_path / "shop", accepted=True).num_left_out == 2
    assert names_in(tmp_path / "shop") == {"r2-0.mp4", "r2-0-thumbnail.webp"}


def test_what_a_person_says_counts_before_the_bounds(out: str, tmp_path: Path) -> None:
    replace_results(out, accepted=[False, True, None], review=["approved", "rejected", None])
    export(out, tmp_path / "shop", accepted=True)
    assert names_in(tmp_path / "shop") == {"r1-0.mp4", "r1-0-thumbnail.webp"}


def test_what_is_no_longer_exported_stays_until_it_is_pruned(out: str, tmp_path: Path) -> None:
    export(out, tmp_path / "shop", feed="both")
    (tmp_path / "shop" / "mine.txt").write_text("not of an export")
    replace_results(out, accepted=[False, True, None])
    assert export(out, tmp_path / "shop", accepted=True).num_others == 3
    assert export(out, tmp_path / "shop", accepted=True, prune=True).num_pruned == 3
    assert names_in(tmp_path / "shop") == {"r2-0.mp4", "r2-0-thumbnail.webp", "mine.txt"}
    assert not (tmp_path / "shop" / "feed.jsonl").exists()


def test_a_video_that_is_missing_or_damaged_is_named_and_the_others_go_out(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uris = pq.read_table(Path(out) / "results.parquet")["video_uri"].to_pylist()
    first, second = (Path(out, *uri.split("/")[-3:]) for uri in uris[:2])
    first.unlink()
    assert main(["export", out, "--to", str(tmp_path / "shop")]) == 1
    assert "r1 (0)" in capsys.readouterr().out
    assert names_in(tmp_path / "shop") == {"r2-0.mp4", "r2-0-thumbnail.webp"}
    assert len((tmp_path / "shop" / "feed.csv").read_text().splitlines()) == 2
    whole = second.read_bytes()
    for number, content in enumerate((whole[:-1], whole[:-1] + bytes([whole[-1] ^ 0x10]))):
        second.write_bytes(content)
        exported = export(out, tmp_path / f"other-{number}")
        assert [(each["id"], each["reason"].partition(" is ")[2]) for each in exported.missing] == [
            ("r1", "not there"),
            ("r2", "damaged"),
        ]


def test_linked_files_share_their_bytes_with_the_output(out: str, tmp_path: Path) -> None:
    export(out, tmp_path / "shop", link=True, provenance="full")
    original = next((Path(out) / "videos").rglob("*.mp4"))
    assert any(path.samefile(original) for path in (tmp_path / "shop").glob("*.mp4"))
    assert export(out, tmp_path / "shop", link=True, provenance="full").num_copied == 0


@pytest.mark.parametrize("target", ["", "videos", "thumbnails/x", "_ledger"])
def test_the_output_is_not_exported_into_itself(out: str, target: str) -> None:
    with pytest.raises(ConfigError, match="a folder that runs write to"):
        export(out, storage.join(out, target))


def test_a_target_that_cannot_be_written_is_named_and_not_the_results(out: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OutputError, match=r"the export stopped: cannot write .*file") as caught:
        export_output(out, str(tmp_path / "file"), options=ExportOptions())
    assert "results" not in caught.value.message


@pytest.mark.parametrize("url", ["cdn.example", "ftp://cdn.example/", "https://cdn.example/?a=b", "https://["])
def test_a_base_url_is_that_of_a_folder(out: str, tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        export(out, tmp_path / "shop", base_url=url)


def test_an_exported_video_tells_no_more_of_its_making_than_was_asked_for(out: str, tmp_path: Path) -> None:
    def told(level: str) -> tuple[int, set[str]]:
        copied = export(out, tmp_path / "shop", provenance=level).num_copied
        content = (tmp_path / "shop" / "r1-0.mp4").read_bytes()
        assert is_marked(content, "mp4")
        return copied, set(probe(content).provenance)

    copied, names = told("public")
    assert (copied, "work_key" in names, "prompt" in names, "image_uri" in names) == (4, True, False, False)
    assert told("public")[0] == 0
    assert told("none") == (2, set())
    copied, names = told("full")
    assert (copied, "prompt" in names) == (2, True)


def test_an_export_inside_s3_and_out_of_it_is_copied_once(s3: str, out: str, tmp_path: Path) -> None:
    export(out, f"{s3}/shop", name="{sku}", base_url="https://cdn.example")
    videos = [found for found in storage.list_objects(f"{s3}/shop") if found.uri.endswith(".mp4")]
    assert [found.uri for found in videos] == [f"{s3}/shop/A 1.mp4", f"{s3}/shop/a-2.mp4"]
    for found in storage.list_objects(out):
        storage.upload_file(storage.local_path(found.uri), s3 + "/out" + found.uri.removeprefix(out))
    assert [export(f"{s3}/out", f"{s3}/again", name="{sku}").num_copied for _ in range(2)] == [4, 0]
    assert storage.read_bytes(f"{s3}/again/A 1.mp4") == storage.read_bytes(f"{s3}/shop/A 1.mp4")
    assert "s3://" in storage.read_bytes(f"{s3}/again/feed.csv").decode()
    export(f"{s3}/out", tmp_path / "shop", name="{sku}")
    assert (tmp_path / "shop" / "A 1.mp4").read_bytes() == storage.read_bytes(f"{s3}/shop/A 1.mp4")


def test_the_closing_lines_and_the_json_say_the_same(
    made: CatalogConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", made.output, "--to", str(tmp_path / "shop")]) == 0
    said = capsys.readouterr().out
    assert "2 videos in" in said
    assert "1 row left out: failed" in said
    assert main(["export", made.output, "--to", str(tmp_path / "shop"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_videos"], facts["num_copied"], facts["num_unchanged"]) == (2, 0, 4)
    assert len(rows_of(made)) == 3
