"""Arrays of floats: .safetensors bytes and cells of tables -> checked float32 numpy arrays, and back to bytes.

Owns the layouts of the knobs that refer to arrays. Reads no files and no URLs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from pia_ray.config.knobs import ARRAY_KNOBS
from pia_ray.errors import BadParameter

Array = np.ndarray[Any, Any]

_FLOATS: Final[Mapping[str, str]] = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_CELL: Final = "array"

_LAYOUTS: Final = {
    name: (layout, layout.count(",") + 1, 1 if name == "ip_adapter_image_embeds" else layout.count(",") + 1)
    for name, layout in ARRAY_KNOBS.items()
}
"""Each array knob's layout in words, and the most and least axes that it may have."""


def decode(content: bytes, knob: str) -> Array:
    """The array of a knob in the bytes of a .safetensors file: its only tensor, or the one of the knob's name.

    Raises:
        BadParameter: no such file, no such tensor, or not what the knob takes; says what is wanted.
    """
    try:
        tensors: dict[str, Mapping[str, Any]] = dict(deserialize(content))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise BadParameter(f"{knob} is not a valid .safetensors file: {error}", knob) from None
    name = knob if knob in tensors else next(iter(tensors), "")
    if not tensors or (name != knob and len(tensors) > 1):
        raise BadParameter(
            f"{knob}: the .safetensors file must hold one tensor, or one named {knob} (it holds "
            f"{', '.join(sorted(tensors)[:5]) or 'none'})",
            knob,
        )
    kind, raw = tensors[name]["dtype"], tensors[name]["data"]
    if kind == "BF16":  # the upper half of a float32
        flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif kind in _FLOATS:
        flat = np.frombuffer(raw, _FLOATS[kind])
    else:
        raise BadParameter(f"{knob} must hold floats, not {kind}", knob)
    return as_array(flat.reshape(tensors[name]["shape"]), knob)


def encode(cell: object, knob: str) -> bytes:
    """The .safetensors bytes of an array, or of the nested lists that a table's cell holds; equal for equal numbers.

    Raises:
        BadParameter: not what the knob takes.
    """
    if not isinstance(cell, np.ndarray):
        try:
            cell = np.array(cell, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            raise BadParameter(
                f"{knob} must be an array of floats {ARRAY_KNOBS[knob]}, with rows of one length", knob
            ) from None
    return save({_CELL: as_array(cell, knob)})


def as_array(values: object, knob: str) -> Array:
    """The array as that knob takes it: float32, without leading axes of length 1.

    Raises:
        BadParameter: no array of finite floats, or of another number of axes; says what is wanted.
    """
    wanted, most, least = _LAYOUTS[knob]
    if not isinstance(values, np.ndarray):
        raise BadParameter(f"{knob} must be a numpy array {wanted}, not {type(values).__name__}", knob)
    if values.dtype.kind != "f":
        raise BadParameter(f"{knob} must hold floats, not {values.dtype}", knob)
    array = values
    while array.ndim > most and array.shape[0] == 1:
        array = array[0]
    if not least <= array.ndim <= most or 0 in array.shape:
        raise BadParameter(f"{knob} must be {wanted} (got {list(values.shape)})", knob)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise BadParameter(f"{knob} holds NaN or infinite values", knob)
    return array
