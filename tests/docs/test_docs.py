"""README and docs/ tell the truth: their tables are the code's, their commands exist, their Python compiles.

`python tests/docs/test_docs.py` writes the tables anew.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pia_ray import errors
from pia_ray.catalog.workload import evaluated_frames
from pia_ray.cli.parser import make_parser
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import KNOBS, AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import resolve
from pia_ray.config.serve import ServeConfig
from pia_ray.ledger import RESULTS_SCHEMA
from pia_ray.types import ResultRow

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = sorted(
    path for path in ROOT.rglob("*.md") if not {".venv", "build", "out"} & set(path.relative_to(ROOT).parts[:-1])
)


def knobs() -> str:
    lines = ["| knob | default | allowed | meaning |", "|---|---|---|---|"]
    for knob in KNOBS.values():
        allowed = ", ".join(f"`{choice}`" for choice in knob.choices) or " ".join(
            filter(None, [knob.bounds, knob.unit])
        )
        default = "" if knob.default is None else f"`{knob.default}`"
        lines.append(f"| `{knob.name}` | {default} | {allowed} | {knob.meaning} |")
    return "\n".join(lines)


def settings() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in CatalogConfig.model_fields.items():
        silent = field.is_required() or field.default in (None, ()) or field.default_factory is not None
        default = "" if silent or name == "defaults" else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def serve() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in ServeConfig.model_fields.items():
        silent = field.is_required() or field.default in (None, (), "") or field.default_factory is not None
        default = "`{demo: demo}`" if name == "models" else "" if silent else f"`{field.default}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def models() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in ModelConfig.model_fields.items():
        silent = field.is_required() or field.default is None or field.default_factory is not None
        default = "" if silent else f"`{field.default}`"
        lines.append(f"| `{name}` | {default if field.default != '' else ''} | {field.description} |")
    return "\n".join(lines)


def results() -> str:
    lines = ["| column | type |", "|---|---|"]
    lines += [
        f"| `{field.name}` | {field.type}{'' if field.nullable else ', never null'} |" for field in RESULTS_SCHEMA
    ]
    return "\n".join(lines)


def codes() -> str:
    lines = ["| error code | retryable | what it means |", "|---|---|---|"]
    lines.append(
        "| `bad_manifest_row` | no | A line of the manifest that is no row: too many cells, not JSON, not text. |"
    )
    for kind in every_row_error():
        meaning = (kind.__doc__ or "").split("Arguments:")[0].strip()
        lines.append(f"| `{kind.code}` | {'yes' if kind.retryable else 'no'} | {meaning} |")
    return "\n".join(lines)


STEP_TFLOP = 35.354 * 0.945
"""One step with guidance, 16 frames of 512 x 512 px: as diffusers counts, times what `test_rewrites.py` leaves."""

OTHER_TFLOP = 40.232 * 0.846 + 1.117 + 0.027
"""Frames decoded, the picture and both prompts encoded."""

PEAKS = {
    "T4": (16, 65),
    "L4": (24, 121),
    "RTX 4090": (24, 165),
    "A100": (40, 312),
    "L40S": (48, 362),
    "H100": (80, 989),
}
"""Memory in GB and dense float16 TFLOP/s of the makers' data sheets."""

SHARES = (0.2, 0.4)
"""Of its peak, what a GPU is taken to reach: published runs of like networks lie between 17 and 46 %."""


def gpus() -> str:
    video = 25 * STEP_TFLOP + OTHER_TFLOP
    lines = ["| GPU | memory | peak, TFLOP/s | s per video | videos per hour |", "|---|---|---|---|---|"]
    for name, (memory, peak) in PEAKS.items():
        slow, fast = (video / (peak * share) for share in SHARES)
        lines.append(
            f"| {name} | {memory} GB | {peak} | {fast:.2g} to {slow:.2g} | {3600 / slow:.0f} to {3600 / fast:.0f} |"
        )
    return "\n".join(lines)


ASKED = (
    {"num_inference_steps": 50},
    {"num_frames": 32},
    {"num_frames": 64},
    {"guidance_scale": 1.0},
    {"image_guidance_scale": 2.0},
    {"strength": 0.6},
    {"scheduler": "heun"},
    {"free_init": "butterworth"},
    {"preset": "draft"},
    {"num_videos": 3},
)


def work() -> str:
    def counted(knobs: dict[str, object]) -> int:
        params = resolve(AnimationParams(prompt="-", **knobs), {}, model_defaults={})
        return params.num_videos * evaluated_frames(params)

    lines = ["| a row with | evaluates, against one of the defaults |", "|---|---|"]
    for knobs in ASKED:
        ((name, value),) = knobs.items()
        lines.append(f"| `{name}` {value} | {counted(knobs) / counted({}):.2g} times |")
    return "\n".join(lines)


