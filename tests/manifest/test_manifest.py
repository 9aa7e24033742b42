"""Manifests through their public door: what is planned, what is rejected, and what each refusal says."""

import base64
import gzip
import hashlib
import json
import os
import random
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from pia_ray import manifest, storage
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.config.resolving import canonical_params, seed_from_id
from pia_ray.errors import BadParameter, ImageNotFound, ManifestError, StorageError, StorageNotFound
from pia_ray.manifest import ITEMS_SCHEMA, Item, open_manifest, plan_row, read_image_cell, row_from_item

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
ITEM_COLUMNS = ITEMS_SCHEMA.names
DEMO = ModelConfig.named("demo")


def config_of(uri, **settings):
    return build(CatalogConfig, {"manifest": str(uri), "output": "out", "model": "demo", **settings})


def opened(uri, **settings):
    return open_manifest(config_of(uri, **settings))


def table_of(uri, *, model_version="v1", **settings):
    found = opened(uri, **settings)
    config = config_of(uri, **settings)
    tables = list(manifest.plan(found, config, model_version=model_version))
    return pa.concat_tables(tables) if tables else found.items_schema.empty_table()


def items_of(uri, **settings):
    return table_of(uri, **settings).to_pylist()


def refusal(uri, **settings):
    with pytest.raises(ManifestError) as caught:
        items_of(uri, **settings)
    return caught.value.message


def rejection(uri, **settings):
    (item,) = [item for item in items_of(uri, **settings) if item["error_message"] is not None]
    return item["error_code"], item["error_message"]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


# Formats


def test_an_item_has_the_columns_of_its_schema_in_order():
    assert list(Item._fields) == ITEMS_SCHEMA.names


def test_the_same_rows_give_the_same_items_in_every_format(tmp_path):
    rows = [
        {"id": "a", "image": "pics/a.jpg", "prompt": "a boat, süß", "motion_scale": "3"},
        {"id": "b", "image": "pics/b.jpg", "prompt": "a tree\nin wind", "motion_scale": "7"},
    ]
    names = list(rows[0])
    quoted = [[f'"{row[name]}"' for name in names] for row in rows]
    csv_text = "\n".join(",".join(line) for line in [names, *quoted]) + "\n"
    jsonl_text = "".join(json.dumps(row) + "\n" for row in rows)
    write_parquet(tmp_path / "m.parquet", {name: [row[name] for row in rows] for name in names})
    write(tmp_path / "m.csv", csv_text)
    write(tmp_path / "m.tsv", "\n".join("\t".join(line) for line in [names, *quoted]) + "\n")
    write(tmp_path / "m.jsonl", jsonl_text)
    write(tmp_path / "m.ndjson", jsonl_text)
    for name in ("m.parquet", "m.csv", "m.tsv", "m.jsonl", "m.ndjson"):
        write(tmp_path / f"{name}.gz", gzip.compress((tmp_path / name).read_bytes()))
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 10
    plans = {path.name: items_of(path) for path in paths}
    expected = plans["m.parquet"]
    assert [item["prompt"] for item in expected] == ["a boat, süß", "a tree\nin wind"]
    assert all(plan == expected for plan in plans.values()), plans


def test_the_items_have_the_schema_and_the_manifest_order(tmp_path):
    path = write(tmp_path / "m.csv", "image,prompt,id,sku\n" + "".join(f"{n}.png,p,{n},s{n}\n" for n in range(100)))
    table = table_of(path)
    assert table.schema == opened(path).items_schema
    assert table.schema.names == [*ITEM_COLUMNS, "sku"]
    assert table["id"].to_pylist() == [str(n) for n in range(100)]
    assert table["sku"].to_pylist() == [f"s{n}" for n in range(100)]
    assert table["image"][7].as_py() == str(tmp_path / "7.png")
    assert table["image_identity"][7].as_py() == "7.png"


def test_csv_cells_stay_text(tmp_path):
    path = write(tmp_path / "m.csv", "id,image,prompt,day,code\n007,a.png,p,2020-01-01,0012\n")
    (item,) = items_of(path)
    assert (item["id"], item["day"], item["code"]) == ("007", "2020-01-01", "0012")


def test_a_csv_with_a_byte_order_mark_and_windows_line_ends_is_read(tmp_path):
    path = write(tmp_path / "m.csv", b"\xef\xbb\xbfid,image,prompt\r\na,x.png,p\r\n\r\nb,y.png,q\r\n")
    assert [item["id"] for item in items_of(path)] == ["a", "b"]


def test_a_newline_in_quotes_stays_in_its_cell(tmp_path):
    path = write(tmp_path / "m.csv", 'id,image,prompt\na,x.png,"one\ntwo"\nb,y.png,q\n')
    assert [item["prompt"] for item in items_of(path)] == ["one\ntwo", "q"]


def test_a_ragged_csv_row_is_rejected_alone_with_its_line(tmp_path):
    path = write(tmp_path / "m.csv", 'id,image,prompt\na,x.png,"p\nq"\nb,y.png,red, blue\nc,z.png,r\n')
    items = items_of(path)
    assert [item["error_code"] for item in items] == [None, "bad_manifest_row", None]
    assert items[1]["error_message"] == (
        "row 2 of m.csv (line 4) has 4 cells, the header 3: check its quotes and separators"
    )
    assert items[1]["id"] == "row 2 of m.csv"
    assert items[1]["seed"] == seed_from_id("row 2 of m.csv")
    assert len(items[1]["work_key"]) == 64


def test_a_quote_that_is_never_closed_rejects_what_it_swallows_and_says_the_lines(tmp_path):
    path = write(tmp_path / "m.csv", 'id,image,prompt\na,x.png,p\nb,y.png,"q\nc,z.png,r\n')
    items = items_of(path)
    assert [item["error_code"] for item in items] == [None, "bad_manifest_row"]
    assert "row 2 of m.csv (lines 3 to 4) cannot be split into cells" in items[1]["error_message"]


def test_a_csv_row_that_is_not_utf8_is_rejected_alone(tmp_path):
    path = write(tmp_path / "m.csv", "id,image,prompt\na,x.png,caf\xe9\nb,y.png,tea\n".encode("latin-1"))
    code, message = rejection(path)
    assert (code, message) == (
        "bad_manifest_row",
        "row 1 of m.csv (line 2) is not UTF-8: save the file as UTF-8, or state its --encoding",
    )
    assert items_of(path)[1]["error_code"] is None


def test_a_csv_header_with_one_name_twice_is_refused(tmp_path):
    path = write(tmp_path / "m.csv", "id,image,prompt,image\na,x.png,p,y.png\n")
    assert refusal(path) == "m.csv has more than one column named image: rename all but one"


def test_a_csv_header_that_is_not_utf8_is_refused(tmp_path):
    path = write(tmp_path / "m.csv", "id,image,prompt,pa\xefs\na,x.png,p,q\n".encode("latin-1"))
    assert refusal(path) == "the header of m.csv is not UTF-8: save the file as UTF-8, or state its --encoding"


