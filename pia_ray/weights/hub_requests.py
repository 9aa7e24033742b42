"""Requests to the Hugging Face hub for parts of a model, and its errors in words. Imported by those that send one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import httpx2
import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from pia_ray.errors import HubUnavailable, WeightsError
from pia_ray.weights.checkpoint import Part, verify
from pia_ray.weights.transfers import TRANSFERS

_HUB_ERRORS: Final = (httpx2.HTTPError, OSError, ValueError)


class CountedBar(tqdm):
    """The hub's own progress bar, which also counts, whether it is shown or not."""

    def __init__(self, *args: Any, **how: Any) -> None:
        # Of a snapshot there are two bars of bytes: as they come over the network, and as they are put together.
        counts = how.get("unit") == "B" and not str(how.get("name") or "").endswith(".transfer")
        self.num_bytes = how.get("initial") or 0
        super().__init__(*args, **how)  # type: ignore[no-untyped-call]
        if counts:
            TRANSFERS.begin(self)

    def update(self, n: float | None = 1) -> Any:
        """As tqdm's, which does nothing where the bar is not shown."""
        self.num_bytes += n or 0
        return super().update(n)


def newest(part: Part, *, repository: str) -> str | None:
    """The commit that the part's revision means on the hub now.

    Raises:
        WeightsError: as `hub.commit`.
    """
    try:
        return huggingface_hub.HfApi().model_info(repository, revision=part.revision).sha
    except _HUB_ERRORS as error:
        raise _hub_error(error, part) from None


def file(part: Part, *, repository: str, name: str, offline: bool) -> Path:
    """The one file in the hub's cache; offline, nothing is fetched.

    Raises:
        WeightsError: as `hub.fetch`.
    """
    try:
        path = Path(
            huggingface_hub.hf_hub_download(
                repository, name, revision=part.revision, local_files_only=offline, tqdm_class=CountedBar
            )
        )
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _hub_error(error, part) from None
        raise WeightsError(f"{part.label}: {repository} on the hub holds no file {name}") from None
    except _HUB_ERRORS as error:
        raise _hub_error(error, part) from None
    verify(part, path)
    return path


def snapshot(part: Part, *, repository: str, inside: str, offline: bool) -> Path:
    """The snapshot, or the folder in one, in the hub's cache; offline, nothing is fetched.

    Raises:
        WeightsError: as `hub.fetch`.
    """
    prefix = f"{inside}/" if inside else ""
    # The next format is asked for only where the one before is missing. Many repositories hold all, at twice the bytes.
    for number, last in enumerate(part.formats, start=1):
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository,
                    revision=part.revision,
                    allow_patterns=[prefix + name for name in part.patterns(part.formats[:number])],
                    local_files_only=offline,
                    tqdm_class=CountedBar,
                )
            )
            folder /= inside
        except _HUB_ERRORS as error:
            raise _hub_error(error, part) from None
        try:
            if not folder.is_dir():
                raise WeightsError(f"{part.reference} on the hub holds none of the files of a {part.label}")
            verify(part, folder)
        except WeightsError:
            if last == part.formats[-1]:
                raise
        else:
            return folder
    raise AssertionError("unreachable")


def _hub_error(error: Exception, part: Part) -> WeightsError:
    name = f"{part.label} {part.reference}" + (f" at revision {part.revision}" if part.revision else "")
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"{name} is gated: accept its terms on the hub's page, then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return WeightsError(
            f"{name}: there is no such model on the hub, nor a folder of that name here. Check the id; "
            "a private model needs `hf auth login` or HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return WeightsError(f"{name}: the hub has the model, but not that revision")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError) or (
        isinstance(error, httpx2.HTTPError) and not isinstance(error, HfHubHTTPError)
    ):
        return WeightsError(
            f"{name} is not (fully) in the hub's cache here, and the hub cannot be reached. Check the network and "
            "HF_HUB_OFFLINE, or run `pia-ray models pull` where there is a network and copy the cache."
        )
    text = str(error).strip().split("\n")[0]
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (408, 429, 500, 502, 503, 504):
        return HubUnavailable(f"{name} cannot be fetched from the hub now: {text}")
    return WeightsError(f"{name} cannot be fetched from the hub: {type(error).__name__}: {text}")
