"""What a batch leaves beside its files: the ledger and results table of a catalogue, a row for each line.

So `pia-ray report` and `pia-ray gallery` work on a batch as on a catalogue. Videos stay where their jobs put them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pia_ray import ledger, manifest
from pia_ray.config.resolving import seed_from_id
from pia_ray.ledger import Ledger, RunRecord
from pia_ray.online.video_jobs import VideoJob
from pia_ray.types import ResultRow


def row_of_job(job: VideoJob, *, batch_id: str, line: int, custom_id: str) -> dict[str, Any]:
    """The results row of a line whose job has ended, as plain JSON values."""
    made, error = job.result, job.error
    params = job.params if made is None else made.params
    row = ResultRow(
        id=custom_id,
        video_index=0,
        status="succeeded" if error is None else "failed",
        error_code=None if error is None else error.code,
        error_message=None if error is None else error.message,
        retryable=None if error is None else error.code == "cancelled",
        attempts=job.attempt,
        video_uri=None if made is None else made.video_uri,
        thumbnail_uri=None if made is None else made.thumbnail_uri,
        input_thumbnail_uri=None,
        image_uri=job.inputs["image"],
        prompt=params.prompt,
        seed=seed_from_id(job.id) if params.seed is None else params.seed,
        width=None if made is None else made.width,
        height=None if made is None else made.height,
        num_frames=None if made is None else made.num_frames,
        fps=None if made is None else made.fps,
        duration_s=None if made is None else made.num_frames / made.fps,
        size_bytes=None if made is None else made.size_bytes,
        sha256=None if made is None else made.sha256,
        input_sha256=None,
        original_width=None,
        original_height=None,
        params=manifest.canonical_params(params),
        work_key=_work_key(batch_id, line),
        model=job.model if made is None else made.model_version,
        run_id=batch_id,
        worker=job.id,
        fetch_s=None,
        animate_s=None if made is None else made.animate_s,
        publish_s=None,
        gpu_s=None if made is None else made.gpu_s,
        motion=None if made is None else made.motion,
        finished_at=datetime.fromtimestamp(job.completed_at or job.created_at, UTC),
    )
    return {**vars(row), "finished_at": row.finished_at.isoformat()}


def row_without_job(
    *, batch_id: str, line: int, custom_id: str, body: Mapping[str, Any], code: str, message: str
) -> dict[str, Any]:
    """The results row of a line that never became a job, or whose job is gone."""
    prompt = body.get("prompt")
    row = dict.fromkeys(ledger.RESULTS_SCHEMA.names)
    return row | {
        "id": custom_id,
        "video_index": 0,
        "status": "failed",
        "error_code": code,
        "error_message": message,
        "retryable": code.startswith("batch_"),
        "attempts": 0,
        "image_uri": "",
        "prompt": prompt if isinstance(prompt, str) else None,
        "seed": seed_from_id(custom_id),
        "params": json.dumps({"prompt": prompt} if isinstance(prompt, str) else {}),
        "work_key": _work_key(batch_id, line),
        "model": "",
        "run_id": batch_id,
        "worker": "",
        "finished_at": datetime.now(UTC).isoformat(),
    }


def write_ledger(output: str, rows: Iterable[Mapping[str, Any]], *, run: RunRecord) -> None:
    """Writes the rows as the ledger of `output`, and its results table. Rows that are there already count once.

    Raises:
        OutputError: the store refused.
    """
    with Ledger.open(output) as book:
        times = ((row, datetime.fromisoformat(row["finished_at"])) for row in rows)
        book.append(ledger.from_record({**row, "finished_at": time}) for row, time in times)
        book.finish(run)


def _work_key(batch_id: str, line: int) -> str:
    return hashlib.sha256(f"{batch_id}:{line}".encode()).hexdigest()