def test_a_column_without_a_name_is_left_out(tmp_path):
    path = write(tmp_path / "m.csv", ",id,image,prompt\n0,a,x.png,p\n")
    assert table_of(path).schema.names == ITEM_COLUMNS


def test_a_csv_cell_may_be_large(tmp_path):
    content = os.urandom(300_000)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    path = write(tmp_path / "m.csv", f'id,image,prompt\na,"{url}",p\n')
    (item,) = items_of(path)
    assert item["image"] == url
    assert item["image_identity"] == "sha256:" + hashlib.sha256(content).hexdigest()


def test_bad_json_lines_are_rejected_alone(tmp_path):
    good = '{"id": "%s", "image": "x.png", "prompt": "p"}\n'
    lines = [good % "a", "{oops}\n", "[1]\n", "\n", '{"id": "n", "image": NaN, "prompt": "p"}\n', good % "b"]
    raw = "".join(lines).encode() + b'{"id": "c", "image": "x.png", "prompt": "caf\xe9"}\n'
    raw += b'{"id": "d", "image": "x.png", "prompt": "\\ud800"}\n'
    raw += b'{"id": "e", "image": "x.png", "prompt": "p", "id": "f"}\n'
    items = items_of(write(tmp_path / "m.jsonl", raw))
    assert [item["error_code"] for item in items] == [None, *["bad_manifest_row"] * 3, None, *["bad_manifest_row"] * 3]
    messages = [item["error_message"] for item in items if item["error_message"]]
    assert messages[0].startswith("row 2 of m.jsonl (line 2) is not valid JSON: Expecting property name")
    assert messages[1] == "row 3 of m.jsonl (line 3) is not a JSON object"
    assert messages[2] == "row 4 of m.jsonl (line 5) is not valid JSON: NaN is not a JSON number"
    assert messages[3] == "row 6 of m.jsonl (line 7) is not UTF-8: save the file as UTF-8, or state its --encoding"
    assert "row 7 of m.jsonl (line 8) holds a lone surrogate" in messages[4]
    assert messages[5] == "row 8 of m.jsonl (line 9) is not valid JSON: 'id' stands twice in an object"


def test_json_columns_get_one_type_over_all_their_files(tmp_path):
    base = {"image": "x.png", "prompt": "p"}
    write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"id": "1", **base, "count": 1, "share": 1, "new": True, "mixed": 1, "tags": ["x"], "none": None},
            {"id": "2", **base, "count": 2**62, "share": 0.5, "new": None, "mixed": None},
        ],
    )
    write_jsonl(tmp_path / "b.jsonl", [{"id": "3", **base, "count": 3, "share": 2, "mixed": "one", "late": "é"}])
    table = table_of(tmp_path)
    types = {field.name: str(field.type) for field in table.schema}
    assert [types[n] for n in ("count", "share", "new", "mixed", "tags", "none", "late")] == [
        "int64",
        "double",
        "bool",
        "string",
        "string",
        "string",
        "string",
    ]
    rows = table.to_pylist()
    assert [row["count"] for row in rows] == [1, 2**62, 3]
    assert [row["mixed"] for row in rows] == ["1", None, '"one"']
    assert [row["tags"] for row in rows] == ['["x"]', None, None]
    assert [row["late"] for row in rows] == [None, None, "é"]


# Parquet


def test_a_column_that_the_first_parquet_file_lacks_is_not_lost(tmp_path):
    base = {"image": ["x.png"], "prompt": ["p"]}
    write_parquet(tmp_path / "a.parquet", {"id": ["1"], **base, "n": pa.array([1], pa.int8())})
    write_parquet(tmp_path / "b.parquet", {"id": ["2"], **base, "n": pa.array([300], pa.int32()), "late": ["x"]})
    write_parquet(tmp_path / "c.parquet", {"id": ["3"], **base, "n": pa.array([0.5])})
    table = table_of(tmp_path)
    assert table["late"].to_pylist() == [None, "x", None]
    assert table["n"].to_pylist() == [1.0, 300.0, 0.5]
    assert table.schema.field("n").type == pa.float64()


def test_conflicting_types_are_refused_with_both_files(tmp_path):
    base = {"image": ["x.png"], "prompt": ["p"]}
    write_parquet(tmp_path / "a.parquet", {"id": ["1"], **base, "sku": [1]})
    write_parquet(tmp_path / "b.parquet", {"id": ["2"], **base, "sku": ["one"]})
    message = 'column "sku" is int64 in a.parquet and string in b.parquet: give it one type, or rename it'
    assert refusal(tmp_path) == message


def test_a_number_that_does_not_fit_the_wider_type_is_refused(tmp_path):
    base = {"image": ["x.png"], "prompt": ["p"]}
    write_parquet(tmp_path / "a.parquet", {"id": ["1"], **base, "n": [2**53 + 1]})
    write_parquet(tmp_path / "b.parquet", {"id": ["2"], **base, "n": [0.5]})
    assert 'column "n" of a.parquet is int64, which does not fit double' in refusal(tmp_path)


def test_parquet_with_one_column_name_twice_is_refused(tmp_path):
    arrays = [pa.array(["a"]), pa.array(["x.png"]), pa.array(["p"]), pa.array(["q"])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["id", "image", "prompt", "prompt"]), tmp_path / "m.parquet")
    assert refusal(tmp_path / "m.parquet") == "m.parquet has more than one column named prompt: rename all but one"


@pytest.mark.parametrize("cut", [0, 3, 40, -1])
def test_a_damaged_parquet_file_is_refused_by_name(tmp_path, cut):
    path = write_parquet(tmp_path / "m.parquet", {"id": ["a"], "image": ["x.png"], "prompt": ["p"]})
    path.write_bytes(path.read_bytes()[:cut])
    assert "m.parquet" in refusal(path)


def test_a_damaged_page_is_refused_by_name(tmp_path):
    path = write_parquet(
        tmp_path / "m.parquet", {"id": [str(n) for n in range(1000)], "image": ["x"] * 1000, "prompt": ["p"] * 1000}
    )
    raw = bytearray(path.read_bytes())
    raw[20:200] = bytes(180)
    path.write_bytes(raw)
    assert "m.parquet" in refusal(path)


