"""The command line as people use it: what bad input is told, and which exit code it ends with."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import transformers.utils.logging
import yaml
from rich.console import Console

from pia_ray import __version__, ledger, read_results, storage
from pia_ray.catalog import cluster_run
from pia_ray.catalog.local import run_local
from pia_ray.catalog.progress import Progress, RunSummary
from pia_ray.cli.console import RunDisplay, show_summary
from pia_ray.cli.main import main
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import KNOBS
from pia_ray.config.model import ModelConfig, build
from pia_ray.media.video import probe
from pia_ray.testing import FakeAnimator, draw_picture, make_catalog, make_lora, make_pipeline_folder
from tests.cli.fake_actors import run_with_fakes
from tests.s3_server import S3Server, point_at, s3, s3_server

__all__ = ["s3", "s3_server"]  # fixtures

pytestmark = [
    # Ray Data sets its own deprecated settings whenever it makes a context.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]


FAKE_ACTORS = Path(__file__).with_name("fake_actors.py")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Pia = Callable[..., Ended]


@pytest.fixture
def pia(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pia]:
    """Runs a command in this process, from an empty folder, and puts back what commands set for their process."""
    for name in ("RAY_BACKEND_LOG_LEVEL", "RAY_USAGE_STATS_ENABLED", "RAY_DATA_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "0" if name != "RAY_BACKEND_LOG_LEVEL" else "fatal")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with capsys.disabled():  # their handlers keep the stream of stderr that they find
        diffusers.utils.logging.get_verbosity()
        transformers.utils.logging.get_verbosity()
    monkeypatch.chdir(tmp_path)
    on_term, level = signal.getsignal(signal.SIGTERM), logging.getLogger("ray").level

    def run(*words: object) -> Ended:
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            assert isinstance(error.code, int)
            code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Ended(code, out, err)

    yield run
    signal.signal(signal.SIGTERM, on_term)
    logging.getLogger("ray").setLevel(level)


@pytest.fixture
def fake_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has runs that this process starts animate with fakes."""
    monkeypatch.setattr(cluster_run, "run_catalog", run_with_fakes())


