"""Parts of a model on the Hugging Face hub: snapshots of repositories, single files, and the commits they mean.

Owns huggingface_hub together with `pia_ray.weights`.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Final

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

from pia_ray import storage
from pia_ray.errors import HubUnavailable, WeightsError
from pia_ray.weights.checkpoint import JUDGES, Part, refuse_format, verify
from pia_ray.weights.transfers import CountedBar

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_PATH = re.compile(rf"{_HUB_ID.pattern}(/[\w][^/]*)+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ERRORS: Final = (httpx2.HTTPError, OSError, ValueError)


def is_hub(part: Part) -> bool:
    """Whether the reference is of the hub: OWNER/NAME, or a path in it, and nothing of that name is here."""
    if storage.is_s3(part.reference) or storage.expanded(part.reference).exists():
        return False
    if not part.is_file and _HUB_ID.fullmatch(part.reference) is not None:
        return True
    # Image encoders lie in a folder next to the adapters that they were trained with.
    in_folder = part.is_file or part.role in ("image_encoder", *JUDGES)
    return in_folder and _HUB_PATH.fullmatch(part.reference) is not None


def cached(part: Part) -> Path:
    """The complete snapshot, or the one file, in the hub's cache, without network.

    Raises:
        WeightsError: it is not there, or not whole.
    """
    return _get(part, offline=True)


def fetch(part: Part, *, refresh: bool) -> Path:
    """As `cached`, fetching what is missing; `refresh` asks whether a branch or tag has moved.

    Raises:
        WeightsError: it cannot be fetched or used.
    """
    if not refresh:
        try:
            return cached(part)
        except WeightsError:
            log.info("fetching %s %s from the hub", part.label, part.reference)
    return _get(part, offline=False)


def commit(part: Part) -> str:
    """The commit that the part's revision means now: of the cache if it is there, else of the hub.

    Raises:
        WeightsError: the hub cannot be asked or has no such model.
    """
    if part.revision is not None and _COMMIT.fullmatch(part.revision):
        return part.revision
    try:
        return commit_of(part, cached(part))
    except WeightsError:
        pass
    repository, _ = _repository(part)
    # Waits only for a hub that answers: without a network, or offline, no patience helps.
    found = storage.waited_out(lambda: _newest(repository, part), has_answered=lambda: True)
    if found is None:
        raise WeightsError(f"the hub names no commit for {repository}: give its revision")
    return found


def commit_of(part: Part, location: Path) -> str:
    """The commit of what `cached` or `fetch` returned."""
    _, name = _repository(part)
    return location.parents[name.count("/")].name if name else location.name


def identity(part: Part, commit: str) -> str:
    """The parts of a version: the commit, and for one file of a repository its name."""
    _, name = _repository(part)
    return hashlib.sha256(f"{commit}\0{name}".encode()).hexdigest() if name else commit


def _newest(repository: str, part: Part) -> str | None:
    try:
        return huggingface_hub.HfApi().model_info(repository, revision=part.revision).sha
    except _HUB_ERRORS as error:
        raise _hub_error(error, part) from None


def _repository(part: Part) -> tuple[str, str]:
    """The repository, and the file's or folder's name in it or an empty string."""
    owner, name, *path = part.reference.split("/", 2)
    return f"{owner}/{name}", "".join(path)


def _get(part: Part, *, offline: bool) -> Path:
    refuse_format(part)
    return _file(part, offline=offline) if part.is_file else _snapshot(part, offline=offline)


def _file(part: Part, *, offline: bool) -> Path:
    repository, name = _repository(part)
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


def _snapshot(part: Part, *, offline: bool) -> Path:
    repository, inside = _repository(part)
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