@pytest.mark.parametrize(
    "ids",
    [
        pa.array(["1", "2"]).dictionary_encode(),
        pa.array(["1", "2"], pa.large_string()),
        pa.array(["1", "2"], pa.string_view()),
        pa.array([1, 2], pa.uint16()),
        pa.array([1.0, 2.0]),
        pa.array([Decimal(1), Decimal(2)]),
        pa.array([b"1", b"2"]),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_of_any_plain_type_become_the_same_text(tmp_path, ids):
    path = write_parquet(tmp_path / "m.parquet", {"id": ids, "image": ["x.png"] * 2, "prompt": ["p"] * 2})
    assert [item["id"] for item in items_of(path)] == ["1", "2"]


def test_uuids_are_ids_as_they_are_written(tmp_path):
    value = uuid.uuid4()
    ids = pa.array([value.bytes], pa.uuid())
    path = write_parquet(tmp_path / "m.parquet", {"id": ids, "image": ["x.png"], "prompt": ["p"]})
    assert items_of(path)[0]["id"] == str(value)


def test_parquet_text_that_is_not_utf8_rejects_its_row_but_not_its_neighbours(tmp_path):
    prompts = pa.array([b"caf\xe9", b"tea"]).view(pa.string())
    path = write_parquet(tmp_path / "m.parquet", {"id": ["a", "b"], "image": ["x.png"] * 2, "prompt": prompts})
    bad, good = items_of(path)
    assert bad["error_message"].startswith("row 1 of m.parquet: prompt must be valid Unicode text")
    assert (good["prompt"], good["error_message"]) == ("tea", None)


def test_pass_through_text_that_is_not_utf8_is_refused_with_column_and_file(tmp_path):
    titles = pa.array([b"caf\xe9"]).view(pa.string())
    path = write_parquet(tmp_path / "m.parquet", {"id": ["a"], "image": ["x.png"], "prompt": ["p"], "title": titles})
    message = refusal(path)
    assert 'column "title" of m.parquet' in message
    assert "UTF8" in message


def test_knob_columns_of_any_type_mean_the_same(tmp_path):
    keys = set()
    for number, values in enumerate(
        [
            pa.array([5], pa.int8()),
            pa.array([5.0]),
            pa.array([Decimal(5)]),
            pa.array(["5"]),
            pa.array(["loop-large"]),
            pa.array(["5"]).dictionary_encode(),
        ]
    ):
        path = write_parquet(
            tmp_path / f"{number}.parquet", {"id": ["a"], "image": ["x.png"], "prompt": ["p"], "motion_scale": values}
        )
        (item,) = items_of(path)
        assert item["error_message"] is None
        keys.add(item["work_key"])
    assert len(keys) == 1


def test_large_seeds_with_nulls_beside_them_keep_every_digit(tmp_path):
    seeds = pa.array([2**64 - 1, None, 2**63 + 1], pa.uint64())
    path = write_parquet(
        tmp_path / "m.parquet", {"id": list("abc"), "image": ["x"] * 3, "prompt": ["p"] * 3, "seed": seeds}
    )
    table = table_of(path)
    assert table.schema.field("seed").type == pa.uint64()
    assert table["seed"].to_pylist() == [2**64 - 1, seed_from_id("b"), 2**63 + 1]
    assert json.loads(table["params"][0].as_py())["seed"] == str(2**64 - 1)


def test_pass_through_columns_keep_their_types(tmp_path):
    columns = {
        "price": pa.array([Decimal("1.50"), None], pa.decimal128(9, 2)),
        "tags": pa.array([["a"], None], pa.list_(pa.string())),
        "shop": pa.array(["x", "y"]).dictionary_encode(),
        "at": pa.array([0, 1], pa.timestamp("us", "UTC")),
        "thumb": pa.array([b"\0", None]),
        "view": pa.array(["v", None], pa.string_view()),
        "nothing": pa.nulls(2),
    }
    path = write_parquet(tmp_path / "m.parquet", {"id": ["a", "b"], "image": ["x"] * 2, "prompt": ["p"] * 2, **columns})
    table = table_of(path)
    types = {name: table.schema.field(name).type for name in columns}
    assert types["price"] == pa.decimal128(9, 2)
    assert types["tags"].value_type == pa.string()
    assert types["at"] == pa.timestamp("us", "UTC")
    assert types["thumb"] == pa.binary()
    assert types["shop"] == types["view"] == types["nothing"] == pa.string()
    assert table["price"].to_pylist() == [Decimal("1.50"), None]


def test_pass_through_cells_follow_their_row_when_it_makes_several_items(tmp_path):
    path = write(tmp_path / "m.csv", "id,image,prompt,num_videos,sku\na,x,p,2,s1\nb,y,p,,s2\n")
    assert [(item["id"], item["video_index"], item["sku"]) for item in items_of(path)] == [
        ("a", 0, "s1"),
        ("a", 1, "s1"),
        ("b", 0, "s2"),
    ]


# Folders, globs and what is no manifest


def test_a_folder_and_a_glob_take_tables_of_any_kind_in_order_of_their_names(tmp_path):
    write(tmp_path / "b.csv", "id,image,prompt\nb,x.png,p\n")
    write_jsonl(tmp_path / "a.jsonl", [{"id": "a", "image": "x.png", "prompt": "p"}])
    write_parquet(tmp_path / "c.parquet", {"id": ["c"], "image": ["x.png"], "prompt": ["p"]})
    write(tmp_path / "README.txt", "no table")
    write(tmp_path / "_SUCCESS", "")
    write(tmp_path / ".hidden.csv", "id\n")
    assert [item["id"] for item in items_of(tmp_path)] == ["a", "b", "c"]
    assert [item["id"] for item in items_of(tmp_path / "[bc].*")] == ["b", "c"]


def test_same_relative_names_in_two_folders_are_two_pictures(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder / "m.csv", "image,prompt\n1.png,p\n")
    items = items_of(tmp_path / "*" / "m.csv")
    assert [item["image"] for item in items] == [str(tmp_path / "one/1.png"), str(tmp_path / "two/1.png")]
    assert [item["image_identity"] for item in items] == ["one/1.png", "two/1.png"]
    assert items[0]["id"] != items[1]["id"]
    assert items == items_of(tmp_path)


def test_a_folder_of_images_is_a_manifest_given_a_prompt(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        write(tmp_path / "pics" / name, PNG)
    items = items_of(tmp_path / "pics", defaults={"prompt": "a photo"})
    assert [item["image"] for item in items] == [str(tmp_path / "pics/a.png"), str(tmp_path / "pics/b.JPG")]
    assert [item["image_identity"] for item in items] == ["a.png", "b.JPG"]
    assert all(re.fullmatch(r"[ab]-[0-9a-f]{12}", item["id"]) for item in items)
    assert {item["prompt"] for item in items} == {"a photo"}
    assert "folder of images, which has no prompts: give a --prompt" in refusal(tmp_path / "pics")


def test_images_in_subfolders_count_where_none_lie_directly_in_the_folder(tmp_path):
    write(tmp_path / "cats" / "a.png", PNG)
    write(tmp_path / "dogs" / "a.png", PNG)
    items = items_of(tmp_path, defaults={"prompt": "p"})
    assert [item["image_identity"] for item in items] == ["cats/a.png", "dogs/a.png"]


def test_nothing_there_is_refused_with_the_reason(tmp_path):
    assert "there is no manifest" in refusal(tmp_path / "none.csv")
    assert "matches no file" in refusal(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    assert "is an empty folder" in refusal(tmp_path / "empty")
    write(tmp_path / "docs" / "a.txt", "x")
    assert "no manifest there" in refusal(tmp_path / "docs")
    assert "a manifest is a local path or an s3:// URI" in refusal("https://example.com/m.csv")


def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path):
    message = refusal(write(tmp_path / "m.docx", "x"))
    known = ".parquet, .csv, .tsv, .jsonl, .ndjson, .json, .txt, .arrow, .feather, .ipc, .xlsx, .xlsm"
    assert f"{known} (also with .gz or .zst)" in message
    assert "use `pia-ray image`" in refusal(write(tmp_path / "a.png", PNG))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", b"id,image,prompt\n"),
        ("m.jsonl", b""),
        ("m.jsonl", b"\n\n"),
        ("m.json", b"[]"),
        ("m.json", b" [ ]\n"),
        ("m.csv.gz", gzip.compress(b"image,prompt\n", mtime=0)),
    ],
)
def test_a_manifest_without_rows_is_refused(tmp_path, name, content):
    assert refusal(write(tmp_path / name, content)).endswith("has no rows")


def test_a_file_name_with_brackets_is_no_glob(tmp_path):
    path = write(tmp_path / "m[1].csv", "id,image,prompt\na,x.png,p\n")
    assert [item["id"] for item in items_of(path)] == ["a"]


def test_a_path_that_the_system_refuses_is_refused_with_its_reason(tmp_path):
    assert "too long" in refusal(tmp_path / ("y" * 300 + ".csv"))


def test_an_empty_csv_is_refused_by_name(tmp_path):
    assert refusal(write(tmp_path / "m.csv", b"")) == "m.csv is empty: it has no header"


def test_parquet_without_rows_is_refused(tmp_path):
    path = write_parquet(
        tmp_path / "m.parquet", {"image": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}
    )
    assert refusal(path).endswith("has no rows")


def test_a_cut_gzip_is_refused_by_name(tmp_path):
    text = "id,image,prompt\n" + "".join(f"{n},{uuid.UUID(int=n)}.png,p\n" for n in range(5000))
    packed = gzip.compress(text.encode())
    assert "m.csv.gz" in refusal(write(tmp_path / "m.csv.gz", packed[: len(packed) // 2]))
    assert "m.csv.gz" in refusal(write(tmp_path / "m.csv.gz", b"not packed"))


# Columns


def test_a_missing_image_or_prompt_column_is_refused_with_the_columns_there_are(tmp_path):
    message = refusal(write(tmp_path / "m.csv", "picture,prompt\nx.png,p\n"))
    assert "m.csv has no image column. Columns there: picture, prompt." in message
    assert "image, url, image_url, image_path or file_name" in message
    assert "--image-col" in message
    path = write(tmp_path / "n.csv", "image,title\nx.png,p\n")
    message = refusal(path)
    assert "n.csv has no prompt column. Columns there: image, title." in message
    assert "prompt, caption or text" in message
    assert "--prompt" in message
    assert items_of(path, defaults={"prompt": "from the run"})[0]["prompt"] == "from the run"


def test_every_file_needs_its_columns(tmp_path):
    write(tmp_path / "a.csv", "image,prompt\nx.png,p\n")
    write(tmp_path / "b.csv", "image,title\nx.png,p\n")
    assert refusal(tmp_path).startswith("b.csv has no prompt column")


@pytest.mark.parametrize("image", ["image", "url", "image_url", "image_path", "file_name"])
@pytest.mark.parametrize("prompt", ["prompt", "caption", "text"])
def test_aliases_are_found(tmp_path, image, prompt):
    path = write(tmp_path / "m.csv", f"{prompt},{image}\nthe prompt,x.png\n")
    (item,) = items_of(path)
    assert (item["image_identity"], item["prompt"]) == ("x.png", "the prompt")
    assert set(item) == set(ITEM_COLUMNS)


def test_the_first_alias_wins_and_the_others_pass_through(tmp_path):
    path = write(tmp_path / "m.csv", "text,prompt,url,image\nt,p,u.png,i.png\n")
    (item,) = items_of(path)
    assert (item["prompt"], item["image_identity"], item["text"], item["url"]) == ("p", "i.png", "t", "u.png")


def test_named_columns_override_the_usual_ones(tmp_path):
    path = write(tmp_path / "m.csv", "sku,pic,title,caption\ns1,x.png,t,c\n")
    (item,) = items_of(path, id_col="sku", image_col="pic", prompt_col="title")
    assert (item["id"], item["image_identity"], item["prompt"], item["caption"]) == ("s1", "x.png", "t", "c")
    message = refusal(path, id_col="skuu", image_col="pic")
    assert message.startswith('m.csv has no column "skuu" (--id-col). Did you mean "sku"? Columns there: sku, pic')


@pytest.mark.parametrize("name", ["status", "video_uri", "sha256", "error_message", "image_identity", "model", "flags"])
def test_a_column_named_like_a_results_column_passes_through_under_another_name(tmp_path, name, caplog):
    path = write(tmp_path / "m.csv", f"image,prompt,{name}\nx.png,p,v\n")
    (item,) = items_of(path)
    assert item[f"manifest_{name}"] == "v"
    assert item["error_code"] is None
    assert caplog.text.count(f"{name} as manifest_{name}") == caplog.text.count("WARNING") == 1


def test_an_id_left_over_because_another_column_is_the_id_passes_through_renamed(tmp_path):
    path = write(tmp_path / "m.csv", "id,sku,image,prompt\n1,s,x.png,p\n")
    (item,) = items_of(path, id_col="sku")
    assert (item["id"], item["manifest_id"]) == ("s", "1")


@pytest.mark.parametrize("name", ["cross_attention_kwargs"])
def test_a_knob_that_is_not_supported_is_refused(tmp_path, name):
    path = write(tmp_path / "m.csv", f"image,prompt,{name}\nx.png,p,v\n")
    assert refusal(path) == (
        f'column "{name}" of m.csv: this knob is not supported by this version; drop or rename the column'
    )


def test_a_misspelt_knob_passes_through_with_a_hint(tmp_path, caplog):
    path = write(tmp_path / "m.csv", "image,prompt,motion_scle,colour\nx.png,p,5,red\n")
    (item,) = items_of(path)
    assert (item["motion_scle"], item["colour"]) == ("5", "red")
    assert 'column "motion_scle" passes through; did you mean the knob "motion_scale"?' in caplog.text
    assert "colour" not in caplog.text


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"image": [1], "prompt": ["p"]}, "image"),
        ({"image": [[5]], "prompt": ["p"]}, "image"),
        ({"image": [{"path": "x.png"}], "prompt": ["p"]}, "image"),
        ({"image": ["x.png"], "prompt": [["p"]]}, "prompt"),
        ({"image": ["x.png"], "prompt": [5]}, "prompt"),
        ({"image": ["x.png"], "prompt": ["p"], "motion_scale": [[1]]}, "motion_scale"),
        ({"image": ["x.png"], "prompt": ["p"], "id": [["a"]]}, "id"),
        ({"image": ["x.png"], "prompt": ["p"], "id": [True]}, "id"),
    ],
)
def test_columns_of_types_that_cannot_work_are_refused(tmp_path, columns, column):
    message = refusal(write_parquet(tmp_path / "m.parquet", columns))
    assert message.startswith(f'column "{column}" of m.parquet is ')


