"""The command `pia-ray export`. Heavy imports stand inside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pia_ray.catalog.export.export import Exported

SHOWN_MISSING: Final = 20
"""Videos that could not be exported which are named; `--json` names all."""


def export_command(args: argparse.Namespace) -> int:
    """Exports; 1 where videos are missing in the output."""
    from rich.progress import Progress as Bar

    from pia_ray.catalog.export.export import ExportOptions, export_output
    from pia_ray.cli.console import make_console

    options = ExportOptions(
        name=args.name,
        accepted=args.accepted,
        provenance=args.provenance,
        feed=args.feed,
        base_url=args.base_url,
        link=args.link,
        prune=args.prune,
    )
    console = make_console()
    with Bar(console=console, transient=True, disable=args.json or not console.is_terminal) as bar:
        task = bar.add_task("exporting videos", total=None)
        exported = export_output(
            args.output,
            args.to,
            options=options,
            observe=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(exported)))
    else:
        console.print(*_lines(exported, options.accepted), sep="\n", highlight=False, soft_wrap=True, markup=False)
    return 1 if exported.missing else 0


def _lines(exported: Exported, is_accepted_only: bool) -> list[str]:
    """The summary for people, a fact a line."""
    from pia_ray.cli.console import absolute_path
    from pia_ray.formatting import count_of, size

    lines = [
        f"{count_of(exported.num_videos, 'video')} in {absolute_path(exported.target)}: "
        f"{count_of(exported.num_copied, 'file')} copied ({size(exported.bytes_copied)}), "
        f"{exported.num_unchanged} there before"
    ]
    if exported.num_left_out:
        why = "failed or not accepted" if is_accepted_only else "failed"
        lines.append(f"{count_of(exported.num_left_out, 'row')} left out: {why}")
    if exported.num_pruned:
        lines.append(f"{count_of(exported.num_pruned, 'file')} of earlier exports removed")
    if exported.num_others:
        lines.append(f"{count_of(exported.num_others, 'file')} of earlier exports stayed: --prune removes them")
    lines += [f"feed      {absolute_path(uri)}" for uri in exported.feeds]
    if exported.missing:
        lines.append(f"{count_of(len(exported.missing), 'video')} not exported; `animate --remake` makes them again:")
        lines += [
            f"  {each['id']} ({each['video_index']}): {each['reason']}" for each in exported.missing[:SHOWN_MISSING]
        ]
    if (more := len(exported.missing) - SHOWN_MISSING) > 0:
        lines.append(f"  and {more} more: --json names all")
    return lines
