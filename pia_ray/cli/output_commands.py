"""The commands of `pia-ray` for the output of a run: report, gallery and ledger. Heavy imports stand inside them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import time
from typing import TYPE_CHECKING, Any, Final

from pia_ray.config.acceptance import parse_bounds
from pia_ray.config.catalog import DAMAGED, MISSING
from pia_ray.errors import ConfigError, LedgerError, OutputError, OutputUnavailable, StorageError
from pia_ray.formatting import count_of

if TYPE_CHECKING:
    from pia_ray.ledger import Lease, Ledger, LedgerSummary, LiveRun, Verified

SHOWN_MISSING: Final = 100
"""Videos that `judge` names, the worst first; `--json` names all."""

FOLLOW_S: Final = 5.0
"""Least time between two reports of `--follow`."""


def report_command(args: argparse.Namespace) -> int:
    from pia_ray import storage
    from pia_ray.cli.console import make_console, show_lines
    from pia_ray.cli.output_report import live_lines, summary_lines

    console = make_console()
    while True:
        began = time.monotonic()
        try:
            with storage.hurry() if args.follow else contextlib.nullcontext():
                found, live, damaged = _reported(args.output)
            store: dict[str, Any] = {"state": "answers", "seconds": time.monotonic() - began}
        except OutputUnavailable as error:
            if not args.follow:
                raise
            found, live, damaged, store = None, None, None, {"state": "away", "reason": error.message}
        if args.json:
            shown = dataclasses.asdict(live) if live is not None else None
            print(json.dumps({**_facts(found), "store": store, "live": shown}, default=str), flush=True)
        else:
            if args.follow and console.is_terminal:
                console.clear()
            summary = [] if found is None else summary_lines(found)
            show_lines(console, [*summary, *live_lines(live, store=store)])
        if damaged is not None:
            raise LedgerError(damaged)
        if not args.follow:
            return 0
        # A ledger of a million rows is not read all the time.
        time.sleep(max(FOLLOW_S, 4 * (time.monotonic() - began)))


def _facts(found: LedgerSummary | None) -> dict[str, Any]:
    """The summary as JSON values; nothing where the store is away."""
    if found is None:
        return {}
    return {**dataclasses.asdict(found), "run": found.run and found.run.run_id}


def _reported(output: str) -> tuple[LedgerSummary, LiveRun | None, str | None]:
    """The summary of an output, the run at work on it, and what to do where all of its ledger is damaged.

    Raises:
        OutputError: the store refuses; OutputUnavailable: it does not answer.
    """
    from pia_ray import ledger

    opened = _open_ledger(output)
    found = ledger.summary(opened)
    try:
        live = ledger.live_run(output)
    except StorageError as error:
        raise _output_error(output, error) from None
    damaged = None
    if opened.index.damaged and not opened.index.part_uris:
        damaged = (
            f"every part of the ledger of {output} is damaged ({count_of(len(opened.index.damaged), 'part')}): "
            f"`pia-ray ledger rebuild {shlex.quote(output)}` restores the rows from the videos"
        )
    return found, live, damaged


def _open_ledger(output: str) -> Ledger:
    from pia_ray import ledger

    _require_run(output)
    return ledger.Ledger.open(output)


def _require_run(output: str, *folders: str) -> None:
    """Refuses an output that no run has written to, before a command leaves traces in it.

    Raises:
        OutputError: there is nothing below `_ledger` nor in the other `folders`.
    """
    from pia_ray import storage

    for folder in ("_ledger/parts", "_ledger/runs", *folders):
        try:
            if next(iter(storage.list_objects(storage.join(output, folder))), None) is not None:
                return
        except StorageError as error:
            raise _output_error(output, error) from None
    raise OutputError(f"there is nothing of pia-ray in {output}: give the --output of an earlier run")


def _output_error(output: str, error: StorageError) -> OutputError:
    kind = OutputUnavailable if error.retryable else OutputError
    return kind(f"the output {output} cannot be used: {error.message}")


def judge_command(args: argparse.Namespace) -> int:
    from pia_ray.catalog.judging import judge_output, write_csv
    from pia_ray.cli.console import make_console, show_lines

    try:
        bounds = parse_bounds(args.accept)
    except ValueError as error:
        raise ConfigError(f"accept: {error}") from None
    if not bounds:
        raise ConfigError("accept: there is no bound: write one such as likeness_min>=0.7")
    judged = judge_output(args.output, bounds)
    if args.csv is not None:
        write_csv(judged, args.csv)
    if args.json:
        print(json.dumps(dataclasses.asdict(judged)))
        return 0
    lines = [f"{judged.num_accepted:,} of {count_of(judged.num_videos, 'video')} within {', '.join(map(str, bounds))}"]
    lines += [f"  {count:>6} miss {bound}" for bound, count in judged.num_by_bound.items() if count]
    lines += [f"  {count:>6} have no {name}, which counts as met" for name, count in judged.num_unmeasured.items()]
    lines += [f"  {judged.num_approved:>6} of them are approved, and stay"] if judged.num_approved else []
    for each in judged.missing[:SHOWN_MISSING]:
        number = f" ({each.video_index})" if each.video_index else ""
        lines.append(f"{each.id}{number}: {', '.join(f'{name} {value:.4g}' for name, value in each.numbers.items())}")
    if (more := len(judged.missing) - SHOWN_MISSING) > 0:
        lines.append(f"and {more} more: --json or --csv FILE names all")
    show_lines(make_console(), lines)
    return 0


def gallery_command(args: argparse.Namespace) -> int:
    from pia_ray.catalog.gallery import write_gallery
    from pia_ray.cli.console import absolute_path

    print(absolute_path(write_gallery(args.output)))
    return 0


def ledger_command(args: argparse.Namespace) -> int:
    from rich.progress import Progress as Bar

    from pia_ray import ledger
    from pia_ray.cli.console import make_console, show_lines
    from pia_ray.cli.output_report import compacted_line, rebuilt_lines, verified_lines

    if args.action != "verify" and (args.deep or args.repair):
        raise ConfigError("--deep and --repair are for ledger verify")
    _require_run(args.output, "videos")
    if args.action == "compact":
        with _lease(args.output), _open_ledger(args.output) as opened:
            before, after = opened.compact()
        print(compacted_line(before, after))
        return 0
    if args.action == "rebuild":
        with _lease(args.output):
            show_lines(make_console(), rebuilt_lines(ledger.rebuild(args.output)))
        return 0
    console = make_console()
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking videos", total=None)
        found = ledger.verify(
            args.output, deep=args.deep, observe=lambda done, total: bar.update(task, completed=done, total=total)
        )
    lines = verified_lines(found, deep=args.deep)
    if not found.ok:
        lines += _repairs(args.output, found) if args.repair else ["`--repair` says how to mend this"]
    show_lines(console, lines)
    return 0 if found.ok else 1


def _repairs(output: str, found: Verified) -> list[str]:
    """The commands that mend what `verify` has found, one a line."""
    from pia_ray import ledger

    lines = []
    if found.damaged_parts:
        lines.append(f"pia-ray ledger rebuild {shlex.quote(output)}")
    if found.num_missing or found.num_wrong_size or found.num_damaged:
        run = ledger.latest_run(output)
        kinds = [MISSING] if found.num_missing else []
        kinds += [DAMAGED] if found.num_wrong_size or found.num_damaged else []
        given = "MANIFEST" if run is None else run.config.get("manifest", run.manifest)
        manifests = shlex.join([given] if isinstance(given, str) else given)
        lines.append(f"pia-ray animate {manifests} --output {shlex.quote(output)} --remake {','.join(kinds)}")
        lines.append("with the other flags, and the --config, of the run that made the videos")
    return lines


def _lease(output: str) -> Lease:
    """No run may be at work while parts are rewritten."""
    from pia_ray import ledger

    return ledger.Lease(output, run_id=f"ledger-{os.getpid()}")
