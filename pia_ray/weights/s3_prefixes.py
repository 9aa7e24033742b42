"""Parts of a model on S3: prefixes and single objects, fetched into a cache next to the hub's, once per node."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import FileLock

from pia_ray import storage
from pia_ray.errors import StorageError, WeightsError
from pia_ray.weights.cache_folders import weights_folder
from pia_ray.weights.checkpoint import Part, refuse_format, verify

log = logging.getLogger(__name__)


def look_up(part: Part) -> tuple[str, dict[str, str]]:
    """The digest of names, sizes and ETags, and the URI of each file that counts by its relative name.

    Raises:
        WeightsError: there is nothing of the part, or the store cannot be asked.
    """
    if part.is_file:
        return _look_up_file(part)
    prefix = part.reference.rstrip("/") + "/"
    try:
        objects = {found.uri.removeprefix(prefix): found for found in storage.list_objects(prefix)}
    except StorageError as error:
        raise WeightsError(f"{part.label}: {error.message}") from None
    counted = _matching(objects, part.patterns([each for each in part.formats if each != "fp16"]))
    if not any(name.endswith((".safetensors", ".bin")) for name in counted):
        counted = _matching(objects, part.patterns(part.formats))
    if not counted:
        raise WeightsError(f"there is no {part.label} in diffusers layout below {prefix}")
    lines = [f"{name}\0{objects[name].size_bytes}\0{objects[name].etag}\n" for name in counted]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest(), {name: objects[name].uri for name in counted}


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    inside = [name for name in names if ".." not in name.split("/")]
    return [name for name in inside if any(fnmatchcase(name, pattern) for pattern in patterns)]


def is_cached(part: Part) -> bool:
    """Whether the part, as the store lists it now, is on this machine.

    Raises:
        WeightsError: as `look_up`.
    """
    return weights_folder(look_up(part)[0][:32]).is_dir()


def fetch(part: Part) -> tuple[Path, str]:
    """The folder or file on this machine, fetched once however many processes ask, and its identity.

    Raises:
        WeightsError: as `look_up`, or the files are damaged.
    """
    identity, uris = look_up(part)
    folder = weights_folder(identity[:32])
    location = folder / next(iter(uris)) if part.is_file else folder
    if folder.is_dir():
        verify(part, location)
        return location, identity
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process fetched it while this one waited
            verify(part, location)
            return location, identity
        for leftover in folder.parent.glob(f"{folder.name}.part-*"):  # of a process that died; the lock is ours now
            shutil.rmtree(leftover)
        log.info("fetching %s %s, %d files", part.label, part.reference, len(uris))
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
        try:
            for name, uri in uris.items():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                storage.copy_to_file(uri, unfinished / name)
            verify(part, unfinished / location.relative_to(folder))
        except StorageError as error:
            raise WeightsError(f"{part.label}: {error.message}") from None
        except WeightsError as error:
            shown = part.reference.rstrip("/")
            shown = shown.rpartition("/")[0] if part.is_file else shown
            raise WeightsError(error.message.replace(str(unfinished), shown)) from None
        else:
            unfinished.chmod(0o755)  # mkdtemp's is for its owner alone; other users of the node read the cache too
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return location, identity


def _look_up_file(part: Part) -> tuple[str, dict[str, str]]:
    refuse_format(part)
    name = part.reference.rpartition("/")[2]
    try:
        found = storage.head(part.reference)
    except StorageError as error:
        raise WeightsError(f"{part.label}: {error.message}") from None
    if found is None:
        raise WeightsError(f"there is no {part.reference} for {part.label}")
    line = f"{name}\0{found.size_bytes}\0{found.etag}\n"
    return hashlib.sha256(line.encode()).hexdigest(), {name: part.reference}
