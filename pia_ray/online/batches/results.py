"""The ledger and results table of a batch, with a row for each line, as those of a catalogue.

`pia-ray report` and `pia-ray gallery` read them. Videos stay at the URIs of their jobs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pia_ray import ledger
from pia_ray.config.knobs import AnimationParams
from pia_ray.config.resolving import canonical, seed_from_id
from pia_ray.ledger import Ledger, RunRecord
from pia_ray.online.public_errors import PublicError
from pia_ray.online.video_jobs import VideoJob
from pia_ray.result_row import ResultRow


def row_of_job(job: VideoJob, *, batch_id: str, line: int, custom_id: str) -> dict[str, Any]:
    """The results row of a line whose job has ended, as plain JSON values."""
    of_line: dict[str, Any] = {
        "id": custom_id,
        "work_key": _work_key(batch_id, line),
        "image_uri": job.inputs["image"],
        "run_id": batch_id,
        "worker": job.id,
        "attempts": job.attempt,
        "finished_at": datetime.fromtimestamp(job.completed_at or job.created_at, UTC),
    }
    if job.error is not None:
        return _as_json(ResultRow.failed(job.error, params=_with_seed(job), model=job.model, **of_line))
    made = job.result
    assert made is not None, "a job ends with a result or an error"
    row = ResultRow.succeeded(
        video_uri=made.video_uri,
        thumbnail_uri=made.thumbnail_uri,
        poster_uri=made.poster_uri,
        params=made.params,
        width=made.width,
        height=made.height,
        size_bytes=made.size_bytes,
        sha256=made.sha256,
        model=made.model_version,
        animate_s=made.animate_s,
        gpu_s=made.gpu_s,
        judgement=made.judgement,
        accepted=made.accepted,
        take=made.take,
        takes=None if made.takes is None else canonical(list(made.takes)),
        nsfw=made.nsfw,
        **of_line,
    )
    return _as_json(row)


def row_without_job(
    error: PublicError, *, batch_id: str, line: int, custom_id: str, body: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """The results row of a line that never became a job, or whose job was deleted; `now` is the store's time."""
    prompt = body.get("prompt")
    row = ResultRow.failed(
        error,
        id=custom_id,
        work_key=_work_key(batch_id, line),
        image_uri="",
        params=None,
        prompt=prompt if isinstance(prompt, str) else None,
        model="",
        run_id=batch_id,
        worker="",
        attempts=0,
        finished_at=datetime.fromtimestamp(now, UTC),
    )
    return _as_json(row)


def write_ledger(output: str, rows: Iterable[Mapping[str, Any]], *, run: RunRecord) -> None:
    """Writes the rows as the ledger and results table of `output`. Rows that it has already count once.

    Raises:
        OutputError: the store refused.
    """
    with Ledger.open(output) as book:
        times = ((row, datetime.fromisoformat(row["finished_at"])) for row in rows)
        book.append(ledger.from_record({**row, "finished_at": time}) for row, time in times)
        book.finish(run)


def _work_key(batch_id: str, line: int) -> str:
    return hashlib.sha256(f"{batch_id}:{line}".encode()).hexdigest()


def _with_seed(job: VideoJob) -> AnimationParams:
    if job.params.seed is not None:
        return job.params
    return job.params.model_copy(update={"seed": seed_from_id(job.id)})


def _as_json(row: ResultRow) -> dict[str, Any]:
    return {**vars(row), "finished_at": row.finished_at.isoformat()}
