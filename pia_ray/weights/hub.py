"""Parts of a model on the Hugging Face hub: snapshots of repositories, single files, and the commits they mean.

`hub_requests` asks the hub and reads its cache. It is imported when it is needed, because it brings an HTTP client, and
a model may lie in a folder, in S3 or in the package.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from pia_ray import storage
from pia_ray.errors import WeightsError
from pia_ray.weights.checkpoint import JUDGES, Part, refuse_format

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_PATH = re.compile(rf"{_HUB_ID.pattern}(/[\w][^/]*)+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    from pia_ray.weights import hub_requests

    repository, _ = _repository(part)
    # Waits only for a hub that answers: without a network, or offline, no patience helps.
    found = storage.waited_out(lambda: hub_requests.newest(part, repository=repository), has_answered=lambda: True)
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


def _repository(part: Part) -> tuple[str, str]:
    """The repository, and the file's or folder's name in it or an empty string."""
    owner, name, *path = part.reference.split("/", 2)
    return f"{owner}/{name}", "".join(path)


def _get(part: Part, *, offline: bool) -> Path:
    refuse_format(part)
    from pia_ray.weights import hub_requests

    repository, name = _repository(part)
    if part.is_file:
        return hub_requests.file(part, repository=repository, name=name, offline=offline)
    return hub_requests.snapshot(part, repository=repository, inside=name, offline=offline)