def start(
    *words: object,
    env: dict[str, str] | None = None,
    program: Sequence[object] = ("-m", "pia_ray.cli"),
    **how: Any,
) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a shell starts one."""
    return subprocess.Popen(
        [sys.executable, *map(str, (*program, *words))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
        **how,
    )


def finish(process: subprocess.Popen[str]) -> Ended:
    try:
        out, err = process.communicate(timeout=170)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Ended(process.returncode, out, err)


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def good(folder: Path, **cells: Any) -> Path:
    """A manifest of one good row with these cells."""
    (folder / "a.png").write_bytes(draw_picture((64, 48), seed=1))
    return write(folder / "manifest.parquet", [{"id": "a", "image": "a.png", "prompt": "sea", **cells}])


def cells(text: str) -> str:
    """The text with every run of white space as one space: tables and wrapped help can be searched."""
    return " ".join(text.split())


# Bad manifests.


def test_no_such_manifest_exits_2_and_names_it(pia: Pia) -> None:
    ended = pia("animate", "nowhere.csv", "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert re.search(r"there is no manifest \S*nowhere\.csv", ended.err)
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["empty.csv", "header.csv", "empty.jsonl", "empty.parquet", "folder"])
def test_an_empty_manifest_exits_2(pia: Pia, name: str) -> None:
    if name == "folder":
        Path(name).mkdir()
    elif name.endswith("parquet"):
        write(Path(name), [], pa.schema({"id": pa.string(), "image": pa.string(), "prompt": pa.string()}))
    else:
        Path(name).write_text("id,image,prompt\n" if name == "header.csv" else "")
    ended = pia("animate", name, "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert name in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize(("missing", "flag"), [("image", "--image-col"), ("prompt", "--prompt-col")])
def test_a_missing_column_exits_2_with_the_columns_there_are_and_the_flag(pia: Pia, missing: str, flag: str) -> None:
    header = ["id", "sku", *({"image", "prompt"} - {missing})]
    Path("m.csv").write_text(",".join(header) + "\n1,2,3\n")
    ended = pia("animate", "m.csv", "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert f"no {missing} column" in ended.err
    assert ", ".join(header) in ended.err
    assert flag in ended.err


def test_a_column_named_by_flag_that_is_not_there_exits_2_with_the_nearest(pia: Pia, tmp_path: Path) -> None:
    ended = pia("animate", good(tmp_path), "--output", "out", "--model", "demo", "--prompt-col", "promt")
    assert ended.code == 2
    assert '"promt" (--prompt-col). Did you mean "prompt"?' in ended.err


def test_a_column_of_a_type_that_cannot_work_exits_2(pia: Pia) -> None:
    write(Path("m.parquet"), [{"image": 1.5, "prompt": "sea"}])
    ended = pia("animate", "m.parquet", "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert 'column "image" of m.parquet is double' in ended.err


def test_duplicate_ids_exit_2_with_the_id_and_its_rows(pia: Pia, tmp_path: Path) -> None:
    good(tmp_path)
    rows = [{"id": name, "image": "a.png", "prompt": "sea"} for name in ("x", "twice", "twice")]
    ended = pia("animate", write(tmp_path / "m.parquet", rows), "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert "twice" in ended.err
    assert re.search(r"\b2\b.*\b3\b", ended.err)
    assert not storage.exists("out/results.parquet")


@pytest.mark.parametrize("name", ["manifest.xls", "manifest.docx", "picture.png"])
def test_a_manifest_of_an_unknown_extension_exits_2_with_the_known_ones(pia: Pia, name: str) -> None:
    Path(name).write_bytes(draw_picture((8, 8), seed=0))
    ended = pia("animate", name, "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert ".csv, .tsv, .jsonl" in ended.err


def test_a_folder_of_images_without_a_prompt_exits_2_and_asks_for_one(pia: Pia) -> None:
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(draw_picture((8, 8), seed=0))
    ended = pia("animate", "pictures", "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert "--prompt" in ended.err


def test_a_reserved_knob_as_a_column_exits_2(pia: Pia, tmp_path: Path) -> None:
    ended = pia("animate", good(tmp_path, cross_attention_kwargs="{}"), "--output", "out", "--model", "demo")
    assert ended.code == 2
    assert '"cross_attention_kwargs"' in ended.err


# Bad flags and settings.


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mottion-scale", "3"], 'unrecognized arguments: --mottion-scale 3. Did you mean "--motion-scale"?'),
        (["--motion-scale", "9"], "--motion-scale: motion_scale must be a whole number from 0 to 8 (got 9)"),
        (["--motion-scale", "-1"], "--motion-scale: motion_scale must be a whole number from 0 to 8 (got -1)"),
        (["--motion-scale", "lots"], "loop-moderate"),
        (["--num-frames", "0"], "--num-frames: num_frames must be a whole number from 1 to 256 (got 0)"),
        (["--num-frames", "257"], "1 to 256 (got 257)"),
        (["--num-frames", "many"], "1 to 256 (got 'many')"),
        (["--width", "500"], "width must be a multiple of 8; the nearest are 496 and 504"),
        (["--scheduler", "dddim"], 'Did you mean "ddim"?'),
        (["--scheduler", "dpmpp"], 'Did you mean "dpm++2'),
        (["--scheduler", "dpmpp_2m_karras"], 'Did you mean "dpm++2m-karras"?'),
        (["--motion-scale", "loop_smal"], 'Did you mean "loop-small"?'),
        (["--seed", "-1"], "seed must be a whole number from 0 to 2^64-1"),
        (["--prompt", ""], "--prompt: prompt"),
        (["--prompt", " "], "--prompt: prompt"),
        (["--strength", "nan"], "--strength: strength must be above 0 to 1"),
        (["--steps", "9"], 'Did you mean "--num-inference-steps"?'),
        (["--allowed-networks", "\udcff"], "allowed_networks: must be valid Unicode text"),
        (["--format", "avi"], '--format "avi" is not valid, choose from mp4, gif, webp, webm'),
        (["--actors", "some"], 'actors: must be a number or MIN:MAX, such as "4" or "1:8" (got \'some\')'),
        (["--actors", "3:1"], "the least not above the most"),
        (["--actors", "0"], "must be at least 1"),
        (["--batch-size", "0"], "batch_size: must be \"auto\" or 1 to 64 (got '0')"),
        (["--batch-size", "all"], "batch_size: must be \"auto\" or 1 to 64 (got 'all')"),
        (["--deadline", "soon"], "'soon' is not a time: write 90s, 15m or 1h30m"),
        (["--deadline", "0"], "deadline_s: must be greater than 0"),
        (["--deadline", ""], "is not a time"),
        (["--limit", "0"], "limit: must be greater than or equal to 1 (got 0)"),
        (["--limit", "ten"], "argument --limit: invalid int value: 'ten'"),
        (["--retry", "timeot"], 'retry: must be "failed" or error codes. Did you mean "timeout"?'),
        (["--background", "red"], "background: must be a colour such as #ffffff (got 'red')"),
        (["--model", "dmo"], 'there is no model "dmo". Did you mean "demo"? Known: demo, realistic-vision'),
        (["--model", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_flag_exits_2_and_is_named(pia: Pia, tmp_path: Path, words: list[str], told: str) -> None:
    ended = pia("animate", good(tmp_path), "--output", "out", *words)
    assert ended.code == 2
    assert told in ended.err
    assert len(ended.err.splitlines()) <= 2, "a message, not a page of usage"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("actorz: 3", 'run.yaml: there is no setting "actorz". Did you mean "actors"?'),
        ("defaults: {motion_scal: 3}", 'defaults: there is no knob "motion_scal". Did you mean "motion_scale"?'),
        ("outptu: out", 'run.yaml: there is no setting "outptu". Did you mean "output"?'),
        ("guidance_scale: 5", 'run.yaml: "guidance_scale" is a knob, not a setting: write it under `defaults:`'),
        ("guidance_scal: 5", 'Did you mean "guidance_scale"? It is a knob: write it under `defaults:`.'),
        ("model: {base: x, num_frames: 5}", 'run.yaml: model: "num_frames" is a knob, not a setting'),
        ("defaults: {num_frames: 0}", "run.yaml: defaults: num_frames must be a whole number from 1 to 256 (got 0)"),
        ("defaults: [1]", "defaults: must be a mapping of knobs to values"),
        ("defaults: {1: 2}", "defaults: must be a mapping of knobs to values"),
        ("defaults: {max_attempts: 2}", 'defaults: "max_attempts" is a setting, not a knob: write it outside of'),
        ("model: {base: x, bse: y}", 'run.yaml: model: there is no setting "bse". Did you mean "base"?'),
        ("model: {bse: y}", 'run.yaml: model: there is no setting "bse". Did you mean "base"?'),
        ("model: {name: x}", "run.yaml: model.base is missing"),
        ("model: {base: x, loras: {a: {wieght: 1}}}", 'model.loras.a: there is no setting "wieght". Did you mean "w'),
        ("model: {base: x, loras: {a: {path: y, weight: true}}}", "model.loras.a.weight: must be a number, not true"),
        ("styles: {cool: {bse: y}}", 'styles.cool: there is no setting "bse". Did you mean "base"?'),
        ("styles: [demo]", "styles: must be a mapping (got ['demo'])"),
        ("model: dmo", 'Did you mean "demo"?'),
        ("actors: [1, 2, 3]", "run.yaml: actors"),
        ("actors: [1, x]", "run.yaml: actors: must be a number or MIN:MAX"),
        ("actors: true", "run.yaml: actors: must be a number or MIN:MAX"),
        ("actors: 1:2:3", "run.yaml: actors: must be a number or MIN:MAX"),
        ("manifest: [m.csv, 3]", "run.yaml: manifest.1: must be text (got 3)"),
        ("header: {cdn.example.com: {Authorization: x}}", "run.yaml: header: each is HOST:NAME:VALUE, such as"),
        ("header: [7]", "run.yaml: header: each is HOST:NAME:VALUE, such as"),
        ("delimiter: '\"'", 'run.yaml: delimiter: must be a character that no cell is written in, such as ";"'),
        ("defaults: {steps: 9}", 'defaults: there is no knob "steps". Did you mean "num_inference_steps"?'),
        ("caf\udce9: 1", "run.yaml is not UTF-8: save the file as UTF-8"),
        ("retry: [[timeout]]", "run.yaml: retry: must be"),
        ("remake: [{missing: 1}]", "run.yaml: remake: must be"),
        ("limit: many", "run.yaml: limit: must be a whole number (got 'many')"),
        ("limit: yes", "run.yaml: limit: must be a number, not true or false (got True)"),
        ("deadline_s: .inf", "run.yaml: deadline_s: must be a finite number (got inf)"),
        ("review: ''", "run.yaml: review: must not be empty"),
        ("limit: 2024-13-45", "run.yaml is not valid YAML: month must be in 1..12"),
        ("limit: 1\nlimit: 2", 'run.yaml is not valid YAML: "limit" occurs twice (line 2, column 1)'),
        ("- a\n- b", "must be a mapping of settings to values"),
        ("a: [", "run.yaml is not valid YAML"),
    ],
)
def test_a_bad_config_file_exits_2_with_file_and_key(pia: Pia, tmp_path: Path, text: str, told: str) -> None:
    Path("run.yaml").write_text(text, errors="surrogateescape")
    manifest = [] if "manifest" in text else [good(tmp_path)]
    ended = pia("animate", *manifest, "--output", "out", "--config", "run.yaml")
    assert ended.code == 2
    assert told in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "header: ['cdn.example.com:Authorization': 'Bearer hush']",
        "on_end_secret: [hush]",
        "on_end_secret: {a: hush}",
    ],
)
def test_an_error_quotes_no_secret(pia: Pia, tmp_path: Path, text: str) -> None:
    Path("run.yaml").write_text(text)
    ended = pia("validate", good(tmp_path), "--config", "run.yaml")
    assert ended.code == 2
    assert "run.yaml: " in ended.err
    assert "hush" not in ended.err


def test_an_error_quotes_the_beginning_of_a_long_value(pia: Pia, tmp_path: Path) -> None:
    Path("run.yaml").write_text("user_agent: " + 5000 * "\u00e4")
    ended = pia("validate", good(tmp_path), "--config", "run.yaml")
    assert ended.code == 2
    assert len(ended.err) < 200


def test_keys_that_a_merged_mapping_also_has_occur_once(pia: Pia, tmp_path: Path) -> None:
    Path("run.yaml").write_text(
        "styles:\n  a: &a {<<: &b {base: embedded, dtype: float32}, dtype: float16}\nmodel: {<<: *a, dtype: bfloat16}\n"
    )
    assert pia("validate", good(tmp_path), "--config", "run.yaml").code == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"base": "x", "long_egde": 512}, 'model.yaml: there is no setting "long_egde". Did you mean "long_edge"?'),
        ({"base": "nowhere"}, "there is no folder nowhere"),
        ({"base": "model.ckpt"}, "pickled checkpoint"),
        ({"base": "model.safetensors", "config": "empty"}, "model.safetensors is truncated or not a safetensors file"),
        ({"base": "embedded", "motion_adapter": "nowhere"}, "motion_adapter"),
        ({"base": "empty"}, "empty"),
        ({"base": "embedded", "defaults": {"motion": 3}}, 'there is no knob "motion"'),
    ],
)
def test_a_model_that_cannot_be_had_exits_2_before_anything_is_written(
    pia: Pia, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    Path("model.yaml").write_text(yaml.safe_dump(settings))
    Path("empty").mkdir()
    for name in ("model.ckpt", "model.safetensors"):
        Path(name).write_bytes(b"\x80\x04.")
    ended = pia("animate", good(tmp_path), "--output", "out", "--model", "model.yaml")
    assert ended.code == 2
    assert told in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [["gallery"], ["judge", "--accept", "likeness>=0"], ["export", "--to", "there"]])
def test_an_output_that_is_a_file_has_no_results(pia: Pia, tmp_path: Path, command: list[str]) -> None:
    Path("m.csv").write_text("image\n")
    ended = pia(*command, "m.csv")
    assert ended.code == 2
    assert ended.err.startswith("pia-ray: there are no results in m.csv yet")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--on-end", "example.com/done"], "on_end: a URL without a scheme is refused"),
        (["--on-end-secret", "hush"], "on_end_secret must begin with whsec_, or name a file"),
    ],
)
def test_a_check_of_a_run_also_checks_where_its_end_is_told(
    pia: Pia, tmp_path: Path, words: list[str], told: str
) -> None:
    for command in (["validate"], ["animate", "--output", "out", "--dry-run"]):
        ended = pia(*command, good(tmp_path), "--model", "demo", *words)
        assert ended.code == 2
        assert told in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--condition-frame", "99"], "condition_frame must be 0 to 15 for a video of 16 frames (got 99)"),
        (["--lora", "pixar"], 'there is no LoRA "pixar"'),
    ],
)
def test_knobs_of_one_picture_are_checked_before_weights_are_searched(
    pia: Pia, tmp_path: Path, words: list[str], told: str
) -> None:
    Path("cat.png").write_bytes(draw_picture((64, 48), seed=1))
    Path("model.yaml").write_text("base: nowhere\n")
    ended = pia("image", "cat.png", "-o", "cat.mp4", "--prompt", "a cat", "--model", "model.yaml", *words)
    assert ended.code == 1
    assert told in ended.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--json", "nowhere/card.json"], "there is no folder"),
        (["--against", "nowhere"], "--against: there is no card nowhere"),
        (["--steps", "0"], "rounds, steps, frames and batches must be at least 1"),
        (["--frames", "0"], "rounds, steps, frames and batches must be at least 1"),
        (["--side", "100"], "side must be a multiple of 8 (got 100)"),
        (["--side", "0"], "side must be a multiple of 8 (got 0)"),
    ],
)
def test_a_benchmark_that_cannot_be_run_or_kept_exits_2_at_once(pia: Pia, words: list[str], told: str) -> None:
    ended = pia("bench", "--size", "demo", *words)
    assert ended.code == 2
    assert told in ended.err


def test_a_price_is_a_number(pia: Pia, tmp_path: Path) -> None:
    for price in ("nan", "inf", "-1"):
        ended = pia("estimate", good(tmp_path), "--model", "demo", "--price-per-hour", price)
        assert ended.code == 2
        assert "--price-per-hour must be 0 or more" in ended.err


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("storage: a.file", "cannot write"),
        ("webhook_secret: hush", "webhook_secret must be whsec_"),
        ("api_keys: nowhere", "nowhere"),
    ],
)
def test_an_endpoint_that_cannot_work_exits_2_before_ray_starts(pia: Pia, setting: str, told: str) -> None:
    Path("a.file").write_text("a file")
    Path("serve.yaml").write_text(f"port: 0\n{setting}\n")
    ended = pia("serve", "--config", "serve.yaml")
    assert ended.code == 2
    assert told in ended.err
    assert "hush" not in ended.err
    assert not ray.is_initialized()


def test_a_cluster_that_does_not_answer_exits_2_at_once(pia: Pia, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        ended = pia("animate", good(tmp_path), "--output", "out", "--model", "demo", "--address", address)
    assert ended.code == 2
    assert f"--address {address}" in ended.err
    assert not Path("out").exists()


def test_a_misspelt_command_exits_2_with_the_nearest(pia: Pia) -> None:
    ended = pia("animat", "m.csv")
    assert ended.code == 2
    assert 'Did you mean "animate"?' in ended.err


def test_flags_are_suggested_from_the_command_that_was_called_only(pia: Pia) -> None:
    assert '"--follow"' in pia("report", "out", "--folow").err
    ended = pia("report", "out", "--actor", "3")
    assert ended.code == 2
    assert "Did you mean" not in ended.err


@pytest.mark.parametrize(("words", "missing"), [(["--output", "out"], "manifest"), (["m.csv"], "output")])
def test_a_run_without_manifest_or_output_exits_2(pia: Pia, words: list[str], missing: str) -> None:
    ended = pia("animate", *words)
    assert ended.code == 2
    assert f"{missing} is missing" in ended.err


def test_a_misspelt_setting_is_named_before_the_one_that_is_missing(pia: Pia, tmp_path: Path) -> None:
    Path("run.yaml").write_text(yaml.safe_dump({"manifest": str(good(tmp_path)), "outptu": "out"}))
    ended = pia("animate", "--config", "run.yaml")
    assert ended.code == 2
    assert 'there is no setting "outptu". Did you mean "output"?' in ended.err


def test_validate_estimate_and_a_dry_run_take_the_config_of_a_run_alone(pia: Pia, tmp_path: Path) -> None:
    settings = {"manifest": str(good(tmp_path)), "output": "out", "model": "demo"}
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    assert pia("validate", "--config", "run.yaml").out.splitlines()[-1] == "1 work item, 0 bad"
    assert "1 in the manifest, 1 video; 0 bad" in pia("estimate", "--config", "run.yaml").out
    dry = pia("animate", "--config", "run.yaml", "--dry-run")
    assert dry.code == 0
    assert "1 work item, 0 bad" in dry.out
    assert "0 ended before, 1 to make" in dry.out
    assert not Path("out").exists()
    assert "manifest is missing" in pia("validate").err


def test_a_dry_run_of_a_manifest_with_bad_rows_names_them_and_exits_1(pia: Pia, tmp_path: Path) -> None:
    manifest = good(tmp_path, num_frames=999)
    ended = pia("animate", manifest, "--output", "out", "--model", "demo", "--dry-run")
    assert ended.code == 1
    assert ended.out.count("columns ") == 1
    assert "num_frames must be" in ended.out
    assert "1 bad" in ended.out


def test_an_estimate_of_a_run_s_config_leaves_out_what_is_done(pia: Pia, output: Path) -> None:
    manifest = next((output.parent / "catalog").glob("*.parquet"))
    settings = {"manifest": str(manifest), "output": str(output), "model": "demo"}
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    facts = json.loads(pia("estimate", "--config", "run.yaml", "--json").out)
    assert facts == json.loads(pia("estimate", manifest, "--model", "demo", "--output", output, "--json").out)
    assert facts != json.loads(pia("estimate", manifest, "--model", "demo", "--json").out)


def test_bad_input_is_told_before_torch_is_loaded_or_ray_started(tmp_path: Path) -> None:
    rows = [{"id": "x", "image": "a.png", "prompt": "sea"}] * 2
    manifest = write(tmp_path / "m.parquet", rows)
    script = (
        "import sys; from pia_ray.cli.main import main; code = main(sys.argv[1:]); import ray; "
        "print(code, 'torch' in sys.modules, ray.is_initialized())"
    )
    words = ["animate", str(manifest), "--output", str(tmp_path / "out"), "--model", "demo"]
    ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
    assert ended.stdout.splitlines()[-1] == "2 False False"
    assert "Traceback" not in ended.stderr


# Outputs.


def test_an_output_that_cannot_be_written_exits_2(pia: Pia, tmp_path: Path) -> None:
    Path("file").write_text("")
    ended = pia("animate", good(tmp_path), "--output", "file/out", "--model", "demo")
    assert ended.code == 2
    assert "file/out" in ended.err


@pytest.mark.parametrize("output", ["gs://bucket/out", "https://example.com/out"])
def test_an_output_of_another_kind_exits_2_with_the_kinds_there_are(pia: Pia, tmp_path: Path, output: str) -> None:
    ended = pia("animate", good(tmp_path), "--output", output, "--model", "demo")
    assert ended.code == 2
    assert "use a local path, file:// or s3://" in ended.err


def test_a_bucket_that_is_missing_exits_2(pia: Pia, s3: str, tmp_path: Path) -> None:
    ended = pia("animate", good(tmp_path), "--output", "s3://no-such-bucket/out", "--model", "demo")
    assert ended.code == 2
    assert "there is no bucket no-such-bucket" in ended.err
    assert "Create it" in ended.err
    ended = pia("animate", "s3://no-such-bucket/m.csv", "--output", s3, "--model", "demo")
    assert ended.code == 2
    assert "no-such-bucket" in ended.err


def test_a_bucket_that_is_denied_exits_2_with_the_right_that_is_missing(
    pia: Pia, s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}]}
    user = s3_server.new_user(json.dumps(policy))
    point_at(monkeypatch, {**s3_server.environment, **user}, tmp_path)
    manifest = good(tmp_path)
    s3_server.enforce_rights(yes=True)
    try:
        written = pia("animate", manifest, "--output", f"{s3}/out", "--model", "demo")
        listed = pia("animate", f"{s3}/folder", "--output", "out", "--model", "demo")
        reported = pia("report", f"{s3}/out")
    finally:
        s3_server.enforce_rights(yes=False)
    for ended in (written, listed, reported):
        assert ended.code == 2
        assert "denied" in ended.err
        assert user["AWS_SECRET_ACCESS_KEY"] not in ended.err
    assert "s3:PutObject" in written.err or "s3:ListBucket" in written.err
    assert not list(storage.list_objects(f"{s3}/out"))


# Looking before and after: validate, report, gallery, ledger, models.


def test_validate_prints_bad_rows_with_row_and_field_and_exits_1(pia: Pia, tmp_path: Path) -> None:
    lines = ["id,image,prompt,motion_scale,width", "a,a.png,sea,9,", "b,a.png,,1,", "c,a.png,sea,1,500", "d,a.png,x,,"]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    ended = pia("validate", "m.csv")
    assert ended.code == 1
    found = ended.out.splitlines()
    for line, row, field in zip(found[:3], (1, 2, 3), ("motion_scale", "prompt", "width"), strict=True):
        assert f"row {row} of m.csv" in line
        assert field in line
    assert found[3] == "4 work items, 3 bad"
    as_json = [json.loads(line) for line in pia("validate", "m.csv", "--json").out.splitlines()]
    assert [entry.get("id") for entry in as_json] == ["a", "b", "c", None]
    assert as_json[0]["code"] == "bad_parameter"
    assert as_json[-1] == {"rows": 4, "bad": 3}


def test_validate_of_a_fine_manifest_exits_0_and_a_bad_one_2(pia: Pia, tmp_path: Path) -> None:
    ended = pia("validate", good(tmp_path))
    assert (ended.code, ended.out) == (0, "1 work item, 0 bad\n")
    assert pia("validate", "nowhere.csv").code == 2
    Path("m.csv").write_text("picture,prompt\na.png,sea\n")
    assert pia("validate", "m.csv").code == 2
    assert pia("validate", "m.csv", "--image-col", "picture").code == 0


def test_validate_tells_a_row_that_cannot_be_read_by_the_code_a_run_gives_it(pia: Pia, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"id": "a", "image": "a.png", "prompt": "sea"}\n{"id": \n')
    ended = pia("validate", "m.jsonl", "--json")
    assert ended.code == 1
    assert json.loads(ended.out.splitlines()[0])["code"] == "bad_manifest_row"


def test_validate_notes_prompts_that_look_weighted_and_are_read_as_text(pia: Pia, tmp_path: Path) -> None:
    rows = [{"id": f"r{index}", "image": "a.png", "prompt": text} for index, text in enumerate(["a (red:1.2) cat", ""])]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ended = pia("validate", "m.jsonl")
    assert ended.code == 0
    note, counts = ended.out.splitlines()
    assert note.startswith("r0: note: prompt looks weighted")
    assert counts == "2 work items, 0 bad"
    assert json.loads(pia("validate", "m.jsonl", "--json").out.splitlines()[0])["id"] == "r0"
    assert pia("validate", "m.jsonl", "--prompt-syntax", "a1111").out == "2 work items, 0 bad\n"


def test_validate_shows_the_finished_prompts_of_a_template(pia: Pia, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("id,image,title,color\na,a.png,Red Cat,\nb,b.png,Boat,blue\nc,c.png,,red\n")
    ended = pia("validate", "m.csv", "--prompt", "a photo of {title|lower}[, {color}], zoom in", "--show", "2")
    assert ended.code == 1
    assert ended.out.splitlines()[:2] == ["a: a photo of red cat, zoom in", "b: a photo of boat, blue, zoom in"]
    assert "the cell of title is empty" in ended.out.splitlines()[2]
    assert pia("validate", "m.csv", "--prompt", "a {tilte}").code == 2


def test_validate_finds_what_the_format_cannot_hold(pia: Pia, tmp_path: Path) -> None:
    ended = pia("validate", good(tmp_path, fps=60), "--format", "gif", "--json")
    assert ended.code == 1
    assert json.loads(ended.out.splitlines()[0])["code"] == "bad_video"


def test_validate_with_fetch_finds_missing_and_broken_images(pia: Pia, tmp_path: Path) -> None:
    manifest = make_catalog(tmp_path, rows=12, broken=0.25)
    assert pia("validate", manifest).code == 0
    ended = pia("validate", manifest, "--fetch", "--json")
    assert ended.code == 1
    *bad, counts = (json.loads(line) for line in ended.out.splitlines())
    assert {entry["code"] for entry in bad} == {"image_truncated", "unsupported_image", "image_not_found"}
    assert counts == {"rows": 12, "bad": 3}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output of 7 succeeded and 3 failed rows."""
    manifest = make_catalog(tmp_path / "catalog", rows=10, broken=0.3)
    config = build(CatalogConfig, {"manifest": str(manifest), "output": str(tmp_path / "out"), "model": "demo"})
    with FakeAnimator(ModelConfig.named("demo"), batch_size=4) as animator:
        assert run_local(config, animator=animator).exit_code == 1
    return tmp_path / "out"