# Images


@pytest.mark.parametrize(
    ("written", "image", "identity"),
    [
        ("a b.png", "{root}/a b.png", "a b.png"),
        ("./x/../a.png", "{root}/a.png", "./x/../a.png"),
        (" a.png ", "{root}/a.png", "a.png"),
        ("/abs/a.png", "/abs/a.png", "/abs/a.png"),
        ("file:///abs/a%20b.png", "/abs/a b.png", "file:///abs/a%20b.png"),
        ("s3://bucket/k/a.png", "s3://bucket/k/a.png", "s3://bucket/k/a.png"),
        ("https://x.org/a.png?w=5&v=2", "https://x.org/a.png?w=5&v=2", "https://x.org/a.png?w=5&v=2"),
        ("HTTPS://x.org/a.png", "https://x.org/a.png", "https://x.org/a.png"),
        (
            "https://b.s3.amazonaws.com/a.png?versionId=7&X-Amz-Signature=aa&X-Amz-Expires=9&X-Amz-Credential=c",
            None,
            "https://b.s3.amazonaws.com/a.png?versionId=7",
        ),
        ("https://x.org/a?AWSAccessKeyId=A&Expires=1&Signature=b", None, "https://x.org/a"),
        ("https://x.org/a?expires=never", None, "https://x.org/a?expires=never"),
        ("https://x.org/a?sv=1&sr=b&sp=r&se=2030&sig=xx&w=5#f", None, "https://x.org/a?w=5#f"),
        ("https://x.org/a?sp=3", None, "https://x.org/a?sp=3"),
    ],
)
def test_references_are_resolved_and_identified_as_written(tmp_path, written, image, identity):
    (item,) = items_of(write_jsonl(tmp_path / "m.jsonl", [{"id": "a", "image": written, "prompt": "p"}]))
    assert item["error_message"] is None
    assert item["image"] == (written if image is None else image.format(root=tmp_path))
    assert item["image_identity"] == identity


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("http://x.org/a.png", "http:// is not fetched; use https:// or s3://"),
        ("ftp://x.org/a.png", "ftp:// is not read; use a path or s3://, for a picture also https:// or data:"),
        ("gs://bucket/a.png", "gs:// is not read"),
        ("s3://bucket", "names no object"),
        ("https://", "names no host"),
        ("https:///a.png", "names no host"),
        ("file://host/a.png", "needs three slashes"),
        ("data:image/png;base64,@@@", "damaged base64"),
        ("data:nothing", "not a valid data: URL"),
        ("a\0b.png", "NUL"),
        ("", "image is missing or null"),
        ("  ", "image is missing or null"),
        (None, "image is missing or null"),
    ],
)
def test_references_that_name_nothing_readable_reject_their_row(tmp_path, written, reason):
    rows = [{"id": "ok", "image": "x.png", "prompt": "p"}, {"id": "a", "image": written, "prompt": "p"}]
    code, message = rejection(write_jsonl(tmp_path / "m.jsonl", rows))
    assert code == "bad_parameter"
    assert message.startswith("row 2 of m.jsonl: image")
    assert reason in message


