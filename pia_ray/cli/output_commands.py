"""The commands of `pia-ray` for the output of a run: report, gallery and ledger. Heavy imports stand inside them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from typing import TYPE_CHECKING

from pia_ray.errors import OutputError, StorageError

if TYPE_CHECKING:
    from pia_ray.ledger import Lease, Ledger


def report_command(args: argparse.Namespace) -> int:
    from pia_ray import ledger
    from pia_ray.cli.console import make_console, show_report

    console = make_console()
    while True:
        facts = dataclasses.asdict(ledger.summary(_open_ledger(args.output)))
        facts["run"] = facts["run"] and facts["run"]["run_id"]
        if args.json:
            print(json.dumps(facts, default=str), flush=True)
        else:
            if args.follow and console.is_terminal:
                console.clear()
            show_report(console, facts)
        if not args.follow:
            return 0
        time.sleep(5)


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
            raise OutputError(f"the output {output} cannot be used: {error.message}") from None
    raise OutputError(f"there is nothing of pia-ray in {output}: give the --output of an earlier run")


def gallery_command(args: argparse.Namespace) -> int:
    from pia_ray.catalog.gallery import write_gallery
    from pia_ray.cli.console import absolute_path

    print(absolute_path(write_gallery(args.output)))
    return 0


def ledger_command(args: argparse.Namespace) -> int:
    from pia_ray import ledger
    from pia_ray.cli.console import make_console, show_report

    _require_run(args.output, "videos")
    if args.action == "compact":
        with _lease(args.output), _open_ledger(args.output) as opened:
            before, after = opened.compact()
        print(f"{before} parts are now {after}")
        return 0
    if args.action == "rebuild":
        with _lease(args.output):
            show_report(make_console(), dataclasses.asdict(ledger.rebuild(args.output)))
        return 0
    found = ledger.verify(args.output)
    show_report(make_console(), dataclasses.asdict(found))
    return 0 if found.ok else 1


def _lease(output: str) -> Lease:
    """No run may be at work while parts are rewritten."""
    from pia_ray import ledger

    return ledger.Lease(output, run_id=f"ledger-{os.getpid()}")
