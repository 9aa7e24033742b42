"""A `ModelConfig` -> verified local folders and files, fetched once per node and usable offline; their version.

Owns huggingface_hub. Loads nothing: that is left to `pia_ray.pia.loading.load`. The parts are `hub`, `prefixes` (S3)
and `copies`, which puts a model where a whole cluster reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from pia_ray import storage
from pia_ray.config.added_weights import UPSCALED_BY
from pia_ray.config.model import ModelConfig, model_file
from pia_ray.errors import WeightsError
from pia_ray.weights import copies, hub, s3_prefixes
from pia_ray.weights.checkpoint import FILE_NAMES, JUDGES, Part, digest, refuse_format, start_digests, verify

MODEL_FILE: Final = copies.MODEL_FILE
"""Name of the settings file of a `copy`."""

EMBEDDED: Final = "embedded"
"""The `base` that means the model inside the package."""

FULL_SIZE_BYTES: Final = 1_000_000_000
"""The UNet of Stable Diffusion 1.5 alone takes 1.7 GB in half precision."""

_NOT_IN_VERSION: Final = (*JUDGES, "upscaler")
"""Roles of parts that change none of the model's frames."""


@dataclass(frozen=True)
class LocalWeights:
    """Verified folders in diffusers layout, and single files, on this machine."""

    base: Path
    """A folder, or a single file."""
    motion_adapter: Path | None
    """None where the base's own UNet has motion modules."""
    vae: Path | None
    """A folder or a single file; None where the base's own VAE is used."""
    version: str
    """As `version` gives it."""
    config: Path | None = None
    """Folder with configs and tokenizer; set where base or VAE is a single file, which has none."""
    loras: Mapping[str, Path] = field(default_factory=dict)
    """File of each LoRA by name."""
    textual_inversions: Mapping[str, Path] = field(default_factory=dict)
    """File of each textual inversion by token."""
    ip_adapter: Path | None = None
    """A file; None where the model has no IP-Adapter."""
    image_encoder: Path | None = None
    """None where the model has none."""
    scorer: Path | None = None
    safety_checker: Path | None = None
    """A folder in transformers' layout; None where the model has none."""
    upscaler: Path | None = None
    """A file; None where the model has none."""


def resolve(model: ModelConfig) -> LocalWeights:
    """The model's folders and files on this machine; what is not here yet is fetched, once however many processes ask.

    What is in the hub's cache is used without network. Where a branch must mean the same on all nodes, `pin` first.

    Raises:
        WeightsError: a part cannot be found, fetched or used; says what to do.
    """
    return _collect(model, refresh=False)


def resolve_scorer(reference: str, *, revision: str | None = None) -> Path:
    """The folder of a scorer on this machine, fetched as `resolve` does; for a judge without a model.

    Raises:
        WeightsError: as `resolve`.
    """
    return _found(Part("scorer", reference, revision), refresh=False)[0]


def fetch(model: ModelConfig) -> None:
    """Fetches what is not on this machine yet, and refuses what cannot be used. `resolve` then needs no network.

    The digests of local files, which `resolve` waits for, begin on threads.

    Raises:
        WeightsError: as `resolve`.
    """
    for part in _parts(model):
        if storage.is_s3(part.reference):
            s3_prefixes.fetch(part)
        elif hub.is_hub(part):
            hub.fetch(part, refresh=False)
        else:
            start_digests(verify(part, _local(part)))


def is_full_size(model: ModelConfig) -> bool:
    """Whether the base has a gigabyte or more, as Stable Diffusion has; those of the hub and of S3 count as such."""
    base = _parts(model)[0]
    if base.reference == EMBEDDED:
        return False
    if storage.is_s3(base.reference) or hub.is_hub(base):
        return True
    location = _local(base)
    files = [location] if location.is_file() else location.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files) >= FULL_SIZE_BYTES


def pull(model: ModelConfig) -> LocalWeights:
    """As `resolve`, but asks the hub whether a branch or tag has moved; unreachable, it keeps what the cache has.

    Raises:
        WeightsError: as `resolve`.
    """
    return _collect(model, refresh=True)


