"""A `ModelConfig` -> verified local folders, fetched once per node and usable offline; the version of its weights.

Owns huggingface_hub. Loads nothing: that is left to `pia_ray.pia.assemble`.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import huggingface_hub
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pia_ray import storage
from pia_ray.checkpoint import PICKLED_SUFFIXES, Part, Role, digest, verify
from pia_ray.config import ModelConfig
from pia_ray.errors import StorageError, WeightsError

log = logging.getLogger(__name__)

EMBEDDED: Final = "embedded"
"""The `base` that means the model inside the package."""

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The base class comes from httpx or its successor, by version of huggingface_hub; this module need not know which.
_HTTP_ERROR: Final[type[Exception]] = HfHubHTTPError.__bases__[0]
_HUB_ERRORS: Final = (_HTTP_ERROR, OSError, ValueError)


@dataclass(frozen=True)
class LocalWeights:
    """Verified folders in diffusers layout on this machine."""

    base: Path
    motion_adapter: Path | None
    """None where the base's own UNet has motion modules."""
    vae: Path | None
    """None where the base's own VAE is used."""
    version: str
    """As `version` gives it."""


def resolve(model: ModelConfig) -> LocalWeights:
    """The model's folders on this machine; what is not here yet is fetched, once however many processes ask.

    What is in the hub's cache is used without network. Where a branch must mean the same on all nodes, `pin` first.

    Raises:
        WeightsError: a part cannot be found, fetched or used; says what to do.
    """
    return _collect(model, refresh=False)


def pull(model: ModelConfig) -> LocalWeights:
    """As `resolve`, but asks the hub whether a branch or tag has moved; unreachable, it keeps what the cache has.

    Raises:
        WeightsError: as `resolve`.
    """
    return _collect(model, refresh=True)


def is_pulled(model: ModelConfig) -> bool:
    """Whether all parts are on this machine, complete and of an allowed kind. Asks no hub; lists s3:// prefixes."""
    try:
        for part in _parts(model):
            if storage.is_s3(part.reference):
                if not _cache_folder(_list_s3(part)[0]).is_dir():
                    return False
            elif _is_hub(part):
                _cached(part)
            else:
                verify(part, _local_folder(part))
    except WeightsError:
        return False
    return True


def version(model: ModelConfig) -> str:
    """Short identity of the weights for work keys and results: the model's name and 12 hex digits per part.

    The digits are a hub commit, or the digest of the files that count: of their contents in local folders, of their
    ETags in S3. Fetches no weights.

    Raises:
        WeightsError: a part cannot be found or used.
    """
    return _version(model, [_identity(part) for part in _parts(model)])


def pin(model: ModelConfig) -> ModelConfig:
    """The same model as all nodes must load it: hub revisions become the commits they mean now, folders absolute.

    Raises:
        WeightsError: a hub id cannot be looked up.
    """
    commits: dict[str, Any] = {}
    for part in _parts(model):
        if _is_hub(part):
            commits["revision" if part.role == "base" else f"{part.role}_revision"] = _identity(part)
        elif part.reference != EMBEDDED and not storage.is_s3(part.reference):
            # Elsewhere a relative folder may not be there, and would then count as a hub id.
            commits[part.role] = str(_local_folder(part).absolute())
    return model.model_copy(update=commits)


def _parts(model: ModelConfig) -> list[Part]:
    parts = [Part("base", model.base, model.revision, model.vae is None, model.allow_pickle)]
    if model.motion_adapter is not None:
        adapter = (model.motion_adapter, model.motion_adapter_revision)
        parts.append(Part("motion_adapter", *adapter, False, model.allow_pickle))
    if model.vae is not None:
        parts.append(Part("vae", model.vae, model.vae_revision, False, model.allow_pickle))
    return parts


def _collect(model: ModelConfig, *, refresh: bool) -> LocalWeights:
    folders: dict[Role, Path] = {}
    identities = []
    for part in _parts(model):
        if storage.is_s3(part.reference):
            folder, identity = _fetch_s3(part)
        elif _is_hub(part):
            folder = _fetch_hub(part, refresh=refresh)
            identity = folder.name
        else:
            folder = _local_folder(part)
            identity = digest(folder, verify(part, folder))
        folders[part.role] = folder
        identities.append(identity)
    return LocalWeights(
        base=folders["base"],
        motion_adapter=folders.get("motion_adapter"),
        vae=folders.get("vae"),
        version=_version(model, identities),
    )


def _version(model: ModelConfig, identities: Iterable[str]) -> str:
    return f"{model.name}@{'+'.join(identity[:12] for identity in identities)}"


def _identity(part: Part) -> str:
    if storage.is_s3(part.reference):
        return _list_s3(part)[0]
    if not _is_hub(part):
        folder = _local_folder(part)
        return digest(folder, verify(part, folder))
    if part.revision is not None and _COMMIT.fullmatch(part.revision):
        return part.revision
    try:
        return _cached(part).name
    except WeightsError:
        pass
    try:
        commit = huggingface_hub.HfApi().model_info(part.reference, revision=part.revision).sha
    except _HUB_ERRORS as error:
        raise _hub_error(error, part) from None
    if commit is None:
        raise WeightsError(f"the hub names no commit for {part.reference}: give its revision")
    return commit


