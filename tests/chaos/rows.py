"""A catalogue under fire: healthy rows among some that fail, each with the end that it has to have."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pia_ray.testing import draw_picture

SUCCEEDS = ""

BAD_PROMPTS = {
    "sea die": "worker_died",
    "sea die-once": SUCCEEDS,
    "sea nan": "nan_frames",
    "sea oom": "out_of_memory",
    "sea hang": "timeout",
    "sea stuck-once": SUCCEEDS,
}
"""Prompts with a fault of the fake animator, and the error code that the row ends with."""

RARE = ("sea die", "sea hang", "sea stuck-once")
"""Those that cost a worker's start or half a minute."""


@dataclass(frozen=True)
class Rows:
    """A manifest, and the error code of each row's end by id; empty where the row succeeds."""

    manifest: Path
    ends: dict[str, str]
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def healthy(self) -> list[str]:
        """Rows in which nothing is wrong."""
        return [row for row, prompt in self.prompts.items() if prompt.startswith("picture")]


def make_rows(folder: Path, rng: random.Random, *, num: int, with_fifo: bool, rare: float) -> Rows:
    """Draws so many healthy rows and some others between them, those of `RARE` with this probability each."""
    folder.mkdir(parents=True)
    prompts = {f"row-{number:04d}": f"picture {number}" for number in range(num)}
    ends = dict.fromkeys(prompts, SUCCEEDS)
    for number, (prompt, code) in enumerate(BAD_PROMPTS.items()):
        if prompt not in RARE or rng.random() < rare:
            prompts[f"bad-{number}"], ends[f"bad-{number}"] = prompt, code
    for name, code in {
        "truncated": "image_truncated",
        "page": "unsupported_image",
        "missing": "image_not_found",
    }.items():
        prompts[name], ends[name] = "sea", code
    if with_fifo:
        prompts["behind"], ends["behind"] = "sea", "timeout"
    order = list(prompts)
    rng.shuffle(order)
    for number, row in enumerate(order):
        _write_picture(folder / f"{row}.png", row, seed=number)
    table = [{"id": row, "image": f"{row}.png", "prompt": prompts[row]} for row in order]
    pq.write_table(pa.Table.from_pylist(table), folder / "manifest.parquet")
    return Rows(folder / "manifest.parquet", ends, prompts)


def _write_picture(path: Path, row: str, *, seed: int) -> None:
    picture = draw_picture((64, 48), seed=seed)
    if row == "behind":
        os.mkfifo(path)
    elif row == "truncated":
        path.write_bytes(picture[: len(picture) // 2])
    elif row == "page":
        path.write_bytes(b"<!doctype html><title>404</title>\n")
    elif row != "missing":
        path.write_bytes(picture)