def test_report_tells_counts_and_errors_as_text_and_json(pia: Pia, output: Path) -> None:
    ended = pia("report", output)
    assert ended.code == 0
    assert "7 of 10 work items succeeded, 3 failed, none left" in ended.out
    assert "1 x image_truncated" in ended.out
    assert "flags     none" in ended.out
    assert "_" not in ended.out.replace("image_truncated", "").replace("unsupported_image", "").replace(
        "image_not_found", ""
    )
    facts = json.loads(pia("report", output, "--json").out)
    assert (facts["num_items"], facts["num_succeeded"], facts["num_failed"]) == (10, 7, 3)
    assert facts["errors"] == {"image_truncated": 1, "unsupported_image": 1, "image_not_found": 1}
    assert (facts["live"], facts["store"]["state"]) == (None, "answers")
    assert "no run is at work" in ended.out


def test_report_follow_prints_json_lines_with_the_run_at_work_until_it_is_stopped(pia: Pia, output: Path) -> None:
    row = ledger.RowInFlight("car", "ab" * 32, "animate", stage_s=2.0, age_s=3.0)
    state = ledger.WorkerState("host:1", "run", "", (row,), busy_share=0.5, outage="", num_waiting=0)
    with ledger.Lease(str(output), run_id="run"):
        ledger.write_worker(str(output), state)
        assert "    car: animate for" in pia("report", output).out
        process = start("report", output, "--follow", "--json")
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert finish(process).code == 130
    assert facts["live"]["workers"][0]["rows"][0]["id"] == "car"


