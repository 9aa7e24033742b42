"""The command `pia-ray jobs`: the video jobs of an endpoint, for its operator. Heavy imports stand inside it."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from pia_ray.config.serve import ServeConfig, owner_of_hash
from pia_ray.errors import ConfigError, JobConflict, JobNotFound
from pia_ray.formatting import count_of, duration

if TYPE_CHECKING:
    from pia_ray.online.video_jobs import JobStore, VideoJob

STATUSES: Final = ("queued", "in_progress", "completed", "failed", "cancelled")
"""The statuses of jobs; a cancelled one is not among the failed ones here."""
ACTIONS: Final = ("list", "show", "retry", "cancel", "purge")

_FILTERS: Final = {"status", "owner", "older_than", "newer_than"}
_FLAGS: Final = {
    "list": _FILTERS | {"limit", "json"},
    "show": {"json"},
    "retry": set[str](),
    "cancel": set[str](),
    "purge": _FILTERS | {"dry_run"},
}
"""The flags of each action, beside `--storage`."""


def jobs_command(args: argparse.Namespace) -> int:
    """Lists, shows or changes jobs; 1 where one of the named jobs could not be changed."""
    from pia_ray.online.video_jobs import JobStore

    _check(args)
    jobs = JobStore(_storage(args))
    if args.action == "list":
        return _list(jobs, args)
    if args.action == "show":
        return _show(jobs, args)
    if args.action == "purge":
        return _purge(jobs, args)
    if args.action == "retry":
        return _change(args.ids, lambda job_id: f"{jobs.retry(job_id).id} is queued again")
    return _change(args.ids, lambda job_id: f"{_cancelled(jobs, job_id).id} is cancelled")


def _check(args: argparse.Namespace) -> None:
    for name in sorted(_FILTERS | {"limit", "json", "dry_run"}):
        if getattr(args, name) not in (None, False) and name not in _FLAGS[args.action]:
            raise ConfigError(f"--{name.replace('_', '-')} is not a flag of jobs {args.action}")
    if args.action in ("list", "purge") and args.ids:
        raise ConfigError(f"jobs {args.action} takes no ids: --status, --owner and --older-than choose jobs")
    if args.action not in ("list", "purge") and not args.ids:
        raise ConfigError(f"jobs {args.action} needs the id of a job, such as video_...; `jobs list` lists them")
    if args.action == "show" and len(args.ids) > 1:
        raise ConfigError("jobs show takes one id")
    if args.action == "purge" and args.status is None and args.older_than is None:
        raise ConfigError("jobs purge needs --older-than or --status, because it deletes every job that they choose")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit must be at least 1 (got {args.limit})")


def _storage(args: argparse.Namespace) -> str:
    """The storage of the endpoint.

    Raises:
        ConfigError: it is a folder that does not exist, which a new store would make.
    """
    from pia_ray import storage

    uri: str = args.storage or ServeConfig.model_fields["storage"].default
    if not storage.is_s3(uri) and not storage.local_path(uri).is_dir():
        raise ConfigError(f"there is no folder {uri}: give the endpoint's own --storage")
    return uri


def _chosen(jobs: JobStore, args: argparse.Namespace) -> Iterator[VideoJob]:
    """The jobs that the flags choose, the newest first. A job is as old as its end, or its creation until it ends."""
    owner = owner_of_hash(bytes.fromhex(args.owner)) if re.fullmatch("[0-9a-f]{64}", args.owner or "") else args.owner
    now = jobs.now()
    before = math.inf if args.older_than is None else now - args.older_than
    after = -math.inf if args.newer_than is None else now - args.newer_than
    for job in jobs.each(owner=owner, created_before=before):
        at = job.completed_at or job.created_at
        if at < before and at > after and args.status in (None, _status(job)):
            yield job


def _list(jobs: JobStore, args: argparse.Namespace) -> int:
    from pia_ray.cli.console import make_console, show_table

    limit = 100 if args.limit is None else args.limit
    some = list(islice(_chosen(jobs, args), limit + 1))
    found = some[:limit]
    if args.json:
        for job in found:
            print(job.model_dump_json())
        return 0
    now, console = jobs.now(), make_console()
    rows = [
        (
            job.id,
            _progress(job),
            duration(max(0.0, now - (job.completed_at or job.created_at))),
            job.owner,
            _reason(job),
        )
        for job in found
    ]
    if rows:
        show_table(console, ("id", "status", "age", "owner", "error"), rows)
    more = f", and more: --limit {10 * limit} lists them" if len(some) > limit else ""
    console.print(f"{count_of(len(found), 'job')}{more}", highlight=False)
    return 0


def _show(jobs: JobStore, args: argparse.Namespace) -> int:
    from pia_ray.cli.console import make_console, show_lines

    job = jobs.find(args.ids[0])
    if args.json:
        print(job.model_dump_json())
    else:
        show_lines(make_console(), _lines(job))
    return 0


def _lines(job: VideoJob) -> list[str]:
    """A job as lines: status, error, attempts and times."""
    facts = {
        "status": _progress(job),
        "error": _reason(job),
        "owner": job.owner,
        "model": job.model,
        "prompt": job.prompt,
        "size": f"{job.size}, {job.seconds} s, {job.format}",
        "batch": job.batch_id,
        "attempts": f"{job.attempt}" + (f", queued again {count_of(job.retries, 'time')}" if job.retries else ""),
        "claimed by": job.lease_owner and f"{job.lease_owner} until {_time(job.lease_until)}",
        "created": _time(job.created_at),
        "started": job.started_at and f"{_time(job.started_at)}, after {duration(job.started_at - job.created_at)}",
        "ended": job.completed_at and f"{_time(job.completed_at)}, after {duration(job.completed_at - job.created_at)}",
        "expires": job.expires_at and _time(job.expires_at),
        "engine time": job.result and duration(job.result.total_gpu_s),
        "video": job.result and job.result.video_uri,
        "webhook": job.webhook_url and _webhook(job),
    }
    return [job.id, *(f"  {name:<12}{value}" for name, value in facts.items() if value)]


def _webhook(job: VideoJob) -> str:
    """The delivery of a job's webhook. Of its URL the host alone, as the rest may be a secret."""
    words = [job.webhook_state, f"to {urlsplit(job.webhook_url or '').hostname}"]
    if job.webhook_attempts:
        words.append(count_of(job.webhook_attempts, "attempt"))
        words += [f"answer {job.webhook_status}"] * (job.webhook_status is not None)
        words += [job.webhook_error] if job.webhook_error else []
    if job.webhook_state == "pending":
        words.append(f"next at {_time(max(job.not_before, job.completed_at or 0.0))}")
    return ", ".join(words)


