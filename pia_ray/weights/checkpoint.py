"""A folder in diffusers layout or a single file: which files count, whether they are whole, and their digest.

Reads configs, headers and lengths only, so that a damaged or refused checkpoint is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pia_ray.errors import WeightsError
from pia_ray.weights.digests import FileDigests

Role = Literal[
    "base",
    "motion_adapter",
    "vae",
    "config",
    "lora",
    "textual_inversion",
    "ip_adapter",
    "image_encoder",
    "scorer",
    "safety_checker",
    "upscaler",
]

JUDGES: Final = ("scorer", "safety_checker")
"""Roles that measure finished frames and change none."""


Format = Literal["safetensors", "fp16", "bin"]
"""A format of weights in a folder; fp16 is the variant of diffusers' name, `model.fp16.safetensors`."""

PICKLED_SUFFIXES: Final = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
"""Endings of checkpoint files that can run code when they are opened."""

CHECKPOINT_SUFFIXES: Final = (".safetensors", *PICKLED_SUFFIXES)
"""Endings by which a reference is one file rather than a folder, hub id or prefix."""

_OTHER_FORMATS: Final = {
    ".gguf": "its quantised weights are not supported, take the .safetensors file of that model",
    ".sft": "rename it to .safetensors, which is the same format",
}

FILE_NAMES: Final[Mapping[Role, str]] = {
    "lora": "pytorch_lora_weights.safetensors",
    "textual_inversion": "learned_embeds.safetensors",
    "ip_adapter": "ip-adapter_sd15.safetensors",
}
"""Roles that are always one file, with the name it usually has: what a folder or hub id stands for."""

_LFS: Final = b"version https://git-lfs"

_JUDGE_FILES: Final = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
)
"""What a judge may have beside its weights; a tokenizer only where it reads text."""

_digests: Final = FileDigests()


@dataclass(frozen=True)
class Part:
    """One of the sources of a model."""

    role: Role
    reference: str
    revision: str | None = None
    own_vae: bool = False
    """Of the base: whether its VAE is used."""
    allow_pickle: bool = False
    half: bool = False
    """Whether it runs in float16, so that files in float16 are fetched where there are any."""
    name: str = ""
    """Of a LoRA or textual inversion: what the model calls it."""

    @property
    def label(self) -> str:
        """The part's name in messages, such as `lora pixel-art`."""
        return f"{self.role} {self.name}" if self.name else self.role

    @property
    def is_file(self) -> bool:
        """Whether the reference is one file."""
        return self.reference.lower().endswith(CHECKPOINT_SUFFIXES)

    @property
    def components(self) -> tuple[str, ...]:
        """Subfolders that hold configs, and with them weights; "" is the folder itself."""
        if self.role == "config":
            return ("unet", "text_encoder", "vae")
        if self.role != "base":
            return ("",)
        return ("unet", "text_encoder", "vae") if self.own_vae else ("unet", "text_encoder")

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats of weights that it may have; the first that is there and complete is fetched."""
        plain: tuple[Format, ...] = ("fp16", "safetensors") if self.half else ("safetensors", "fp16")
        return (*plain, "bin") if self.allow_pickle else plain

    def patterns(self, formats: Iterable[Format]) -> list[str]:
        """Names of the files that count: weights in these formats, no single-file checkpoints, no pictures."""
        whole = self.role in ("base", "config")
        names = ["model_index.json", "scheduler/scheduler_config.json"] if whole else []
        if whole:
            names += [f"tokenizer/{name}" for name in ("*.json", "merges.txt")]
        if self.role in JUDGES:
            names += _JUDGE_FILES
        for component in self.components:
            prefix = f"{component}/" if component else ""
            names.append(f"{prefix}config.json")
            if self.role == "config":
                continue
            for each in formats:
                file = f"{prefix}{_weights_name(self, component, each)}"
                stem, _, extension = file.rpartition(".")
                names += [file, f"{stem}-*.{extension}", f"{file}.index.json"]
        return names


def verify(part: Part, location: Path) -> list[Path]:
    """The files of a folder that count, sorted, or the one file; layout, configs, headers and lengths are checked.

    Raises:
        WeightsError: something is missing, damaged, or a pickled checkpoint that is refused.
    """
    if part.is_file:
        return [_verify_file(part, location)]
    if not any((location / component / "config.json").is_file() for component in part.components):
        raise _not_diffusers(part, location)
    used = []
    for component in part.components:
        used.append(_json_file(location / component / "config.json"))
        if part.role != "config":
            used += _weight_files(location / component, component, part)
    if part.role in JUDGES:
        used += [location / name for name in _JUDGE_FILES if (location / name).is_file()]
    if part.role in ("base", "config"):
        used.append(_json_file(location / "scheduler" / "scheduler_config.json"))
        tokenizer = location / "tokenizer"
        if not (tokenizer / "tokenizer.json").is_file() and not (
            (tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()
        ):
            raise WeightsError(f"no tokenizer.json, nor vocab.json and merges.txt, in {tokenizer}")
        used += [path for path in tokenizer.iterdir() if path.suffix in (".json", ".txt")]
    return sorted(used)


def refuse_format(part: Part) -> None:
    """Raises where the reference is a file that may not, or cannot, be opened.

    Raises:
        WeightsError: it is a pickled file, and the model does not allow it; or a file of another format.
    """
    for suffix, text in _OTHER_FORMATS.items():
        if part.reference.lower().endswith(suffix):
            raise WeightsError(f"{part.label} {part.reference} is a {suffix} file: {text}")
    if part.reference.lower().endswith(PICKLED_SUFFIXES) and not part.allow_pickle:
        raise WeightsError(
            f"{part.label} {part.reference} is a pickled checkpoint, and opening one can run any code. Take or make a "
            ".safetensors file of it, or set allow_pickle: true if you trust its author."
        )


def digest(location: Path, paths: Iterable[Path]) -> str:
    """The sha256, in hex, of the names and contents of these files of the folder; of a single file its content's."""
    whole = hashlib.sha256()
    for path in paths:
        found = _digests.of(path)
        if path == location:
            return found
        whole.update(f"{path.relative_to(location).as_posix()}\0{found}\n".encode())
    return whole.hexdigest()


