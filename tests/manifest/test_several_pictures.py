"""Rows with several pictures: lists, lists in text, and the continuation rows of shop exports."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import manifest
from pia_ray.catalog.local import run_local
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ManifestError
from pia_ray.ledger import read_results
from pia_ray.manifest import open_manifest, read_image_cell
from pia_ray.testing import FakeAnimator, draw_picture

SHOPIFY = """Handle,Title,Body (HTML),Vendor,Image Src,Image Position,Variant SKU
shirt,Red Shirt,Soft.,Acme,https://cdn.example.com/a.jpg,1,S
shirt,,,,https://cdn.example.com/b.jpg,2,M
shirt,,,,,,L
shirt,,,,https://cdn.example.com/a.jpg,3,XL
mug,Mug,,Acme,https://cdn.example.com/c.jpg,1,U
"""


def config_of(source: Path, **settings: Any) -> CatalogConfig:
    return build(CatalogConfig, {"manifest": str(source), "output": "out", "model": "demo", **settings})


def items_of(source: Path, **settings: Any) -> list[dict[str, Any]]:
    config = config_of(source, **settings)
    return [
        item for table in manifest.plan(open_manifest(config), config, model_version="v1") for item in table.to_pylist()
    ]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def pictures_of(items: list[dict[str, Any]]) -> list[tuple[str, str, int | None]]:
    return [(item["id"], item["image_identity"], item["picture_index"]) for item in items]


def table_of(images: list[Any], path: Path) -> Path:
    if path.suffix == ".jsonl":
        rows = [{"id": f"r{number}", "images": cell, "prompt": "p"} for number, cell in enumerate(images)]
        return write(path, "\n".join(map(json.dumps, rows)))
    ids = [f"r{number}" for number in range(len(images))]
    table = pa.table({"id": ids, "images": images, "prompt": ["p"] * len(images)})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow", "m.jsonl"])
def test_a_list_is_an_item_for_each_picture(name: str, tmp_path: Path) -> None:
    path = table_of([["a.png", None, "b.png", "a.png"], ["c.png"], []], tmp_path / name)
    found = items_of(path)
    assert pictures_of(found[:3]) == [("r0", "a.png", 0), ("r0-p1", "b.png", 1), ("r1", "c.png", 0)]
    assert found[3]["error_message"].startswith(f"row 3 of {name}: image is missing")
    assert pictures_of(items_of(path, pictures="first")[:2]) == [("r0", "a.png", 0), ("r1", "c.png", 0)]


def test_a_list_within_a_list_is_a_bad_row_alone(tmp_path: Path) -> None:
    images = [[["a.png"], "b.png"], [{"path": ["a.png"]}, [1], [1]], "c.png"]
    found = items_of(table_of(images, tmp_path / "m.jsonl"))
    assert [(item["id"], item["error_message"] is None) for item in found] == [
        *(("r0", False), ("r0-p1", True), ("r1", False), ("r1-p1", False), ("r2", True))
    ]


def test_the_first_picture_has_the_work_key_of_a_plain_row(tmp_path: Path) -> None:
    several = items_of(table_of([["a.png", "b.png"]], tmp_path / "m.parquet"))
    (plain,) = items_of(write(tmp_path / "m.csv", "id,image,prompt\nr0,a.png,p\n"))
    assert several[0]["work_key"] == plain["work_key"]
    assert plain["picture_index"] is None


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow"])
def test_structs_in_a_list_are_read_in_place(name: str, tmp_path: Path) -> None:
    contents = [b"\x89PNG" + bytes([number]) for number in range(3)]
    path = table_of(
        [
            [
                {"bytes": contents[0], "path": "x.png"},
                {"bytes": None, "path": None},
                {"bytes": contents[1], "path": None},
            ],
            [{"bytes": None, "path": "b.png"}, {"bytes": contents[2], "path": "y.png"}],
        ],
        tmp_path / name,
    )
    found = items_of(path)
    assert [item["picture_index"] for item in found] == [0, 1, 0, 1]
    assert found[2]["image"] == str(tmp_path / "b.png")
    assert [read_image_cell(found[number]["image"]) for number in (3, 1, 0)] == [contents[2], contents[1], contents[0]]


def test_objects_in_a_json_list_are_read_as_shops_write_them(tmp_path: Path) -> None:
    path = table_of([[{"src": "https://x.example.com/a.jpg", "alt": "A"}, {"url": "b.png"}]], tmp_path / "m.jsonl")
    assert pictures_of(items_of(path)) == [("r0", "https://x.example.com/a.jpg", 0), ("r0-p1", "b.png", 1)]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("a.jpg, b.PNG", ["a.jpg", "b.PNG"]),
        ("a.jpg;b.jpg;", ["a.jpg", "b.jpg"]),
        ("a.jpg|b.jpg", ["a.jpg", "b.jpg"]),
        ("https://x.example.com/a.jpg,https://x.example.com/b?c=1,2", None),
        ("//x.example.com/a.jpg\n//x.example.com/b.jpg", None),
        ("https://x.example.com/w_100,h_200/a.jpg", ["https://x.example.com/w_100,h_200/a.jpg"]),
        ("red,blue.jpg", ["red,blue.jpg"]),
        ("a;b/c.png", ["a;b/c.png"]),
        ("data:image/png;base64,AAAA", 1),
    ],
)
def test_text_is_a_list_where_each_part_is_a_picture(cell: str, expected: Any, tmp_path: Path) -> None:
    found = items_of(table_of([cell], tmp_path / "m.parquet"))
    if expected == 1:
        assert len(found) == 1
    elif expected is None:
        assert len(found) == 2
        assert ["x.example.com" in item["image"] for item in found] == [True, True]
    else:
        assert [item["image_identity"] for item in found] == expected


def test_continuation_rows_bring_further_pictures_of_a_product(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "m.csv", SHOPIFY)
    with caplog.at_level(logging.WARNING):
        found = items_of(path, defaults={"prompt": "a photo of {Title}"})
    assert caplog.messages == ["m.csv: left out: 1 row to continue a product, without a picture"]
    assert [(item["image"][-5:], item["picture_index"], item["prompt"], item["error_code"]) for item in found] == [
        ("a.jpg", 0, "a photo of Red Shirt", None),
        ("b.jpg", 1, "a photo of Red Shirt", None),
        ("c.jpg", 0, "a photo of Mug", None),
    ]
    assert [(item["Vendor"], item["Variant SKU"]) for item in found] == [("Acme", "S"), ("Acme", "M"), ("Acme", "U")]
    assert len(items_of(path, defaults={"prompt": "p"}, pictures="first")) == 2


def test_a_product_may_go_on_in_another_chunk_and_name_its_rows(tmp_path: Path) -> None:
    handles, titles = ["shirt"] * 5 + ["mug"], ["Red Shirt", None, "", None, None, "Mug"]
    table = pa.table({"Handle": handles, "Title": titles, "Image Src": [f"{number}.jpg" for number in range(6)]})
    with pa.ipc.new_file(str(tmp_path / "m.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    found = items_of(tmp_path / "m.arrow", id_col="Handle", prompt_col="Title")
    assert [item["id"] for item in found] == ["shirt", "shirt-p1", "shirt-p2", "shirt-p3", "shirt-p4", "mug"]
    assert [item["prompt"] for item in found] == ["Red Shirt"] * 5 + ["Mug"]


def test_a_bad_cell_is_told_of_each_picture(tmp_path: Path) -> None:
    found = items_of(write(tmp_path / "m.csv", 'image,prompt,fps\n"a.jpg,b.jpg",p,8\n"c.jpg,d.jpg",p,x\n'), knobs="fps")
    assert [(item["error_message"] or "").partition(":")[0] for item in found[2:]] == [
        "row 2 of m.csv",
        "picture 2 of row 2 of m.csv",
    ]


def test_an_id_that_another_row_has_too_names_both(tmp_path: Path) -> None:
    path = write(tmp_path / "m.csv", 'id,image,prompt\na,"a.jpg,b.jpg",p\na-p1,c.jpg,p\n')
    with pytest.raises(ManifestError, match=r'"a-p1": row 1 of m\.csv, row 2 of m\.csv'):
        items_of(path)


def test_the_results_say_which_picture_a_video_is_of(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(draw_picture((64, 64), seed=1))
    config = config_of(
        write(tmp_path / "m.csv", 'id,image,prompt\nx,"a.png,b.png",p\ny,a.png,q\n'), output=str(tmp_path / "out")
    )
    with FakeAnimator(config.model) as animator:
        run_local(config, animator=animator)
    table = read_results(config.output)
    assert list(zip(table["id"].to_pylist(), table["picture_index"].to_pylist(), strict=True)) == [
        ("x", 0),
        ("x-p1", 1),
        ("y", None),
    ]


def test_ids_that_are_made_of_columns_tell_the_pictures_of_a_row_apart(tmp_path: Path) -> None:
    source = table_of([["a.png", "b.png"], ["c.png"]], tmp_path / "m.jsonl")
    assert [item["id"] for item in items_of(source, id_col="sku-{id}")] == ["sku-r0", "sku-r0-p1", "sku-r1"]


@pytest.mark.parametrize(
    ("further", "pictures"),
    [
        (
            "https://x.org/b.jpg,https://x.org/c,1.jpg",
            [("r0-p1", "https://x.org/b.jpg", 1), ("r0-p2", "https://x.org/c,1.jpg", 2)],
        ),
        ("https://x.org/a.jpg , https://x.org/b.jpg", [("r0-p1", "https://x.org/b.jpg", 1)]),
        ("gs://x/b.jpg,memory://x/c.jpg", [("r0-p1", None, 1), ("r0-p2", "memory://x/c.jpg", 2)]),
        ("", []),
    ],
)
def test_the_additional_images_of_a_google_feed_follow_the_main_one(
    further: str, pictures: list[tuple[str, str | None, int]], tmp_path: Path
) -> None:
    lines = [
        "id\timage link\tadditional image link\tprompt",
        f"r0\thttps://x.org/a.jpg\t{further}\tp",
        "r1\t\tb.jpg\tp",
    ]
    path = write(tmp_path / "feed.tsv", "\n".join(lines))
    *found, missing = items_of(path)
    first = ("r0", "https://x.org/a.jpg", 0 if pictures else None)
    assert pictures_of(found) == [first, *((id_, identity or "", number) for id_, identity, number in pictures)]
    assert "image is missing" in missing["error_message"]
    assert pictures_of(items_of(path, pictures="first")[:1]) == [first]