def test_image_bytes_stay_in_the_manifest_and_are_read_by_reference(tmp_path):
    contents = [PNG + bytes([n]) for n in range(10)]
    columns = {"id": [str(n) for n in range(10)], "my image": contents, "prompt": ["p"] * 10}
    path = write_parquet(tmp_path / "m.parquet", columns, row_group_size=3)
    items = items_of(path, image_col="my image")
    for item, content in zip(items, contents, strict=True):
        assert item["image"].startswith(f"{path}#row=")
        assert len(item["image"]) < len(str(path)) + 40
        assert item["image_identity"] == "sha256:" + hashlib.sha256(content).hexdigest()
        assert read_image_cell(item["image"]) == content


def test_a_struct_of_bytes_and_path_uses_bytes_before_path(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [
        {"bytes": PNG, "path": "first.png"},
        {"bytes": None, "path": "second.png"},
        None,
        {"bytes": None, "path": None},
    ]
    path = write_parquet(tmp_path / "m.parquet", {"image": pa.array(images, kind), "prompt": ["p"] * 4})
    items = items_of(path)
    assert read_image_cell(items[0]["image"]) == PNG
    assert items[0]["id"].startswith("first-")
    assert items[1]["image"] == str(tmp_path / "second.png")
    assert [item["error_code"] for item in items] == [None, None, "bad_parameter", "bad_parameter"]


def test_a_data_url_in_parquet_is_not_carried_either(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    path = write_parquet(tmp_path / "m.parquet", {"id": ["a"], "image": [url], "prompt": ["p"]})
    (item,) = items_of(path)
    assert item["image"] == f"{path}#row=1&column=image"
    assert read_image_cell(item["image"]) == PNG
    assert manifest.decode_data_url(url) == PNG


def test_equal_bytes_have_one_identity_however_they_are_given(tmp_path):
    url = "data:;base64," + base64.b64encode(PNG).decode()
    one = items_of(write_parquet(tmp_path / "a.parquet", {"id": ["a"], "image": [PNG], "prompt": ["p"]}))
    two = items_of(write_jsonl(tmp_path / "b.jsonl", [{"id": "a", "image": url, "prompt": "p"}]))
    assert one[0]["work_key"] == two[0]["work_key"]


def test_a_cell_that_is_gone_is_a_row_error(tmp_path):
    path = write_parquet(tmp_path / "m.parquet", {"image": [PNG, None]})
    for reference in (f"{path}#row=3&column=image", f"{path}#row=1&column=other", f"{path}#row=2&column=image", "x"):
        with pytest.raises(ImageNotFound):
            read_image_cell(reference)
    with pytest.raises(StorageNotFound):
        read_image_cell(f"{tmp_path}/none.parquet#row=1&column=image")
    with pytest.raises(StorageError):
        read_image_cell(f"{write(tmp_path / 'bad.parquet', b'PAR1')}#row=1&column=image")


def test_large_row_groups_of_images_are_planned_and_read_in_pieces(tmp_path):
    contents = [os.urandom(1_500_000) for _ in range(60)]
    path = write_parquet(tmp_path / "m.parquet", {"image": contents, "prompt": ["p"] * 60}, compression="none")
    tables = list(manifest.plan(opened(path), config_of(path), model_version="v1"))
    assert len(tables) > 1
    items = [item for table in tables for item in table.to_pylist()]
    assert read_image_cell(items[59]["image"]) == contents[59]
    assert read_image_cell(items[0]["image"]) == contents[0]


def test_a_picture_shared_by_many_rows_is_read_from_each(tmp_path):
    contents = [os.urandom(100_000) for _ in range(3)]
    images = [contents[n % 3] for n in range(900)]  # Parquet stores each once: 0.3 MB in the file, 90 MB as rows
    columns = {"id": [str(n) for n in range(900)], "image": images, "prompt": ["p"] * 900}
    path = write_parquet(tmp_path / "m.parquet", columns)
    assert path.stat().st_size < 2_000_000
    items = items_of(path)
    assert [read_image_cell(items[n]["image"]) for n in (0, 899, 400)] == [contents[0], contents[2], contents[1]]


def test_threads_may_read_image_cells_together(tmp_path):
    contents = [bytes([n]) * 100 for n in range(200)]
    path = write_parquet(tmp_path / "m.parquet", {"image": contents}, row_group_size=7)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: read_image_cell(f"{path}#row={n + 1}&column=image"), range(200)))
    assert found == contents


