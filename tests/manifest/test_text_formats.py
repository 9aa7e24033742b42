"""Text manifests as spreadsheets, shops and databases write them: delimiters, encodings, arrays, lists, packing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import manifest
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ConfigError, ManifestError
from pia_ray.manifest import open_manifest

ROWS = [{"id": "a", "image": "a.png", "prompt": "süß, ein Boot"}, {"id": "b", "image": "b.png", "prompt": "tree; wind"}]


def items_of(source: Path | str, **settings: Any) -> list[dict[str, Any]]:
    config = build(CatalogConfig, {"manifest": str(source), "output": "out", "model": "demo", **settings})
    tables = manifest.plan(open_manifest(config), config, model_version="v1")
    return [item for table in tables for item in table.to_pylist()]


def text_of(delimiter: str = ",", header: str = "id,image,prompt") -> str:
    lines = [header.replace(",", delimiter)]
    lines += [delimiter.join(f'"{cell}"' for cell in row.values()) for row in ROWS]
    return "\n".join(lines) + "\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def expected(tmp_path: Path) -> list[dict[str, Any]]:
    return items_of(write(tmp_path / "expected.csv", text_of()))


@pytest.mark.parametrize("extension", ["csv", "tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_by_the_header(
    extension: str, delimiter: str, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    path = write(tmp_path / f"m.{extension}", text_of(delimiter))
    assert items_of(path) == expected
    assert items_of(path, delimiter="tab" if delimiter == "\t" else delimiter) == expected


def test_a_header_that_works_with_the_usual_delimiter_keeps_it(tmp_path: Path) -> None:
    (item,) = items_of(write(tmp_path / "m.csv", "image,prompt,a;b;c;d\nx.png,p,1;2\n"))
    assert item["a;b;c;d"] == "1;2"
    (item,) = items_of(write(tmp_path / "n.csv", "pic,prompt,a;b;c;d\nx.png,p,1;2\n"), image_col="pic")
    assert item["a;b;c;d"] == "1;2"


def test_a_stated_delimiter_goes_before_the_header(tmp_path: Path) -> None:
    (item,) = items_of(write(tmp_path / "m.csv", "a,image^prompt\n1,2^p\n"), delimiter="^", image_col="a,image")
    assert (item["image_identity"], item["prompt"]) == ("1,2", "p")
    with pytest.raises(ConfigError, match="delimiter"):
        items_of(tmp_path / "m.csv", delimiter=";;")


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "\ufeffSEP=;"])
def test_a_line_for_excel_names_the_delimiter(first: str, tmp_path: Path) -> None:
    text = f"{first}\r\nID;Image Src;TEXT\r\n1;a.png;one, two\r\n2;b.png;x;y\r\n"
    good, bad = items_of(write(tmp_path / "m.csv", text))
    assert (good["id"], good["image_identity"], good["prompt"]) == ("1", "a.png", "one, two")
    assert "row 2 of m.csv (line 4) has 4 cells, the header 3" in bad["error_message"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_utf16_and_utf32_are_read_with_their_mark_and_utf16_without_it(
    encoding: str, kind: str, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    text = {"csv": text_of(";"), "jsonl": lines, "json": json.dumps(ROWS, ensure_ascii=False)}[kind]
    assert items_of(write(tmp_path / f"m.{kind}", text.encode(encoding))) == expected


def test_another_encoding_is_stated(tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    path = write(tmp_path / "m.csv", text_of(";").encode("cp1252"))
    assert items_of(path)[0]["error_code"] == "bad_manifest_row"
    assert items_of(path, encoding="cp1252") == expected
    with pytest.raises(ManifestError, match="is not utf-16"):
        items_of(write(tmp_path / "n.csv", b"abc"), encoding="utf-16")
    for no_text in ("klingon", "base64", "rot13", "undefined"):
        with pytest.raises(ConfigError, match="encoding: must be an encoding that Python knows"):
            items_of(path, encoding=no_text)


@pytest.mark.parametrize(
    ("content", "kind"),
    [(gzip.compress(b"x", mtime=0), "gzip file"), (b"PK\x03\x04", "Excel workbook"), (b"PAR1", "Parquet file")],
)
@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.txt"])
def test_a_file_of_another_kind_than_its_name_says_is_refused_by_its_kind(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    with pytest.raises(ManifestError, match=rf"{name} is an? .*{kind}.* by its first bytes"):
        items_of(write(tmp_path / name, content), defaults={"prompt": "p"})


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_json_array_is_its_objects(
    indent: int | None, kind: str, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    path = write(tmp_path / f"m.{kind}", "\n " + json.dumps(ROWS, indent=indent))
    assert items_of(path) == expected
    assert items_of(write(tmp_path / "lines.json", "".join(json.dumps(row) + "\n" for row in ROWS))) == expected


def test_a_long_json_array_is_read_piece_by_piece(tmp_path: Path) -> None:
    rows = [{"id": str(number), "image": "a.png", "prompt": "p" * 500} for number in range(5000)]
    assert [item["id"] for item in items_of(write(tmp_path / "m.json", json.dumps(rows)))] == [
        row["id"] for row in rows
    ]


def test_a_damaged_json_array_is_refused_and_what_is_no_object_is_a_bad_row(tmp_path: Path) -> None:
    cut = json.dumps(ROWS)[:-20]
    with pytest.raises(ManifestError, match=r"m\.json is not a JSON array: element 2"):
        items_of(write(tmp_path / "m.json", cut))
    with pytest.raises(
        ManifestError, match=r"m\.json is not a JSON array: element 2: 'image' stands twice in an object"
    ):
        items_of(write(tmp_path / "m.json", '[{"image": "a.png"}, {"image": "a.png", "image": "b.png"}]'))
    for more in ("[5]", "{}"):
        with pytest.raises(ManifestError, match=r"m\.json goes on behind its JSON array"):
            items_of(write(tmp_path / "m.json", json.dumps(ROWS) + "\n" + more))
    items = items_of(write(tmp_path / "n.json", json.dumps([ROWS[0], 5, ROWS[1]])))
    assert [item["error_message"] for item in items] == [None, "row 2 of n.json (element 2) is not a JSON object", None]


def test_a_text_file_is_a_list_of_references(tmp_path: Path) -> None:
    path = write(tmp_path / "m.txt", "\ufeffa b.png\r\n\r\nhttps://x.org/b.png\r\ns3://bucket/c.png")
    items = items_of(path, defaults={"prompt": "p"})
    assert [item["image"] for item in items] == [f"{tmp_path}/a b.png", "https://x.org/b.png", "s3://bucket/c.png"]
    with pytest.raises(ManifestError, match="txt has no prompt column"):
        items_of(path)
    with pytest.raises(ManifestError, match="has no rows"):
        items_of(write(tmp_path / "n.txt", "\n\n"), defaults={"prompt": "p"})


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_packed_file_is_the_same_manifest(
    kind: str, packing: str, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    contents = {"csv": text_of().encode(), "jsonl": lines, "json": json.dumps(ROWS).encode()}
    content = contents.get(kind) or sink.getvalue().to_pybytes()
    packed = gzip.compress(content) if packing == "gz" else pa.compress(content, codec="zstd", asbytes=True)
    assert items_of(write(tmp_path / f"m.{kind}.{packing}", packed)) == expected
    with pytest.raises(ManifestError, match=rf"m\.{kind}\.{packing}"):
        items_of(write(tmp_path / f"m.{kind}.{packing}", packed[: len(packed) // 2]))


def test_notes_and_captions_of_a_folder_are_no_tables_but_named_ones_are(tmp_path: Path) -> None:
    for name in ("a.png", "a.json", "a.txt"):
        write(tmp_path / name, json.dumps([ROWS[0]]))
    assert [item["image_identity"] for item in items_of(tmp_path, defaults={"prompt": "p"})] == ["a.png"]
    assert [item["id"] for item in items_of(f"{tmp_path}/*.json")] == ["a"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{\n  "image": "a.png",\n  "prompt": "waves"\n}\n', "(line 1) is not valid JSON"),
        ('["a.png", "b.png"]', "(line 1) is not a JSON object"),
        ("null", "(line 1) is not a JSON object"),
    ],
)
def test_json_without_an_object_is_refused_with_its_first_fault(tmp_path: Path, content: str, fault: str) -> None:
    with pytest.raises(ManifestError) as caught:
        items_of(write(tmp_path / "m.json", content))
    assert caught.value.message.startswith(f"m.json {fault}")
    assert "an object on each line, or is an array of objects" in caught.value.message