@pytest.mark.parametrize("words", ["report", "gallery", "ledger verify", "ledger compact", "ledger rebuild"])
def test_a_folder_without_a_run_exits_2_and_is_left_as_it_was(pia: Pia, words: str) -> None:
    Path("photos").mkdir()
    for folder in ("photos", "nowhere"):
        ended = pia(*words.split(), folder)
        assert ended.code == 2
        assert folder in ended.err
        assert "pia-ray animate" in ended.err or "--output of an earlier run" in ended.err
    assert not list(Path("photos").iterdir())
    assert not Path("nowhere").exists()


def test_a_report_of_a_ledger_whose_parts_are_all_damaged_exits_2_with_what_to_do(pia: Pia, output: Path) -> None:
    for part in storage.list_objects(f"{output}/_ledger/parts"):
        storage.write_bytes(part.uri, b"damaged")
    ended = pia("report", output)
    assert ended.code == 2
    assert f"pia-ray ledger rebuild {output}" in ended.err


def test_gallery_writes_the_page_and_prints_where(pia: Pia, output: Path) -> None:
    (output / "index.html").unlink()
    ended = pia("gallery", output)
    assert (ended.code, ended.out.strip()) == (0, str((output / "index.html").resolve()))
    assert "item-000003" in (output / "index.html").read_text()


