"""A model's verified parts, copied to a folder or s3:// prefix of one's own, for a cluster without the hub.

One folder per role, and per name where there are several; `model.yaml` is written last and says that all is there.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pia_ray import storage
from pia_ray.errors import StorageNotFound, WeightsError
from pia_ray.weights.checkpoint import PICKLED_SUFFIXES, Part, verify

MODEL_FILE: Final = "model.yaml"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A part and the folder or file of it on this machine."""

    part: Part
    location: Path


def references(sources: Sequence[Source], uri: str) -> dict[str, Any]:
    """The settings of a model whose parts are below `uri`, without hub revisions."""
    changes: dict[str, Any] = {}
    for source in sources:
        part = source.part
        if part.name:
            changes.setdefault(f"{part.role}s", {})[part.name] = _reference(source, uri)
            continue
        changes[part.role] = _reference(source, uri)
        changes["revision" if part.role == "base" else f"{part.role}_revision"] = None
    return changes


def write(sources: Sequence[Source], uri: str, *, settings: str, version: str) -> None:
    """Copies the files that count, holds their sizes against the originals', and writes the settings; nothing where a
    copy of that version is whole.

    Raises:
        WeightsError: files of another model lie there that would count, or a file came out different.
        StorageError: the folder or prefix cannot be written or read.
    """
    files = {target: path for source in sources for target, path in _files(source, uri).items()}
    text = f"# {version}\n{settings}".encode()
    if _is_whole(files, uri, text):
        log.info("%s is already in %s", version, uri)
        return
    if strays := _strays(sources, files, uri):
        raise WeightsError(f"{strays[0]} is of another model and would count: remove it, or copy to another folder")
    storage.delete(storage.join(uri, MODEL_FILE))  # of what lies there from now on it would not be true
    for target, path in files.items():
        log.info("copying %s, %d bytes", target, path.stat().st_size)
        storage.upload_file(path, target)
    if wrong := _different(files, uri):
        raise WeightsError(f"{wrong[0]} is not as it was written: copy the model again")
    storage.write_bytes(storage.join(uri, MODEL_FILE), text, content_type="application/yaml")


def _is_whole(files: Mapping[str, Path], uri: str, text: bytes) -> bool:
    try:
        before = storage.read_bytes(storage.join(uri, MODEL_FILE))
    except StorageNotFound:
        return False
    return before == text and not _different(files, uri)


def _different(files: Mapping[str, Path], uri: str) -> list[str]:
    sizes = {found.uri: found.size_bytes for found in storage.list_objects(uri)}
    return [target for target, path in files.items() if sizes.get(target) != path.stat().st_size]


def _strays(sources: Sequence[Source], files: Mapping[str, Path], uri: str) -> list[str]:
    """Files of an earlier copy in the parts' folders that this one does not replace."""
    folders = tuple(f"{_folder(source.part, uri)}/" for source in sources if not source.part.is_file)
    count = (".safetensors", ".json", ".txt", *PICKLED_SUFFIXES)
    names = (found.uri for found in storage.list_objects(uri))
    return [name for name in names if name not in files and name.startswith(folders) and name.endswith(count)]


def _files(source: Source, uri: str) -> dict[str, Path]:
    """The part's files on this machine by where they go."""
    folder = _folder(source.part, uri)
    if source.part.is_file:
        return {storage.join(folder, source.location.name): source.location}
    paths = verify(source.part, source.location)
    if (index := source.location / "model_index.json").is_file() and source.part.role == "base":
        paths.append(index)  # not read here; makes the copy one that diffusers itself loads
    return {storage.join(folder, path.relative_to(source.location).as_posix()): path for path in paths}


def _reference(source: Source, uri: str) -> str:
    folder = _folder(source.part, uri)
    return storage.join(folder, source.location.name) if source.part.is_file else folder


def _folder(part: Part, uri: str) -> str:
    if not part.name:
        return storage.join(uri, part.role)
    # A token may be any word, and not every word is a folder's name.
    plain = re.fullmatch(r"[\w-][\w.-]*", part.name) is not None
    return storage.join(
        uri, f"{part.role}s", part.name if plain else hashlib.sha256(part.name.encode()).hexdigest()[:12]
    )