# Local folders.


def _local_folder(part: Part) -> Path:
    if part.reference == EMBEDDED:
        folder = Path(str(files("pia_ray"))) / "demo" / "model"
        if not folder.is_dir():
            raise WeightsError(f"the embedded model is missing from {folder}: install pia-ray again")
        return folder
    folder = Path(part.reference).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix.lower() in PICKLED_SUFFIXES:
        raise WeightsError(
            f"{part.role} {part.reference} is a pickled checkpoint, and opening one can run any code. Convert it to "
            "safetensors in diffusers layout (diffusers' scripts do that) and give the folder."
        )
    if folder.suffix.lower() == ".safetensors":
        raise WeightsError(
            f"{part.role} {part.reference} is a single file: give a folder in diffusers layout. "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) makes one."
        )
    raise WeightsError(f"there is no folder {part.reference} for {part.role}, and it is no hub id (OWNER/NAME)")


# The hub.


def _is_hub(part: Part) -> bool:
    known = part.reference == EMBEDDED or storage.is_s3(part.reference)
    if known or Path(part.reference).expanduser().is_dir():
        return False
    suffix = Path(part.reference).suffix.lower()
    return _HUB_ID.fullmatch(part.reference) is not None and suffix not in (*PICKLED_SUFFIXES, ".safetensors")


def _cached(part: Part) -> Path:
    """The complete snapshot in the hub's cache, without network."""
    return _snapshot(part, offline=True)


def _fetch_hub(part: Part, *, refresh: bool) -> Path:
    if not refresh:
        try:
            return _cached(part)
        except WeightsError:
            log.info("fetching %s %s from the hub", part.role, part.reference)
    return _snapshot(part, offline=False)


def _snapshot(part: Part, *, offline: bool) -> Path:
    # Pickled files are asked for only where there are no others: most repositories hold both, at twice the bytes.
    for pickled in (False, True) if part.allow_pickle else (False,):
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    part.reference,
                    revision=part.revision,
                    allow_patterns=part.patterns(pickled=pickled),
                    local_files_only=offline,
                )
            )
        except _HUB_ERRORS as error:
            raise _hub_error(error, part) from None
        try:
            if not folder.is_dir():
                raise WeightsError(f"{part.reference} on the hub holds none of the files of a {part.role}")
            verify(part, folder)
        except WeightsError:
            if pickled or not part.allow_pickle:
                raise
        else:
            return folder
    raise AssertionError("unreachable")


def _hub_error(error: Exception, part: Part) -> WeightsError:
    name = f"{part.role} {part.reference}" + (f" at revision {part.revision}" if part.revision else "")
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
        isinstance(error, _HTTP_ERROR) and not isinstance(error, HfHubHTTPError)
    ):
        return WeightsError(
            f"{name} is not (fully) in the hub's cache here, and the hub cannot be reached. Check the network and "
            "HF_HUB_OFFLINE, or run `pia-ray models pull` where there is a network and copy the cache."
        )
    text = str(error).strip().split("\n")[0]
    return WeightsError(f"{name} cannot be fetched from the hub: {type(error).__name__}: {text}")


# S3.


def _list_s3(part: Part) -> tuple[str, dict[str, str]]:
    """The digest of the prefix's names, sizes and ETags, and the URI of each file that counts by its relative name."""
    prefix = part.reference.rstrip("/") + "/"
    patterns = part.patterns(pickled=part.allow_pickle)
    uris: dict[str, str] = {}
    lines = []
    try:
        for found in storage.list_objects(prefix):
            name = found.uri.removeprefix(prefix)
            if ".." not in name.split("/") and any(fnmatchcase(name, pattern) for pattern in patterns):
                uris[name] = found.uri
                lines.append(f"{name}\0{found.size_bytes}\0{found.etag}\n")
    except StorageError as error:
        raise WeightsError(f"{part.role}: {error.message}") from None
    if not uris:
        raise WeightsError(f"there is no {part.role} in diffusers layout below {prefix}")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest(), uris


def _cache_folder(identity: str) -> Path:
    return Path(HF_HOME) / "pia-ray" / "weights" / identity[:32]


def _fetch_s3(part: Part) -> tuple[Path, str]:
    identity, uris = _list_s3(part)
    folder = _cache_folder(identity)
    if folder.is_dir():
        verify(part, folder)
        return folder, identity
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process fetched it while this one waited
            verify(part, folder)
            return folder, identity
        for leftover in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that died; the lock is ours now
            shutil.rmtree(leftover)
        log.info("fetching %s %s, %d files", part.role, part.reference, len(uris))
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
        try:
            for name, uri in uris.items():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                storage.copy_to_file(uri, unfinished / name)
            verify(part, unfinished)
        except StorageError as error:
            raise WeightsError(f"{part.role}: {error.message}") from None
        except WeightsError as error:
            raise WeightsError(error.message.replace(str(unfinished), part.reference.rstrip("/"))) from None
        else:
            unfinished.chmod(0o755)  # mkdtemp's is for its owner alone; other users of the node read the cache too
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder, identity