def test_ledger_verify_compact_and_rebuild_after_a_run(pia: Pia, output: Path) -> None:
    ended = pia("ledger", "verify", output)
    assert ended.code == 0
    assert ended.out.splitlines() == [
        "7 videos checked by size: none missing or damaged (--deep reads every byte)",
        "3 failed rows without a video",
    ]
    assert pia("ledger", "compact", output).out == "the ledger has 1 part, as before\n"
    before = read_results(str(output))
    for part in storage.list_objects(f"{output}/_ledger/parts"):
        storage.delete(part.uri)
    ended = pia("ledger", "rebuild", output)
    assert ended.code == 0
    assert ended.out == "7 videos found, 7 rows restored from them; the results have 7 rows\n"
    succeeded = before.filter(pa.compute.equal(before["status"], "succeeded"))
    assert read_results(str(output))["id"].to_pylist() == succeeded["id"].to_pylist()
    lost = Path(read_results(str(output))["video_uri"][0].as_py())
    lost.unlink()
    ended = pia("ledger", "verify", output)
    assert ended.code == 1
    assert lost.name in ended.out
    manifest = output.parent / "catalog"
    (line,) = [line for line in pia("ledger", "verify", output, "--repair").out.splitlines() if "--remake" in line]
    assert line.startswith(f"pia-ray animate {manifest}")
    assert line.endswith(f"--output {output} --remake missing")


def test_a_deep_verify_finds_a_video_that_is_damaged_from_its_middle_on(pia: Pia, output: Path) -> None:
    video = Path(next(uri for uri in read_results(str(output))["video_uri"].to_pylist() if uri))
    content = video.read_bytes()
    video.write_bytes(content[:200] + bytes(len(content) - 200))
    ended = pia("ledger", "verify", output, "--deep", "--repair")
    assert ended.code == 1
    assert "1 of 7 videos missing or damaged" in ended.out
    assert f"  1 damaged\n    {video}" in ended.out
    assert ended.out.count("--remake damaged") == 1
    assert pia("ledger", "compact", output, "--deep").code == 2


def test_ledger_commands_that_rewrite_refuse_while_a_run_is_at_work(pia: Pia, output: Path) -> None:
    with ledger.Lease(str(output), run_id="the-run"):
        for action in ("compact", "rebuild"):
            ended = pia("ledger", action, output)
            assert ended.code == 2
            assert "the-run" in ended.err
        assert pia("ledger", "verify", output).code == 0


def test_models_lists_names_and_pull_verifies_them(pia: Pia) -> None:
    ended = pia("models")
    assert ended.code == 0
    assert pia("models", "list") == ended
    assert "demo yes embedded" in cells(ended.out)
    assert "SG161222/Realistic_Vision_V6.0_B1_noVAE" in ended.out, "no part of a name is cut off"
    ended = pia("models", "pull", "demo")
    assert ended.code == 0
    assert ended.out.startswith("demo: demo@")
    ended = pia("models", "pull", "nope")
    assert ended.code == 2
    assert "Known: demo, realistic-vision" in ended.err
    assert pia("models", "pull").code == 2


