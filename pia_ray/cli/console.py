"""The output of a run for people: one live display on a terminal, plain lines elsewhere, and the closing summary.

Owns rich. Writes to the console it is given; the command line decides which.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from pia_ray import logs
from pia_ray.cli.output_report import takes_line
from pia_ray.formatting import count_of, duration, videos_rate

if TYPE_CHECKING:
    from pia_ray.catalog.progress import Progress, RunSummary

log = logging.getLogger(__name__)

PLAIN_S: Final = 10.0
"""Seconds between lines where there is no terminal."""

RATE_S: Final = 5.0
"""Shortest time over which a rate is shown, because rows that denoised together end together."""

_PHASES: Final = {
    "planning": "reading the manifest",
    "starting": "Ray starts",
    "animating": "animating",
    "stopping": "stopping: what denoises may end (a second signal stops at once)",
    "writing": "writing results and gallery",
    "ended": "done",
}


class Screen(Console):
    """A console whose reader may go away: what is shown is lost then, the work goes on."""

    def on_broken_pipe(self) -> None:
        """Called by rich where it would end the process."""
        self.quiet = True
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _LogLines(io.StringIO):
    """A file whose lines become log lines."""

    def write(self, text: str) -> int:
        """Logs each line."""
        for line in filter(None, map(str.rstrip, text.splitlines())):
            log.info("%s", line)
        return len(text)


def make_run_console() -> Screen:
    """The console for what a run or endpoint says: standard output, or where log lines are JSON, one that logs."""
    if not logs.is_json():
        return make_console()
    log.setLevel(logging.INFO)
    return Screen(file=_LogLines(), width=200, emoji=False)


def make_console() -> Screen:
    """The console on standard output."""
    # Where there is no terminal rich assumes 80 columns, and would cut the tables of a pipe or a log file. The :x: of a
    # prompt or path is no emoji.
    return Screen(width=None if sys.stdout.isatty() else 200, emoji=False)


def absolute_path(uri: str) -> str:
    """A path that can be clicked or pasted: absolute where it is local."""
    return uri if "://" in uri else str(Path(uri).resolve())


def open_page(console: Console, uri: str | None) -> None:
    """Opens a run's gallery in the browser of this machine, or says why it does not."""
    import webbrowser

    if uri is None:
        reason = "there is no gallery to open"
    elif "://" in uri and not uri.startswith("file://"):
        reason = f"--open opens pages of this machine only: {uri}"
    elif not webbrowser.open(uri if "://" in uri else Path(uri).resolve().as_uri()):
        reason = f"there is no browser on this machine: open {absolute_path(uri)} on another"
    else:
        return
    console.print(reason, highlight=False, soft_wrap=True, markup=False)


class RunDisplay:
    """Shows the progress of one run; give its `show` to the run as observer. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._phase: tuple[str, str] = "", ""
        self._last_line = 0.0
        self._begun_at = time.monotonic()
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, facts="")
        self._display = Live(self._bar, console=console, transient=True, refresh_per_second=8)

    def show(self, progress: Progress) -> None:
        """Takes the run's progress, as often as it comes."""
        if progress.review:
            self._console.print(f"review    {progress.review}", highlight=False, soft_wrap=True)
            return
        if progress.columns:
            self._console.print(progress.columns, highlight=False, soft_wrap=True, markup=False)
            return
        if self._live:
            # Before there are rows to count the bar pulses.
            self._bar.update(
                self._task,
                description=progress.start or _PHASES[progress.phase],
                total=progress.num_pending or None,
                completed=progress.num_succeeded + progress.num_failed,
                facts=_facts(progress),
            )
            return
        now = time.monotonic()
        # Of the start, each new kind of state is a line; steps and bytes, which follow the comma, make none at once.
        phase = progress.phase, progress.away or progress.start.partition(",")[0]
        is_due = progress.phase in ("starting", "animating") and now - self._last_line >= PLAIN_S
        if phase != self._phase or is_due:
            self._phase, self._last_line = phase, now
            elapsed = f" ({duration(now - self._begun_at)})" if progress.start else ""
            self._console.print(_line(progress) + elapsed, highlight=False, soft_wrap=True)

    def __enter__(self) -> RunDisplay:
        if self._live:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._display.stop()


