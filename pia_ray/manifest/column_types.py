"""Refusals of columns whose Arrow type cannot hold what they mean."""

from __future__ import annotations

import pyarrow as pa

from pia_ray.config.knobs import ARRAY_KNOBS, KNOBS, REFERENCE_KNOBS
from pia_ray.errors import ManifestError
from pia_ray.manifest.tables import Columns, TableFile, is_packed


def check_types(file: TableFile, columns: Columns) -> None:
    """Refuses columns of a file whose type cannot hold what they mean.

    Raises:
        ManifestError: names the column, its type and what it may hold.
    """
    _check_references(file, columns)
    kinds = {name: _kind(file, name) for name in columns.read}
    if columns.prompt is not None and not (_is_text(kinds[columns.prompt]) or pa.types.is_null(kinds[columns.prompt])):
        _refuse(file, columns.prompt, "a prompt is text")
    if columns.id is not None and (pa.types.is_nested(kinds[columns.id]) or pa.types.is_boolean(kinds[columns.id])):
        _refuse(file, columns.id, "an id is text or a whole number")
    for knob, name in columns.knobs.items():
        if knob in REFERENCE_KNOBS:
            continue
        found = kinds[name]
        if KNOBS[knob].many and _is_list(found):
            found = found.value_type
        number = pa.types.is_integer(found) or pa.types.is_floating(found) or pa.types.is_decimal(found)
        if not (number or _is_text(found) or pa.types.is_boolean(found) or pa.types.is_null(found)):
            _refuse(file, name, f"a knob is a number or text{' or a list of numbers' if KNOBS[knob].many else ''}")


def _check_references(file: TableFile, columns: Columns) -> None:
    kind = _kind(file, columns.image)
    if not _may_refer(kind.value_type if _is_list(kind) else kind):
        _refuse(file, columns.image, "an image is a path or URL, bytes, a struct of bytes and path, or a list of these")
    if _packs_bytes(file, columns.image):
        _refuse(
            file,
            columns.image,
            f"unpack the {file.uri[file.uri.rindex('.') :]}, image bytes are read from the file in place",
        )
    for knob in columns.references:
        name = columns.knobs[knob]
        is_array = knob in ARRAY_KNOBS
        if not _may_refer(_kind(file, name)) and not (is_array and _holds_floats(_kind(file, name))):
            lists = ", nested lists of floats" if is_array else ""
            _refuse(file, name, f"{knob} is a path or URL, bytes{lists}, or a struct of bytes and path")
        if _packs_bytes(file, name):
            _refuse(
                file,
                name,
                f"unpack the {file.uri[file.uri.rindex('.') :]}, what cells hold is read from the file in place",
            )


def _kind(file: TableFile, name: str) -> pa.DataType:
    found = file.schema.field(name).type
    found = found.storage_type if isinstance(found, pa.BaseExtensionType) else found
    return found.value_type if pa.types.is_dictionary(found) else found


def _refuse(file: TableFile, name: str, wanted: str) -> None:
    raise ManifestError(f'column "{name}" of {file.name} is {file.schema.field(name).type}: {wanted}')


def _may_refer(kind: pa.DataType) -> bool:
    struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return _is_text(kind) or _is_binary(kind) or struct or bool(pa.types.is_null(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _holds_floats(kind: pa.DataType) -> bool:
    while _is_list(kind):
        kind = kind.value_type
        if pa.types.is_floating(kind):
            return True
    return False


def _packs_bytes(file: TableFile, name: str) -> bool:
    kind = file.schema.field(name).type
    if _is_list(kind) and _is_text(kind.value_type):
        return False
    held = _is_binary(kind) or pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)
    return is_packed(file.uri) and held