def test_models_show_says_what_a_model_is_made_of_and_what_of_its_loras_has_no_place(pia: Pia, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_pipeline_folder(tmp_path / "tiny", vae_factor=4)
    lora = load_file(make_lora(tmp_path / "few.safetensors", folder))
    lost = {f"lora_unet_nowhere.lora_{side}.weight": torch.zeros(2, 2) for side in ("down", "up")}
    save_file({**lora, **lost}, tmp_path / "few.safetensors")
    loras = {"few": {"path": str(tmp_path / "few.safetensors"), "merge": True}}
    settings = {"base": str(folder), "loras": loras, "few_step": "lcm-4", "long_edge": 32, "size_step": 16}
    (tmp_path / "fast.yaml").write_text(json.dumps(settings), "utf-8")
    ended = pia("models", "show", str(tmp_path / "fast.yaml"))
    assert ended.code == 0, ended.err
    assert "predicts: epsilon" in ended.out
    assert "lcm-4: scheduler lcm, num_inference_steps 4" in ended.out
    assert "few, without a place in this model: lora_unet_nowhere" in ended.out
    assert pia("models", "show").code == 2
    (tmp_path / "m.csv").write_text("id,image,prompt\na,a.png,sea\n")
    ended = pia("validate", "m.csv", "--model", str(tmp_path / "fast.yaml"))
    assert ended.code == 0
    assert "note: 1 layer of LoRA few without a place in it, such as lora_unet_nowhere" in ended.out


def test_the_version_is_the_package_s(pia: Pia) -> None:
    assert pia("--version") == Ended(0, f"pia-ray {__version__}\n", "")


@pytest.mark.parametrize("command", ["animate", "image", "validate"])
def test_help_names_every_knob_with_its_bounds(pia: Pia, command: str) -> None:
    ended = pia(command, "--help-knobs")
    assert ended.code == 0
    for knob in KNOBS.values():
        assert f"--{knob.name.replace('_', '-')} " in ended.out
        assert knob.bounds in cells(ended.out)
        assert all(choice in ended.out for choice in knob.choices)


def test_animate_has_a_flag_for_every_setting_of_a_run(pia: Pia) -> None:
    text = pia("animate", "--help").out
    for name in CatalogConfig.model_fields:
        if name not in ("manifest", "defaults"):  # the argument itself; the knobs
            assert f"--{name.removesuffix('_s').replace('_', '-')} " in text


@pytest.mark.parametrize("command", ["demo", "report", "gallery", "ledger", "models"])
def test_every_command_has_help(pia: Pia, command: str) -> None:
    ended = pia(command, "--help")
    assert ended.code == 0
    assert f"pia-ray {command}" in ended.out


# One picture.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = {
        "base": str(make_pipeline_folder(folder / "weights")),
        "device": "cpu",
        "dtype": "float32",
        "long_edge": 64,
        "size_step": 16,
        "defaults": {"num_inference_steps": 2, "num_frames": 4, "guidance_scale": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder / "tiny.yaml"


@pytest.mark.heavy
@pytest.mark.parametrize("extension", ["mp4", "gif", "webp", "webm"])
def test_image_makes_a_video_of_the_format_its_name_says(pia: Pia, tiny: Path, tmp_path: Path, extension: str) -> None:
    good(tmp_path)
    words = ["--prompt", "sea", "--model", tiny, "--seed", "7", "--num-frames", "5", "--fps", "10"]
    ended = pia("image", "a.png", *words, "-o", f"video.{extension}")
    assert ended.code == 0, ended.err
    assert f"video.{extension}: 64 x 48 px, 5 frames, seed 7" in ended.out
    facts = probe(Path(f"video.{extension}"))
    assert (facts.format, facts.num_frames, facts.width, facts.height) == (extension, 5, 64, 48)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["a.png", "-o", "v.avi", "--prompt", "sea"],
            '"avi" is not a video format, choose from .mp4, .gif, .webp, .webm',
        ),
        (["a.png", "-o", "nowhere/v.mp4", "--prompt", "sea"], "there is no folder"),
        (["a.png", "-o", "v.mp4"], "--prompt"),
        (["a.png", "-o", "v.mp4", "--prompt", "sea", "--motoin-scale", "1"], 'Did you mean "--motion-scale"?'),
        (["a.png", "-o", "v.mp4", "--prompt", "sea", "--motion-scale", "9"], "from 0 to 8 (got 9)"),
        (["a.png", "-o", "v.mp4", "--prompt", "sea", "--num-videos", "2"], "pia-ray animate"),
        (["a.png", "-o", "v.mp4", "--prompt", "sea", "--model", "nope"], "Known: demo"),
    ],
)
def test_image_called_wrongly_exits_2(pia: Pia, tmp_path: Path, words: list[str], told: str) -> None:
    good(tmp_path)
    ended = pia("image", "--model", "demo", *words)
    assert ended.code == 2
    assert told in ended.err


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("image a.png --prompt sea -o /proc/v.mp4", "/proc"),
        ("animate m.csv --output /proc/out", "/proc/out"),
        ("models pull realistic-vision --to /proc/weights", "/proc/weights"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_hub_is_asked(
    pia: Pia, tmp_path: Path, words: str, folder: str
) -> None:
    ended = pia(*(word.replace("m.csv", str(good(tmp_path))) for word in words.split()))
    assert ended.code == 2
    assert f"{folder}:" in ended.err
    assert "probe" not in ended.err
    assert "hub" not in ended.err


def test_a_picture_that_cannot_be_used_is_a_failed_row_and_exits_1(pia: Pia) -> None:
    ended = pia("image", "gone.png", "--prompt", "sea", "-o", "v.mp4", "--model", "demo")
    assert ended.code == 1
    assert "there is no image" in ended.err
    assert "gone.png" in ended.err
    Path("page.png").write_text("<!doctype html>")
    assert pia("image", "page.png", "--prompt", "sea", "-o", "v.mp4", "--model", "demo").code == 1
    assert not Path("v.mp4").exists()


# What a person sees of a run.

PROGRESS = Progress("animating", num_items=12, num_before=2, num_pending=8, num_rejected=2)


def told(console: Console, summary: RunSummary) -> str:
    show_summary(console, summary, retry_command="pia-ray animate --retry failed m.csv", open_path=lambda uri: uri)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def summary_of(progress: Progress, **how: Any) -> RunSummary:
    values: dict[str, Any] = {
        "run_id": "r",
        "output": "out",
        "ending": "finished",
        "seconds": 90.0,
        "errors": {},
        **how,
    }
    return RunSummary(
        progress=progress, results_uri="out [1]/results.parquet", **{"gallery_uri": "out [1]/index.html", **values}
    )


def test_without_a_terminal_a_run_is_told_in_plain_lines() -> None:
    console = Console(file=StringIO(), width=40)
    with RunDisplay(console) as display:
        display.show(Progress("planning"))
        display.show(replace(PROGRESS, phase="starting"))
        for step in range(9):
            start = f"the first row denoises, step {step} of 9" if step else "the model loads on 1 of 1 worker"
            display.show(replace(PROGRESS, phase="starting", start=start))
        for done in range(1, 9):
            display.show(replace(PROGRESS, num_succeeded=done, num_failed=0, animating_s=10.0 * done))
        display.show(replace(PROGRESS, phase="writing"))
    text = console.file.getvalue()
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text) is None, "no control characters but line ends"
    lines = text.splitlines()
    assert lines[0] == "reading the manifest"
    assert lines[1] == "8 of 12 work items to do: Ray starts"
    assert re.fullmatch(r"the model loads on 1 of 1 worker \([\d.]+ m?s\)", lines[2])
    assert re.fullmatch(r"the first row denoises, step 1 of 9 \([\d.]+ m?s\)", lines[3])
    assert lines[4] == "1 of 8 done, 0 failed, 7 left"
    assert lines[-1] == "writing results and gallery"
    assert len(lines) == 6, "steps that follow at once, and rows that end at once, share a line"


def test_an_outage_is_told_when_it_begins_with_its_reason_and_the_animations_that_wait() -> None:
    console = Console(file=StringIO(), width=40)
    with RunDisplay(console) as display:
        display.show(Progress("planning", away="the hub", away_reason="it answers 503"))
        display.show(PROGRESS)
        display.show(replace(PROGRESS, away="the store", away_reason="cannot write s3://[b]/v", num_waiting=3))
        display.show(replace(PROGRESS, away="the store", away_reason="cannot write s3://[b]/v", num_waiting=3))
        display.show(PROGRESS)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "reading the manifest: the hub is away (it answers 503)"
    assert lines[2] == "animating: the store is away, 3 animations wait (cannot write s3://[b]/v)"
    assert lines[1] == lines[3] == "0 of 8 done, 0 failed, 8 left"
    assert len(lines) == 4


def test_the_live_bar_tells_an_outage() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120, color_system=None)
    with RunDisplay(console) as display:
        display.show(replace(PROGRESS, away="the store", away_reason="it answers 503", num_waiting=1))
    assert "the store is away, 1 animation waits" in console.file.getvalue()


