"""Prompts that name columns: their text row by row, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pia_ray import manifest
from pia_ray.catalog.validate import validate
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import build
from pia_ray.errors import ManifestError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "a.png", "title": " The Red  Cat ", "color": "blue", "year": 1999},
    {"id": "b", "image": "b.png", "title": "Boat", "color": None, "year": None},
    {"id": "c", "image": "c.png", "title": "", "color": "red", "year": 3, "prompt": "own {text}"},
]


def planned(folder: Path, rows: list[dict[str, Any]] = ROWS, **knobs: Any) -> list[dict[str, Any]]:
    file = folder / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = build(CatalogConfig, {"manifest": str(file), "output": "out", "model": "demo", "defaults": knobs})
    tables = list(manifest.plan(manifest.open_manifest(config), config, model_version="v1"))
    items = pa.concat_tables(tables).to_pylist()
    for item, row in zip(items, rows, strict=True):
        if item["error_code"] is None:
            alone = manifest.plan_row(row, config, model_version="v1")
            assert (alone.params.prompt, alone.work_key) == (item["prompt"], item["work_key"])
    return items


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        ("{title}", " The Red  Cat ", "Boat"),
        ("{title|strip|lower}", "the red  cat", "boat"),
        ("{ title | words:2 }", "The Red", "Boat"),
        ("{title|strip}[, {color}], slow", "The Red  Cat, blue, slow", "Boat, slow"),
        ("[x] {title|words:1}[ of {year}]", "[x] The of 1999", "[x] Boat"),
        ("{{title}} {title|words:1}", "{title} The", "{title} Boat"),
        ("{} and {title|words:1}", "{} and The", "{} and Boat"),
        ("{{title}}", "{{title}}", "{{title}}"),
    ],
)
def test_a_template_gives_each_row_without_a_prompt_its_own(
    tmp_path: Path, template: str, first: str, second: str
) -> None:
    items = planned(tmp_path, prompt=template)
    assert [item["prompt"] for item in items] == [first, second, "own {text}"]


def test_validate_names_what_would_be_read_as_text(tmp_path: Path) -> None:
    prompts = ["a (red:1.3) cat", "a photo of {title}", "a {red|blue} cat", "a cat"]
    rows = [{"id": str(n), "image": "a.png", "prompt": text} for n, text in enumerate(prompts)]
    rows[3]["negative_prompt"] = "embedding:bad-art"
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = build(CatalogConfig, {"manifest": str(tmp_path / "m.jsonl"), "output": "out", "model": "demo"})
    notes = [finding.note or "" for finding in validate(config, fetch=False)]
    expected = (
        "prompt looks weighted",
        "prompt holds {title}",
        "prompt holds {red|blue}",
        "negative_prompt holds embed",
    )
    assert all(note.startswith(start) for note, start in zip(notes, expected, strict=True)), notes


def test_ids_may_be_made_of_columns(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))

    def items(template: str) -> list[dict[str, Any]]:
        config = build(
            CatalogConfig,
            {"manifest": str(file), "output": "out", "model": "demo", "id_col": template, "defaults": {"prompt": "p"}},
        )
        found = pa.concat_tables(manifest.plan(manifest.open_manifest(config), config, model_version="v1")).to_pylist()
        for item, row in zip(found, ROWS, strict=True):
            if item["error_code"] is None:
                assert manifest.plan_row(row, config, model_version="v1").id == item["id"]
        return found

    assert [item["id"] for item in items("{image|lower}[-{color}]")] == ["a.png-blue", "b.png", "c.png-red"]
    found = items("{title|strip|lower}")
    assert [item["id"] for item in found[:2]] == ["the red  cat", "boat"]
    assert "id: the cell of title is empty" in found[2]["error_message"]
    with pytest.raises(ManifestError, match='no column "sku", which --id-col names'):
        items("{sku}")


def test_a_row_of_a_filled_prompt_has_the_work_key_of_that_prompt(tmp_path: Path) -> None:
    filled = planned(tmp_path, ROWS[:1], prompt="a {color} sea", negative_prompt="no {title|words:1}")
    rows = [{**ROWS[0], "prompt": "a blue sea", "negative_prompt": "no The"}]
    assert filled[0]["work_key"] == planned(tmp_path, rows)[0]["work_key"]


def test_a_row_with_an_empty_cell_outside_of_a_clause_is_bad(tmp_path: Path) -> None:
    items = planned(tmp_path, prompt="a {color}")
    assert [item["error_code"] for item in items] == [None, "bad_parameter", None]
    assert items[1]["id"] == "b"
    assert "the cell of color is empty" in items[1]["error_message"]
    without_prompts = planned(
        tmp_path, [{key: row[key] for key in ("image", "color")} for row in ROWS], prompt="{color}"
    )
    assert [item["prompt"] for item in without_prompts] == ["blue", None, "red"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a {titel}", 'Did you mean "title"'),
        ("{title|upper}", "not a filter"),
        ("{title|words:x}", "not a filter"),
        ("{title|words:0}", "not a filter"),
    ],
)
def test_a_template_that_no_row_could_fill_ends_the_run(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        planned(tmp_path, prompt=template)


def test_an_empty_prompt_of_a_row_is_the_runs_or_where_there_is_none_empty(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "prompt": ""}, {**ROWS[1], "prompt": None}]
    assert [item["prompt"] for item in planned(tmp_path, rows, prompt="the run's")] == ["the run's", "the run's"]
    assert [(item["prompt"], item["error_code"]) for item in planned(tmp_path, rows)] == [
        ("", None),
        (None, "bad_parameter"),
    ]


def test_loras_of_a_prompt_must_be_the_models(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "prompt": "a <lora:pixar:0.8>", "prompt_syntax": "a1111"}]
    assert 'no LoRA "pixar"' in planned(tmp_path, rows)[0]["error_message"]