def copy(model: ModelConfig, uri: str) -> ModelConfig:
    """The same model from a folder or s3:// prefix of one's own, to which its files are copied, verified, where they
    are not there yet; asks the hub as `pull` does. `uri`/model.yaml, written last, says the model as it is there.

    Work keys follow: what was animated with the hub's copy counts as another model's.

    Raises:
        WeightsError: as `resolve`, or files of another model lie there.
        StorageError: the folder or prefix cannot be written or read.
    """
    if not storage.is_s3(uri):
        uri = str(storage.local_path(uri).absolute())
    if not storage.exists(storage.join(uri, MODEL_FILE)):  # a whole copy may be in a store that can only be read
        storage.check_writable(uri)
    found = _find(model, refresh=True)
    version = _version(model, [(part, identity) for part, _, identity in found])
    sources = [copies.Source(part, location) for part, location, _ in found]
    changes = copies.references(sources, uri)
    for name in ("loras", "textual_inversions"):
        named = dict(getattr(model, name))
        for key, path in changes.pop(name, {}).items():
            named[key] = named[key].model_copy(update={"path": path, "revision": None})
        changes[name] = named
    copied = model.model_copy(update=changes)
    copies.write(sources, uri, settings=model_file(copied), version=version)
    return copied


def is_pulled(model: ModelConfig) -> bool:
    """Whether all parts are on this machine, complete and of an allowed kind. Asks no hub; lists s3:// prefixes."""
    try:
        for part in _parts(model):
            if storage.is_s3(part.reference):
                if not s3_prefixes.is_cached(part):
                    return False
            elif hub.is_hub(part):
                hub.cached(part)
            else:
                verify(part, _local(part))
    except WeightsError:
        return False
    return True


def version(model: ModelConfig) -> str:
    """Short identity of the weights for work keys and results: the model's name and 12 hex digits per part.

    The digits are a hub commit, or the digest of the files that count: of their contents where they are local, of
    their ETags in S3. All LoRAs and textual inversions count as one part, with their names and weights and what
    the model's settings say of its predictions. Scorer and safety checker, which change no video, do not count; an
    upscaler does in `work_version`. Fetches no weights.

    Raises:
        WeightsError: a part cannot be found or used.
    """
    parts = [part for part in _parts(model) if part.role not in _NOT_IN_VERSION]
    _start_digests(parts)
    return _version(model, [(part, _identity(part)) for part in parts])


def work_version(model: ModelConfig) -> str:
    """The `version` for work keys, with the identity of the upscaler where the model has one.

    `without_upscaler` is that of rows that are not enlarged.

    Raises:
        WeightsError: as `version`.
    """
    plain = version(model)
    return plain if model.upscaler is None else f"{plain}{UPSCALED_BY}{_identity(_upscaler(model))[:12]}"


def pin(model: ModelConfig) -> ModelConfig:
    """The same model as all nodes must load it: hub revisions become the commits they mean now, paths absolute.

    Raises:
        WeightsError: the hub does not answer for a hub id.
    """
    pinned: dict[str, Any] = {"loras": dict(model.loras), "textual_inversions": dict(model.textual_inversions)}
    for part in _parts(model):
        changes: dict[str, str] = {}
        if hub.is_hub(part):
            changes["revision"] = hub.commit(part)
        elif part.reference != EMBEDDED and not storage.is_s3(part.reference):
            # Elsewhere a relative path may not be there, and would then count as a hub id.
            changes["path"] = str(_local(part).absolute())
        if part.name:
            named = pinned[f"{part.role}s"]
            named[part.name] = named[part.name].model_copy(update=changes)
            continue
        keys = {"path": part.role, "revision": "revision" if part.role == "base" else f"{part.role}_revision"}
        pinned.update({keys[key]: value for key, value in changes.items()})
    return model.model_copy(update=pinned)


def _parts(model: ModelConfig) -> list[Part]:
    allow, half = model.allow_pickle, model.dtype == "float16"
    parts = [Part("base", model.base, model.revision, own_vae=model.vae is None, allow_pickle=allow, half=half)]
    if model.motion_adapter is not None:
        revision = model.motion_adapter_revision
        parts.append(Part("motion_adapter", model.motion_adapter, revision, allow_pickle=allow, half=half))
    if model.vae is not None:
        parts.append(Part("vae", model.vae, model.vae_revision, allow_pickle=allow, half=half))
    if any(part.is_file for part in parts if part.role in ("base", "vae")):
        parts.append(Part("config", model.config, model.config_revision))
    for name, lora in model.loras.items():
        parts.append(Part("lora", lora.path, lora.revision, name=name, allow_pickle=allow))
    for token, inversion in model.textual_inversions.items():
        parts.append(Part("textual_inversion", inversion.path, inversion.revision, name=token, allow_pickle=allow))
    if model.ip_adapter is not None:
        parts.append(Part("ip_adapter", model.ip_adapter, model.ip_adapter_revision, allow_pickle=allow))
    if model.image_encoder is not None:
        parts.append(Part("image_encoder", model.image_encoder, model.image_encoder_revision, allow_pickle=allow))
    if model.scorer is not None:
        parts.append(Part("scorer", model.scorer, model.scorer_revision, allow_pickle=allow))
    if model.safety_checker is not None:
        parts.append(Part("safety_checker", model.safety_checker, model.safety_checker_revision, allow_pickle=allow))
    if model.upscaler is not None:
        parts.append(_upscaler(model))
    return [_as_file(part) for part in parts]