# Ids and duplicates


@pytest.mark.parametrize(
    ("row_id", "reason"),
    [
        ("x" * 257, "id has 257 characters, at most 256"),
        ("a\0b", "NUL"),
        ("", "missing"),
        (None, "missing"),
        (1.5, "text"),
    ],
)
def test_an_id_that_cannot_be_one_rejects_its_row(tmp_path, row_id, reason):
    rows = [{"id": row_id, "image": "x.png", "prompt": "p"}, {"id": "ok", "image": "x.png", "prompt": "p"}]
    items = items_of(write_jsonl(tmp_path / "m.jsonl", rows))
    assert items[0]["id"] == "row 1 of m.jsonl"
    assert items[0]["error_message"].startswith("row 1 of m.jsonl: id ")
    assert reason in items[0]["error_message"]
    assert items[1]["error_message"] is None


def test_an_id_of_256_characters_is_fine(tmp_path):
    (item,) = items_of(write_jsonl(tmp_path / "m.jsonl", [{"id": "x" * 256, "image": "x.png", "prompt": "p"}]))
    assert item["error_message"] is None


def test_duplicate_ids_are_refused_with_file_and_row(tmp_path):
    write(tmp_path / "a.csv", "id,image,prompt\nx,1.png,p\ny,2.png,p\nx,3.png,q\n")
    write(tmp_path / "b.csv", "id,image,prompt\nz,1.png,p\ny,2.png,p\n")
    message = refusal(tmp_path)
    assert "has 2 ids that occur more than once: give each row its own" in message
    assert '"x": row 1 of a.csv, row 3 of a.csv' in message
    assert '"y": row 2 of a.csv, row 2 of b.csv' in message
    assert '"z"' not in message


def test_at_most_twenty_duplicate_ids_are_listed(tmp_path):
    rows = [{"id": str(n % 50), "image": "x.png", "prompt": "p"} for n in range(1000)]
    message = refusal(write_jsonl(tmp_path / "m.jsonl", rows))
    assert message.count("\n") == 21
    assert "has 50 ids" in message
    assert "and 15 more" in message
    assert message.endswith("and 30 more")


def test_equal_rows_without_ids_are_duplicates(tmp_path):
    message = refusal(write(tmp_path / "m.csv", "image,prompt\nx.png,p\nx.png,q\nx.png,p\n"))
    assert "1 row that occurs more than once with the same image and knobs" in message
    assert "row 1 of m.csv, row 3 of m.csv" in message


def test_a_limit_looks_at_the_first_rows_only(tmp_path):
    rows = [{"id": str(n % 7), "image": "x.png", "prompt": "p", "num_videos": 2} for n in range(10)]
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    assert [item["id"] for item in items_of(path, limit=3)] == ["0", "0", "1", "1", "2", "2"]
    write(tmp_path / "f" / "a.csv", "id,image,prompt\na,x,p\n")
    write(tmp_path / "f" / "b.csv", "id,image,prompt\nb,x,p\nc,x,p\n")
    assert [item["id"] for item in items_of(tmp_path / "f", limit=2)] == ["a", "b"]


def test_one_picture_with_three_prompts_is_three_items_with_stable_ids(tmp_path):
    rows = [{"image": "pics/boat.png", "prompt": prompt} for prompt in "abc"]
    items = items_of(write_jsonl(tmp_path / "m.jsonl", rows))
    assert len({item["id"] for item in items}) == 3
    assert all(re.fullmatch(r"boat-[0-9a-f]{12}", item["id"]) for item in items)
    again = items_of(write_jsonl(tmp_path / "n.jsonl", list(reversed(rows))), model_version="v2")
    assert sorted(item["id"] for item in again) == sorted(item["id"] for item in items)


def test_derived_ids_know_the_rows_own_knobs_but_not_the_runs(tmp_path):
    path = write(tmp_path / "m.csv", "image,prompt,motion_scale\nx.png,p,1\nx.png,p,\nx.png,p,2\n")
    one = items_of(path)
    two = items_of(path, defaults={"num_frames": 8})
    assert len({item["id"] for item in one}) == 3
    assert [item["id"] for item in one] == [item["id"] for item in two]
    assert {item["work_key"] for item in one}.isdisjoint(item["work_key"] for item in two)


# Knobs, seeds and keys


def params_of(item):
    return json.loads(item["params"])


def test_row_run_and_model_decide_in_this_order(tmp_path):
    path = write(tmp_path / "m.csv", "id,image,prompt,num_inference_steps\nrow,x,p,3\nrun,x,p,\n")
    row, run = items_of(path, defaults={"guidance_scale": 9})
    assert params_of(row)["num_inference_steps"] == 3
    assert params_of(run)["num_inference_steps"] == DEMO.defaults["num_inference_steps"]
    assert {params_of(item)["guidance_scale"] for item in (row, run)} == {9.0}
    assert {params_of(item)["motion_scale"] for item in (row, run)} == {1}
    zero = items_of(write(tmp_path / "z.csv", "id,image,prompt,motion_scale\na,x,p,0\n"), defaults={"motion_scale": 5})
    assert params_of(zero[0])["motion_scale"] == 0


@pytest.mark.parametrize(
    ("knob", "cell", "reason"),
    [
        ("motion_scale", 9, "motion_scale must be a whole number from 0 to 8 (got 9)"),
        ("motion_scale", -1, "motion_scale must be"),
        ("motion_scale", True, "motion_scale must be a number, not true or false"),
        ("num_frames", 0, "num_frames must be a whole number from 1 to 256 (got 0)"),
        ("width", 500, "width must be a multiple of 8; the nearest are 496 and 504"),
        ("scheduler", "dimm", "scheduler must be one of ddim"),
        ("seed", -1, "seed must be a whole number from 0 to 2^64-1"),
        ("seed", 2**64, "seed must be a whole number from 0 to 2^64-1"),
        ("guidance_scale", {"a": 1}, "guidance_scale"),
        ("prompt", None, "prompt is missing or null: give each row a prompt, or the run a --prompt"),
        ("prompt", "x" * 10_001, "prompt"),
        ("negative_prompt", 5, "negative_prompt"),
    ],
)
def test_a_bad_cell_rejects_its_row_with_row_file_and_knob(tmp_path, knob, cell, reason):
    rows = [{"id": "a", "image": "x.png", "prompt": "p"}, {"id": "b", "image": "x.png", "prompt": "p", knob: cell}]
    items = items_of(write_jsonl(tmp_path / "m.jsonl", rows))
    assert items[0]["error_message"] is None
    bad = items[1]
    assert (bad["id"], bad["video_index"], bad["seed"]) == ("b", 0, seed_from_id("b"))
    assert bad["error_code"] == "bad_parameter"
    assert bad["error_message"].startswith("row 2 of m.jsonl: ")
    assert reason in bad["error_message"]
    assert re.fullmatch("[0-9a-f]{64}", bad["work_key"])
    assert bad["work_key"] == items_of(tmp_path / "m.jsonl", model_version="v2")[1]["work_key"]


