"""The outcome of a line of a batch: its record in the output or error file, and its row of the results table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pia_ray.errors import RowError
from pia_ray.online.batches.input_file import BatchLine
from pia_ray.online.batches.results import row_of_job, row_without_job
from pia_ray.online.batches.store import Outcome
from pia_ray.online.http import error_responses
from pia_ray.online.public_errors import PublicError, public_error
from pia_ray.online.video_jobs import VideoJob


@dataclass(frozen=True)
class Outcomes:
    """Makes the outcomes of one batch at one time."""

    batch_id: str
    now: float
    """Seconds since 1970 by the store's clock."""

    def of_job(self, line: BatchLine, job: VideoJob, *, video: Mapping[str, Any]) -> Outcome:
        """The outcome of a line whose job has ended; `video` is the video object of the job."""
        row = row_of_job(job, batch_id=self.batch_id, line=line.index, custom_id=line.custom_id)
        response = {"status_code": 200, "request_id": job.id, "body": video}
        return Outcome(line.index, self._record(line, response, job.error), row)

    def of_refusal(self, line: BatchLine, error: RowError) -> Outcome:
        """The outcome of a line of which no job can be made."""
        response = {
            "status_code": error_responses.status_of(error),
            "request_id": self._request_id(line),
            "body": error_responses.body_of(error),
        }
        return Outcome(line.index, self._record(line, response, None), self._row(line, public_error(error)))

    def given_up(self, line: BatchLine, error: PublicError) -> Outcome:
        """The outcome of a line that was not made before the batch ended with that error."""
        return replace(self.of_deleted(line, error), is_given_up=True)

    def of_deleted(self, line: BatchLine, error: PublicError) -> Outcome:
        """The outcome of a line whose job is gone."""
        return Outcome(line.index, self._record(line, None, error), self._row(line, error))

    def _record(
        self, line: BatchLine, response: Mapping[str, Any] | None, error: PublicError | None
    ) -> Mapping[str, Any]:
        return {
            "id": self._request_id(line),
            "custom_id": line.custom_id,
            "response": response,
            "error": None if error is None else {"code": error.code, "message": error.message},
        }

    def _row(self, line: BatchLine, error: PublicError) -> Mapping[str, Any]:
        return row_without_job(
            error, batch_id=self.batch_id, line=line.index, custom_id=line.custom_id, body=line.body, now=self.now
        )

    def _request_id(self, line: BatchLine) -> str:
        return f"batch_req_{self.batch_id.removeprefix('batch_')}_{line.index}"
