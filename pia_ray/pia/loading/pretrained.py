"""A folder of weights in diffusers' or transformers' layout -> a module, in the precision of its files.

A module is converted when it is moved to its device, in one pass; files in the wanted precision stay mapped until then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from diffusers import ModelMixin
from transformers import CLIPTokenizer

from pia_ray.errors import WeightsError
from pia_ray.formatting import first_line

_STORED: Final = {"F16": torch.float16, "BF16": torch.bfloat16}


def load_pretrained(kind: Any, folder: Path, *, use_safetensors: bool | None) -> Any:
    """The module of this class in a folder.

    Raises:
        WeightsError: the folder does not hold one, or it is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    kwargs: dict[str, Any] = {"use_safetensors": use_safetensors}
    if files and all(".fp16." in path.name for path in files):
        kwargs["variant"] = "fp16"
    # For another precision both libraries set torch's default dtype while they load, which is that of the whole
    # process, and rows of another model may be denoising. diffusers has a hook for it, transformers none.
    if issubclass(kind, ModelMixin):
        loader, kwargs["torch_dtype"] = _with_own_default(kind), _stored_dtype(files)
    else:
        loader, kwargs["dtype"] = kind, torch.float32
    try:
        loaded = loader.from_pretrained(folder, local_files_only=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"cannot load {kind.__name__} from {folder}: {first_line(error)}") from error
    loaded.__class__ = kind
    return loaded


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        WeightsError: there is none.
    """
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"cannot load CLIPTokenizer from {folder}: {first_line(error)}") from error


def _with_own_default(kind: Any) -> Any:
    """A subclass whose loader leaves torch's default precision alone."""

    def keep(cls: Any, dtype: torch.dtype) -> torch.dtype:
        return torch.get_default_dtype()

    return type(kind.__name__, (kind,), {"_set_default_torch_dtype": classmethod(keep), "__module__": kind.__module__})


def _stored_dtype(files: list[Path]) -> torch.dtype:
    """The precision of the files' first tensor of several dimensions; float32 where there is none, or a wider one."""
    for path in files:
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a file is not iterable
                    part = file.get_slice(name)
                    if len(part.get_shape()) > 1:
                        return _STORED.get(part.get_dtype(), torch.float32)
        except (OSError, safetensors.SafetensorError):
            break  # diffusers says what is wrong with it
    return torch.float32