def _status(job: VideoJob) -> str:
    return "cancelled" if job.cancelled else job.status


def _progress(job: VideoJob) -> str:
    return f"{_status(job)} {job.progress}%" if job.status == "in_progress" else _status(job)


def _reason(job: VideoJob) -> str:
    return "" if job.error is None or job.cancelled else f"{job.error.code}: {job.error.message}"


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _cancelled(jobs: JobStore, job_id: str) -> VideoJob:
    return jobs.cancel(jobs.find(job_id).owner, job_id)


def _change(ids: list[str], change: Callable[[str], str]) -> int:
    """Changes each of the jobs, and goes on behind one that cannot be changed."""
    has_failed = False
    for job_id in ids:
        try:
            print(change(job_id))
        except (JobConflict, JobNotFound) as error:
            print(f"pia-ray: {error.message}", file=sys.stderr)
            has_failed = True
    return 1 if has_failed else 0


def _purge(jobs: JobStore, args: argparse.Namespace) -> int:
    if args.status in ("queued", "in_progress"):
        raise ConfigError("jobs purge deletes jobs that have ended: cancel the others first")
    num_jobs = 0
    for job in _chosen(jobs, args):
        if not job.ended:
            continue
        if not args.dry_run:
            try:
                jobs.purge(job)
            except (JobConflict, JobNotFound):  # queued again or deleted since it was read
                continue
        print(f"{job.id} {_status(job)}")
        num_jobs += 1
    print(f"{count_of(num_jobs, 'job')} {'would be deleted' if args.dry_run else 'deleted'}")
    return 0