def test_a_null_cell_is_an_absent_one(tmp_path):
    with_nulls = {
        "id": "a",
        "image": "x.png",
        "prompt": "p",
        "motion_scale": None,
        "negative_prompt": None,
        "seed": None,
    }
    one = items_of(write_jsonl(tmp_path / "m.jsonl", [with_nulls]))
    two = items_of(write_jsonl(tmp_path / "n.jsonl", [{"id": "a", "image": "x.png", "prompt": "p"}]))
    assert one == two


def test_a_row_with_n_videos_makes_n_items_and_more_later_keep_the_first_keys(tmp_path):
    def planned(num_videos):
        row = {"id": "a", "image": "x.png", "prompt": "p", "seed": 2**64 - 2, "num_videos": num_videos}
        return items_of(write_jsonl(tmp_path / "m.jsonl", [row]))

    three, five = planned(3), planned(5)
    assert [item["video_index"] for item in three] == [0, 1, 2]
    assert [item["seed"] for item in three] == [2**64 - 2, 2**64 - 1, 0]
    assert [params_of(item)["seed"] for item in three] == [str(2**64 - 2), str(2**64 - 1), "0"]
    assert "num_videos" not in params_of(three[0])
    assert five[:3] == three
    assert len({item["work_key"] for item in five}) == 5


def test_the_params_are_canonical_json(tmp_path):
    row = {"id": "a", "image": "x.png", "prompt": 'é "quoted"', "seed": 5}
    (item,) = items_of(write_jsonl(tmp_path / "m.jsonl", [row]))
    text = item["params"]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert params_of(item)["prompt"] == 'é "quoted"'
    assert params_of(item)["width"] is None


def test_the_key_depends_on_everything_that_changes_the_video_and_on_nothing_else(tmp_path):
    base = {"id": "a", "image": "x.png", "prompt": "p", "sku": "1"}

    def key(row=base, **settings):
        return items_of(write_jsonl(tmp_path / "m.jsonl", [row]), **settings)[0]["work_key"]

    first = key()
    assert key({**base, "sku": "2"}) == first
    assert key({**base, "num_videos": 2}) == first
    assert key(max_attempts=9, row_timeout_s=5) == first
    assert key({**base, "eta": -0.0}) == first
    assert key({**base, "preset": "exact"}) == first
    model = config_of("m").model.model_dump()
    different = [
        key({**base, "id": "b"}),
        key({**base, "image": "y.png"}),
        key({**base, "prompt": "q"}),
        key({**base, "negative_prompt": "n"}),
        key({**base, "seed": 1}),
        key({**base, "fps": 9}),
        key({**base, "preset": "balanced"}),
        key({**base, "preset": "fast"}),
        key(defaults={"strength": 0.5}),
        key(format="gif"),
        key(background="#000000"),
        key(model_version="v2"),
        key(model={**model, "dtype": "bfloat16"}),
        key(model={**model, "long_edge": 128}),
        key(model={**model, "size_step": 8}),
    ]
    assert len({first, *different}) == len(different) + 1


def test_an_upscaler_counts_in_the_keys_of_rows_alone_that_it_enlarges(tmp_path):
    rows = [{"id": "a", "image": "x.png", "prompt": "p"}, {"id": "b", "image": "x.png", "prompt": "p", "upscale": 2}]

    def keys(version, rows=rows):
        path = write_jsonl(tmp_path / "m.jsonl", rows)
        keys = [item["work_key"] for item in items_of(path, model_version=version)]
        assert keys == [plan_row(row, config_of(path), model_version=version).work_key for row in rows]
        return keys

    plain, other = keys("v1"), keys("v1 upscaler@0123")
    assert plain[0] == other[0]
    assert plain[1] != other[1]
    assert keys("v1 upscaler@4567")[1] != other[1]
    assert keys("v1", [{**row, "upscale": 1} for row in rows])[0] == plain[0]


def test_an_item_turns_back_into_its_row(tmp_path):
    path = write(tmp_path / "m.csv", "id,image,prompt,num_videos,width\na,x.png,p,2,64\n")
    items = items_of(path)
    for item in items:
        row = row_from_item(item)
        assert (row.id, row.video_index, row.image, row.work_key) == (
            item["id"],
            item["video_index"],
            item["image"],
            item["work_key"],
        )
        assert (row.params.seed, row.params.width, row.params.num_videos) == (item["seed"], 64, 1)
        assert canonical_params(row.params) == item["params"]
        spec = {"row_id": row.id, "video_index": row.video_index, "image_identity": row.image_identity}
        key = manifest.work_key(**spec, params=row.params, config=config_of(path), model_version="v1")
        assert key == item["work_key"]


CELLS = {
    "id": ["a", "b", "é", 'q"uote', "x" * 300, "", None, 5, 5.5, 2.0, "n\0ul", "tab\t", "\u2028"],
    "image": [
        "x.png",
        "pics/x.png",
        "../x.png",
        "s3://b/k.png",
        "s3://b",
        "https://x.org/a?sig=1",
        "http://x",
        "",
        None,
        " y.png",
        "é.png",
        5,
    ],
    "prompt": ["p", "é\n", "x" * 999, "x" * 2000, "x" * 10_001, "", None, '\\back"slash', 7, "\x7f\x01"],
    "negative_prompt": ["", "n", None, "x" * 1500, "x" * 10_001, False],
    "seed": [0, 5, "5", "007", " 7 ", 2**64 - 1, 2**64, -1, None, True, 1.5, 3.0, "x", "9" * 19, "9" * 25, "١"],
    "motion_scale": [0, 1, 1.0, True, "1", "loop large", "9", 9, None, "", [1], {"a": 1}],
    "guidance_scale": [0, 0.0, -0.0, False, 7, 7.5, "7.5", 51, None, "nan"],
    "num_videos": [1, None, 0, "1"],
    "eta": [0, -0.0, 0.5, None],
    "preset": ["fast", "Standard", None, "none", "draft", "exact"],
    "width": [64, 64.0, 60, None, "128"],
}


@pytest.mark.parametrize("seed", range(8))
def test_planning_by_template_equals_planning_each_row_alone(tmp_path, seed):
    pick = random.Random(seed)
    chosen = pick.sample(sorted(CELLS), pick.randint(2, len(CELLS)))
    knobs = [knob for knob in CELLS if knob in {*chosen, "image", "prompt"}]
    rows = []
    while len(rows) < 400:  # of which half have mostly good cells
        wildness = pick.choice([0.1, 1.0])
        row = {knob: pick.choice(CELLS[knob][: None if pick.random() < wildness else 1]) for knob in knobs}
        rows += [row] if any(cell not in (None, "") for cell in row.values()) else []  # else it is no row
    settings = {"defaults": {"prompt": "run", "motion_scale": 4, "seed": 7}} if seed % 2 else {}
    path = write_jsonl(tmp_path / "m.jsonl", rows)
    config = config_of(path, **settings)
    items = []
    with pytest.raises(ManifestError, match=r"occurs? more than once"):  # as cells are drawn at random
        for table in manifest.plan(opened(path, **settings), config, model_version="v1"):
            items.extend(table.to_pylist())
    num_rejected = 0
    for number, (item, row) in enumerate(zip(items, rows, strict=True), 1):
        try:
            alone = plan_row(row, config, model_version="v1")
        except BadParameter as error:
            num_rejected += 1
            assert (item["error_code"], item["error_message"]) == (
                error.code,
                f"row {number} of m.jsonl: {error.message}",
            )
        else:
            assert item["error_message"] is None
            assert row_from_item(item) == alone
    assert 0 < num_rejected < len(rows)


