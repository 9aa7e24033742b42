"""The entry point of `pia-ray`: logging, exit codes, and one line for each error.

Exit codes: 0 all rows succeeded, 1 some failed, 2 could not run, 4 deadline or out of patience, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from pia_ray import logs
from pia_ray.cli.arguments import Parser, fill_from_environment
from pia_ray.cli.commands import Command, image_command
from pia_ray.cli.machine_errors import machine_error
from pia_ray.cli.parser import make_parser
from pia_ray.errors import ConfigError, JobError, PiaRayError, RowError
from pia_ray.imports import own_process

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code. Installed as `pia-ray`."""
    if argv is None:
        own_process()
    given = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args = _parse(parser, given)
    _set_up(args)
    command: Command = args.command
    used: list[str] = []
    try:
        used = fill_from_environment(args, os.environ, known=parser.variables)
        return command(args)
    except PiaRayError as error:
        _tell(error.message)
        if used and isinstance(error, ConfigError):
            _tell(f"settings from the environment: {', '.join(used)}")
        return _exit_code_of(error, command)
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as of a program that SIGPIPE ends; 1 would mean failed rows
    except Exception as error:
        known = machine_error(error)
        if known is None or args.verbose:
            if logs.is_json():
                log.exception("pia-ray cannot go on")
            else:
                traceback.print_exc()
        if known is not None:
            _tell(known)
        return 2


def _parse(parser: Parser, given: list[str]) -> argparse.Namespace:
    """The parsed arguments, with the given ones as `argv`."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    args, unknown = parser.parse_known_args(given)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.argv = given
    return args


def _exit_code_of(error: PiaRayError, command: Command) -> int:
    if isinstance(error, JobError):
        return error.exit_code
    # `pia-ray image` is a run of one row. Anywhere else a store's or a knob's error means that nothing could run.
    return 1 if isinstance(error, RowError) and command is image_command else 2


def _tell(message: str) -> None:
    """Says on standard error what ended the command."""
    if logs.is_json():
        log.error("%s", message)
    else:
        print(f"pia-ray: {message}", file=sys.stderr)


def _set_up(args: argparse.Namespace) -> None:
    level = logging.INFO if args.verbose else logging.WARNING
    logs.set_up(args.log or "text", level=level)
    for name in ("httpx2", "httpcore2", "botocore", "diffusers", "transformers"):
        # httpx2 logs whole URLs at INFO, signatures of presigned ones included.
        logging.getLogger(name).setLevel(logging.WARNING)
    if not args.verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