def show_summary(console: Console, summary: RunSummary, *, retry_command: str, open_path: Callable[[str], str]) -> None:
    """The closing lines of a run: counts, errors by code, where things are, and how to go on."""
    progress = summary.progress
    if not progress.num_pending and summary.ending == "finished":
        rest = "has failed, and waits for --retry" if progress.num_failed_before else "is a bad row of the manifest"
        rest = f" or {rest}" if progress.num_failed_in_all else ""
        console.print(f"Nothing to animate: every work item is done{rest}.", highlight=False, soft_wrap=True)
    console.print(_counts(progress), highlight=False, soft_wrap=True)
    if progress.num_succeeded + progress.num_failed:
        console.print(_times(summary), highlight=False, soft_wrap=True)
    takes = progress.takes
    if takes.num_accepted or takes.num_given_up or takes.num_retaken:
        console.print(takes_line(takes), highlight=False, soft_wrap=True)
    for code, count in sorted(summary.errors.items(), key=lambda entry: (-entry[1], entry[0])):
        console.print(f"  {count:>6} x {code}", highlight=False)
    console.print(f"results   {open_path(summary.results_uri)}", highlight=False, soft_wrap=True, markup=False)
    if summary.gallery_uri is not None:
        console.print(f"gallery   {open_path(summary.gallery_uri)}", highlight=False, soft_wrap=True, markup=False)
    if summary.ending != "finished":
        word = "Interrupted" if summary.ending == "interrupted" else "The deadline has passed"
        console.print(f"{word}. The same command goes on where this run stopped.", highlight=False, soft_wrap=True)
        return
    if progress.num_rejected:
        console.print(
            "bad rows  are named, with row and field, in the results and by `pia-ray validate`",
            highlight=False,
            soft_wrap=True,
        )
    if progress.num_failed_in_all > progress.num_rejected:
        console.print(f"retry     {retry_command}", highlight=False, soft_wrap=True, markup=False)


def show_lines(console: Console, lines: Iterable[str]) -> None:
    """Lines as they are: neither wrapped nor coloured."""
    console.print(*lines, sep="\n", highlight=False, soft_wrap=True, markup=False)


def show_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings."""
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)


def _counts(progress: Progress) -> Text:
    """The line of the work items that succeeded, failed and are left."""
    succeeded, failed = progress.num_before + progress.num_succeeded, progress.num_failed_in_all
    text = Text()
    text.append(
        f"{succeeded} of {count_of(progress.num_items, 'work item')} succeeded", style="bold green" if succeeded else ""
    )
    text.append(f" ({progress.num_succeeded} now, {progress.num_before} before)")
    if failed:
        text.append(f", {failed} failed", style="bold red")
        when = {"now": progress.num_failed, "before": progress.num_failed_before, "bad rows": progress.num_rejected}
        text.append(f" ({', '.join(f'{count} {word}' for word, count in when.items() if count)})")
    if progress.num_left:
        text.append(f", {progress.num_left} left", style="bold yellow")
    return text


def _times(summary: RunSummary) -> str:
    """The line of a run's duration and speed."""
    progress = summary.progress
    parts = [f"{duration(summary.seconds)} in all"]
    if progress.first_video_s:
        parts.append(f"{duration(progress.first_video_s)} to the first video")
    if progress.since_first_video_s >= RATE_S and progress.videos_per_s:
        parts.append(f"then {videos_rate(progress.videos_per_s)}")
    if progress.busy_share is not None:
        parts.append(f"engine busy {progress.busy_share:.0%}")
    return "time      " + ", ".join(parts)


def _facts(progress: Progress) -> str:
    parts = [f"[yellow]{_outage(progress)}[/yellow]"] if progress.away else []
    if progress.phase != "animating":
        return "".join(parts)
    parts += [f"[red]{progress.num_failed} failed[/red]"] if progress.num_failed else []
    return " · ".join(parts + _speed(progress, "left"))


def _speed(progress: Progress, end: str) -> list[str]:
    """The speed of a run, and the time to its end with that word; nothing in its first seconds."""
    if progress.animating_s < RATE_S or not progress.rows_per_s:
        return []
    is_known = progress.since_first_video_s >= RATE_S and progress.videos_per_s
    rate = [videos_rate(progress.videos_per_s)] if is_known else []
    return [*rate, f"{duration(progress.num_left / progress.rows_per_s)} {end}"]


def _outage(progress: Progress) -> str:
    text = f"{progress.away} is away"
    if progress.num_waiting:
        text += f", {progress.num_waiting} animation{'s wait' if progress.num_waiting > 1 else ' waits'}"
    return text


def _line(progress: Progress) -> str:
    if progress.away:
        doing = progress.start or _PHASES[progress.phase]
        return escape(f"{doing}: {_outage(progress)} ({progress.away_reason})")
    if progress.phase != "animating":
        if progress.start:
            return progress.start
        if progress.phase == "starting":
            return f"{progress.num_pending} of {count_of(progress.num_items, 'work item')} to do: {_PHASES['starting']}"
        return _PHASES[progress.phase]
    done = progress.num_succeeded + progress.num_failed
    counts = f"{done} of {progress.num_pending} done", f"{progress.num_failed} failed", f"{progress.num_left} left"
    return ", ".join([*counts, *_speed(progress, "to go")])