def test_a_row_from_elsewhere_may_carry_bytes_and_must_ask_for_one_video():
    config = config_of("catalogue/m.csv")
    row = plan_row({"id": "a", "image": PNG, "prompt": "p"}, config, model_version="v1")
    assert manifest.decode_data_url(row.image) == PNG
    assert row.image_identity == "sha256:" + hashlib.sha256(PNG).hexdigest()
    relative = plan_row({"image": "x.png", "prompt": "p"}, config, model_version="v1")
    assert relative.image == str(Path.cwd() / "catalogue/x.png")
    with pytest.raises(BadParameter, match="repeat the row with other seeds"):
        plan_row({"image": "x.png", "prompt": "p", "num_videos": 2}, config, model_version="v1")
    with pytest.raises(BadParameter, match="image is missing: give each row one of image, url"):
        plan_row({"prompt": "p"}, config, model_version="v1")
    with pytest.raises(BadParameter, match="lone surrogate"):
        plan_row({"image": "\ud800.png", "prompt": "p"}, config, model_version="v1")


def test_more_rows_than_a_chunk_keep_order_and_numbers(tmp_path):
    count = 120_000
    text = "id,image,prompt,motion_scale\n" + "".join(f"{n},x.png,p,{9 if n == 110_000 else 1}\n" for n in range(count))
    path = write(tmp_path / "m.csv", text)
    tables = list(manifest.plan(opened(path), config_of(path), model_version="v1"))
    assert len(tables) == 3
    table = pa.concat_tables(tables)
    assert table["id"].to_pylist() == [str(n) for n in range(count)]
    (message,) = [text for text in table["error_message"].to_pylist() if text]
    assert message.startswith("row 110001 of m.csv: motion_scale")


# Changes and S3


def test_a_changed_file_gets_another_key_where_changes_are_detected(tmp_path):
    path = write(tmp_path / "m.csv", "image,prompt\nx.png,p\n")
    write(tmp_path / "x.png", PNG)
    plain, one = items_of(path)[0], items_of(path, detect_changes=True)[0]
    assert items_of(path, detect_changes=True)[0] == one
    write(tmp_path / "x.png", PNG + b"more")
    two = items_of(path, detect_changes=True)[0]
    assert items_of(path)[0] == plain
    assert len({plain["work_key"], one["work_key"], two["work_key"]}) == 3
    assert plain["id"] == one["id"] == two["id"]
    (tmp_path / "x.png").unlink()
    assert items_of(path, detect_changes=True)[0]["image_identity"] == "x.png"


@pytest.fixture(scope="module")
def s3_server():
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage.forget_clients()
    yield boto3.client("s3")
    patch.undo()
    storage.forget_clients()
    server.stop()


@pytest.fixture
def bucket(s3_server):
    name = f"b{uuid.uuid4().hex}"
    s3_server.create_bucket(Bucket=name)
    return name


@pytest.fixture
def put(s3_server, bucket):
    def put(key, content):
        s3_server.put_object(Bucket=bucket, Key=key, Body=content if isinstance(content, bytes) else content.encode())
        return f"s3://{bucket}/{key}"

    return put


def test_a_manifest_in_s3_is_planned_like_a_local_one(put, bucket, tmp_path):
    text = "id,image,prompt\na,pics/a.png,p\nb,../b.png,p\nc,/etc/passwd,p\nd,../../x.png,p\n"
    items = items_of(put("in/m.csv", text))
    assert [item["image"] for item in items[:2]] == [f"s3://{bucket}/in/pics/a.png", f"s3://{bucket}/b.png"]
    assert "a manifest in S3 cannot name files of one machine" in items[2]["error_message"]
    assert "leads out of the bucket" in items[3]["error_message"]
    local = items_of(write(tmp_path / "m.csv", text))
    assert [item["work_key"] for item in items[:2]] == [item["work_key"] for item in local[:2]]


def test_folders_globs_and_image_cells_work_in_s3(put, bucket, tmp_path):
    path = write_parquet(tmp_path / "m.parquet", {"id": ["a", "b"], "image": [PNG, PNG + b"2"], "prompt": ["p", "p"]})
    put("in/one/m.parquet", path.read_bytes())
    put("in/two/m.jsonl.gz", gzip.compress(b'{"id": "c", "image": "c.png", "prompt": "p"}\n'))
    put("in/two/m.txt", "x")
    items = items_of(f"s3://{bucket}/in/")
    assert [item["id"] for item in items] == ["a", "b", "c"]
    assert items[1]["image"] == f"s3://{bucket}/in/one/m.parquet#row=2&column=image"
    assert read_image_cell(items[1]["image"]) == PNG + b"2"
    assert items[2]["image"] == f"s3://{bucket}/in/two/c.png"
    assert [item["id"] for item in items_of(f"s3://{bucket}/in/**/*.jsonl.gz")] == ["c"]
    assert [item["id"] for item in items_of(f"s3://{bucket}/in/[!t]*/m.*")] == ["a", "b"]
    put("pics/x.png", PNG)
    put("pics/y.png", PNG)
    (item, _) = items_of(f"s3://{bucket}/pics", defaults={"prompt": "p"})
    assert (item["image"], item["image_identity"]) == (f"s3://{bucket}/pics/x.png", "x.png")


def test_what_is_not_in_s3_is_refused_with_the_reason(put, bucket):
    assert "there is no manifest" in refusal(f"s3://{bucket}/none.csv")
    assert "there is no manifest" in refusal(f"s3://{bucket}/none/")
    assert "matches no object" in refusal(f"s3://{bucket}/*.csv")
    assert "extension" in refusal(put("m.docx", b"x"))
    assert f"cannot read s3://no-{bucket}/m.csv" in refusal(f"s3://no-{bucket}/m.csv")
    with pytest.raises(StorageNotFound):
        read_image_cell(f"s3://{bucket}/none.parquet#row=1&column=image")


def test_etags_come_from_listings(put, bucket):
    uri = put("in/m.csv", "id,image,prompt\na,pics/a.png,p\nb,pics/none.png,p\n")
    put("in/pics/a.png", PNG)
    one = items_of(uri, detect_changes=True)
    put("in/pics/a.png", PNG + b"more")
    two = items_of(uri, detect_changes=True)
    assert one[0]["image_identity"] == f"pics/a.png#etag={hashlib.md5(PNG).hexdigest()}"
    assert one[0]["work_key"] != two[0]["work_key"]
    assert one[1] == two[1] == items_of(uri)[1]