def test_on_a_terminal_there_is_one_live_bar_that_goes_away() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120, color_system=None)
    with RunDisplay(console) as display:
        for done in range(1, 8):
            times = {"first_row_s": 1.0, "first_video_s": 1.0, "animating_s": 60.0}
            display.show(replace(PROGRESS, num_succeeded=done - 1, num_failed=1, **times))
    text = console.file.getvalue()
    assert "7/8" in text
    assert "1 failed" in text
    assert "5.0 videos/min" in text, "the row that failed is no video"
    assert max(len(piece.splitlines()) for piece in re.split(r"\r", text)) <= 2, "the bar is one line"
    assert text.endswith("\x1b[2K"), "the bar leaves no trace"


def test_a_summary_names_no_gallery_that_could_not_be_written() -> None:
    console = Console(file=StringIO(), width=100)
    assert "gallery" in told(console, summary_of(PROGRESS))
    console = Console(file=StringIO(), width=100)
    assert "gallery" not in told(console, summary_of(PROGRESS, gallery_uri=None))


def test_the_summary_tells_counts_by_error_code_and_where_things_are_and_how_to_retry() -> None:
    progress = replace(PROGRESS, num_succeeded=5, num_failed=3, first_row_s=4.0, first_video_s=10.0, animating_s=42.0)
    errors = {"timeout": 1, "image_not_found": 2, "bad_parameter": 2}
    text = told(Console(file=StringIO(), width=40), summary_of(progress, errors=errors))
    lines = text.splitlines()
    assert lines[0] == "7 of 12 work items succeeded (5 now, 2 before), 5 failed (3 now, 2 bad rows)"
    assert "1 min 30 s in all, 10.0 s to the first video, then 6.7 videos/min" in cells(text)
    assert [cells(line) for line in lines if " x " in line] == [
        "2 x bad_parameter",
        "2 x image_not_found",
        "1 x timeout",
    ]
    assert "results   out [1]/results.parquet" in lines
    assert "gallery   out [1]/index.html" in lines
    assert "retry     pia-ray animate --retry failed m.csv" in lines
    assert "pia-ray validate" in text


def test_the_summary_of_a_run_without_a_video_tells_of_none() -> None:
    progress = replace(PROGRESS, num_failed=8, first_row_s=4.0, animating_s=42.0)
    text = cells(told(Console(file=StringIO()), summary_of(progress, errors={"timeout": 8})))
    assert "time 1 min 30 s in all" in text
    assert "to the first video" not in text
    assert "videos/" not in text


def test_the_summary_of_a_run_with_nothing_to_do_says_so_and_offers_no_retry() -> None:
    text = told(Console(file=StringIO()), summary_of(Progress("ended", num_items=3, num_before=3)))
    assert "Nothing to animate: every work item is done." in text
    assert "retry" not in text
    text = told(Console(file=StringIO()), summary_of(Progress("ended", num_items=3, num_before=1, num_failed_before=2)))
    assert "every work item is done or has failed, and waits for --retry." in text
    assert "retry" in text


@pytest.mark.parametrize(("ending", "word"), [("interrupted", "Interrupted"), ("deadline", "The deadline has passed")])
def test_the_summary_of_a_run_that_was_stopped_says_how_to_go_on(ending: str, word: str) -> None:
    text = told(Console(file=StringIO()), summary_of(replace(PROGRESS, num_succeeded=2), ending=ending))
    assert f"{word}. The same command goes on where this run stopped." in text
    assert "6 left" in text


# Whole runs, on a Ray cluster that they join where it is not their own that counts.

BAD_ROWS: dict[str, dict[str, Any]] = {
    "motion-9": {"motion_scale": 9},
    "motion-minus": {"motion_scale": -1},
    "motion-word": {"motion_scale": "lots"},
    "frames-0": {"num_frames": 0},
    "frames-257": {"num_frames": 257},
    "frames-word": {"num_frames": "many"},
    "frames-half": {"num_frames": 4.5},
    "width-500": {"width": 500},
    "scheduler": {"scheduler": "dddim"},
    "seed": {"seed": -1},
    "strength": {"strength": 0},
    "prompt": {"prompt": None},
    "image": {"image": None},
}
"""Rows that differ from a good one in the cell that is wrong."""


@dataclass(frozen=True)
class Ran:
    """A run of good, broken and bad rows."""

    ended: Ended
    folder: Path
    rows: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny: Path, ray_address: str) -> Ran:
    """20 rows of which a tenth have broken images, good ones with knobs of their own, and each kind of bad row."""
    folder = tmp_path_factory.mktemp("run")
    manifest = make_catalog(folder, rows=20, broken=0.1, format="jsonl")
    (folder / "a.png").write_bytes(draw_picture((64, 48), seed=1))
    plain = {"image": "a.png", "prompt": "sea"}
    rows = [{"id": "plain", **plain}, {"id": "own", **plain, "motion_scale": 5, "fps": 12, "num_frames": 6}]
    rows += [{"id": name, **plain, **wrong} for name, wrong in BAD_ROWS.items()]
    rows += [{"id": "gone", **plain, "image": "gone.png"}, {"id": "gs", **plain, "image": "gs://bucket/a.png"}]
    with manifest.open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "model": str(tiny),
                "format": "gif",
                "defaults": {"fps": 5, "num_frames": 3, "strength": 0.9, "motion_scale": 3},
            }
        )
    )
    words = ["--config", folder / "run.yaml", "--output", folder / "out dir", "--fps", "10", "--format", "webm"]
    words += ["--motion-scale", "2", "--max-attempts", "1", "--address", ray_address]
    # Most values of these columns are wrong, so that they are knobs only if the run says so.
    words += ["--knobs", "motion_scale,num_frames,width,scheduler,seed,strength,fps"]
    ended = finish(start("animate", manifest, *words, program=(FAKE_ACTORS, 0)))
    return Ran(ended, folder, {row["id"]: row for row in read_results(str(folder / "out dir")).to_pylist()})


@pytest.mark.heavy
def test_a_run_with_bad_rows_exits_1_and_every_row_has_a_result(ran: Ran) -> None:
    assert ran.ended.code == 1, ran.ended.err
    assert len(ran.rows) == 20 + 2 + len(BAD_ROWS) + 2
    assert "20 of 37 work items succeeded (20 now, 0 before), 17 failed" in ran.ended.out
    assert f"{len(BAD_ROWS) + 1} bad rows" in ran.ended.out, "with the one of a kind of URI that is not read"


@pytest.mark.heavy
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_a_failed_row_that_names_row_and_field(ran: Ran, name: str) -> None:
    (field,) = BAD_ROWS[name]
    row, number = ran.rows[name], 20 + 2 + 1 + list(BAD_ROWS).index(name)
    assert (row["status"], row["error_code"], row["video_uri"]) == ("failed", "bad_parameter", None)
    assert f"row {number} of manifest.jsonl" in row["error_message"]
    assert field in row["error_message"]


@pytest.mark.heavy
def test_broken_images_fail_their_own_rows_only_and_say_why(ran: Ran) -> None:
    catalog = [row for name, row in ran.rows.items() if name.startswith("item-")]
    assert Counter(row["error_code"] for row in catalog) == {None: 18, "image_truncated": 1, "unsupported_image": 1}
    assert ran.rows["gone"]["error_code"] == "image_not_found"
    assert "gone.png" in ran.rows["gone"]["error_message"]
    assert ran.rows["gs"]["status"] == "failed"
    assert "gs://" in ran.rows["gs"]["error_message"]
    for code, count in Counter(row["error_code"] for row in ran.rows.values() if row["error_code"]).items():
        assert f"{count} x {code}" in cells(ran.ended.out)