def start_digests(paths: Iterable[Path]) -> None:
    """Starts to compute the digests of these files beside what the caller does; `digest` waits for them."""
    _digests.start(paths)


def _verify_file(part: Part, path: Path) -> Path:
    refuse_format(part)
    if not path.is_file():
        raise WeightsError(f"there is no file {path} for {part.label}")
    if path.suffix.lower() == ".safetensors":
        _check_safetensors(path)
        return path
    with path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    return path


def _weights_name(part: Part, component: str, kind: Format) -> str:
    """The file name by which diffusers' and transformers' loaders know the weights."""
    is_clip = component == "text_encoder" or part.role in ("image_encoder", *JUDGES)
    if kind == "bin":
        return "pytorch_model.bin" if is_clip else "diffusion_pytorch_model.bin"
    stem = "model" if is_clip else "diffusion_pytorch_model"
    return f"{stem}.fp16.safetensors" if kind == "fp16" else f"{stem}.safetensors"


def _weight_files(folder: Path, component: str, part: Part) -> list[Path]:
    # Of files that are here, those in the full precision count, whatever the model runs in.
    for kind in ("safetensors", "fp16", "bin") if part.allow_pickle else ("safetensors", "fp16"):
        name = _weights_name(part, component, kind)
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            shards = [whole]
        elif index.is_file():
            mapping = _read_json(index).get("weight_map")
            if not isinstance(mapping, Mapping) or not mapping:
                raise WeightsError(f"{index} names no files: fetch it again")
            shards = [folder / Path(str(name)).name for name in sorted(set(mapping.values()))]
        else:
            continue
        for shard in shards:
            if kind != "bin":
                _check_safetensors(shard)
            elif not shard.is_file():
                raise WeightsError(f"{shard} is missing: fetch the model again")
        return [index, *shards] if shards != [whole] else shards
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (*PICKLED_SUFFIXES, ".safetensors"))
    text = f"there is no {_weights_name(part, component, 'safetensors')} in {folder}"
    if any(name.endswith(".safetensors") for name in found):
        raise WeightsError(f"{text}, only {', '.join(found)}: rename the one to use")
    raise WeightsError(
        f"{text}{', only ' + ', '.join(found) if found else ''}. Pickled checkpoints (.bin) are refused, since opening "
        "one can run code: convert it to safetensors, or set allow_pickle: true if you trust its author."
    )


def _not_diffusers(part: Part, folder: Path) -> WeightsError:
    singles = sorted(path.name for path in folder.iterdir() if path.suffix in (*PICKLED_SUFFIXES, ".safetensors"))
    wanted = f"{part.components[0]}/config.json" if part.components[0] else "config.json"
    hint = f" It holds {', '.join(singles[:3])}: to use a single-file checkpoint, name the file." if singles else ""
    return WeightsError(f"{folder}, the {part.label}, is not in diffusers layout: it has no {wanted}.{hint}")


def _check_safetensors(path: Path) -> None:
    """Compares the length with what the header promises. Source: the format's description, huggingface/safetensors."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            header_bytes = int.from_bytes(start, "little")
            if start == b"version ":
                raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
            if len(start) < 8 or header_bytes > min(size_bytes - 8, 100_000_000):
                raise WeightsError(
                    f"{path} is truncated or not a safetensors file ({size_bytes} bytes): fetch it again"
                )
            header = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing: fetch the model again") from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise WeightsError(f"{path} has a damaged header: fetch it again") from None
    if size_bytes != (whole := 8 + header_bytes + max(ends, default=0)):
        raise WeightsError(f"{path} is truncated or damaged: {size_bytes} bytes of {whole}. Fetch it again.")


def _json_file(path: Path) -> Path:
    _read_json(path)
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"{path} is missing: the model is not in diffusers layout, or its copy is incomplete"
        ) from None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise WeightsError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is damaged: it must hold a JSON object")
    return value
