"""The end of a run, told to programs: `summary.json` in the output, and a post of it to the webhook `on_end`.

Neither changes how the run ends.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from pydantic import SecretStr

from pia_ray import ledger, manifest, storage
from pia_ray.catalog.progress import Progress, RunSummary
from pia_ray.config.catalog import CatalogConfig
from pia_ray.errors import ConfigError, FetchError, JobError, PiaRayError, StorageError
from pia_ray.formatting import count_of, duration
from pia_ray.webhooks import Poster

RETRY_DELAYS_S: Final = (2.0, 10.0)
"""Seconds between the tries of a post; a run that was interrupted tries once."""

log = logging.getLogger(__name__)

Summary = Mapping[str, Any]
"""The content of `summary.json`: plain JSON values."""


def summary_of_end(summary: RunSummary, config: CatalogConfig) -> Summary:
    """The summary of a run that has ended by itself, by its deadline or by a signal."""
    reasons = {"deadline": "the deadline has passed", "interrupted": "interrupted"}
    return {
        **_facts(config, summary.run_id, summary.progress, seconds=summary.seconds),
        "type": "run.finished" if summary.ending == "finished" else "run.stopped",
        "exit_code": summary.exit_code,
        "error": None,
        "reason": reasons.get(summary.ending),
        "errors": dict(summary.errors),
        "results_uri": summary.results_uri,
        "gallery_uri": summary.gallery_uri,
    }


def summary_of_trouble(
    error: BaseException, config: CatalogConfig, *, run_id: str | None, progress: Progress, seconds: float
) -> Summary:
    """The summary of a run that an error has ended; `run_id` is None before it had one."""
    exit_code = 2
    if isinstance(error, KeyboardInterrupt):
        exit_code = 130
    elif isinstance(error, JobError):
        exit_code = error.exit_code
    told = error.message if isinstance(error, PiaRayError) else f"{type(error).__name__}: {error}"
    interrupted = exit_code == 130
    return {
        **_facts(config, run_id, progress, seconds=seconds),
        "type": "run.stopped" if exit_code != 2 else "run.failed",
        "exit_code": exit_code,
        "error": None if interrupted else (error.code if isinstance(error, PiaRayError) else "unexpected"),
        "reason": "interrupted" if interrupted else told,
        "errors": dict(progress.errors),
        "results_uri": ledger.results_uri(config.output),
        "gallery_uri": None,
    }


def write_summary(output: str, summary: Summary) -> None:
    """Writes `summary.json` over that of an earlier run; only the holder of the lease may."""
    content = json.dumps(summary, indent=2).encode() + b"\n"
    try:
        storage.write_bytes(ledger.summary_uri(output), content, content_type="application/json")
    except StorageError as error:
        log.warning("summary.json could not be written: %s", error.message)


class EndPost:
    """Posts the summary of a run to its `on_end`; without one it does nothing.

    Raises:
        ConfigError: its URL or secret is not valid.
    """

    def __init__(self, config: CatalogConfig, *, retry_delays_s: Sequence[float] = RETRY_DELAYS_S) -> None:
        self._url = config.on_end
        self._retry_delays_s = tuple(retry_delays_s)
        self._poster = Poster(
            _read(config.on_end_secret),
            setting="on_end_secret",
            plain_http=bool(config.on_end_networks),
            allowed_networks=config.on_end_networks,
        )
        if self._url is not None:
            try:
                self._poster.check(self._url)
            except FetchError as error:
                raise ConfigError(f"on_end: {error.message}") from None

    def send(self, summary: Summary) -> None:
        """Posts it, with bounded retries; what goes wrong is logged."""
        if self._url is None:
            return
        body, began = json.dumps(summary).encode(), datetime.now(UTC)
        message_id = f"evt_{summary['run_id'] or f'{began:%Y%m%dT%H%M%S%f}'}"
        delays = () if summary["exit_code"] == 130 else self._retry_delays_s
        try:
            for delay_s in (*delays, None):
                try:
                    self._poster.post(self._url, body, message_id=message_id)
                except FetchError as error:
                    told = _without_path(error.message, self._url)
                    if delay_s is None or not error.retryable:
                        log.warning("on_end has not taken the run's summary: %s", told)
                        return
                    log.info("on_end, another try in %g s: %s", delay_s, told)
                    time.sleep(delay_s)
                else:
                    return
        except KeyboardInterrupt:
            log.warning("on_end is given up: interrupted")
        except Exception:
            log.exception("on_end has not taken the run's summary")


def _facts(config: CatalogConfig, run_id: str | None, progress: Progress, *, seconds: float) -> dict[str, Any]:
    done, failed = progress.num_before + progress.num_succeeded, progress.num_failed_in_all
    takes = progress.takes
    counts = f"{done} of {count_of(progress.num_items, 'video')}, {failed} failed, {progress.num_left} left"
    return {
        "run_id": run_id,
        "manifest": ", ".join(map(manifest.redacted, config.manifests)),
        "output": config.output,
        "model": config.model.name,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "num_items": progress.num_items,
        "num_succeeded": done,
        "num_failed": failed,
        "num_left": progress.num_left,
        "num_succeeded_now": progress.num_succeeded,
        "num_failed_now": progress.num_failed,
        "videos_per_hour": round(3600 * progress.videos_per_s, 3),
        "gpu_s": round(progress.gpu_s, 3),
        "busy_share": None if progress.busy_share is None else round(progress.busy_share, 4),
        **dataclasses.asdict(dataclasses.replace(takes, retake_gpu_s=round(takes.retake_gpu_s, 3))),
        "text": f"pia-ray, {config.output}: {counts}, {duration(seconds)}",
    }


def _read(secret: SecretStr | None) -> str | None:
    """The secret itself, from its file where it names one.

    Raises:
        ConfigError: the file cannot be read.
    """
    if secret is None or secret.get_secret_value().startswith("whsec_"):
        return None if secret is None else secret.get_secret_value()
    try:
        return Path(secret.get_secret_value()).read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        # Not quoted: it may be the secret itself.
        raise ConfigError(
            f"on_end_secret must begin with whsec_, or name a file that can be read ({type(error).__name__})"
        ) from None


def _without_path(message: str, url: str) -> str:
    """The message without the URL's path, by which some services know who may post."""
    path = urlsplit(url).path
    return message.replace(path, "/...") if len(path) > 1 else message