@pytest.mark.heavy
def test_a_row_s_value_wins_over_a_flag_over_the_file_over_the_model(ran: Ran) -> None:
    plain, own = (json.loads(ran.rows[name]["params"]) for name in ("plain", "own"))
    assert (own["motion_scale"], own["fps"], own["num_frames"]) == (5, 12, 6)
    assert (plain["motion_scale"], plain["fps"]) == (2, 10), "flags"
    assert (plain["num_frames"], plain["strength"]) == (3, 0.9), "the file"
    assert (plain["num_inference_steps"], plain["guidance_scale"]) == (2, 1), "the model"
    assert ran.rows["plain"]["video_uri"].endswith(".webm")
    facts = probe(Path(ran.rows["plain"]["video_uri"]))
    assert (facts.format, facts.num_frames, round(facts.fps)) == ("webm", 3, 10)


@pytest.mark.heavy
def test_without_a_terminal_a_run_prints_nothing_but_its_own_lines(ran: Ran) -> None:
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ran.ended.out) is None
    assert "Traceback" not in ran.ended.err
    assert str(ran.folder / "out dir" / "results.parquet") in ran.ended.out
    assert str(ran.folder / "out dir" / "index.html") in ran.ended.out


@pytest.mark.heavy
def test_the_retry_command_pasted_into_a_shell_tries_the_failed_rows_again(ran: Ran) -> None:
    (line,) = (line for line in ran.ended.out.splitlines() if line.startswith("retry "))
    command = line.removeprefix("retry").strip()
    assert shlex.split(command)[shlex.split(command).index("--retry") + 1] == "failed"
    (ran.folder / "gone.png").write_bytes(draw_picture((40, 40), seed=3))
    before = {path: path.stat().st_mtime_ns for path in (ran.folder / "out dir" / "videos").rglob("*.webm")}
    again = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=170)
    assert again.returncode == 1, again.stderr
    assert "21 of 37 work items succeeded (1 now, 20 before), 16 failed" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.heavy
@pytest.mark.usefixtures("fake_actors")
def test_a_signal_ends_a_run_with_130_and_the_same_command_does_the_rest(
    pia: Pia, tiny: Path, tmp_path: Path, ray_address: str
) -> None:
    output, videos = tmp_path / "out", tmp_path / "out" / "videos"
    words = ["animate", make_catalog(tmp_path, rows=8), "--output", output, "--model", tiny]
    words += ["--num-inference-steps", "10", "--batch-size", "1", "--prefetch", "0"]
    slow = (FAKE_ACTORS, 0.08)  # seconds of a step
    done: dict[Path, int] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(*words, program=slow)  # with a cluster of its own, which ends with it
        deadline = time.monotonic() + 120
        while len(list(videos.rglob("*.mp4"))) < len(done) + 2 and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        # A terminal's Ctrl-C goes to the whole group, Ray's processes and workers included; a scheduler's stop to one.
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        ended = finish(process)
        assert ended.code == 130, ended.err
        assert "Interrupted. The same command goes on where this run stopped." in ended.out
        assert "Traceback" not in ended.err
        assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ended.out) is None, "nothing but its own lines"
        rows = read_results(str(output)).to_pylist()
        assert {path: path.stat().st_mtime_ns for path in done} == done
        done = {path: path.stat().st_mtime_ns for path in videos.rglob("*.mp4")}
        assert len(done) < 8
        assert {row["status"] for row in rows} == {"succeeded"}
        assert 1 <= len(rows) <= len(done), "a row that ended with the signal may have its video and no record yet"
        assert not ledger.count_attempts(str(output)), "rows that were stopped have not killed their worker"
    ended = pia(*words, "--address", ray_address)
    assert ended.code == 0, ended.err
    assert f"8 of 8 work items succeeded ({8 - len(rows)} now, {len(rows)} before)" in ended.out
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(videos.rglob("*.mp4"))) == 8


@pytest.mark.heavy
@pytest.mark.usefixtures("fake_actors")
def test_a_whole_catalogue_goes_from_s3_to_s3_and_a_second_run_animates_nothing(
    pia: Pia, s3: str, tiny: Path, tmp_path: Path, ray_address: str
) -> None:
    make_catalog(tmp_path, rows=6)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/in/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    words = ["animate", f"{s3}/in/manifest.parquet", "--output", f"{s3}/out", "--model", tiny]
    words += ["--address", ray_address]
    ended = pia(*words)
    assert ended.code == 0, ended.err
    assert f"results   {s3}/out/results.parquet" in ended.out
    rows = read_results(f"{s3}/out").to_pylist()
    assert [row["status"] for row in rows] == ["succeeded"] * 6
    for row in rows:
        assert row["image_uri"].startswith(f"{s3}/in/images/")
        found = storage.head(row["video_uri"])
        assert found is not None
        assert found.metadata["work-key"] == row["work_key"]
        assert found.metadata["sha256"] == row["sha256"]
        assert probe(storage.read_bytes(row["video_uri"])).provenance["id"] == row["id"]
    assert b"item-000005" in storage.read_bytes(f"{s3}/out/index.html")
    made = {found.uri: found.last_modified for found in storage.list_objects(f"{s3}/out/videos")}
    ended = pia(*words)
    assert ended.code == 0, ended.err
    assert "Nothing to animate: every work item is done." in ended.out
    assert "6 of 6 work items succeeded (0 now, 6 before)" in ended.out
    assert {found.uri: found.last_modified for found in storage.list_objects(f"{s3}/out/videos")} == made


@pytest.mark.heavy
def test_a_model_that_its_actors_cannot_load_ends_the_command_with_2_and_one_clean_line(
    pia: Pia, s3: str, tmp_path: Path, ray_address: str
) -> None:
    folder = make_pipeline_folder(tmp_path / "model")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        damaged = path.parent.name == "unet" and path.suffix == ".safetensors"  # its actors see that, not the driver
        place = f"{s3}/model/{path.relative_to(folder).as_posix()}"
        storage.write_bytes(place, content[: len(content) // 2] if damaged else content)
    (tmp_path / "tiny.yaml").write_text(f"base: {s3}/model\nlong_edge: 64\ndevice: cpu\n")
    words = [make_catalog(tmp_path, rows=2), "--output", tmp_path / "out", "--actors", "1"]
    ended = pia("animate", *words, "--model", tmp_path / "tiny.yaml", "--address", ray_address)
    assert ended.code == 2
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("pia-ray: the workers could not go on: ")
    assert "unet" in last
    assert "WeightsError" not in last, "an error of ours is its message"
    assert "\x1b[" not in ended.err


def test_an_error_of_a_command_is_one_json_object_where_logs_are(tmp_path: Path) -> None:
    ended = finish(start("report", tmp_path / "nowhere", "--log", "json"))
    assert ended.code == 2
    assert not ended.out
    values = json.loads(ended.err)
    assert values["level"] == "ERROR"
    assert "nowhere" in values["message"]


@pytest.mark.parametrize("client", ["httpx2", "httpcore2", "botocore"])
def test_verbose_commands_log_no_request_whose_url_may_be_presigned(pia: Pia, client: str):
    pia("models", "list", "-v")
    assert not logging.getLogger(client).isEnabledFor(logging.INFO)


def test_a_judgement_needs_a_bound(pia: Pia) -> None:
    ended = pia("judge", "out", "--accept", "")
    assert ended.code == 2
    assert "there is no bound" in ended.err
