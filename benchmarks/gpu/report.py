"""The cards of the parts as files, and the table of all of them for people."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.card import commit
from benchmarks.gpu.part import Outcome
from benchmarks.gpu.sizes import Size

PACKAGES: Final = ("pia-ray", "torch", "diffusers", "transformers", "ray", "triton")


@dataclass(frozen=True)
class CardFolder:
    """The folder that gets a file for each part, named after the machine."""

    folder: Path
    size: Size
    machine: dict[str, Any]

    def path_of(self, part: str) -> Path:
        """The file of a part; another size than the full one is in its name."""
        size = () if self.size.name == "full" else (self.size.name,)
        return self.folder / f"{'-'.join(('gpu', self.machine['kind'], *size, part))}.json"

    def write(self, outcome: Outcome) -> None:
        """Writes the card of a part, if it has one."""
        if not outcome.has_card:
            return
        card = {
            "benchmark": "gpu",
            "part": outcome.part.name,
            "title": outcome.part.title,
            "status": outcome.status,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "size": self.size.name,
            "seconds": round(outcome.seconds, 2),
            "machine": self.machine,
            "numbers": _rounded(outcome.card.numbers),
            "problems": outcome.card.problems,
            "lines": outcome.card.lines,
            "reason": outcome.reason,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path_of(outcome.part.name).write_text(json.dumps(card, indent=1) + "\n", "utf-8")


def machine_of(device: torch.device) -> dict[str, Any]:
    """The device, the versions and the commit that were measured."""
    facts: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    name = f"{os.cpu_count()} CPUs {platform.machine()}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        facts |= {
            "gpu": name,
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    facts["kind"] = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    facts |= {package: _version(package) for package in PACKAGES}
    return facts | {"commit": commit() if shutil.which("git") else "unknown"}


def table(outcomes: Sequence[Outcome], machine: dict[str, Any], size: Size) -> str:
    """All findings, a paragraph for each part."""
    where = machine.get("gpu", f"{machine['cpus']} CPUs")
    lines = [
        f"gpu: {size.name} size, {size.num_frames} frames of {size.side} px, on {where}; torch {machine['torch']}, "
        f"diffusers {machine['diffusers']}, commit {machine['commit']}"
    ]
    for outcome in outcomes:
        lines.append(f"{outcome.part.name:16}{outcome.status:14}{outcome.seconds:7.1f} s   {outcome.part.title}")
        lines += [f"    {line}" for line in outcome.card.lines]
        lines += [f"    WRONG: {problem}" for problem in outcome.card.problems]
        if outcome.reason:
            lines.append(f"    {outcome.reason.splitlines()[-1]}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _rounded(value: Any) -> Any:
    """Numbers with six digits."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
