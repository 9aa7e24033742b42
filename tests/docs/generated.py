"""What docs/ takes from the code: tables between marks in hand-written guides, and whole pages.

`python -m tests.docs.generated` writes all of it anew; test_docs.py holds it against the code.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from pia_ray import errors
from pia_ray.catalog.workload import evaluated_frames
from pia_ray.config.catalog import CatalogConfig
from pia_ray.config.knobs import KNOBS, AnimationParams
from pia_ray.config.model import ModelConfig
from pia_ray.config.resolving import resolve
from pia_ray.config.serve import ServeConfig
from pia_ray.ledger import RESULTS_SCHEMA
from tests.docs.api_page import api

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


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


def run_errors() -> str:
    lines = ["| error code | class | exit | meaning | what to do |", "|---|---|---|---|---|"]
    for kind in below(errors.JobError):
        meaning, advice = meaning_of(kind)
        lines.append(f"| `{kind.code}` | `{kind.__name__}` | {kind.exit_code} | {meaning} | {advice} |")
    return "\n".join(lines)


def row_errors() -> str:
    lines = [
        "| error code | class | fault | retryable | HTTP | meaning | what to do |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in below(errors.RowError):
        meaning, advice = meaning_of(kind)
        retryable = "yes" if kind.retryable else "no"
        shown = f"{kind.fault} | {retryable} | {kind.http_status} | {meaning} | {advice}"
        lines.append(f"| `{kind.code}` | `{kind.__name__}` | {shown} |")
    return "\n".join(lines)


def below(root: type[errors.PiaRayError]) -> Iterator[type[errors.PiaRayError]]:
    """The class and all its subclasses, each before its own."""
    yield root
    for kind in root.__subclasses__():
        yield from below(kind)


def meaning_of(kind: type[errors.PiaRayError]) -> tuple[str, str]:
    """The first sentence of its docstring, and the advice that follows."""
    text = (kind.__doc__ or "").partition("Arguments:")[0]
    first, _, rest = " ".join(text.split()).partition(". ")  # a row of a table is one line
    return f"{first.removesuffix('.')}.", rest


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
    {"preset": "balanced"},
    {"preset": "fast"},
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


TABLES = {
    "knobs": knobs,
    "settings": settings,
    "serve": serve,
    "models": models,
    "results": results,
    "run-errors": run_errors,
    "row-errors": row_errors,
    "gpus": gpus,
    "work": work,
}
"""By the name in the marks around them; each stands in one guide."""


def index_page() -> str:
    """The README for a package index, where links that are relative in the repository would lead nowhere."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    source = urls["Source"]
    raw = source.replace("github.com", "raw.githubusercontent.com")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{raw}/main/", README.read_text("utf-8"))
    text = re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{source}/blob/main/", text)
    return "<!-- Made from README.md by `python -m tests.docs.generated`: edit that one. -->\n\n" + text


PAGES = {"api.md": api, "pypi.md": index_page}
"""Pages of docs/ that hold nothing else."""

GUIDES = [
    README,
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in PAGES),
]
"""What is written by hand and read by users."""


def table(name: str) -> tuple[Path, str]:
    """The one guide that has the table, and what stands there."""
    found = [
        (path, match[1])
        for path in GUIDES
        if (match := re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", path.read_text("utf-8"), re.DOTALL))
    ]
    assert len(found) == 1, f"the table {name} must stand in one of {[path.name for path in GUIDES]}"
    return found[0]


if __name__ == "__main__":
    for name, make in TABLES.items():
        path, old = table(name)
        marked = f"<!-- {name} -->\n"
        path.write_text(path.read_text("utf-8").replace(marked + old, marked + make()), "utf-8")
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), "utf-8")
