"""The meaning of a manifest's columns: knobs, pass-through columns, and the run's word on both."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pia_ray import ledger, manifest
from pia_ray.catalog.estimate import estimate, facts_of, text_of
from pia_ray.catalog.local import run_local
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.model import ModelConfig, build
from pia_ray.errors import ConfigError, JobError, ManifestError
from pia_ray.manifest import open_manifest
from pia_ray.testing import FakeAnimator, draw_picture

FORMATS = ("csv", "tsv", "jsonl", "parquet")


def config_of(source: Path, **settings: Any) -> CatalogConfig:
    return build(
        CatalogConfig, {"manifest": str(source), "output": str(source.parent / "out"), "model": "demo", **settings}
    )


def items_of(source: Path, **settings: Any) -> list[dict[str, Any]]:
    config = config_of(source, **settings)
    tables = manifest.plan(open_manifest(config), config, model_version="v1")
    return [item for table in tables for item in table.to_pylist()]


def params_of(item: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(item["params"]))


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    """The rows in the format of the path's extension; a key that a row lacks is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def row(number: int = 0, **cells: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "image": f"{number}.png", "prompt": "p", **cells}


# Knobs by the owner's word


def test_a_named_column_is_no_knob_and_passes_through_under_a_name_that_results_have_not(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.csv", row(width="1200", height="800", strength="soft", motion_scale="2"))
    (item,) = items_of(path, not_knobs="width,height,strength")
    assert (item["manifest_width"], item["manifest_height"], item["strength"]) == ("1200", "800", "soft")
    assert (params_of(item)["width"], params_of(item)["motion_scale"]) == (None, 2)


def test_the_named_knobs_are_the_only_ones(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.csv", row(width="1200", style="casual", motion_scale="2", seed="5"))
    (item,) = items_of(path, knobs="motion_scale")
    assert params_of(item)["motion_scale"] == 2
    assert (item["manifest_width"], item["manifest_style"], item["manifest_seed"]) == ("1200", "casual", "5")
    (item,) = items_of(path, knobs="none")
    assert item["motion_scale"] == "2"


def test_a_column_with_the_prefix_is_always_a_knob_and_goes_before_the_bare_one(tmp_path: Path) -> None:
    cells = {"pia.width": "256", "pia.prompt": "waves", "width": "1200", "PIA.Motion_Scale": "2"}
    path = write_rows(tmp_path / "m.csv", {"id": "a", "image": "a.png", **cells})
    for settings in ({}, {"knobs": "none"}):
        (item,) = items_of(path, **settings)
        params = params_of(item)
        assert (params["width"], params["motion_scale"], params["prompt"]) == (256, 2, "waves")
        assert item["manifest_width"] == "1200"


def test_the_prefix_and_the_bare_name_make_the_same_work(tmp_path: Path) -> None:
    bare = items_of(write_rows(tmp_path / "a.csv", row(width="256", seed="3")))
    prefixed = items_of(write_rows(tmp_path / "b.csv", row(**{"pia.width": "256", "pia.seed": "3"})))
    assert bare == prefixed


def test_an_array_below_a_prefixed_name_is_read_as_one(tmp_path: Path) -> None:
    latents = [[[[0.5]]] * 4]
    table = pa.table({"id": ["a"], "image": ["a.png"], "prompt": ["p"], "pia.latents": [latents]})
    pq.write_table(table, tmp_path / "m.parquet")
    (item,) = items_of(tmp_path / "m.parquet")
    assert item["error_message"] is None
    assert len(manifest.read_image_cell(json.loads(item["reference_uris"])["latents"])) > 16


@pytest.mark.parametrize(
    ("cells", "settings", "message"),
    [
        ({"pia.widht": "8"}, {}, 'there is no knob "widht". Did you mean "width"?'),
        ({"width": "8"}, {"not_knobs": "widht"}, 'has a column "widht" (--not-knobs). Did you mean "width"?'),
        ({"width": "8"}, {"knobs": "height"}, 'has a column "height" (--knobs)'),
        ({"price": "8"}, {"knobs": "price"}, 'there is no knob "price" (--knobs)'),
    ],
)
def test_a_word_on_columns_that_cannot_be_kept_is_refused(
    cells: dict[str, str], settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ManifestError) as caught:
        items_of(write_rows(tmp_path / "m.csv", row(**cells)), **settings)
    assert message in caught.value.message


def test_a_knob_that_is_not_supported_may_pass_through(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.csv", row(cross_attention_kwargs="x"))
    assert items_of(path, not_knobs="cross_attention_kwargs")[0]["cross_attention_kwargs"] == "x"


def test_names_that_clash_in_turn_stay_apart(tmp_path: Path) -> None:
    (item,) = items_of(write_rows(tmp_path / "m.csv", row(status="now", manifest_status="before")))
    assert (item["manifest_manifest_status"], item["manifest_status"]) == ("now", "before")


def test_files_that_rename_a_column_alike_share_it(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    write_rows(tmp_path / "f" / "a.csv", row(1, status="x", model="m"))
    write_rows(tmp_path / "f" / "b.parquet", row(2, status="y"))
    items = items_of(tmp_path / "f")
    assert [(item["manifest_status"], item["manifest_model"]) for item in items] == [("x", "m"), ("y", None)]


# Columns that are mostly impossible as knobs


@pytest.mark.parametrize("kind", FORMATS)
def test_mostly_impossible_values_stop_the_run_before_the_model_and_name_the_flag(kind: str, tmp_path: Path) -> None:
    rows = [row(number, style=style, strength="soft") for number, style in enumerate(["casual", "formal", "default"])]
    path = write_rows(tmp_path / f"m.{kind}", *rows)
    animator = FakeAnimator(ModelConfig.named("demo"))
    with pytest.raises(JobError) as caught:
        run_local(config_of(path), animator=animator)
    assert 'column "style": 2 of 3 values' in caught.value.message
    assert 'column "strength": 3 of 3 values' in caught.value.message
    assert "--not-knobs strength,style" in caught.value.message.replace("style,strength", "strength,style")
    assert not (tmp_path / "out" / "results.parquet").exists()
    items = items_of(path, not_knobs="style,strength")
    assert [item["error_code"] for item in items] == [None] * 3
    assert [item["manifest_style"] for item in items] == ["casual", "formal", "default"]


def test_a_few_impossible_values_are_failed_rows(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "m.csv", *(row(number, motion_scale="9" if number < 2 else "1") for number in range(5))
    )
    assert [item["error_code"] for item in items_of(path)] == ["bad_parameter"] * 2 + [None] * 3


def test_impossible_values_of_a_column_that_is_said_to_be_a_knob_are_failed_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.csv", row(1, style="casual"), row(2, style="formal"))
    assert [item["error_code"] for item in items_of(path, knobs="style")] == ["bad_parameter"] * 2
    prefixed = write_rows(tmp_path / "n.csv", row(1, **{"pia.style": "casual"}), row(2, **{"pia.style": "formal"}))
    assert [item["error_code"] for item in items_of(prefixed)] == ["bad_parameter"] * 2


# Reports


def report(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    return (code, *capsys.readouterr())


def test_validate_and_estimate_say_which_columns_are_knobs_and_which_pass_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "m.csv", row(width="1200", height="800", sku="s", status="new"))
    expected = "knobs: width, height (width and height are the sizes of the video; --not-knobs width,height if"
    code, out, _ = report(capsys, "validate", path)
    assert code == 0
    assert expected in out
    assert "passed through: sku, manifest_status" in out
    code, out, err = report(capsys, "validate", path, "--json", "--not-knobs", "width,height")
    assert (code, json.loads(out)) == (0, {"rows": 1, "bad": 0})
    assert "knobs:" not in err
    assert "passed through: manifest_width, manifest_height, sku, manifest_status" in err
    estimated = estimate(config_of(path))
    assert expected in text_of(estimated)
    assert facts_of(estimated)["columns"]["knobs"] == ("width", "height")


def test_a_run_says_so_too(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(draw_picture((64, 48), seed=1))
    path = write_rows(tmp_path / "m.csv", row(motion_scale="2", sku="s"))
    seen = []
    run_local(config_of(path), animator=FakeAnimator(ModelConfig.named("demo")), observe=seen.append)
    assert [progress.columns for progress in seen if progress.columns] == [
        "columns    knobs: motion_scale; passed through: sku"
    ]


def test_the_flags_are_settings_of_a_config_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.csv", row(width="8"))
    assert config_of(path, not_knobs=["width"]).not_knobs == ("width",)
    assert config_of(path, knobs="none").knobs == ()
    with pytest.raises(ConfigError):
        config_of(path, knobs=5)


# The results of a run as a manifest


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_results_of_a_run_are_a_manifest_of_a_second_one(kind: str, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(draw_picture((64, 48), seed=number))
    cells = {"num_videos": "2", "num_frames": "4", "sku": "s"}
    path = write_rows(tmp_path / "m.csv", row(0, **cells), row(1, num_frames="4", sku="t"))
    first = run_local(config_of(path), animator=FakeAnimator(ModelConfig.named("demo")))
    assert first.exit_code == 0
    before = {(r["id"], r["video_index"]): r for r in ledger.read_results(str(tmp_path / "out")).to_pylist()}
    results = tmp_path / "out" / "results.parquet"
    if kind == "csv":
        results = write_rows(tmp_path / "results.csv", *before.values())
    again = config_of(results, output=str(tmp_path / "second"), defaults={"num_frames": 8})
    assert run_local(again, animator=FakeAnimator(ModelConfig.named("demo"))).exit_code == 0
    found = {r["id"]: r for r in ledger.read_results(str(tmp_path / "second")).to_pylist()}
    assert set(found) == {"r0", "r0-1", "r1"}
    for name, key in {"r0": ("r0", 0), "r0-1": ("r0", 1), "r1": ("r1", 0)}.items():
        assert found[name]["seed"] == before[key]["seed"]
        assert found[name]["sku"] == before[key]["sku"]
        assert found[name]["manifest_video_uri"] == before[key]["video_uri"]
        assert found[name]["num_frames"] == 8


# Empty cells


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("empty", ["", " ", "\t \u00a0"])
def test_an_empty_cell_is_as_if_the_column_were_not_there(kind: str, empty: str, tmp_path: Path) -> None:
    cells = dict.fromkeys(("prompt", "seed", "motion_scale", "style", "mask_image", "scheduler"), empty)
    path = write_rows(tmp_path / f"m.{kind}", row(1, **cells), row(2, motion_scale="2"))
    run = {"prompt": "pan left", "motion_scale": 4}
    (empties, filled) = items_of(path, defaults=run)
    (absent, _) = items_of(
        write_rows(tmp_path / f"n.{kind}", {"id": "r1", "image": "1.png"}, {"id": "r2", "image": "2.png"}), defaults=run
    )
    assert empties == absent
    assert (empties["prompt"], params_of(empties)["motion_scale"]) == ("pan left", 4)
    assert params_of(filled)["motion_scale"] == 2


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_of_nothing_but_blanks_are_no_rows(kind: str, tmp_path: Path) -> None:
    nothing = {"id": "", "image": " ", "prompt": "", "sku": " "}
    path = write_rows(tmp_path / f"m.{kind}", row(1, sku="s"), nothing, row(2, sku="t"), nothing)
    assert [(item["id"], item["sku"], item["error_code"]) for item in items_of(path)] == [
        ("r1", "s", None),
        ("r2", "t", None),
    ]
    with pytest.raises(ManifestError, match="has no rows"):
        items_of(write_rows(tmp_path / f"n.{kind}", nothing, nothing))


def test_a_row_that_has_anything_is_a_row(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.parquet", row(1, sku="s"), {"sku": "t"})
    assert [item["error_code"] for item in items_of(path)] == [None, "bad_parameter"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_empty_negative_prompt_in_a_typed_format_says_that_there_is_none(kind: str, tmp_path: Path) -> None:
    (item,) = items_of(write_rows(tmp_path / f"m.{kind}", row(negative_prompt="")))
    assert params_of(item)["negative_prompt"] == ""