def _upscaler(model: ModelConfig) -> Part:
    """The upscaler of a model that has one.

    Raises:
        WeightsError: it is not a file.
    """
    part = Part("upscaler", str(model.upscaler), model.upscaler_revision, allow_pickle=model.allow_pickle)
    if not part.is_file:
        raise WeightsError(f"the upscaler {part.reference} is not a .safetensors or .pth file")
    return part


def _as_file(part: Part) -> Part:
    """A folder, hub id or prefix of what is always one file means the file of diffusers' name in it."""
    if part.role not in FILE_NAMES or part.is_file:
        return part
    return replace(part, reference=f"{part.reference.rstrip('/')}/{FILE_NAMES[part.role]}")


def _collect(model: ModelConfig, *, refresh: bool) -> LocalWeights:
    found = _find(model, refresh=refresh)
    locations = {(part.role, part.name): location for part, location, _ in found}
    return LocalWeights(
        base=locations["base", ""],
        motion_adapter=locations.get(("motion_adapter", "")),
        vae=locations.get(("vae", "")),
        version=_version(model, [(part, identity) for part, _, identity in found]),
        config=locations.get(("config", "")),
        loras={name: location for (role, name), location in locations.items() if role == "lora"},
        textual_inversions={
            name: location for (role, name), location in locations.items() if role == "textual_inversion"
        },
        ip_adapter=locations.get(("ip_adapter", "")),
        image_encoder=locations.get(("image_encoder", "")),
        scorer=locations.get(("scorer", "")),
        safety_checker=locations.get(("safety_checker", "")),
        upscaler=locations.get(("upscaler", "")),
    )


def _find(model: ModelConfig, *, refresh: bool) -> list[tuple[Part, Path, str]]:
    """Every part, where it is on this machine after being fetched if need be, and its identity."""
    parts = _parts(model)
    _start_digests(parts)
    return [(part, *_found(part, refresh=refresh)) for part in parts]


def _start_digests(parts: Iterable[Part]) -> None:
    """Starts the digests of the local parts, side by side; what is wrong with one is said when it has its turn."""
    for part in parts:
        with suppress(WeightsError):
            if not storage.is_s3(part.reference) and not hub.is_hub(part):
                start_digests(verify(part, _local(part)))


def _found(part: Part, *, refresh: bool) -> tuple[Path, str]:
    if storage.is_s3(part.reference):
        return s3_prefixes.fetch(part)
    if hub.is_hub(part):
        location = hub.fetch(part, refresh=refresh)
        return location, hub.identity(part, hub.commit_of(part, location))
    location = _local(part)
    return location, digest(location, verify(part, location))


def _version(model: ModelConfig, identities: Iterable[tuple[Part, str]]) -> str:
    digits, lines = [], []
    for part, identity in identities:
        if part.role in _NOT_IN_VERSION:
            continue
        if not part.name:
            digits.append(identity[:12])
            continue
        lora = model.loras[part.name] if part.role == "lora" else None
        weight, merged = (1.0, "") if lora is None else (lora.weight, "\0merged" * lora.merge)
        lines.append(f"{part.role}\0{part.name}\0{weight:g}\0{identity}{merged}\n")
    stated = {"prediction_type": model.prediction_type, "zero_snr": model.zero_snr}
    lines.extend(f"{setting}\0{value}\n" for setting, value in stated.items() if value != "auto")
    if lines:
        digits.append(hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:12])
    return f"{model.name}@{'+'.join(digits)}"


def _identity(part: Part) -> str:
    if storage.is_s3(part.reference):
        return s3_prefixes.look_up(part)[0]
    if hub.is_hub(part):
        return hub.identity(part, hub.commit(part))
    location = _local(part)
    return digest(location, verify(part, location))


def _local(part: Part) -> Path:
    if part.reference == EMBEDDED:
        folder = Path(str(files("pia_ray"))) / "demo" / "model"
        if not folder.is_dir():
            raise WeightsError(f"the embedded model is missing from {folder}: install pia-ray again")
        return folder
    refuse_format(part)
    location = storage.expanded(part.reference)
    if part.is_file:
        if not location.is_file():
            raise WeightsError(
                f"there is no file {part.reference} for {part.label}, and it is not a file of the hub (OWNER/NAME/FILE)"
            )
    elif not location.is_dir():
        raise WeightsError(f"there is no folder {part.reference} for {part.label}, and it is not a hub id (OWNER/NAME)")
    return location