def every_row_error(root: type[errors.RowError] = errors.RowError) -> list[type[errors.RowError]]:
    found = []
    for kind in root.__subclasses__():
        found += [kind, *every_row_error(kind)]
    return found


TABLES = {
    "knobs": knobs,
    "settings": settings,
    "serve": serve,
    "models": models,
    "results": results,
    "codes": codes,
    "gpus": gpus,
    "work": work,
}


def table(name: str) -> tuple[Path, str]:
    """The one guide that has the table, and what stands there."""
    found = [
        (path, match[1])
        for path in GUIDES
        if (match := re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", path.read_text("utf-8"), re.DOTALL))
    ]
    assert len(found) == 1, f"the table {name} must stand in one of {[path.name for path in GUIDES]}"
    return found[0]


def blocks(kinds: str) -> list[str]:
    return [
        block
        for path in GUIDES
        for block in re.findall(rf"```(?:{kinds})\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    ]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_equals_the_code(name: str) -> None:
    assert table(name)[1] == TABLES[name](), "run `python tests/docs/test_docs.py`"


def commands() -> list[str]:
    lines = "\n".join(blocks("console|sh")).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in lines if "pia-ray " in line]


def test_every_command_is_one_that_the_parser_takes() -> None:
    assert len(commands()) >= 8
    for command in commands():
        words = shlex.split(command)
        start = next(i for i, word in enumerate(words) if word.endswith("pia-ray"))
        make_parser().parse_args(words[start + 1 :])


def first_commands() -> list[list[str]]:
    """Those of the section for newcomers, but for `make`, which CI runs as it stands."""
    section = README.read_text("utf-8").split("## Five minutes")[1].split("\n## ")[0]
    found = [shlex.split(line, comments=True) for line in re.findall(r"^\$ (.*)$", section, re.MULTILINE)]
    return [words[1:] for words in found if words[0] != "make"]


@pytest.mark.heavy
def test_a_newcomers_commands_run_one_after_the_other(tmp_path: Path, ray_address: str) -> None:
    (tmp_path / "out").mkdir()  # `make demo` makes it
    assert len(first_commands()) == 3
    for words in first_commands():
        arguments = [word.replace("pia_ray/demo", str(ROOT / "pia_ray" / "demo")) for word in words]
        cluster = ["--address", ray_address] if words[0] == "animate" else []
        command = [sys.executable, "-m", "pia_ray.cli", *arguments, *cluster]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "cat.mp4").stat().st_size > 1000
    assert len(list((tmp_path / "out" / "mine" / "videos").rglob("*.mp4"))) == 3


def test_every_make_target_exists() -> None:
    makefile = README.with_name("Makefile").read_text("utf-8")
    text = "\n".join(path.read_text("utf-8") for path in DOCUMENTS)
    targets = set(re.findall(r"(?:`|^\$ )make (?:[A-Z]+=\S+ )*([a-z-]+)\b", text, re.MULTILINE))
    assert {"demo", "check", "test", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_python_examples_compile_and_use_public_names_only() -> None:
    import pia_ray

    examples = blocks("python")
    assert len(examples) >= 4
    for block in examples:
        compile(block, "example", "exec")
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "pia_ray":
                assert {name.name for name in node.names} <= set(pia_ray.__all__)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        there = path if not target else path.parent / target
        assert there.exists(), target
        assert there.resolve().is_relative_to(ROOT.resolve()), target
        if anchor:
            assert anchor in anchors(there), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Of the headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_guide_is_reached_from_the_readme() -> None:
    for path in GUIDES[1:]:
        assert f"](docs/{path.name}" in README.read_text("utf-8"), path.name


def test_the_readme_stays_short_enough_to_read() -> None:
    assert len(README.read_text("utf-8").splitlines()) < 400, "move what a newcomer does not read into docs/"


def test_the_drawn_modules_are_those_of_the_package() -> None:
    lines = README.read_text("utf-8").split("| module | what it is |")[1].split("\n\n")[0].splitlines()
    named = [name for line in lines[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    there = [
        path.stem for path in (ROOT / "pia_ray").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert sorted(named) == sorted(name for name in there if name != "__init__")


def test_the_reading_order_names_what_is_there() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Reading order")[1].split("\n## ")[0]
    paths = re.findall(r"`([\w/]+(?:\.py|/))`", section)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / "pia_ray" / path).exists() or path == "pia_ray/", path


def test_results_columns_are_those_of_the_value_type() -> None:
    assert RESULTS_SCHEMA.names == [field.name for field in fields(ResultRow)]


if __name__ == "__main__":
    for name, make in TABLES.items():
        path, old = table(name)
        marked = f"<!-- {name} -->\n"
        path.write_text(path.read_text("utf-8").replace(marked + old, marked + make()), "utf-8")
